#!/usr/bin/env python
"""
Train, evaluate and use a GAML-BERT on a GLUE task or on your own texts.

    python run_glue_gaml.py --model_name_or_path google-bert/bert-base-uncased --task_name mrpc \
        --do_train --do_eval --output_dir out/mrpc

    python run_glue_gaml.py recipe.json --learning_rate 3e-5      # a JSON or YAML file; the command line overrides it

The shape is that of `run_glue.py` in the Transformers examples; `--help` lists every argument. In the order of `main`:
part of the training set is set aside; the model trains on the rest, and the checkpoint that is best on that part is
kept; the exit policy is chosen there for the wanted speed-up; the validation set is scored once, with the model as it
will be used.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from gaml_hf import GamlAutoConfig, GamlAutoModelForSequenceClassification, GamlTrainer
from gaml_hf.data.files import (
    RowFile,
    class_names,
    encode_labels,
    find_text_columns,
    known_classes,
    read_split,
)
from gaml_hf.evaluation import (
    flops_speed_up,
)
from gaml_hf.evaluation.glue import GLUE_TASKS, GlueMetric, GlueTask, get_task, selection_scorer
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.exits_gaml import ExitsMixin
from gaml_hf.models.pipeline_gaml import MIN_LENGTH
from gaml_hf.training import script
from gaml_hf.training.script import (
    SWITCH,
    GamlArguments,
    GamlTrainingArguments,
    check_output_dir,
    choose_policy,
    class_counts,
    count_rows,
    first,
    leave,
    make_trainer,
    set_aside,
    set_up,
    train,
    what_to_resume,
    write_predictions,
)


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str = field(
        metadata={"help": "An encoder's checkpoint, plain or with exits: a local folder or a name on the Hub."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not that of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for files that are not public."})

    def source(self) -> dict:
        """What `from_pretrained` is told."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass
class DataTrainingArguments:
    """What the model reads."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"A GLUE task: {', '.join(GLUE_TASKS)}. Sets columns, labels and metric."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset on the Hub or a local folder. Defaults to nyu-mll/glue where a task is named."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: csv, tsv, json(l) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation rows, likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict, likewise."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "The one or two text columns. Defaults to the task's, or to the columns that hold text."},
    )
    label_column: str = field(default="label", metadata={"help": "The column of the class: names or whole numbers."})
    positive_label: str | None = field(
        default=None,
        metadata={"help": "Of two classes of your own, the one whose F1 is a score, instead of the mean over both."},
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer texts are cut to this many tokens, here and wherever the saved model is used. Defaults to "
            "what a model with exits was trained with, and to 128 for a plain one."
        },
    )
    split_special_tokens: bool | None = field(
        default=None,
        metadata={
            "help": 'Read "[SEP]" or "[MASK]" in a text as the characters they are, here and wherever the saved model '
            "is used. Defaults to what the tokenizer says; for a plain model's that says nothing, to True, unless "
            "special tokens were added to it.",
            **SWITCH,
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every text to `max_seq_length`; else to the longest of its batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even where a cache exists."})
    allow_blank_texts: bool = field(
        default=False, metadata={"help": "Use blank texts too, with a warning; the pipeline refuses to answer them."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows at most."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict this many rows at most."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = get_task(self.task_name).name
        elif self.dataset_name is None and not self.files():
            raise ValueError("Give `task_name`, `dataset_name`, or `train_file` and `validation_file`.")
        for argument, path in self.files().items():
            RowFile(path, argument)  # says what is wrong with it
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise ValueError(f"`text_columns` must name one or two columns. Got {self.text_columns}.")
        if self.positive_label is not None and self.task_name is not None:
            raise ValueError(
                f"`positive_label` is for data of your own: what counts in {self.task_name} is set. "
                f"Got {self.positive_label!r}."
            )
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")

    def files(self) -> dict[str, str]:
        """The files that are given, by argument."""
        names = ("train_file", "validation_file", "test_file")
        return {name: path for name in names if (path := getattr(self, name)) is not None}


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, GamlArguments, GamlTrainingArguments]:
    return script.parse_arguments(argv, (ModelArguments, DataTrainingArguments, GamlArguments, GamlTrainingArguments))


def open_splits(data_args: DataTrainingArguments, model_args: ModelArguments) -> dict[str, RowFile | Dataset]:
    """The splits, by the names they have at their source; files become train, validation and test."""
    if files := data_args.files():
        return {argument.removesuffix("_file"): RowFile(path, argument) for argument, path in files.items()}
    name = data_args.dataset_name or "nyu-mll/glue"
    config_name = data_args.dataset_config_name or (None if data_args.dataset_name else data_args.task_name)
    return load_dataset(name, config_name, cache_dir=model_args.cache_dir, token=model_args.token)


def find_classes(config: GamlConfigMixin, task: GlueTask | None) -> dict[str, int]:
    """The model's class index of each name that a class may have in the data: of a task also those of GLUE."""
    classes = dict(config.label2id)
    if task is not None:
        for name, index in config.label2id.items():
            k = task.class_index(name)
            classes |= {task.label_names[k]: index, str(k): index}
    return classes


