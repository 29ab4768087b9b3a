"""
Checksums of weights files, kept in the files themselves.

A safetensors file may carry a few words about itself. One of ours carries a SHA-256 there: it goes along with every
copy, is never out of date, and is gone where another program writes the weights anew.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import BinaryIO


KEY, PREFIX = "checksum", "gaml_hf sha256 "  # among the file's `__metadata__`; told twice, so that either may be hit
CHUNK = 2**20  # bytes


def weight_files(folder: str | os.PathLike, variant: str | None = None) -> list[Path]:
    """
    The safetensors files that Transformers would load from `folder`: one, or the shards that an index names.

    Args:
        folder (`str` or `os.PathLike`): a local folder.
        variant (`str`, *optional*): as in `from_pretrained`.

    Returns:
        `list[Path]`: the files, whether they are there or not; none where there is neither file nor index.

    Raises:
        ValueError: the index cannot be read, or names a file outside the folder.
    """
    folder, dot = Path(folder), f".{variant}" if variant else ""
    single, index = folder / f"model{dot}.safetensors", folder / f"model.safetensors.index{dot}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{index}` is not an index of weights: {error!r}.") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"`{index}` must name files of its own folder. Got {name!r}.")
    return [folder / name for name in names]


def write_checksum(path: Path) -> None:
    """
    Put the checksum into a safetensors file that has none. The file is replaced in one step, with the mode that the
    umask gives: it is whole at every moment, but needs its size twice while this runs.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with path.open("rb") as source, temporary.open("wb") as target:
            header = _read_header(path, source)
            words = header.setdefault("__metadata__", {})
            if KEY in words:
                return
            digest = _digest_of(header)
            placeholder = PREFIX + "0" * 64
            words[KEY] = placeholder
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            target.write(len(text).to_bytes(8, "little") + text)
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
            target.seek(8 + text.index(placeholder.encode()))
            target.write((PREFIX + digest.hexdigest()).encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def verify_checksum(path: Path) -> bool:
    """
    Check a safetensors file against the checksum in it, and its length against its header.

    Returns:
        `bool`: whether it has a checksum. One that another program wrote has none.

    Raises:
        ValueError: the checksum differs, the file is cut short, or it is none of safetensors.
    """
    with path.open("rb") as file:
        header = _read_header(path, file)
        words = header.get("__metadata__") or {}
        said = {key: value for key, value in words.items() if key == KEY or str(value).startswith(PREFIX)}
        if not said:
            return False
        header["__metadata__"] = {key: value for key, value in words.items() if key not in said}
        digest = _digest_of(header)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if said != {KEY: PREFIX + digest.hexdigest()}:
        raise ValueError(
            f"`{path}` is not what was saved: its checksum differs. It was damaged on the disk or on the way here; "
            "fetch it again, or take another copy or checkpoint."
        )
    return True


def verify_weights(folder: str | os.PathLike, variant: str | None = None) -> None:
    """Check every file of [`weight_files`] that is there; raises as [`verify_checksum`] does."""
    for path in weight_files(folder, variant):
        if path.is_file():  # else whoever loads it says so
            verify_checksum(path)


def _read_header(path: Path, file: BinaryIO) -> dict:
    """The header of a safetensors file that is as long as the header says; `file` is then at the first tensor."""
    size = int.from_bytes(file.read(8), "little")
    length = path.stat().st_size
    if 8 + size <= length:
        try:
            header = json.loads(file.read(size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if isinstance(header.get("__metadata__", {}), dict) and 8 + size + max(ends, default=0) == length:
                return header
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            pass
    raise ValueError(
        f"`{path}` is damaged or cut short: what its first bytes say does not fit its {length:,} bytes. Fetch it "
        "again, or take another copy or checkpoint."
    )


def _digest_of(header: dict):
    # Without an entry of words only where there are none beside the checksum: `write_checksum` may have made it.
    said = {key: value for key, value in header.items() if value}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode())
