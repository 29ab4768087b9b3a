"""
The text-classification pipeline with exits: the stock one, plus where each row left, a say in it, and clear errors.

A row is checked in `checked_texts`, a setting in `_sanitize_parameters`; nothing else decides what is valid.
"""

import copy
import difflib
import os
import threading
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TextClassificationPipeline

from .exiting_gaml import EXIT_FIELDS, changed_exits, policy_from_config, shown


EXIT_ARGUMENTS = ("exit_policy", *EXIT_FIELDS)

# What a caller may ask of the tokenizer. Its other options take [CLS] or the mask away, or return what no model reads.
TOKENIZER_ARGUMENTS = {
    "padding": (True, False, "longest", "max_length", "do_not_pad"),
    "truncation": (True, False, "longest_first", "only_first", "only_second", "do_not_truncate"),
    "max_length": None,
    "split_special_tokens": (True, False),
}
# Three special tokens and one of each text: with fewer, a tokenizer drops a text or cuts nothing at all.
MIN_LENGTH = 5
READ_AHEAD = 64  # characters that are tokenized at first for a token that may be read
OTHER_ARGUMENTS = ("top_k", "function_to_apply", "on_error", "batch_size", "num_workers")

# A fast tokenizer keeps the truncation and padding of the call in progress as its own state: two threads would get
# each other's. One lock for all pipelines: they may share a tokenizer, and a lock in a pipeline could not be pickled.
_tokenizer_lock = threading.Lock()


def _renew_tokenizer_lock() -> None:
    global _tokenizer_lock
    _tokenizer_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a DataLoader's worker must not inherit a lock that another thread holds for ever
    os.register_at_fork(after_in_child=_renew_tokenizer_lock)


