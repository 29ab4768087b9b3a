"""
Folders that a crash cannot spoil: saves that are staged, and training checkpoints that are sealed when they are whole.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tokenizers import Tokenizer
from transformers.utils import logging

from gaml_hf.models.checksums_gaml import verify_checksum, weight_files


try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be locked
    fcntl = None


logger = logging.get_logger(__name__)

DAY = 86_400  # seconds
SEAL = "checksums.json"  # written last: `{"files": {name: SHA-256}}`
STATE = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")  # what only a resume reads


# Saves


@contextmanager
def staging_folder(beside: Path) -> Iterator[Path]:
    """
    A new hidden folder in `beside`, to be renamed when it is whole; what is left of it at the end is deleted.

    So are those of killed saves, which could not clean up after themselves: nobody holds them with a lock, as even
    a process of another container does. Locks of another machine may not be seen: what its name tells to be of one, or
    of a container that is gone, is left until nothing was written there for a day.
    """
    own = set(beside.glob(f".saving-{glob.escape(platform.node())}-*"))
    for path in own | {path for path in beside.glob(".saving-*") if _age(path) > DAY}:
        if (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
    # Locked under another name: under its own it could be taken for one that a killed save has left.
    name = uuid4().hex
    stage, new = beside / f".saving-{platform.node()}-{name}", beside / f".saving-new-{name}"
    new.mkdir(parents=True)
    lock = _lock(new)
    try:
        new.rename(stage)
        yield stage
    finally:
        for path in (new, stage):
            shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _age(folder: Path) -> float:
    """Seconds since anything was written in a folder; 0 where it, or something in it, is gone meanwhile."""
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return 0.0


def _lock(folder: Path) -> int | None:
    """A lock on a folder that holds until it is closed, or the process ends; `None` where somebody has it."""
    if fcntl is None:
        return None
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # gone by now
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody's; or there are no locks on this disk
        os.close(lock)
        return None
    return lock


def save_tokenizer(tokenizer, folder: Path) -> None:
    """
    Save a tokenizer as it is used, which its own `save_pretrained` does not do:

    - `split_special_tokens` is written as the attribute says; upstream, only if it was given to `from_pretrained`.
    - `tokenizer.json` forgets truncation and padding: they are those of whatever call came last, and a program that
      reads the file without Transformers would cut every text by them.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"split_special_tokens": tokenizer.split_special_tokens}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer.json"
    if path.exists():  # else a tokenizer in Python alone
        backend = Tokenizer.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        backend.save(str(path))


def explain_full_disk(error: Exception, folder: Path, needed: int) -> str | None:
    """What to say of a failed save of about `needed` bytes to `folder`; `None` where room was not the problem."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    told = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not told and free >= needed:
        return None
    return (
        f"{error}. There {free / 2**20:,.1f} MiB are free, and about {needed / 2**20:,.1f} MiB are needed. Make room, "
        "or save to another disk."
    )


# Training checkpoints


def write_seal(folder: str | os.PathLike, pattern: str = "*") -> None:
    """Declare a folder finished: write the SHA-256 of each file that `pattern` fits to `SEAL`, in one step."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file() and not path.name.startswith(SEAL))
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    temporary = folder / f"{SEAL}.tmp"
    temporary.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / SEAL)


