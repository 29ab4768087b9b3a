"""
Predictions for many rows: a dataset or a file in, one prediction per row out, in the same order.

    gaml-score --model path/to/checkpoint --input rows.csv --output predictions.parquet --text_columns sentence

The command line is `gaml_score.py`.

Rows are read a window at a time and sorted by length inside it, so that a batch holds little padding. No more than one
window is held in memory, or two for each of several processes, however long the file. A `.json` list is read whole.
"""

import contextlib
import csv
import errno
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from gaml_hf.data.files import RowFile
from gaml_hf.hub.folders import staging_folder
from gaml_hf.models.auto import GamlAutoModelForSequenceClassification
from gaml_hf.models.exiting_gaml import shown
from gaml_hf.models.pipeline_gaml import GamlTextClassificationPipeline

from .ort import GamlOrtModelForSequenceClassification


if TYPE_CHECKING:
    from .ray_scoring import RayEngine

logger = logging.getLogger(__name__)

WINDOW = 4096  # rows
TEXTS = ("text", "text_pair")  # what the pipeline calls the text columns

# What is told of a row. `row` counts from 0; a bad row has an `error`, and no answer.
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "label": pa.string(),
        "score": pa.float64(),
        "exit_layer": pa.int64(),
        "truncated": pa.bool_(),
        "error": pa.string(),
    }
)


def score_rows(
    rows: Iterable[Mapping[str, Any]],
    classifier: GamlTextClassificationPipeline,
    *,
    text_columns: Sequence[str] = ("text",),
    batch_size: int = 32,
    window: int = WINDOW,
    on_error: str = "skip",
    **arguments: Any,
) -> Iterator[dict[str, Any]]:
    """
    Predictions, one for each row, in the order of the rows, as they are consumed.

    Args:
        rows (`datasets.Dataset`, `datasets.IterableDataset` or any iterable of `dict`): read once, `window` at a time.
        classifier ([`GamlTextClassificationPipeline`]): it checks the rows and answers them.
        text_columns (`list[str]`, *optional*, defaults to `["text"]`): the one or two columns that hold text.
        batch_size (`int`, *optional*, defaults to 32): rows that run together.
        window (`int`, *optional*, defaults to 4096): rows that are read ahead and sorted by length.
        on_error (`str`, *optional*, defaults to `"skip"`):
            `"skip"`: a bad row is answered by its error. `"raise"`: it ends the run.
        arguments (*optional*): of the pipeline, for these rows: `exit_strategy`, `patience`, `max_length`, ...

    Returns:
        An iterator of `dict`: `row` (from 0), `label`, `score`, `exit_layer`, `truncated`, and `error`, which is None
        unless the row is bad; then the others are.

    Raises:
        TypeError: `rows` cannot hold rows.
        ValueError: an argument is out of range, or a dataset lacks a text column; with `on_error="raise"`, a row is
            bad.
    """
    _check_arguments(text_columns, batch_size, window, on_error)
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"`rows` must be a dataset, or an iterable of dicts, one for each row. Got {shown(rows)}.")
    if isinstance(rows, (Dataset, IterableDataset)):
        _check_columns(text_columns, rows.column_names)
    return _score_windows(rows, classifier, text_columns, batch_size, window, on_error, arguments)


def _score_windows(
    rows, classifier, text_columns, batch_size, window, on_error, arguments, tell=lambda answered: None
):
    rows, start = iter(rows), 0
    while chunk := list(islice(rows, min(window, sys.maxsize))):
        if start == 0:
            check_first_rows(text_columns, chunk)
        predictions = _score_window(chunk, start, classifier, text_columns, batch_size, arguments, tell)
        for prediction in predictions:
            if on_error == "raise" and prediction["error"] is not None:
                raise ValueError(f"Row {prediction['row']}: {prediction['error']}")
            yield prediction
        start += len(chunk)


def check_first_rows(text_columns: Sequence[str], chunk: Sequence[Any]) -> None:
    """A stream may not know its columns before: of the first rows, whether any has those that are asked for."""
    if dicts := [row for row in chunk if isinstance(row, Mapping)]:
        _check_columns(text_columns, list(dict.fromkeys(name for row in dicts for name in row)))