def load_config(model_args: ModelArguments, gaml_args: GamlArguments, **changes) -> GamlConfigMixin:
    """The config of the model to be, and what is wrong with it in one sentence."""
    try:
        return GamlAutoConfig.from_pretrained(
            model_args.model_name_or_path, **model_args.source(), **(gaml_args.config_fields() | changes)
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def load_model(
    model_args: ModelArguments, gaml_args: GamlArguments, data: "Data"
) -> tuple[ExitsMixin, PreTrainedTokenizerBase]:
    """A model for the classes of the data. One that was trained for them keeps its own names and their order."""
    label_names, task = data.label_names, data.task
    name, source = model_args.model_name_or_path, model_args.source()
    found, labels = GamlAutoConfig.from_pretrained(name, **source), {}
    if found.comes_with_exits:
        own = [found.id2label[k] for k in range(found.num_labels)]
        try:
            fits = sorted(map(task.class_index, own)) == [*range(task.num_labels)] if task else None
        except ValueError:
            fits = False
        if not (set(label_names or own) <= set(own) if fits is None else fits):  # a file need not hold every class
            raise ValueError(
                f"The model `{name}` was trained for the classes {own}. The data has {label_names}. For other "
                "classes, start from a plain checkpoint."
            )
    elif label_names is None:
        raise ValueError(f"The model `{name}` has no classes yet: give rows with labels. Got rows to predict alone.")
    else:
        labels["id2label"] = dict(enumerate(label_names))
        labels["label2id"] = {label: i for i, label in enumerate(label_names)}
    config = load_config(model_args, gaml_args, **labels)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, trust_remote_code=False, **source)
    return GamlAutoModelForSequenceClassification.from_pretrained(name, config=config, **source), tokenizer


def settle_reading(
    tokenizer: PreTrainedTokenizerBase, config: GamlConfigMixin, data_args: DataTrainingArguments
) -> None:
    """How a text becomes tokens: set on the tokenizer, which is saved with it, so that all who use it read alike."""
    limit, length = config.max_input_length, data_args.max_seq_length
    is_gaml = config.comes_with_exits
    if length is None:
        length = min(tokenizer.model_max_length, limit) if is_gaml else min(128, tokenizer.model_max_length, limit)
    elif not MIN_LENGTH <= length <= limit:
        raise ValueError(
            f"`max_seq_length` must lie between {MIN_LENGTH} and {limit}, the longest input that "
            f"the model can read (`config.max_input_length`). Got {length}."
        )
    split = data_args.split_special_tokens
    if split is None and (is_gaml or "split_special_tokens" in tokenizer.init_kwargs):
        split = tokenizer.split_special_tokens
    elif split is None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        split = special <= set(tokenizer.special_tokens_map.values())
    tokenizer.model_max_length, tokenizer.split_special_tokens = length, split
    kind = "the characters they are" if split else "special tokens"
    logger.info(f"Texts are cut to {length} tokens. [SEP] and the like in a text are read as {kind}.")