def why_unsealed(folder: str | os.PathLike, *, without_state: bool = False) -> str | None:
    """
    What is wrong with a folder that has a seal, in a few words; `None` where nothing is.

    Args:
        folder (`str` or `os.PathLike`): with a file `SEAL` in it.
        without_state (`bool`): let files be missing that only a resume reads (optimizer, schedule, random numbers).
    """
    folder = Path(folder)
    try:
        files = dict(json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"`{SEAL}` cannot be read: {error!r}"
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"`{SEAL}` names a file outside the folder, `{name}`"
        if not path.is_file():
            if without_state and STATE.fullmatch(name):
                continue
            return f"`{name}` is missing"
        if _sha256(path) != expected:
            return f"`{name}` is damaged or cut short: its checksum differs"
    return None


def why_incomplete(folder: str | os.PathLike, *, without_state: bool = False) -> str | None:
    """
    What keeps a folder from being a whole training checkpoint, in a few words; `None` where nothing does.

    One without a seal, by another program or an earlier version, counts as whole if each file that a resume reads is
    there and can be read. A byte that has changed is then seen by PyTorch's own CRCs, and in weights not at all.

    Args:
        folder (`str` or `os.PathLike`): `checkpoint-<step>`.
        without_state (`bool`): let files be missing that only a resume reads (optimizer, schedule, random numbers).
    """
    folder = Path(folder)
    if (folder / SEAL).is_file():
        return why_unsealed(folder, without_state=without_state)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # the stock Trainer's last file
        adapters = folder / "adapter_model.safetensors"  # all that PEFT saves
        weights = weight_files(folder) or [adapters if adapters.is_file() else folder / "model.safetensors"]
        for path in weights:
            verify_checksum(path)
    except FileNotFoundError as error:
        return f"`{Path(error.filename).name}` is missing"
    except ValueError as error:  # also of JSON
        return f"a file cannot be read: {error}"
    states = {path.name: path for path in folder.iterdir() if STATE.fullmatch(path.name)}
    for name, path in states.items():
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            broken = error
        if broken:
            return f"`{name}` is damaged or cut short"
    if not without_state:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state"):
            if not any(found.startswith(name) for found in states):
                return f"`{name}{'.pth' if name == 'rng_state' else ''}` is missing"
    return None


def training_checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The folders `checkpoint-<step>` in `output_dir` by step, the newest first, whole or not."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if path.is_dir() and (number := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            found[int(number[1])] = path
    return dict(sorted(found.items(), reverse=True))


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> Path:
    """
    The training checkpoint to go on from: the one of the highest step that is whole. Newer ones that are not are
    named in one warning.

    Args:
        output_dir (`str` or `os.PathLike`): the folder that holds `checkpoint-<step>` folders.

    Returns:
        `Path`: its path.

    Raises:
        ValueError: there is none, with what is wrong with each.
    """
    reasons = []
    for path in training_checkpoints(output_dir).values():
        if (reason := why_incomplete(path)) is None:
            if reasons:
                logger.warning(f"Passed over, not complete: {'; '.join(reasons)}. Training goes on from `{path}`.")
            return path
        reasons.append(f"`{path}`: {reason}")
    if not reasons:
        raise ValueError(
            f"`resume_from_checkpoint=True` needs a folder `checkpoint-<step>` in `output_dir`. Got `{output_dir}`, "
            "which has none. Start without it, or name a checkpoint."
        )
    raise ValueError(
        f"`resume_from_checkpoint=True` found no complete checkpoint in `{output_dir}`: {'; '.join(reasons)}. One "
        "that lacks only optimizer, schedule or random numbers can be named: `resume_from_checkpoint=<folder>`."
    )


def check_named_checkpoint(folder: str | os.PathLike) -> Path:
    """
    Check a checkpoint that the user named. It may lack what only makes a resume exact.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: it is not there, a file in it is damaged, or it lacks its weights or `trainer_state.json`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be a checkpoint folder. Got `{folder}`, which is not there.")
    if (reason := why_incomplete(folder, without_state=True)) is not None:
        raise ValueError(
            f"`resume_from_checkpoint` must be a complete checkpoint. Got `{folder}`: {reason}. Name another, or let "
            "`resume_from_checkpoint=True` take the newest complete one."
        )
    return folder


def rotate_checkpoints(output_dir: str | os.PathLike, limit: int | None, keep: Iterable[str | os.PathLike]) -> None:
    """
    Delete the oldest training checkpoints, by step, until `limit` are left.

    Args:
        output_dir (`str` or `os.PathLike`): the folder that holds `checkpoint-<step>` folders.
        limit (`int`, *optional*): how many stay, from 1; `None` or less: all.
        keep (`list[str]`): those that stay in any case: the one just sealed, and the best.
    """
    if limit is None or limit < 1:
        return
    kept = {Path(path).resolve() for path in keep}
    found = list(training_checkpoints(output_dir).values())
    others = [path for path in found if path.resolve() not in kept]
    for path in others[max(limit - (len(found) - len(others)), 0) :]:
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