def _score_window(
    chunk, start, classifier, text_columns, batch_size, arguments, tell=lambda answered: None
) -> list[dict[str, Any]]:
    """Predictions for the rows of `chunk`, the first of which has the number `start`, each told as it comes."""
    inputs, predictions = {}, [{}] * len(chunk)
    for i, row in enumerate(chunk):
        if isinstance(row, Mapping):
            inputs[i] = {name: row.get(column) for name, column in zip(TEXTS, text_columns, strict=False)}
        else:
            error = str(row) if isinstance(row, ValueError) else f"a row must be a dict of columns. Got {shown(row)}."
            predictions[i] = dict.fromkeys(SCHEMA.names) | {"row": start + i, "error": error}
            tell(1)
    # Characters stand in for tokens, which would cost a second pass of the tokenizer.
    order = sorted(inputs, key=lambda i: sum(len(t) for t in inputs[i].values() if isinstance(t, str)))
    # A dataset and not a list, whose answers would come all at once.
    answers = classifier(Subset(inputs, order), batch_size=batch_size, **arguments, on_error="skip")
    for i, answer in zip(order, answers, strict=True):
        if isinstance(answer, list):  # of a pipeline made with `top_k`, best first
            answer = answer[0]
        # The pipeline numbers the rows as it sees them, sorted.
        error = answer["error"].partition(": ")[2] if "error" in answer else None
        predictions[i] = {"row": start + i, **answer, "error": error}
        tell(1)
    return predictions


def score_file(
    source: str | os.PathLike | Dataset | IterableDataset,
    target: str | os.PathLike,
    load_classifier: Callable[[], GamlTextClassificationPipeline],
    *,
    text_columns: Sequence[str] = ("text",),
    batch_size: int = 32,
    window: int = WINDOW,
    on_error: str = "skip",
    num_proc: int = 1,
    engine: "RayEngine | None" = None,
    progress: bool = True,
    **arguments: Any,
) -> dict[str, int]:
    """
    Score a file or a dataset, and write the predictions to a file.

    `target` appears when it is complete: it is written in a hidden folder `.saving-...` beside it, and then moved. The
    folder that a killed run has left, the next run beside it takes away, of another machine once it is a day old. A
    line of a file that is no row, broken JSON say, is a bad row as others are, where the next line is surely another.

    Args:
        source (`str`, `os.PathLike`, `datasets.Dataset` or `datasets.IterableDataset`):
            A dataset, or a file as in [`~gaml_hf.data.files.RowFile`], which is streamed and may be larger than the
            memory, but for a list in a `.json` file.
        target (`str` or `os.PathLike`): a csv, jsonl or parquet file; one that is there is replaced.
        load_classifier (`Callable`): makes the pipeline; each process calls it once. It must be picklable where
            `num_proc` is above 1, and with `engine`.
        num_proc (`int`, *optional*, defaults to 1): processes; each answers a window at a time.
        engine ([`~ray_scoring.RayEngine`], *optional*): a Ray cluster in place of processes of this machine.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar. It counts rows as they are answered; with several processes or Ray, windows.
        text_columns, batch_size, window, on_error, arguments: as in [`score_rows`].

    Returns:
        `dict[str, int]`: `rows`, and how many of them were `skipped`.

    Raises:
        ValueError: as in [`score_rows`]; a file is missing, of another kind, or cannot be read or written.
        OSError: one of several processes was killed, or there is no room for the predictions.
    """
    _check_arguments(text_columns, batch_size, window, on_error)
    if type(num_proc) is not int or num_proc < 1:
        raise ValueError(f"`num_proc` must be a whole number of at least 1. Got `num_proc={num_proc!r}`.")
    if engine is not None:
        if num_proc != 1:
            raise ValueError(f"`num_proc` is for this machine; with `engine` it must be 1. Got `num_proc={num_proc}`.")
        engine.check()
    is_file = not isinstance(source, (Dataset, IterableDataset))
    source, target = _path("source", source) if is_file else source, _path("target", target)
    if target.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ValueError(f"`target` must end in .csv, .jsonl or .parquet. Got `{target}`.")
    # What would come out after the last row, or take the rows away.
    target = target.resolve() if target.is_symlink() else target  # what a link leads to is written
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        raise ValueError(f"`target` must be a file in a folder that is there. Got `{target}`.")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"`target` must be a file that may be written over. Got `{target}`.")
    if is_file and target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"`target` must not be `source`, whose rows it would replace. Got `{target}` for both.")
    counts = {"rows": 0, "skipped": 0}
    rows = RowFile(source, "source", text_columns, tells_bad_rows=True) if is_file else source
    _check_columns(text_columns, rows.column_names or None)  # none at all: of a list without rows
    with _writer(target) as write:
        total = len(rows) if isinstance(rows, Dataset) else None
        settings = (text_columns, batch_size, window, on_error, arguments)
        is_here = num_proc == 1 and engine is None
        classifier = load_classifier() if is_here else None  # before the bar, for it has bars of its own
        with tqdm(total=total, unit=" rows", disable=not progress) as bar:
            if is_here:
                predictions = _score_windows(rows, classifier, *settings, bar.update)
            elif engine is not None:
                predictions = engine.predictions(rows, load_classifier, *settings)
            else:
                predictions = _score_in_processes(rows, load_classifier, *settings, num_proc)
            while chunk := list(islice(predictions, window)):
                write(chunk)
                if not is_here:
                    bar.update(len(chunk))
                counts["rows"] += len(chunk)
                counts["skipped"] += sum(prediction["error"] is not None for prediction in chunk)
    return counts


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be the path of a file. Got {shown(value)}.")
    return Path(value)