def main(argv: list[str] | None = None) -> dict:
    started = time.time()
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, gaml_args, training_args = parse_arguments(argv)
    set_up(training_args)
    old_checkpoints, resume = what_to_resume(training_args)
    if training_args.do_train:
        gaml_args.settle_strategy("entropy")
    gaml_args.check_policy()
    check_output_dir(training_args, gaml_args, model_args.model_name_or_path)
    # Before any row is read; the classes are not known yet.
    trained_columns = load_config(model_args, gaml_args, class_weights=None).text_columns
    data = read_data(model_args, data_args, training_args, trained_columns)
    model, tokenizer = load_model(model_args, gaml_args, data)
    if training_args.do_train:
        model.config.text_columns = data.columns
    encode(data, model.config, tokenizer, data_args, training_args)
    train_rows, holdout_rows, promise_rows = set_aside(
        data.rows.get("train"), data_args.max_train_samples, gaml_args, training_args
    )
    score, main_metric = make_score(data, model.config, data_args)
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None)
    trainer = make_trainer(
        model, tokenizer, collator, train_rows, holdout_rows, score, main_metric, gaml_args, training_args
    )
    rows = count_rows(train_rows, holdout_rows, promise_rows, training_args.do_train)
    run = describe(argv, data, tokenizer, rows, model_args, data_args, training_args)

    if training_args.do_train:
        run |= train(trainer, resume, old_checkpoints)
    script.leave_autocast(trainer)
    is_chosen = holdout_rows is not None and gaml_args.chooses
    if is_chosen:
        run |= choose_policy(trainer, holdout_rows, promise_rows, score, main_metric, gaml_args)
    run["config"] = model.config.to_dict()
    tables = []
    if training_args.do_eval:
        draws = not script.is_own_folder(training_args, model_args.model_name_or_path)
        run["evaluation"], tables = evaluate_splits(
            trainer, data, run, score, main_metric, data_args, gaml_args, draws
        )
    run["seconds"] = time.time() - started
    if training_args.do_predict:
        predict(trainer, data, data_args.max_predict_samples)
    if trainer.is_world_process_zero():
        leave(trainer, tokenizer, run, card_values(run, data_args, model_args, main_metric), is_chosen)
        print("\n".join(tables))
        print(f"Everything is in {training_args.output_dir.rstrip(os.sep)}{os.sep}")
    return run


# Rows


