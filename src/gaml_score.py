"""
The command `gaml-score`: classify every row of a file, see `gaml_hf.runtime.scoring`.

It stands outside the package because `import gaml_hf` takes seconds: `--help` and a wrong file or model do not.
"""

import argparse
import json
import re
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# What functions call otherwise than the command line does.
NAMES = {"source": "input", "target": "output", "pretrained_model_name_or_path": "model"}
EXITS = ("exit_strategy", "patience", "budgeted_exit", "exit_threshold")
# Of `RayEngine`.
RAY = ("address", "num_actors", "actor_cpus", "actor_gpus")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gaml-score",
        description="Classify every row of a file. Exit code: 1 where rows were skipped, 2 where nothing was written.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint: a folder or a name on the Hub")
    add("--revision", help="of a model on the Hub: branch, tag or commit (default: the main branch as it is now)")
    add("--input", required=True, help="rows: a csv, tsv, json, jsonl or parquet file")
    add("--output", required=True, help="predictions: a csv, jsonl or parquet file")
    add("--text_columns", nargs="+", help="the one or two text columns (default: as in training, if known, or text)")
    add("--batch_size", type=int, default=32, help="rows that run together (default: %(default)s)")
    add("--window", type=int, default=4096, help="rows read ahead and sorted by length (default: %(default)s)")
    add("--num_proc", type=int, default=1, help="processes (default: %(default)s)")
    add("--num_threads", type=int, help="CPU threads of each process (default: PyTorch's)")
    add("--engine", choices=["local", "ray"], default="local", help="this machine or a cluster (default: %(default)s)")
    add("--address", help="of the Ray cluster (default: $RAY_ADDRESS, or this machine's, or one for this run)")
    add("--num_actors", type=int, help="with Ray, replicas of the model (default: as many as there is room for)")
    add("--actor_cpus", type=float, help="with Ray, CPUs, and so threads, of each replica (default: 1)")
    add("--actor_gpus", type=float, help="with Ray, GPUs of each replica (default: 0)")
    add("--device", help='"cpu", "cuda:0", ... (default: a GPU where there is one)')
    add(
        "--onnx",
        action="store_true",
        help="the model is an export to ONNX; runs on the CPU (default: no)",
    )
    add("--prepack", action="store_true", help="reorder the weights for the CPU first (default: no)")
    add("--on_error", choices=["skip", "raise"], default="skip", help="what a bad row does (default: %(default)s)")
    add("--max_length", type=int, help="longer texts are cut to this many tokens (default: as in training)")
    strategies = "none, budgeted, patience, entropy or max_prob"
    add("--exit_strategy", help=f"when a row leaves: {strategies} (default: the model's)")
    add("--patience", type=int, help="agreeing exits, for patience (default: the model's)")
    add("--budgeted_exit", type=int, help="layer at which all leave, for budgeted (default: the model's)")
    add("--exit_threshold", type=float, help="in [0, 1], for entropy and max_prob (default: the model's)")
    add("--no_progress", action="store_true", help="no progress bar (default: a bar)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command line. Returns 0, or 1 where rows were skipped; argparse leaves with 2 where nothing was written. Ctrl-C
    and SIGTERM leave nothing behind, and end it with 130 and 143, as a shell counts.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    if threading.current_thread() is not threading.main_thread():  # where no signal can be caught
        return _score(parser, options)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _score(parser, options)
    except KeyboardInterrupt:
        print("gaml-score: interrupted; nothing was written.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _score(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        counts = _scored(parser, options)
    except Exception as error:  # whatever it is: 1 would say that there are predictions
        if not isinstance(error, (ValueError, OSError, ImportError)):
            traceback.print_exc()
        parser.error(_in_words_of_the_command(str(error) or type(error).__name__, vars(options)))
    print(f"{counts['rows']} rows, {counts['skipped']} of them skipped; predictions in {options.output}")
    return int(counts["skipped"] > 0)


def _scored(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, int]:
    """Write the predictions; how many there are."""
    problem = _wrong_options(options) or _wrong_model(options.model, options.onnx, options.revision)
    if problem is not None:
        parser.error(problem)

    from gaml_hf.runtime.scoring import ClassifierLoader, score_file

    revision = _commit(options.model, options.revision)  # one for all that is read, whatever is pushed meanwhile
    trained = _trained_columns(options.model, revision)
    text_columns = options.text_columns or trained or ["text"]
    if trained is not None and len(text_columns) != len(trained):
        parser.error(
            f"`--text_columns` must name {len(trained)}: the model was trained on {' and '.join(trained)}. "
            f"Got {' '.join(text_columns)}."
        )

    model, device, engine = options.model, options.device, None
    if options.engine == "ray":
        try:
            from gaml_hf.runtime.ray_scoring import RayEngine
        except ImportError as error:
            parser.error(f"`--engine ray` needs more packages: `pip install gaml_hf[ray]`. {error}")
        engine = RayEngine(**{name: value for name in RAY if (value := getattr(options, name)) is not None})
        if Path(model).is_dir():
            model = str(Path(model).absolute())  # an actor has a working folder of its own
        device = device or (None if engine.actor_gpus else "cpu")
    arguments = {name: getattr(options, name) for name in (*EXITS, "max_length")}
    return score_file(
        options.input,
        options.output,
        ClassifierLoader(model, options.onnx, device, options.num_threads, options.prepack, revision),
        text_columns=text_columns,
        batch_size=options.batch_size,
        window=options.window,
        on_error=options.on_error,
        num_proc=options.num_proc,
        engine=engine,
        progress=not options.no_progress,
        **{name: value for name, value in arguments.items() if value is not None},
    )


def _wrong_options(options: argparse.Namespace) -> str | None:
    if not Path(options.input).is_file():
        return f"`--input` must be a file. Got `{options.input}`, which is not there."
    given = [name for name in RAY if getattr(options, name) is not None]
    if options.engine != "ray" and given:
        return f"`--{given[0]}` is for a Ray cluster. Got it without `--engine ray`."
    if options.engine == "ray" and options.num_proc != 1:
        return f"`--num_proc` is for one machine; Ray has `--num_actors`. Got `--num_proc {options.num_proc}`."
    if options.num_threads is not None and options.num_threads < 1:
        return f"`--num_threads` must be at least 1. Got `--num_threads {options.num_threads}`."
    if options.onnx and options.prepack:
        return "`--prepack` is for a checkpoint; an export is packed when it is loaded. Got it with `--onnx`."
    if (options.onnx or options.prepack) and options.device not in (None, "cpu"):
        option = "--onnx" if options.onnx else "--prepack"
        return f"`--device` must be cpu with `{option}`. Got `--device {options.device}`."
    return None


def _is_export(folder: str | Path) -> bool:
    """As far as can be told without ONNX Runtime; one that lacks its config is told by [`_wrong_model`]."""
    return Path(folder, "embeddings.onnx").is_file()


def _wrong_model(model: str, is_export: bool, revision: str | None) -> str | None:
    """What is wrong with the name of a model, as far as its config, which is all that is fetched here, can tell."""
    folder, needed = Path(model), "a checkpoint folder" + ("" if is_export else ", or a checkpoint's name on the Hub")
    if folder.is_dir():
        if revision is not None:
            return f"`--revision` is of a model on the Hub. Got `{revision}` for the folder `{model}`."
        if not is_export and _is_export(folder):
            return f"`--model` is an export to ONNX. Got `{model}` without `--onnx`."
        if (folder / "config.json").is_file():
            return None
        return f"`--model` must be {needed}. Got `{model}`, a folder without `config.json`."
    if folder.exists() or is_export:
        state = "which is no folder" if folder.exists() else "which is not there"
        return f"`--model` must be {needed}. Got `{model}`, {state}."

    try:
        _config(model, revision)
    except Exception as error:  # also of the network's library
        reason = " ".join(str(error).split())
        return f"`--model` must be {needed}. Got `{model}`, no folder here; and from the Hub: {reason}"
    return None


def _config(model: str, revision: str | None) -> Path:
    """The config of a model in a folder, or on the Hub and then in its cache."""
    if (folder := Path(model)).is_dir():
        return folder / "config.json"

    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "config.json", revision=revision))


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that a model on the Hub is loaded from; None of a folder."""
    return None if Path(model).is_dir() else _config(model, revision).parent.name


def _trained_columns(model: str, revision: str | None) -> list[str] | None:
    """`text_columns` of the config. None of one that is broken, too: loading it says what is wrong."""
    try:
        columns = json.loads(_config(model, revision).read_text(encoding="utf-8")).get("text_columns")
    except (AttributeError, ValueError):
        return None
    return columns if isinstance(columns, list) and all(isinstance(name, str) for name in columns) else None


def _in_words_of_the_command(message: str, options: Mapping[str, Any]) -> str:
    """The arguments that an error names, as the command line calls them; but a value that nobody gave is not given."""

    def renamed(found: re.Match) -> str:
        name = NAMES.get(found[1], found[1])
        is_of_the_model = options.get(name) is None and f"Got `{found[1]}=" in message
        return f"`--{name}" if name in options and not is_of_the_model else found[0]

    return re.sub(r"`(\w+)(?=[=`])", renamed, message)


if __name__ == "__main__":
    sys.exit(main())