def _score_in_processes(
    rows, load_classifier, text_columns, batch_size, window, on_error, arguments, num_proc
) -> Iterator[dict[str, Any]]:
    """[`_score_windows`], with up to two windows for each process read ahead."""
    rows, start, waiting = iter(rows), 0, deque()
    context = get_context("spawn")  # not forked: a child would wait for ever for the threads of a PyTorch here
    watched, open_end = context.Pipe(duplex=False)  # closed with this process too, whatever ends it
    with watched, open_end, ProcessPoolExecutor(num_proc, context, _keep, (load_classifier, watched)) as pool:
        try:
            while (chunk := list(islice(rows, min(window, sys.maxsize)))) or waiting:
                if chunk and start == 0:
                    check_first_rows(text_columns, chunk)
                if chunk:
                    waiting.append(pool.submit(_score_chunk, chunk, start, text_columns, batch_size, arguments))
                    start += len(chunk)
                if not chunk or len(waiting) == 2 * num_proc:
                    for prediction in _result(waiting.popleft()):
                        if on_error == "raise" and prediction["error"] is not None:
                            raise ValueError(f"Row {prediction['row']}: {prediction['error']}")
                        yield prediction
        finally:  # while `open_end` is open: a process that ended in the middle of an answer would be waited for
            pool.shutdown(cancel_futures=True)


def _result(future: Future) -> list[dict[str, Any]]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "One of the `num_proc` processes was killed, by the system for want of memory perhaps. Take fewer, or a "
            "smaller `batch_size`. Nothing was written."
        ) from error


def _keep(load_classifier: Callable[[], GamlTextClassificationPipeline], watched: Connection) -> None:
    """Begin one of several processes, which ends when the first one, that holds the other end of `watched`, does."""
    global _classifier
    _classifier = cache(load_classifier)  # not called here: what it raises would be lost
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is told to all; the first process decides
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv()
    os._exit(1)


def _score_chunk(chunk, start, text_columns, batch_size, arguments) -> list[dict[str, Any]]:
    """[`_score_window`] in one of several processes."""
    return _score_window(chunk, start, _classifier(), text_columns, batch_size, arguments)