@dataclass
class Data:
    """
    The splits that are needed.

    Attributes:
        task ([`GlueTask`], *optional*): where one is named.
        eval_splits, test_splits (`list[str]`): names of those to score and to predict.
        columns (`list[str]`): the one or two columns of text.
        rows (`DatasetDict`): texts of each split; tokens and `labels` once they are encoded.
        names (`dict`): of each split, the class of each row as the data calls it, or `None` without labels.
        label_names (`list[str]`, *optional*): classes in the order of the logits; the model's once it is there.
        classes (`dict[str, int]`): the class number of each name that a class may have in the data.
        labels (`dict[str, list[int]]`): of each split with labels, the class of each row.
        positive_label (`str`, *optional*): the class whose F1 is a score.
    """

    task: GlueTask | None
    eval_splits: list[str]
    test_splits: list[str]
    columns: list[str]
    rows: DatasetDict
    names: dict[str, list[str] | None]
    label_names: list[str] | None
    classes: dict[str, int] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)
    positive_label: str | None = None

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Of each split with labels, how many rows each class has."""
        return {split: class_counts(labels, self.label_names) for split, labels in self.labels.items()}


def read_data(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    trained_columns: list[str] | None,
) -> Data:
    """Texts and class names, checked row by row, and the classes that there are."""
    sources = open_splits(data_args, model_args)
    task = None if data_args.task_name is None else get_task(data_args.task_name)
    eval_splits = list(task.validation_splits) if task else ["validation"]
    test_splits = list(task.test_splits) if task else ["test"]
    needed = {"train"} if training_args.do_train else set()
    needed |= set(eval_splits) if training_args.do_eval else set()
    needed |= set(test_splits) if training_args.do_predict else set()
    if not needed <= set(sources):
        raise ValueError(f"The data must have the splits {sorted(needed)}. Got {sorted(sources)}.")
    splits = [*(["train"] if "train" in sources else []), *sorted(needed - {"train"})]
    columns = data_args.text_columns or (list(task.text_columns) if task else None)
    trained = None if training_args.do_train else trained_columns
    if columns is None and trained and set(trained) <= set(sources[splits[0]].column_names):
        columns = trained
    if columns is None:
        columns = find_text_columns(sources[splits[0]], data_args.label_column)
    if trained and len(columns) != len(trained):
        raise ValueError(
            f"`text_columns` must name {len(trained)}: the model was trained on {' and '.join(trained)}. "
            f"Got {' '.join(columns)}."
        )
    rows, names = DatasetDict(), {}
    for split in splits:
        rows[split], names[split] = read_split(
            sources[split],
            split,
            columns,
            None if split in test_splits else data_args.label_column,  # whose labels, if any, are not read
            allow_blank_texts=data_args.allow_blank_texts,
            cache_dir=model_args.cache_dir,
        )
    label_names = list(task.label_names) if task else None
    for split in splits:
        if label_names is None and names[split] is not None:
            label_names = known_classes(sources[split], data_args.label_column) or class_names(names[split])
            if len(label_names) < 2 and training_args.do_train:  # a model that was trained has its own classes
                raise ValueError(
                    f"The labels of the {split} split, column {data_args.label_column!r}, must be of at least two "
                    f"classes. Got {label_names}."
                )
    return Data(task, eval_splits, test_splits, columns, rows, names, label_names)


def encode(
    data: Data,
    config: GamlConfigMixin,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
) -> None:
    """Put tokens and class numbers, in the model's order, in place of texts and names."""
    data.classes = find_classes(config, data.task)
    data.label_names = [config.id2label[k] for k in range(config.num_labels)]
    positive = data.task.label_names[1] if data.task and "f1" in data.task.metrics else data_args.positive_label
    if positive is not None and (positive not in data.classes or len(data.label_names) != 2):
        raise ValueError(f"`positive_label` must be one of two classes. Got {positive!r}, and {data.label_names}.")
    data.positive_label = positive
    data.labels = {
        split: encode_labels(names, split, data_args.label_column, data.classes)
        for split, names in data.names.items()
        if names is not None
    }
    logger.info("Text is read from %s.", " and ".join(f"column {column!r}" for column in data.columns))
    for split, counts in data.class_counts().items():
        told = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        logger.info("%s: %d rows; classes: %s", split, len(data.rows[split]), told)
    settle_reading(tokenizer, config, data_args)

    def tokenize(batch: dict) -> dict:
        return tokenizer(
            *([text or "" for text in batch[column]] for column in data.columns),
            padding="max_length" if data_args.pad_to_max_length else False,
            truncation=True,
        )

    with training_args.main_process_first(desc="tokenizing"):
        for split, part in data.rows.items():
            data.rows[split] = part.map(
                tokenize,
                batched=True,
                remove_columns=part.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
            )
            if split in data.labels:
                data.rows[split] = data.rows[split].add_column("labels", data.labels[split])


# Training


def make_score(
    data: Data, config: GamlConfigMixin, data_args: DataTrainingArguments
) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str]:
    """The scores of one list of predictions, and the name of the one that is compared."""
    positive_class = data.classes.get(data.positive_label)
    return selection_scorer(GlueMetric(data_args.task_name, config.num_labels, positive_class=positive_class))


def describe(
    argv: list[str],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, int],
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: GamlTrainingArguments,
) -> dict:
    """What `run.json` tells before a step is made: arguments, versions, machine, rows. No tokens."""
    return script.describe(argv, "run_glue_gaml.py", model_args, data_args, training_args) | {
        "max_length": tokenizer.model_max_length,
        "split_special_tokens": tokenizer.split_special_tokens,
        "rows": rows,
        "columns": {"text": data.columns, "label": data_args.label_column},
        "classes": data.class_counts(),
        "positive_label": data.positive_label,
    }


