"""What is wrong with the rows, found before the first step: the error names split, row (from 0) and column."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers.trainer_utils import has_length


# Names that the collators of Transformers turn into `labels`.
LABEL_COLUMNS = ("labels", "label", "label_ids")

TOKENS = ("input_ids", "inputs_embeds")  # one of which a row of text has

ROWS_AT_ONCE = 10_000


def column_values(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    """
    The values of one column, row by row, as Python objects; about 50 times as fast as iterating over the column.

    A text that is not valid UTF-8, which a parquet file may hold, comes as `bytes`.
    """
    for table in dataset.select_columns(column).with_format("arrow").iter(ROWS_AT_ONCE):
        yield from python_values(table.column(0))


def python_values(values: pa.Array | pa.ChunkedArray) -> Iterator[Any]:
    """The values as Python objects, a text that is not valid UTF-8 as `bytes`."""
    try:
        yield from values.to_pylist()
    except UnicodeDecodeError:
        for value in values:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield value.as_buffer().to_pybytes()


def check_dataset(
    dataset: Any,
    split: str,
    *,
    num_labels: int,
    max_length: int | None,
    needs_labels: bool = True,
    columns_are_final: bool = True,
    inputs: Sequence[str] = TOKENS,
) -> None:
    """
    Check a whole dataset, in a time that does not count: a `datasets.Dataset` by its columns, a list row by row.

    Of any other dataset only the length is looked at; [`CheckedCollator`] checks its rows batch by batch.

    Args:
        dataset (`datasets.Dataset`, `torch.utils.data.Dataset`, ...): tokenized rows.
        split (`str`): its name in the error: `"train"`, `"eval"` or `"test"`.
        num_labels (`int`): labels must lie in `[0, num_labels - 1]`.
        max_length (`int`, *optional*): a row of `input_ids` must have from 1 to this many.
        needs_labels (`bool`): whether a row may be without a label; for predictions it may.
        columns_are_final (`bool`):
            Whether the model sees the columns as they are. `False` with a collator or a transform of one's own, which
            may make labels and tokens out of others.
        inputs (`list[str]`): columns of which there must be one.

    Raises:
        ValueError: there are no rows, no token ids or no labels; a row has no tokens or too many; a label is missing,
            is not a whole number, or is out of range.
    """
    if has_length(dataset) and len(dataset) == 0:
        raise ValueError(f"The {split} dataset has no rows.")
    if not columns_are_final:
        return
    if isinstance(dataset, (list, tuple)):
        for row, features in enumerate(dataset):
            _check_features(features, f"Row {row} of the {split} dataset", num_labels, needs_labels)
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return
    columns = dataset.format["columns"]
    if not set(inputs) & set(columns):
        hint = ": tokenize its texts first" if "input_ids" in inputs else ""
        raise ValueError(f"The {split} dataset must have the column {inputs[0]!r}{hint}. It has {columns}.")
    labels = [column for column in LABEL_COLUMNS if column in columns]
    if needs_labels and not labels:
        raise ValueError(f"The {split} dataset must have the column 'labels' or 'label'. It has {columns}.")
    for column in labels:
        _raise_at_first(
            dataset, column, lambda values: _wrong_labels(values, num_labels), split, _label_rule(num_labels)
        )
    if "input_ids" in columns and "input_ids" in inputs:
        rule = (
            f"must be a list of 1 to {max_length} tokens (`config.max_input_length`; tokenize with `truncation=True`)"
        )
        _raise_at_first(dataset, "input_ids", lambda values: _wrong_lengths(values, max_length), split, rule)


class CheckedCollator:
    """
    A collator that checks each batch before it is on a GPU, where a bad label ends in a crash, and padding on the left
    in wrong answers.

    Args:
        collator (`Callable`): makes a batch out of a list of rows.
        split (`str`): its name in the error.
        num_labels (`int`): labels must lie in `[0, num_labels - 1]`.
        needs_labels (`bool`): whether a batch may be without labels.
    """

    def __init__(self, collator: Callable, split: str, *, num_labels: int, needs_labels: bool = True):
        self.collator = collator
        self.split = split
        self.num_labels = num_labels
        self.needs_labels = needs_labels

    def __call__(self, rows: list[Any]) -> Any:
        try:
            batch = self.collator(rows)
        except Exception:
            self._find_bad_row(rows)
            raise
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is None and self.needs_labels:
            self._find_bad_row(rows)
            raise ValueError(f"A batch of the {self.split} dataset has no `labels`, which training and scores need.")
        if isinstance(labels, Tensor):
            wrong = (labels < 0) | (labels >= self.num_labels)
            if labels.shape != (len(rows),) or labels.dtype != torch.int64 or wrong.any():
                self._find_bad_row(rows)
                at = int(wrong.flatten().nonzero()[0]) if wrong.any() else 0
                raise ValueError(
                    f"Row {at} of a batch of the {self.split} dataset, `labels`, {_label_rule(self.num_labels)}. "
                    f"Got {labels.flatten()[at].item()!r} in a tensor of shape {tuple(labels.shape)}, {labels.dtype}."
                )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, :1].all():
            row = int((mask[:, 0] == 0).nonzero()[0])
            raise ValueError(
                f"Row {row} of a batch of the {self.split} dataset starts with padding, where its text must begin. "
                'Pad on the right: `padding_side="right"` of the tokenizer.'
            )
        return batch

    def _find_bad_row(self, rows: list[Any]) -> None:
        for row, features in enumerate(rows):
            where = f"Row {row} of a batch of the {self.split} dataset"
            _check_features(features, where, self.num_labels, self.needs_labels)


def _check_features(features: Any, where: str, num_labels: int, needs_labels: bool) -> None:
    if not isinstance(features, Mapping):
        return
    labels = [column for column in LABEL_COLUMNS if column in features]
    if needs_labels and not labels:
        raise ValueError(f"{where} must have a label, as `labels` or `label`. It has {list(features)}.")
    for column in labels:
        label = features[column]
        if hasattr(label, "item") and getattr(label, "size", None) is not None:  # a number of NumPy or PyTorch
            label = label.item() if (label.numel() if isinstance(label, Tensor) else label.size) == 1 else label
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"{where}, column {column!r}, {_label_rule(num_labels)}. Got {label!r}." + _hint(label, needs_labels)
            )


def _label_rule(num_labels: int) -> str:
    return f"must be a whole number from 0 to {num_labels - 1} (`num_labels` of the model is {num_labels})"


def _hint(label: Any, needs_labels: bool = True) -> str:
    if isinstance(label, int) and label < 0:
        way_out = "take such rows out" if needs_labels else "leave the column out"
        return f" Elsewhere that says that a row has no label; here, {way_out}."
    return ""


def _raise_at_first(
    dataset: datasets.Dataset,
    column: str,
    wrong: Callable[[pa.ChunkedArray], pa.ChunkedArray],
    split: str,
    rule: str,
) -> None:
    # The table as it lies in memory or on disk, quickly; rows of it that a `select` left out may be as they like.
    if not pc.any(wrong(dataset.data.column(column))).as_py():
        return
    start = 0
    for table in dataset.select_columns(column).with_format("arrow").iter(ROWS_AT_ONCE):
        values = table.column(0)
        at = pc.index(wrong(values), True).as_py()
        if at >= 0:
            value = values[at].as_py()
            got = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            raise ValueError(
                f"Row {start + at} of the {split} dataset, column {column!r}, {rule}. Got {got}."
                + _hint(value, needs_labels=split != "test")
            )
        start += len(values)


def _wrong_labels(values: pa.ChunkedArray, num_labels: int) -> pa.ChunkedArray:
    if not pa.types.is_integer(values.type):
        return pc.is_null(pa.nulls(len(values)))  # all of them
    outside = pc.or_(pc.less(values, 0), pc.greater_equal(values, num_labels))
    return pc.fill_null(outside, True)


def _wrong_lengths(values: pa.ChunkedArray, max_length: int) -> pa.ChunkedArray:
    kind = values.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return pc.is_null(pa.nulls(len(values)))
    lengths = pc.list_value_length(values)
    return pc.fill_null(pc.or_(pc.less(lengths, 1), pc.greater(lengths, max_length)), True)