@contextlib.contextmanager
def _writer(target: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that writes predictions to a file that becomes `target` at the end."""
    with staging_folder(target.parent) as stage:
        temporary = stage / target.name
        try:
            with _open_writer(temporary) as write:
                yield write
            with open(temporary, "r+b") as file:
                os.fsync(file)  # or a power cut could leave the name without the rows
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(f"`target` could not be written, for want of room. Got `{target}`: {error}") from error
        if target.exists():
            shutil.copymode(target, temporary)
        try:
            os.replace(temporary, target)
        except OSError:  # a file that is a mount, as of a container: it cannot be replaced, but written
            shutil.copyfile(temporary, target)


@contextlib.contextmanager
def _open_writer(path: Path) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, SCHEMA) as parquet:
            yield lambda chunk: parquet.write_table(pa.Table.from_pylist(chunk, SCHEMA))
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, SCHEMA.names)
            table.writeheader()
            yield table.writerows
        else:
            yield lambda chunk: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk)


def _check_arguments(text_columns, batch_size, window, on_error) -> None:
    is_list = isinstance(text_columns, Sequence) and not isinstance(text_columns, str)
    if not is_list or len(text_columns) not in (1, 2) or not all(isinstance(name, str) for name in text_columns):
        raise ValueError(f"`text_columns` must be a list of one or two columns. Got {shown(text_columns)}.")
    for name, value in (("batch_size", batch_size), ("window", window)):
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1. Got `{name}={shown(value)}`.")
    if on_error not in ("skip", "raise"):
        raise ValueError(f"`on_error` must be 'skip' or 'raise'. Got `on_error={on_error!r}`.")


def _check_columns(text_columns: Sequence[str], present: Sequence[str] | None) -> None:
    if present is not None and (missing := [column for column in text_columns if column not in present]):
        raise ValueError(f"`text_columns` must name columns out of {list(present)}. Got {missing[0]!r}.")


class ClassifierLoader(NamedTuple):
    """What a process needs to make the pipeline: a name, no weights."""

    model: str
    onnx: bool
    device: str | None
    num_threads: int | None
    prepack: bool = False
    revision: str | None = None  # of a model on the Hub

    def __call__(self) -> GamlTextClassificationPipeline:
        """
        The pipeline.

        Raises:
            ValueError: `device` is not there, or the model cannot be loaded.
            OSError, ImportError: a file of the model, or a package that it needs, is missing.
        """
        try:
            return self._load()
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # a config of wrong values, and what not; some of them could not be pickled
            reason = " ".join(str(error).split()) or "no reason given"
            raise ValueError(f"`{self.model}` cannot be loaded: {type(error).__name__}: {reason}") from error

    def _load(self) -> GamlTextClassificationPipeline:
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        if self.device is not None:
            try:
                torch.ones(1, device=self.device).item()  # "meta" can be allocated, and holds nothing
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"`device` must be one that PyTorch has here, such as cpu or cuda:0. Got `{self.device}`: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        if self.onnx:
            model = GamlOrtModelForSequenceClassification.from_pretrained(self.model)
        else:
            model = GamlAutoModelForSequenceClassification.from_pretrained(self.model, revision=self.revision)
            if model.exits_are_new:
                raise ValueError(
                    f"`model` must be a checkpoint with exits. Got `{self.model}`, a plain one: its exits would be "
                    "new, and answer at random. Train them first, by run_glue_gaml.py or GamlTrainer."
                )
            for tensor in (*model.parameters(), *model.buffers()):
                # A loaded weight is a view of its file: who wrote over that would change, or end, what runs.
                tensor.data = tensor.data.clone()
        if self.prepack:
            try:
                model = model.eval().prepack()
            except ValueError as error:  # float16, say
                logger.warning(f"Not prepacked: {error} The model is as it was.")
        if self.onnx and not Path(self.model, "tokenizer_config.json").is_file():
            raise ValueError(
                f"`model` must be an export with its tokenizer. Got `{self.model}`, without `tokenizer_config.json`: "
                "export again with `export_onnx(..., tokenizer=tokenizer)`, or save the tokenizer into the folder."
            )
        tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
        device = "cpu" if self.onnx or self.prepack else self.device
        return GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, device=device)