# Use


def evaluate_splits(
    trainer: GamlTrainer,
    data: Data,
    run: dict,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    main_metric: str,
    data_args: DataTrainingArguments,
    gaml_args: GamlArguments,
    draws: bool,
) -> tuple[dict, list[str]]:
    """Score each validation split once: what `run.json` tells of each, and a table of each."""
    parts = {
        split: (prefix, first(data.rows[split], data_args.max_eval_samples))
        for split, prefix in zip(data.eval_splits, ("eval", "eval_mm"), strict=False)
    }

    def evaluate(part: Dataset) -> dict:
        lengths = [sum(mask) for mask in part["attention_mask"]]
        return script.evaluate(
            trainer,
            part,
            score,
            main_metric,
            gaml_args.latency_rows,
            flops=lambda exit_layer, **how: flops_speed_up(trainer.model, exit_layer, lengths, **how),
            rows_of=lambda part, numbers: part.select(numbers).to_list(),
        )

    evaluations = script.evaluate_splits(trainer, parts, evaluate, main_metric, draws=draws)
    return evaluations, [score_table(split, evaluation, run) for split, evaluation in evaluations.items()]


def predict(trainer: GamlTrainer, data: Data, limit: int | None) -> None:
    """Write the answers for each test split, and of a GLUE task what its server takes."""
    output_dir, task = Path(trainer.args.output_dir), data.task
    for i, split in enumerate(data.test_splits):
        part = first(data.rows[split], limit)
        logits, exit_layer = trainer.predict(part, metric_key_prefix="predict").predictions[:2]
        if trainer.is_world_process_zero():
            write_predictions(output_dir / f"predictions_{split}.tsv", logits, exit_layer, data.label_names)
            if task:
                answers = [task.submission_labels[task.class_index(data.label_names[k])] for k in logits.argmax(-1)]
                write_submission(output_dir / task.submission_files[i], answers, task.submission_rows[i])


def score_table(split: str, evaluation: dict, run: dict) -> str:
    """What a person reads at the end."""
    f1_of = "" if run["positive_label"] is None else f"; f1 is that of class {run['positive_label']}"
    head = (
        f"{split}: {evaluation['rows']} rows, cut to {run['max_length']} tokens; "
        f"text: {' + '.join(run['columns']['text'])}; "
        f"{run['columns']['label']}: {', '.join(f'{name!r} {n}' for name, n in evaluation['classes'].items())}{f1_of}"
    )
    return script.score_table(head, evaluation, run)


def write_submission(path: Path, answers: list[str], rows_wanted: int) -> None:
    """What the GLUE server takes: a line for each test row, its number from 0 and the answer."""
    lines = ["index\tprediction", *(f"{row}\t{answer}" for row, answer in enumerate(answers))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if len(answers) != rows_wanted:
        logger.warning(
            f"{path.name} has {len(answers)} rows, and the GLUE server takes {rows_wanted}: predict the whole test "
            "split of nyu-mll/glue, without `max_predict_samples`, before you submit it."
        )


def card_values(run: dict, data_args: DataTrainingArguments, model_args: ModelArguments, main_metric: str) -> dict:
    """What the model card tells, out of what was measured here; see [`gaml_hf.hub.render_card`]."""
    card = script.card_values(run, main_metric) | {
        "base_model": model_args.model_name_or_path,
        "dataset": data_args.dataset_name or ("nyu-mll/glue" if data_args.task_name else data_args.train_file),
        "task": data_args.task_name,
        "label_column": run["columns"]["label"],
        "max_length": run["max_length"],
    }
    if "training_arguments" in card:
        card["training_arguments"] = {"max_seq_length": run["max_length"]} | card["training_arguments"]
    return card


def command() -> str | None:
    return script.command(main)


if __name__ == "__main__":
    sys.exit(command())
