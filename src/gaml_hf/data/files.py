"""
Texts and classes out of files and datasets, read alike by `run_glue_gaml.py` and `gaml_hf.runtime.scoring`.

They are what stands there: `NA`, `007`, `true` and `1e5` are texts, and `1` and `01` are two classes. What is wrong
with them is told before the first step, by split, row (from 0) and column.
"""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, NamedSplit, Value

from gaml_hf.models.exiting_gaml import shown

from .checks import column_values, python_values


logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SAMPLE = 1000  # rows by which columns are told apart

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WHOLE_NUMBER = re.compile(r"[+-]?\d+")
ID = re.compile(r"(?=.*\d)[!-~]{1,40}")  # no blank, no letter but those of ASCII, and a digit among them

# What can be wrong with a class.
MISSING = "has no label"
SEVERAL = "must be one class (several labels of one text, multi-label, are outside the method)"
FRACTION = "must be a name or a whole number (regression is outside the paper)"
NEGATIVE = "must not be negative, which elsewhere means that a row has no label; take such rows out"


class RowFile:
    """
    The rows of a file, each a `dict` of its cells by column, read anew, as they are consumed, by each iteration.

    - `.csv`, `.tsv`: in UTF-8; the first line names the columns. Each cell is a `str`, `""` where it is empty. Tabs
      separate those of a `.tsv` file; those of a `.csv` file whichever of comma, semicolon and tab divides the first
      line into most names.
    - `.json`, `.jsonl`: an object in each line, or one list of objects. Cells are what `json` makes of them.
    - `.parquet`: cells are Python objects, a text that is not valid UTF-8 `bytes`.

    Args:
        path (`str` or `os.PathLike`): the file of exactly this name, whatever characters it has; no pattern, no URL.
        argument (`str`): what the caller calls `path`, for errors.
        columns (`list[str]`, *optional*): what to read. Defaults to all columns.
        tells_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether a line that is no row, but leaves no doubt where the next begins, is read as a `ValueError` that
            says what is wrong with it, in the place of its row. Else it ends the reading.

    Attributes:
        column_names (`list[str]`): all columns of the file; of JSON, those of its first 1,000 rows.

    Raises:
        ValueError: the file is missing, empty, of another kind or cannot be read; the last also while it is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        argument: str,
        columns: Sequence[str] | None = None,
        tells_bad_rows: bool = False,
    ):
        self.path, self.argument, self.columns = Path(path), argument, columns
        self.tells_bad_rows = tells_bad_rows
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"`{argument}` must end in {', '.join(SUFFIXES)}. Got `{path}`.")
        if not self.path.is_file():
            raise ValueError(f"`{argument}` must be a file. Got `{path}`, which is not there.")
        if self.path.stat().st_size == 0:
            raise ValueError(f"`{argument}` must hold rows. Got `{path}`, which is empty.")
        self._read = {".csv": self._csv, ".tsv": self._csv, ".parquet": self._parquet}.get(
            self.path.suffix.lower(), self._json
        )
        with self._reading():
            self.column_names: list[str] = next(self._read(names=True))

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        with self._reading():
            for row in self._read():
                if isinstance(row, ValueError) and not self.tells_bad_rows:
                    raise row
                yield row

    @property
    def features(self) -> dict[str, Any]:
        """What a parquet file of `datasets` says of its columns; empty for any other file."""
        if self.path.suffix.lower() != ".parquet":
            return {}
        with self._reading(), self.path.open("rb") as file:
            return Features.from_arrow_schema(pq.read_schema(file))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a codec, csv, json or Arrow
            raise ValueError(f"`{self.argument}` could not be read, {self.path}: {error}") from error

    # Each of these yields the rows, or the names of the columns alone.

    def _csv(self, names: bool = False) -> Iterator:
        csv.field_size_limit(2**31 - 1)  # for all of this process: 131,072 characters are less than some texts have
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            delimiters, headers = ["\t"] if self.path.suffix.lower() == ".tsv" else [",", ";", "\t"], []
            for delimiter in delimiters:
                file.seek(0)
                headers.append(next(filter(None, csv.reader(file, delimiter=delimiter)), []))
            header = max(headers, key=len)  # the first of those that are equal
            if not header:
                raise ValueError("it holds blank lines alone")
            if twice := [name for name, count in Counter(header).items() if count > 1 and name]:
                raise ValueError(f"the first line names the column {twice[0]!r} twice")
            if names:
                yield header
                return
            file.seek(0)
            rows = csv.reader(file, delimiter=delimiters[headers.index(header)], strict=True)
            kept = {name: i for i, name in enumerate(header) if self.columns is None or name in self.columns}
            next(filter(None, rows))
            while True:
                error, before = None, rows.line_num
                try:
                    if not (row := next(rows)):  # a blank line is no row
                        continue
                    if len(row) != len(header):
                        error = f"line {rows.line_num} has {len(row)} cells, the first line {len(header)}"
                except StopIteration:
                    return
                except csv.Error as problem:
                    hint = (
                        "a text that holds a quote, a separator or a new line must stand in quotes, its quotes doubled"
                    )
                    error = f"{problem}, before the end of line {rows.line_num}; {hint}"
                if error is not None and rows.line_num > before + 1:  # a quote too many may have made one of them
                    raise ValueError(error)
                yield {name: row[i] for name, i in kept.items()} if error is None else ValueError(error)

    def _json(self, names: bool = False, of_all: bool = False) -> Iterator:
        if names:
            rows = list(islice(self._json(of_all=True), SAMPLE))
            good = [row for row in rows if isinstance(row, dict)]
            if len(good) < len(rows) and (not good or not self.tells_bad_rows):
                raise next(row for row in rows if isinstance(row, ValueError))
            yield list(dict.fromkeys(name for row in good for name in row))
            return
        with self.path.open(encoding="utf-8-sig") as file:
            is_list = next((line for line in file if line.strip()), "").lstrip().startswith("[")
            file.seek(0)
            if is_list:
                rows = enumerate(json.load(file))
            else:
                rows = ((i, line) for i, line in enumerate(file, start=1) if line.strip())
            for i, row in rows:
                where = f"row {i} of its list" if is_list else f"line {i}"
                try:
                    row = row if is_list else json.loads(row)
                except ValueError as error:
                    hint = "an object in each line, or one list of objects, is what can be read"
                    yield ValueError(f"{where} is no JSON: {error}; {hint}")
                    continue
                columns = isinstance(row, dict) and list(row.values())
                if not is_list and columns and all(isinstance(cells, dict) for cells in columns):
                    # pandas' `to_json` without `orient="records"`
                    raise ValueError(f"{where} is an object of whole columns; one object for each row can be read")
                if not isinstance(row, dict):
                    yield ValueError(f"{where} must be an object of cells by column. Got {shown(row)}")
                    continue
                kept = row if of_all or self.columns is None else self.columns
                yield {name: row[name] for name in kept if name in row}

    def _parquet(self, names: bool = False) -> Iterator:
        with self.path.open("rb") as source, pq.ParquetFile(source) as file:  # opened here: a name could be a URL
            if names:
                yield file.schema_arrow.names
                return
            wanted = self.column_names if self.columns is None else self.columns
            kept = [name for name in self.column_names if name in wanted]
            for batch in file.iter_batches(SAMPLE, columns=kept):
                for cells in zip(*(python_values(batch.column(name)) for name in kept), strict=True):
                    yield dict(zip(kept, cells, strict=True))


def find_text_columns(rows: RowFile | Dataset, label_column: str) -> list[str]:
    """
    The columns that seem to hold the texts to classify: one, or two for pairs, told by the first 1,000 rows.

    They are the columns of strings that are not all numbers. Where these are several, also taken out are a column that
    is the same in all rows, one that names the class once more, and one whose values are ids: nearly all different,
    without blanks, with digits. What is taken out is logged; a pair is a warning.

    Args:
        rows ([`RowFile`] or `datasets.Dataset`): with all its columns.
        label_column (`str`): the column of the class.

    Returns:
        `list[str]`: in the order of the file.

    Raises:
        ValueError: there is none, or there are more than two; it says which.
    """
    if isinstance(rows, Dataset):
        strings = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "").endswith("string")]
        sample = rows.select(range(min(SAMPLE, len(rows))))
        sample = sample.select_columns([*{*strings, label_column} & {*rows.column_names}]).to_list()
    else:
        sample = list(islice(rows, SAMPLE))
    if not sample:
        raise ValueError("There are no rows to tell the columns of text by (`text_columns` not given).")
    values = {name: [row.get(name) for row in sample] for name in rows.column_names if name != label_column}
    found = {}
    for name, cells in values.items():
        strings = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
        # A few cells of another kind are an error that is told where texts are checked.
        mostly = 2 * len(strings) > sum(cell is not None and not isinstance(cell, str) for cell in cells)
        if mostly and not all(NUMBER.fullmatch(text.strip()) for text in strings):
            found[name] = strings
    columns, other = list(found), dict.fromkeys(found)
    if len(columns) > 1:
        classes = [str(row.get(label_column)) for row in sample]
        other = {name: _what_else(found[name], zip(values[name], classes, strict=True)) for name in columns}
        columns = [name for name in columns if other[name] is None]
        for name in found:
            if other[name] is not None:
                logger.info("Column %r is taken to be %s, not text (`text_columns` not given).", name, other[name])
    if len(columns) not in (1, 2):
        seen = [f"{name!r} ({other[name] or 'text, it seems'})" for name in found]
        raise ValueError(
            f"`text_columns` must name one or two columns out of {rows.column_names}: it cannot be told which hold "
            f"the texts. Of strings that are not all numbers: {', '.join(seen) or 'none'}."
        )
    if len(columns) == 2:
        logger.warning(
            "`text_columns` is not given, and two columns seem to hold text: each row is taken to be a PAIR of %r "
            "(%s) and %r (%s). If only one of them is what a text to classify has, name it: `--text_columns %s`.",
            *(word for name in columns for word in (name, shown(found[name][0]))),
            max(columns, key=lambda name: sum(map(len, found[name])) / len(found[name])),
        )
    return columns


def _what_else(texts: list[str], cells_and_classes: Iterable[tuple[Any, str]]) -> str | None:
    """What a column of strings holds if not texts."""
    kinds = len(set(texts))
    if kinds == 1 < len(texts):
        return "the same in all rows"
    pairs = {(cell, name) for cell, name in cells_and_classes if isinstance(cell, str) and cell.strip()}
    if kinds < len(texts) and len(pairs) == len({name for _, name in pairs}):  # one cell for all rows of a class
        return "the class by another name"
    if kinds > 0.95 * len(texts) and sum(ID.fullmatch(text) is not None for text in texts) > 0.95 * len(texts):
        return "an id of the row"
    return None


def read_split(
    rows: RowFile | Dataset,
    split: str,
    text_columns: Sequence[str],
    label_column: str | None,
    *,
    allow_blank_texts: bool = False,
    cache_dir: str | None = None,
) -> tuple[Dataset, list[str] | None]:
    """
    The texts and the classes of one split, checked.

    Args:
        rows ([`RowFile`] or `datasets.Dataset`): of the split.
        split (`str`): its name, for errors.
        text_columns (`list[str]`): the one or two columns of text.
        label_column (`str`, *optional*): the column of the class; None reads none.
        allow_blank_texts (`bool`): whether a text may be missing or blank; then it is told in a warning.
        cache_dir (`str`, *optional*): where the texts of a file are kept. Defaults to the cache of `datasets`.

    Returns:
        `tuple`: the texts as a `datasets.Dataset` on the disk, of these columns alone; a missing one of a dataset is
        None. The name of each row's class, or None.

    Raises:
        ValueError: there are no rows; a column is missing; a text is missing or blank, or no text; a class is missing,
            a fraction or negative among numbers, or a list.
    """
    if missing := [column for column in text_columns if column not in rows.column_names]:
        raise ValueError(f"The {split} split has no column {missing}; it has {rows.column_names}.")
    if label_column is not None and label_column not in rows.column_names:
        raise ValueError(
            f"`label_column` must be one of {rows.column_names}, the columns of the {split} split. "
            f"Got {label_column!r}."
        )
    wanted = [*text_columns, *([] if label_column is None else [label_column])]
    if isinstance(rows, Dataset):
        cells = zip(*(column_values(rows, column) for column in wanted), strict=True)
    else:
        rows = RowFile(rows.path, rows.argument, wanted)
        cells = (tuple(row.get(column) for column in wanted) for row in rows)
    no_text, blank = ({column: {} for column in text_columns} for _ in range(2))  # by row
    labels = []
    for row, values in enumerate(cells):
        for column, text in zip(text_columns, values, strict=False):
            if text is None or isinstance(text, str) and not text.strip():
                blank[column][row] = text
            elif not _is_text(text):
                no_text[column][row] = text
        labels.append(values[-1])
    if not labels:
        raise ValueError(f"The {split} split is empty.")
    for column in text_columns:
        _refuse(no_text[column], split, column, "must be text, in valid Unicode")
        if blank[column] and allow_blank_texts:
            found = f"{len(blank[column])} rows of the {split} split, column {column!r}, are blank"
            logger.warning("%s: %s.", found, _numbers(blank[column]))
        else:
            way_out = "Take them out, or use them with `--allow_blank_texts`."
            _refuse(blank[column], split, column, "must hold more than blanks", way_out)
    names = None if label_column is None else row_class_names(labels, rows, split, label_column)
    if isinstance(rows, Dataset):
        return rows.select_columns(list(text_columns)), names
    stat = rows.path.stat()  # with the names, what the cache of `datasets` knows a file by
    texts = Dataset.from_generator(
        _texts,
        features=Features({column: Value("string") for column in text_columns}),
        split=NamedSplit(split),
        cache_dir=cache_dir,
        gen_kwargs={
            "path": str(rows.path.resolve()),
            "argument": rows.argument,
            "columns": tuple(text_columns),
            "known_by": (stat.st_mtime_ns, stat.st_size, version("gaml_hf")),
        },
    )
    return texts, names


def _texts(path: str, argument: str, columns: tuple[str, ...], known_by: tuple) -> Iterator[dict[str, str]]:
    for row in RowFile(path, argument, columns):
        yield {column: row.get(column) or "" for column in columns}


def _is_text(text: Any) -> bool:
    try:
        return isinstance(text, str) and (text.isascii() or text.encode() is not None)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def row_class_names(labels: list[Any], rows: RowFile | Dataset, split: str, column: str) -> list[str]:
    if (known := known_classes(rows, column)) is not None:
        beyond = {row: k for row, k in enumerate(labels) if k is not None and k >= len(known)}
        _refuse(beyond, split, column, f"must be the number of one of {len(known)} classes, {shown(known)}")
        labels = [None if label is None or label < 0 else known[label] for label in labels]
    wrong: dict[str, dict[int, Any]] = {MISSING: {}, SEVERAL: {}, FRACTION: {}}
    for row, label in enumerate(labels):
        # NaN is not itself.
        if label is None or label != label or (isinstance(label, str) and not label.strip()):
            wrong[MISSING][row] = label
        elif isinstance(label, (list, dict)):
            wrong[SEVERAL][row] = label
        elif not isinstance(label, (str, int)):
            wrong[FRACTION][row] = label
    for problem, found in wrong.items():
        _refuse(found, split, column, problem)
    names = [str(label).lower() if isinstance(label, bool) else str(label) for label in labels]
    kinds = set(names)
    if all(NUMBER.fullmatch(name) for name in kinds):
        for problem, is_wrong in (
            (FRACTION, lambda name: not WHOLE_NUMBER.fullmatch(name)),
            (NEGATIVE, lambda name: name.startswith("-")),
        ):
            if any(map(is_wrong, kinds)):
                _refuse({row: labels[row] for row, name in enumerate(names) if is_wrong(name)}, split, column, problem)
    return names


def known_classes(rows: RowFile | Dataset, column: str) -> list[str] | None:
    """The classes in their order, where the data say so (`datasets.ClassLabel`)."""
    feature = rows.features.get(column)
    return feature.names if isinstance(feature, ClassLabel) else None


def class_names(names: Sequence[str]) -> list[str]:
    """
    The classes that occur in `names`, in their order: whole numbers by their size, else by the alphabet.

    Warns where two differ by case or blanks alone.
    """
    kinds = set(names)
    are_numbers = all(WHOLE_NUMBER.fullmatch(name) for name in kinds)
    alike: dict[str, list[str]] = {}
    for name in sorted(kinds):
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            logger.warning("The classes %s differ by case or blanks alone, and are as many classes.", group)
    return sorted(kinds, key=lambda name: (int(name) if are_numbers else 0, name))


def encode_labels(names: Sequence[str], split: str, column: str, classes: dict[str, int]) -> list[int]:
    """
    The class index of each row.

    Args:
        names (`list[str]`): what the rows call their classes.
        split, column (`str`): where they stand, for the error.
        classes (`dict[str, int]`): the class index of each name.

    Raises:
        ValueError: a name is in no class.
    """
    unknown = {row: name for row, name in enumerate(names) if name not in classes}
    _refuse(unknown, split, column, f"must be one of {list(classes)}")
    return [classes[name] for name in names]


def _numbers(rows: dict[int, Any]) -> str:
    return str(list(rows)[:10])[1:-1] + (", ..." if len(rows) > 10 else "")


def _refuse(rows: dict[int, Any], split: str, column: str, problem: str, way_out: str = "") -> None:
    """An error for the first of `rows`, which tells the others too, if there are any."""
    for row, value in rows.items():
        kind = "" if value is None or isinstance(value, str) else f" ({type(value).__name__})"
        words = [f"Row {row} of the {split} split, column {column!r}, {problem}. Got {shown(value)}{kind}."]
        words += [f"In all, {len(rows)} such rows: {_numbers(rows)}."] if len(rows) > 1 else []
        raise ValueError(" ".join([*words, way_out]).strip())