class ExitPipelineMixin:
    """What a pipeline for a model with exits adds to the stock one, whatever it reads: the say in where rows leave."""

    known_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model, **kwargs):
        if not hasattr(model.config, "exit_layers"):
            raise ValueError(
                f"`model` must be one with exits: its config names `exit_layers`. Got a {type(model).__name__}."
            )
        check_counts(kwargs)
        self._exit_defaults = {}
        super().__init__(model=model, **kwargs)
        self._exit_defaults = {name: kwargs.get(name) for name in EXIT_FIELDS}

    def check_model_type(self, supported_models):
        """Done above: upstream looks for the class name among the registered ones and logs an error without it."""

    def _take_exits(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take what says where rows leave out of a call's arguments; an error where one of them is unknown."""
        kwargs.pop("local_files_only", None)  # `pipeline` hands it on
        known = self.known_arguments
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                meant = f"Did you mean `{near[0]}`?" if near else f"The arguments are {', '.join(known)}."
                if key == "text_pair":
                    meant = 'A pair is one row: {"text": ..., "text_pair": ...}.'
                name = key if len(key) < 50 else f"{key[:50]}..."
                raise ValueError(f"`{name}` is not an argument of this pipeline. {meant}")
        return {name: kwargs.pop(name, None) for name in EXIT_ARGUMENTS}

    def _with_exits(self, steps: tuple[dict, dict, dict], exits: dict[str, Any], on_error: str | None) -> tuple:
        """The stock pipeline's parameters of its three steps, and ours."""
        preprocess_params, forward_params, postprocess_params = steps
        if on_error is not None:
            check_choice("on_error", on_error, ("raise", "skip"))
            preprocess_params["on_error"] = postprocess_params["on_error"] = on_error
        if any(value is not None for value in exits.values()):
            forward_params["exit_policy"] = self._exit_policy(**exits)
        return preprocess_params, forward_params, postprocess_params

    def _exit_policy(self, exit_policy, **changes):
        """The policy that the arguments of a call name, on top of those given at construction and of the config's."""
        if exit_policy is not None:
            given = [name for name, value in changes.items() if value is not None]
            if given:
                raise ValueError(f"`exit_policy` takes the place of `{given[0]}`: give one of them. Got both.")
            if isinstance(exit_policy, type) or not callable(exit_policy) or not hasattr(exit_policy, "may_exit"):
                raise ValueError(
                    "`exit_policy` must be an object such as `Patience(2)`, which called with exit logits decides "
                    f"which rows leave. Got {_shown(exit_policy)}."
                )
            return exit_policy
        config = copy.copy(self.model.config)
        fields = {name: getattr(config, name) for name in EXIT_FIELDS}
        # Into the copy's dict: its own setter would check types in other words than the policies'.
        vars(config).update(changed_exits(changed_exits(fields, self._exit_defaults), changes))
        return policy_from_config(config)

    def _check_training_mode(self) -> None:
        if self.model.training:
            raise ValueError("The model is in training mode: it would answer at random. Call `model.eval()` first.")

    def _error_of(self, model_outputs: dict[str, Any], on_error: str) -> str | None:
        """What is wrong with a row or its answer; raised unless bad rows are skipped."""
        about = model_outputs["about"]
        if about["error"] is not None or torch.isfinite(model_outputs["logits"]).all():
            return about["error"]
        error = (
            f"{about['row']}: the model answered with NaN or infinite logits. Its weights are broken, or too "
            f"large for {self.model.dtype}."
        )
        if on_error == "raise":
            raise ValueError(error)
        return error


class GamlTextClassificationPipeline(ExitPipelineMixin, TextClassificationPipeline):
    """
    [`~transformers.TextClassificationPipeline`] for a model with exits: the same calls and the same shapes of answers,
    and each answer, a dict, also says where its row left.

    - **label** (`str`), **score** (`float`): as in the stock pipeline, from the exit at which the row left.
    - **exit_layer** (`int`): the layer at which the row left, from 1.
    - **truncated** (`bool`, always there): whether the text was cut, to `max_length` tokens.
    - **error** (`str`): there only for a row left out under `on_error="skip"`; all other values are then `None`.

    Each of these arguments may be given here, for every call, and in a call, for that call alone:

    Args:
        exit_strategy (`str`, *optional*, defaults to the config's):
            When a row leaves: `"none"` (all layers), `"budgeted"`, `"patience"`, `"entropy"` or `"max_prob"`.
        patience (`int`, *optional*):
            Agreeing comparisons after which a row leaves, from 1. Given alone it implies `exit_strategy="patience"`.
        budgeted_exit (`int`, *optional*):
            The layer, an exit of the model, at which every row leaves. Given alone it implies
            `exit_strategy="budgeted"`.
        exit_threshold (`float`, *optional*):
            In `[0, 1]`: leave below this normalised entropy (`"entropy"`), or above this probability (`"max_prob"`).
            Given alone it is an error unless the strategy in force is one of these two.
        exit_policy ([`ExitPolicy`], *optional*): a policy object, in place of the four above.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What a bad row does: `"raise"` stops with an error that names the row, `"skip"` answers the other rows and
            puts the error in this row's place.
        top_k (`int`, *optional*, defaults to 1): how many labels to return, from 1; `None` for all.
        function_to_apply (`str`, *optional*, defaults to `"default"`):
            `"softmax"`, `"sigmoid"` or `"none"`; `"default"` is softmax, for exits need one class per text.
        truncation (`bool` or `str`, *optional*, defaults to `True`):
            As the tokenizer's. With `False`, a text that is too long is an error, and its row a bad one.
        max_length (`int`, *optional*, defaults to the tokenizer's `model_max_length`):
            The longest input in tokens, from 5 to the `max_input_length` of the config. The tokenizer of a checkpoint
            that `run_glue_gaml.py` trained holds the length that it was trained and scored with.
        padding (`bool` or `str`, *optional*): as the tokenizer's; a batch is padded to its longest row in any case.
        split_special_tokens (`bool`, *optional*, defaults to the tokenizer's own, as in the stock pipeline):
            `True`: "[SEP]" or "[MASK]" in a text are the characters they are. `False`: they are control tokens, with
            which a text can end itself. What the model was trained with is right, and stored with its tokenizer.
        batch_size, num_workers (`int`, *optional*): as in the stock pipeline.

    Threads may share one pipeline, whatever their settings.

    Raises:
        ValueError: an argument is unknown, misspelt or out of range; the tokenizer cannot belong to the model; a text
            is blank, too long with `truncation=False`, or holds a lone surrogate; the model's logits are not finite.
        TypeError: a row is neither a `str` nor a dict, or a text not a `str`.

    Example:

    ```python
    >>> classifier = pipeline("text-classification", model="path/or/name", trust_remote_code=True, patience=2)
    >>> classifier(["a good film", {"text": "He left.", "text_pair": "He is gone."}], batch_size=2)
    ```
    """

    known_arguments = (*EXIT_ARGUMENTS, *OTHER_ARGUMENTS, *TOKENIZER_ARGUMENTS)

    def __init__(self, model, tokenizer=None, **kwargs):
        if hasattr(model.config, "exit_layers"):
            _check_tokenizer(tokenizer, model.config)
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def __call__(self, inputs, **kwargs):
        """
        Classify texts.

        Args:
            inputs (`str`, `dict`, or many of them):
                A text, or a dict `{"text": ..., "text_pair": ...}` for a pair. Many of them come as a list, a tuple
                (two texts, not a pair), a NumPy array, a pandas Series, a column of a dataset, a PyTorch dataset such
                as `KeyDataset`, or a generator or other iterator.
            kwargs: the arguments of the class, for this call alone.

        Returns:
            A list of one answer for a `str`, one answer for a dict, a list of answers for a list, and an iterator that
            reads and answers as it is consumed for datasets, generators and iterators. With `top_k`, a list of
            answers, best first, takes the place of one answer, and of the list around the answer to a `str`.
        """
        check_counts(kwargs)
        return super().__call__(_as_rows(inputs), **kwargs)

    @property
    def max_length(self) -> int:
        """The longest input in tokens where a call names none: the tokenizer's, as far as the model can read."""
        return min(self.tokenizer.model_max_length, self.model.config.max_input_length)

    # Settings

    def _sanitize_parameters(self, function_to_apply=None, on_error=None, **kwargs):
        exits = self._take_exits(kwargs)
        top_k = {"top_k": kwargs.pop("top_k")} if "top_k" in kwargs else {}  # None is a value: all labels
        if top_k and top_k["top_k"] is not None:
            check_count("top_k", top_k["top_k"], 1, ", or None for all labels")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        self._check_tokenizer_arguments(kwargs)
        steps = super()._sanitize_parameters(function_to_apply=known_function(function_to_apply), **top_k, **kwargs)
        return self._with_exits(steps, exits, on_error)

    def _check_tokenizer_arguments(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if name != "max_length":
                check_choice(name, value, TOKENIZER_ARGUMENTS[name])
        max_length = kwargs.get("max_length")
        limit = self.model.config.max_input_length
        if max_length is not None and (type(max_length) is not int or not MIN_LENGTH <= max_length <= limit):
            raise ValueError(
                f"`max_length` must be a whole number between {MIN_LENGTH} and {limit}, the longest input that this "
                f"model can read (`config.max_input_length`). Got `max_length={shown(max_length)}`."
            )

    # One row

    def preprocess(self, inputs, on_error="raise", **tokenizer_kwargs) -> dict[str, Any]:
        """The model's inputs, and under `"about"` what `postprocess` needs to know of this row."""
        name, inputs = numbered_row(inputs)
        error = None
        try:
            texts = checked_texts(inputs, self.model.config.text_columns)
            encoding, truncated = self._encode(texts, **tokenizer_kwargs)
        except (TypeError, ValueError) as problem:
            error = f"{name}: {problem}"
            if on_error == "raise":
                raise type(problem)(error) from problem
            # The row keeps its place in the batch, with no text; the answer to it is never read.
            encoding, truncated = self._tokenize({"text": ""}, **tokenizer_kwargs)
        return {**encoding, "about": {"row": name, "truncated": truncated, "error": error}}

    def _encode(self, texts: dict[str, str], max_length=None, **tokenizer_kwargs):
        """Tokens of a checked row. A `ValueError` if there are too many, no own ones, or some the model has not."""
        max_length = max_length or self.max_length
        encoding, truncated = self._tokenize(texts, max_length=max_length, **tokenizer_kwargs)
        # Here and not in the model, where one such row would cost the batch, and on a GPU the process.
        config = self.model.config
        for name, bound in (("input_ids", config.vocab_size), ("token_type_ids", config.num_token_types)):
            if name in encoding and (largest := int(encoding[name].max())) >= bound:
                raise ValueError(
                    f"the tokenizer made `{name}` up to {largest}, and the model knows 0 to {bound - 1}. Is it the "
                    "tokenizer that the model was trained with?"
                )
        length = int(encoding["attention_mask"].sum())
        if length > max_length:
            limit = config.max_input_length
            raise ValueError(
                f"the text has {f'more than {max_length}' if truncated else length} tokens, and at most {max_length} "
                "are read. Leave `truncation` at its default, "
                "True, to cut it" + (f", or give `max_length`, up to {limit}." if max_length < limit else ".")
            )
        fields = ("text", "text_pair")[: len(texts)]
        if encoding.is_fast:
            unread = [field for number, field in enumerate(fields) if number not in encoding.encodings[0].sequence_ids]
        else:  # tells the texts of a pair not apart
            unread = fields if length <= self.tokenizer.num_special_tokens_to_add(pair=len(fields) == 2) else ()
        if unread:
            raise ValueError(
                f"`{unread[0]}` must hold something the tokenizer can read. Got {_shown(texts[unread[0]])}."
            )
        return encoding, truncated

    def _tokenize(self, texts, padding=False, truncation=True, max_length=None, split_special_tokens=None):
        """Tokens of one row, and whether its text was cut. Threads take turns."""
        max_length = max_length or self.max_length
        if split_special_tokens is None:
            split_special_tokens = self.tokenizer.split_special_tokens
        arguments = {
            "padding": padding,
            "max_length": max_length,
            "split_special_tokens": split_special_tokens,
            "return_attention_mask": True,
            "return_tensors": "pt",
            "verbose": False,
        }
        with _tokenizer_lock:
            try:
                near = texts
                ends_at_limit = truncation not in ("only_first", "only_second")
                if ends_at_limit and self.tokenizer.is_fast and self.tokenizer.truncation_side == "right":
                    near = self._near_texts(texts, max_length, split_special_tokens)
                arguments |= near
                encoding = self.tokenizer(**arguments, truncation=truncation)
            except Exception as problem:  # the tokenizers library raises no narrower class
                raise ValueError(f"the tokenizer cannot encode the text: {problem}") from problem
            if encoding.is_fast:
                return encoding, near != texts or bool(encoding.encodings[0].overflowing)
            whole = self.tokenizer(**arguments | {"padding": False}, truncation=False)
            return encoding, whole["input_ids"].shape[1] > int(encoding["attention_mask"].sum())

    def _near_texts(self, texts: dict[str, str], max_length: int, split_special_tokens: bool) -> dict[str, str]:
        """
        A row without words that lie beyond the longest input in any case.

        A fast tokenizer reads a text to its end and keeps what it cuts off, in pieces, and for a pair every piece of
        one text beside every piece of the other. So two million characters would take seconds, for which others wait,
        and two texts of some ten thousand words all the memory there is.
        """
        if sum(map(len, texts.values())) <= 8 * max_length:
            return texts
        arguments = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
        enough, encodings, lengths = max_length + 100, {}, {}
        for name, text in texts.items():
            size = READ_AHEAD * enough
            encoding = self.tokenizer(text[:size], **arguments).encodings[0]
            while size < len(text) and _word_from(enough, encoding) is None:
                size *= 8
                encoding = self.tokenizer(text[:size], **arguments).encodings[0]
            encodings[name] = encoding
            lengths[name] = len(encoding.ids) * max(len(text) / size, 1)  # of a text not read to its end, about
        # Which text is the longer decides to which an odd token falls. A word is of at most 100 characters, or [UNK].
        longer = max(encodings, key=lambda name: (lengths[name], name == "text_pair"))
        near = {}
        for name, encoding in encodings.items():
            end = _word_from(enough if name == longer else max_length, encoding)
            near[name] = texts[name] if end is None else texts[name][: encoding.offsets[end][0]]
        return near

    def _forward(self, model_inputs, exit_policy=None) -> dict[str, Any]:
        self._check_training_mode()
        tensors = {name: value for name, value in model_inputs.items() if name != "about"}
        outputs = self.model(**tensors, exit_policy=exit_policy, return_dict=True)
        return {"logits": outputs.logits, "exit_layer": outputs.exit_layer, "about": model_inputs["about"]}

    def postprocess(self, model_outputs, function_to_apply=None, top_k=1, _legacy=True, on_error="raise"):
        """The answer to one row: a dict, or with `top_k` a list of them."""
        about = model_outputs["about"]
        if (error := self._error_of(model_outputs, on_error)) is not None:
            answer = {"label": None, "score": None, "exit_layer": None, "truncated": None, "error": error}
            return answer if top_k == 1 and _legacy else [answer]
        answers = super().postprocess(model_outputs, function_to_apply=function_to_apply, top_k=top_k, _legacy=_legacy)
        exits = {"exit_layer": int(model_outputs["exit_layer"][0]), "truncated": about["truncated"]}
        return {**answers, **exits} if isinstance(answers, dict) else [{**answer, **exits} for answer in answers]


def _word_from(start: int, encoding: Any) -> int | None:
    """The first token from `start` that begins a word; None if that is the last one, of which more may follow."""
    words = encoding.word_ids
    return next((i for i in range(start, len(words)) if words[i] not in (words[i - 1], words[-1])), None)


def checked_texts(row: Any, columns: Sequence[str] | None = None) -> dict[str, str]:
    """
    The texts of one row: the one place that says what a row is.

    Args:
        row (`str` or `dict`): a text, or `{"text": ..., "text_pair": ...}`, where only `text_pair` may be left out.
        columns (`list[str]`, *optional*): `text_columns` of the config: a row has as many texts. By default, any.

    Returns:
        `dict[str, str]`: the texts under the names the tokenizer knows.

    Raises:
        TypeError: the row is neither, or a text is no `str`.
        ValueError: a key is missing or unknown; a text is blank or cannot be written as UTF-8; they are too many or
            too few.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise TypeError(f'a row must be a `str` or a dict {{"text": ..., "text_pair": ...}}. Got {_shown(row)}.')
    if "text" not in row or not row.keys() <= {"text", "text_pair"}:
        raise ValueError(
            f"a dict must have the key `text` and, for a pair, `text_pair`. Got the keys {shown(list(row))}."
        )
    if columns is not None and len(row) != len(columns):
        wanted = 'pairs, {"text": ..., "text_pair": ...}' if len(columns) == 2 else "single texts, with no `text_pair`"
        raise ValueError(
            f"a row must be as in the training, of {wanted} ({' and '.join(columns)}). Got {len(row)} of "
            f"{len(columns)} texts."
        )
    for field, text in row.items():
        if not isinstance(text, str):
            raise TypeError(f"`{field}` must be a `str`. Got {_shown(text)}.")
        if not text.strip():
            raise ValueError(f"`{field}` must hold more than blanks. Got {_shown(text)}.")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(
                f"`{field}` must be valid Unicode. Got the lone surrogate {text[problem.start]!a} at character "
                f"{problem.start}."
            ) from None
    return row


def _as_rows(inputs: Any) -> Any:
    """
    `inputs` in a form whose rows the stock pipeline reads one by one, each with its number. Left as they are, it would
    take a tuple for a single row, and look into the rows for the messages of a chat.
    """
    if not isinstance(inputs, (str, dict, list, Dataset, GeneratorType)):
        if isinstance(inputs, (bytes, bytearray, memoryview)):
            pass  # sequences of numbers, and no rows
        elif hasattr(inputs, "tolist"):  # NumPy, pandas
            inputs = inputs.tolist()
        elif isinstance(inputs, Sequence):
            inputs = list(inputs)
        elif isinstance(inputs, Iterator):
            inputs = (row for row in inputs)
    if isinstance(inputs, (str, dict)):
        return inputs
    if not isinstance(inputs, (list, Dataset, GeneratorType)):
        raise TypeError(
            "`inputs` must be a `str`, a dict, a list or array of them, a PyTorch dataset of them (such as "
            f"`KeyDataset(dataset, column)`), or a generator. Got {_shown(inputs)}."
        )
    return numbered_rows(inputs)


def numbered_rows(inputs: list | Dataset | GeneratorType) -> Any:
    """Many rows, each with its number, of the same kind for the stock pipeline."""
    if isinstance(inputs, Dataset):
        is_stream = isinstance(inputs, IterableDataset) or not isinstance(inputs, Sized)
        return _NumberedStream(inputs) if is_stream else _NumberedRows(inputs)
    rows = (_Row(number, value) for number, value in enumerate(inputs))
    # As a list, unless it is empty: the stock pipeline looks at `inputs[0]`, except in a generator.
    return list(rows) if isinstance(inputs, list) and inputs else rows


def numbered_row(row: Any) -> tuple[str, Any]:
    """What an error calls a row, and the row itself."""
    return (f"`inputs[{row.number}]`", row.value) if isinstance(row, _Row) else ("`inputs`", row)


@dataclass(frozen=True)
class _Row:
    """A row and its place among the inputs."""

    number: int
    value: Any


class _NumberedRows(Dataset):
    """A dataset with its rows numbered."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return _Row(number, self.rows[number])


class _NumberedStream(IterableDataset):
    """A dataset without places, with its rows numbered as they come; it can be read again where the dataset can."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (_Row(number, value) for number, value in enumerate(self.rows))


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """A `ValueError` for a tokenizer whose tokens the model would misread without a word."""
    if tokenizer is None:
        raise ValueError("`tokenizer` must be the tokenizer of the model. Got None.")
    size = len(tokenizer)
    # A folder without tokenizer files loads as a tokenizer of 5 special tokens: every word becomes [UNK].
    if not config.vocab_size / 2 <= size <= config.vocab_size:
        raise ValueError(
            f"`tokenizer` must be the one the model was trained with: the model knows {config.vocab_size} tokens "
            f"(`vocab_size`). Got one with {size}; are the tokenizer's files in the model's folder?"
        )
    if tokenizer.model_max_length < MIN_LENGTH:
        raise ValueError(
            f"`tokenizer` must allow at least {MIN_LENGTH} tokens: three special ones and one of each text. Got "
            f"`model_max_length={tokenizer.model_max_length}`."
        )
    if tokenizer.padding_side != "right":
        raise ValueError(
            '`tokenizer` must pad on the right (`padding_side="right"`): a text begins at the first position. '
            f"Got `padding_side={tokenizer.padding_side!r}`."
        )


def known_function(name: Any) -> str | None:
    """`function_to_apply` in lower case; `"default"` is softmax, for a row has one class."""
    if name is None:
        return None
    name = name.lower() if isinstance(name, str) else name
    check_choice("function_to_apply", name, ("default", "softmax", "sigmoid", "none"))
    return "softmax" if name == "default" else name


def check_choice(name: str, value: Any, choices: tuple) -> None:
    # By type too, for 1 == True.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Got `{name}={shown(value)}`.")


def check_count(name: str, value: Any, least: int, otherwise: str = "") -> None:
    if type(value) is not int or value < least:
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}{otherwise}. Got `{name}={shown(value)}`."
        )


def check_counts(kwargs: dict[str, Any]) -> None:
    """Of the arguments that the stock pipeline takes out and hands to a DataLoader."""
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if kwargs.get(name) is not None:
            check_count(name, kwargs[name], least)


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"


__all__ = ["GamlTextClassificationPipeline"]
