"""Saving a checkpoint folder whole, or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

from .card import FIGURES, render_card
from .checking import PROCESSOR, WEIGHTS_INDEX, find_problems
from .folders import explain_full_disk, save_tokenizer, staging_folder


DECIDES = ("config.json", "vocab.txt", PROCESSOR)  # what an answer depends on, beside the weights


def save_checkpoint(model, tokenizer, folder: str | os.PathLike, *, card: Mapping | None = None) -> Path:
    """
    Save everything a stranger needs to load the model: config, weights (safetensors), tokenizer, code, the handler of
    Inference Endpoints and the model card. Nothing is pickled, and every file gets the mode that the umask gives.

    Everything is written to a temporary folder first and checked there ([`check_checkpoint`]). So a save that fails (a
    full disk, weights with NaN) leaves the old folder as it was. Then:

    - A new folder appears whole, in one rename.
    - In an existing folder only the files written here are replaced, each in one step; training checkpoints, results
      and figures stay. Where config and tokenizer are the same as before, which is the same run with better weights,
      the folder loads at every moment. Where they differ, `config.json` goes first and comes back last: whoever reads
      the folder within these milliseconds, or after a crash in them, is told that the config is missing, and never
      gets the weights of one model with the labels, exits or vocabulary of another.

    Args:
        model ([`GamlBertForSequenceClassification`]): the model itself, not one wrapped for several GPUs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; for images, its image processor.
        folder (`str` or `os.PathLike`): where to; made if it is not there.
        card (`dict`, *optional*):
            Keyword arguments of [`render_card`]; `figures` is filled in from the folder, `max_length` from the
            tokenizer. Without it, a `README.md` that is already there stays, and a new folder gets a card of what the
            config knows.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: the folder would not be complete, or a weight is not finite.
        OSError: the disk is full; says how much is free and how much is needed.
    """
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` must be given (of images, the image processor): nobody could use the model. Got None."
        )
    folder = Path(folder)
    exists = folder.is_dir()
    # Inside an existing folder: a rename must not cross file systems, and `folder` may be a mount.
    with staging_folder(folder if exists else folder.parent) as stage:
        try:
            model.save_pretrained(stage)
            is_text = model.config.pipeline_type == "text"
            if is_text:
                save_tokenizer(tokenizer, stage)
            else:
                tokenizer.save_pretrained(stage)
            if card is not None or not (folder / "README.md").exists():
                figures = [name for name in FIGURES if (folder / name).exists()]
                length = min(tokenizer.model_max_length, model.config.max_input_length) if is_text else None
                values = {"figures": figures, "max_length": length} | dict(card or {})
                text = render_card(model.config, **values | {"model_name": values.get("model_name") or folder.name})
                (stage / "README.md").write_text(text, encoding="utf-8")
            if problems := find_problems(stage):
                raise ValueError(
                    f"The checkpoint was not saved to `{folder}`:\n" + "\n".join(f"- {p}" for p in problems)
                )
            if exists:
                _move_in(stage, folder)
            else:
                stage.rename(folder)
        except ValueError:  # told above
            raise
        except Exception as error:  # the Rust libraries raise nothing narrower on a full disk
            weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
            # Twice, for the checksum is put into a copy.
            if (why := explain_full_disk(error, folder, 2 * weights + 2**20)) is None:
                raise
            raise OSError(f"The checkpoint was not saved to `{folder}`; what was there is as it was. {why}") from error
    return folder


def _move_in(stage: Path, folder: Path) -> None:
    """Replace files of `folder` by those of `stage`, `config.json` last; see [`save_checkpoint`]."""
    new = sorted(stage.iterdir(), key=lambda path: path.name == "config.json")
    decides = [path for path in new if path.name in DECIDES or "token" in path.name]
    # What is there already is not moved: the less, the shorter the folder is without its config.
    kept = {path for path in new if path.suffix != ".safetensors" and _is_there(path, folder / path.name)}
    if not kept.issuperset(decides):
        (folder / "config.json").unlink(missing_ok=True)
        kept.discard(stage / "config.json")
    for path in new:
        if path not in kept:
            os.replace(path, folder / path.name)
    # A single file is loaded in preference to shards, so none of an older save may stay.
    for path in [*folder.glob("model*.safetensors"), folder / WEIGHTS_INDEX]:
        if path.name not in {path.name for path in new}:
            path.unlink(missing_ok=True)


def _is_there(path: Path, old: Path) -> bool:
    return old.is_file() and not old.is_symlink() and old.read_bytes() == path.read_bytes()
