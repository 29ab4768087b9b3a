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

import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer, __version__, plots
from gaml_hf.checkpoints import training_checkpoints
from gaml_hf.data_checks import column_values
from gaml_hf.engine_gaml import bfloat16_cost
from gaml_hf.evaluation import (
    ExitMetrics,
    OperatingPoint,
    calibrate,
    choose,
    exit_mean,
    flops_speed_up,
    latency_speed_up,
    layer_speed_up,
    overthinking,
    replay,
    score_exits,
    sweep,
)
from gaml_hf.exiting_gaml import EXIT_POLICIES
from gaml_hf.glue import GLUE_TASKS, GlueMetric, get_task, selection_scorer
from gaml_hf.hub import TOLD_ARGUMENTS, TOLD_FIELDS, push_checkpoint, save_checkpoint


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str = field(
        metadata={"help": "A BERT or GAML-BERT checkpoint: a local folder or a name on the Hub."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not that of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for files that are not public."})


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
    train_file: str | None = field(default=None, metadata={"help": "Training rows: csv, json (lines) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation rows, likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict, likewise."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "The one or two text columns. Defaults to the task's, or to the columns that hold text."},
    )
    label_column: str = field(default="label", metadata={"help": "The column of the class: names or whole numbers."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
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
        elif self.dataset_name is None and self.train_file is None and self.validation_file is None:
            raise ValueError("Give `task_name`, `dataset_name`, or `train_file` and `validation_file`.")
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and (Path(path).suffix not in (".csv", ".json", ".jsonl", ".parquet")):
                raise ValueError(f"`{name}` must end in .csv, .json, .jsonl or .parquet. Got `{path}`.")
            if path is not None and not Path(path).is_file():
                raise ValueError(f"`{name}` must be a file. Got `{path}`, which is not there.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")


@dataclass
class GamlArguments:
    """The exits: how they are trained, and when a text leaves. `None` keeps what the model's config says."""

    exit_layers: list[int] | None = field(default=None, metadata={"help": "Layers with an exit. Defaults to all."})
    exit_pooler: str | None = field(default=None, metadata={"help": "none, shared or per_exit."})
    exit_loss_weights: str | None = field(
        default=None, metadata={"help": "linear (Eq. 1), uniform, or last (plain fine-tuning)."}
    )
    distillation: str | None = field(
        default=None,
        metadata={"help": "mutual (Eq. 3), last_to_all, none, or a JSON list of [teacher, student] layers."},
    )
    kd_reduction: str | None = field(default=None, metadata={"help": "sum (Eq. 3) or mean over the pairs."})
    kd_temperature: float | None = field(default=None, metadata={"help": "Temperature of the distillation loss."})
    alpha: float | None = field(default=None, metadata={"help": "α of Eqs. 2, 6 and 7, in [0, 1]."})
    ga_mode: str | None = field(default=None, metadata={"help": "soft (Eq. 6), hard (Eq. 7) or none (Eq. 2)."})
    ga_granularity: str | None = field(
        default=None, metadata={"help": "global (the letter of the paper), layer (default) or tensor."}
    )
    exit_strategy: str | None = field(
        default=None,
        metadata={"help": "none, budgeted, patience, entropy or max_prob. Patience where a model is trained."},
    )
    patience: int | None = field(
        default=None, metadata={"help": "For patience. Chosen for `target_speed_up` where not given."}
    )
    exit_threshold: float | None = field(
        default=None, metadata={"help": "For entropy and max_prob. Chosen for `target_speed_up` where not given."}
    )
    budgeted_exit: int | None = field(
        default=None, metadata={"help": "For budgeted. Chosen for `target_speed_up` where not given."}
    )
    target_speed_up: list[float] = field(
        default_factory=lambda: [1.8, 2.1],
        metadata={"help": "Range of the speed-up in layers for which the policy is chosen (Sec. 6.4: 1.8 to 2.1)."},
    )
    calibrate_exits: bool = field(
        default=False, metadata={"help": "Fit a temperature for each exit, so that its probabilities can be trusted."}
    )
    holdout_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training rows set aside to choose the checkpoint and the exit policy. The same rows "
            "for the same `data_seed`."
        },
    )
    latency_rows: int = field(
        default=64, metadata={"help": "Validation rows for the wall-clock speed-up; 0 leaves it out."}
    )

    def __post_init__(self):
        if self.distillation is not None and self.distillation.lstrip().startswith("["):
            self.distillation = json.loads(self.distillation)
        if len(self.target_speed_up) != 2 or not 1 <= self.target_speed_up[0] <= self.target_speed_up[1]:
            raise ValueError(
                f"`target_speed_up` must be a range such as `1.8 2.1`, from 1 up. Got {self.target_speed_up}."
            )
        if not 0 <= self.holdout_fraction < 1:
            raise ValueError(f"`holdout_fraction` must lie in [0, 1). Got {self.holdout_fraction}.")

    @property
    def policy_is_open(self) -> bool:
        """Whether the strategy's parameter is still to be chosen."""
        parameter = getattr(EXIT_POLICIES.get(self.exit_strategy), "parameter", None)
        return parameter is not None and getattr(self, parameter) is None

    def config_fields(self) -> dict:
        """What goes into [`GamlBertConfig`]; a policy whose parameter is open waits for it."""
        fields = {key: value for key, value in asdict(self).items() if key in GamlBertConfig.__annotations__}
        if self.policy_is_open:
            fields["exit_strategy"] = None
        return {key: value for key, value in fields.items() if value is not None}


@dataclass
class GamlTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the paper's protocol (Sec. 6.4) as defaults."""

    eval_strategy: str = field(default="epoch", metadata={"help": "When the held-out rows are scored."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is saved."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    metric_for_best_model: str | None = field(
        default="exit_mean", metadata={"help": "What is best. Defaults to the mean score over the exits."}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Stop after this many evaluations without a better one; 0 never stops."}
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Warm-up as a multiple of the steps in an epoch (Table 7)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where `output_dir` holds training checkpoints; deletes them."}
    )

    def __post_init__(self):
        do_eval = self.do_eval  # which the parent sets to True, for rows are scored during training; ours are held out
        super().__post_init__()
        self.do_eval = do_eval


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, GamlArguments, GamlTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, GamlArguments, GamlTrainingArguments))
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        # Turned into command-line words, so that what follows the file overrides it and both are checked alike.
        recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))  # JSON is YAML
        words: list[str] = []
        for key, value in recipe.items():
            if isinstance(value, list) and not any(isinstance(item, list) for item in value):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:
                words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        argv = words + argv[1:]
    return parser.parse_args_into_dataclasses(args=argv)


def load_rows(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """The splits, by the names they have at their source; files become train, validation and test."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: path for split, path in files.items() if path is not None}
    if files:
        suffix = {Path(path).suffix for path in files.values()}
        if len(suffix) > 1:
            raise ValueError(f"`train_file`, `validation_file` and `test_file` must be of one format. Got {files}.")
        builder = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}[suffix.pop()[1:]]
        # One by one: together, a column that only one file has would appear in all of them, full of None.
        rows = DatasetDict()
        for split, path in files.items():
            try:
                rows[split] = load_dataset(builder, data_files=path, split="train", cache_dir=model_args.cache_dir)
            except DatasetGenerationError as error:  # says nothing itself
                raise ValueError(f"`{split}_file` could not be read, {path}: {error.__cause__}") from error
        return rows
    name = data_args.dataset_name or "nyu-mll/glue"
    config_name = data_args.dataset_config_name or (None if data_args.dataset_name else data_args.task_name)
    return load_dataset(name, config_name, cache_dir=model_args.cache_dir, token=model_args.token)


def find_columns(rows: DatasetDict, data_args: DataTrainingArguments) -> list[str]:
    """The text columns, checked to be in every split."""
    features = next(iter(rows.values())).features
    if data_args.text_columns is not None:
        columns = data_args.text_columns
    elif data_args.task_name is not None:
        columns = list(get_task(data_args.task_name).text_columns)
    else:
        is_text = {"string", "large_string"}
        columns = [
            name
            for name, feature in features.items()
            if name != data_args.label_column and getattr(feature, "dtype", None) in is_text
        ]
    if len(columns) not in (1, 2):
        raise ValueError(f"`text_columns` must name one or two columns out of {list(features)}. Got {columns}.")
    for split, part in rows.items():
        missing = [column for column in columns if column not in part.column_names]
        if missing:
            raise ValueError(f"The {split} split has no column {missing}; it has {part.column_names}.")
        if len(part) == 0:
            raise ValueError(f"The {split} split is empty.")
    return columns


def find_label_names(rows: DatasetDict, data_args: DataTrainingArguments) -> list[str]:
    """The class names, in the order of the class indices."""
    column = data_args.label_column
    split = "train" if "train" in rows else next(iter(rows))
    source = rows[split]
    if column not in source.column_names:
        raise ValueError(f"`label_column` must be one of {source.column_names}. Got {column!r}.")
    feature = source.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    else:
        classes = ("string", "large_string", "int", "uint", "bool", "null")
        dtype = str(getattr(feature, "dtype", feature))
        labels = source.unique(column) if dtype.startswith((*classes, "float")) else [source[0][column]]
        # NaN is not itself; an empty cell of a csv file is None, or NaN in a column of numbers.
        missing = [x for x in labels if x is None or x != x or (isinstance(x, str) and not x.strip())]
        negative = [x for x in labels if x is not None and x < 0] if dtype.startswith("int") else []
        fractions = [] if dtype.startswith(classes) else labels
        for wrong, problem in (
            (missing, "has no label"),
            (fractions, "must be a name or a whole number (regression is outside the paper)"),
            (negative, "must not be negative, which elsewhere means that a row has no label; take such rows out"),
        ):
            if wrong:
                values = enumerate(column_values(source, column))
                row = next(row for row, x in values if x == wrong[0] or (x != x and wrong[0] != wrong[0]))
                raise ValueError(f"Row {row} of the {split} split, column {column!r}, {problem}. Got {wrong[0]!r}.")
        names = [str(label) for label in sorted(labels)]
    if len(names) < 2:
        raise ValueError(
            f"The labels of the {split} split, column {column!r}, must be of at least two classes. Got {names}."
        )
    return names


def check_texts(rows: DatasetDict, columns: list[str], allow_blank: bool) -> None:
    """Find a missing, blank or broken text before the first step, not in the middle of an epoch."""
    for split, part in rows.items():
        for column in columns:
            blank = []
            for row, text in enumerate(column_values(part, column)):
                if not isinstance(text, str):
                    raise ValueError(
                        f"Row {row} of the {split} split, column {column!r}, must be text, in valid Unicode. "
                        f"Got {text!r} ({type(text).__name__})."
                    )
                if not text.strip():
                    blank.append(row)
            if not blank:
                continue
            found = f"{len(blank)} rows of the {split} split, column {column!r}, are blank: {str(blank[:10])[1:-1]}"
            if not allow_blank:
                raise ValueError(
                    f"Row {blank[0]} of the {split} split, column {column!r}, must hold more than blanks. Got "
                    f"{part[blank[0]][column]!r}. In all, {found}. Take them out, or use them with "
                    "`--allow_blank_texts`."
                )
            logger.warning("%s.", found)


def encode_labels(part: datasets.Dataset, split: str, label2id: dict[str, int], column: str) -> list[int]:
    """Class indices of one split."""
    if column not in part.column_names:
        raise ValueError(f"The {split} split has no column {column!r} (`label_column`); it has {part.column_names}.")
    labels = list(column_values(part, column))
    if isinstance(part.features[column], datasets.ClassLabel):
        names = part.features[column].names
        labels = [names[label] if label is not None and label >= 0 else label for label in labels]
    for row, label in enumerate(labels):
        if str(label) not in label2id:
            raise ValueError(
                f"Row {row} of the {split} split, column {column!r}, must be one of {list(label2id)}. Got {label!r}."
            )
    return [label2id[str(label)] for label in labels]


def load_model(
    model_args: ModelArguments, gaml_args: GamlArguments, label_names: list[str]
) -> tuple[GamlBertForSequenceClassification, PreTrainedTokenizerBase]:
    """A model for these classes. One that was trained for them keeps its own order of the classes."""
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
    }
    name = model_args.model_name_or_path
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {label: i for i, label in enumerate(label_names)}}
    found = GamlBertConfig.from_pretrained(name, **source)
    if GamlBertForSequenceClassification.__name__ in (found.architectures or []):
        if set(found.id2label.values()) != set(label_names):
            raise ValueError(
                f"The model `{name}` was trained for the classes {list(found.id2label.values())}. The data has "
                f"{label_names}. For other classes, start from a BERT checkpoint."
            )
        labels = {}
    config = GamlBertConfig.from_pretrained(name, **source, **labels, **gaml_args.config_fields())
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, trust_remote_code=False, **source)
    return GamlBertForSequenceClassification.from_pretrained(name, config=config, **source), tokenizer


def policy_line(name: str, point: dict) -> str:
    speeds = [f"{point['speed_up']:.2f}x layers"]
    speeds += [f"{point['flops_speed_up']:.2f}x FLOPs"]
    speeds += [f"{point['latency_speed_up']:.2f}x wall clock at batch 1"] if "latency_speed_up" in point else []
    return f"{name}: {', '.join(speeds)}"


def main(argv: list[str] | None = None) -> dict:
    model_args, data_args, gaml_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    output_dir = Path(training_args.output_dir)

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
        level=logging.INFO if training_args.should_log else logging.WARNING,
    )
    for noisy in ("httpx", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)
    wants_bf16 = training_args.bf16 or training_args.bf16_full_eval
    if wants_bf16 and training_args.device.type == "cpu" and (cost := bfloat16_cost()) > 1:
        logger.warning(f"`bf16` will crawl: products take {cost:.1f} times as long as in float32 on this processor.")

    checkpoints = list(training_checkpoints(output_dir).values())
    resume = training_args.resume_from_checkpoint
    if resume in ("True", "true"):
        if not checkpoints:
            raise ValueError(f"`resume_from_checkpoint` found no checkpoint in `{output_dir}`.")
        resume = True  # the newest complete one
    elif training_args.do_train and not resume and checkpoints and not training_args.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` already holds a training run, up to `{checkpoints[0]}`. Go on with it by "
            "`--resume_from_checkpoint True`, or start anew with `--overwrite_output_dir`."
        )

    # Data
    rows = load_rows(data_args, model_args)
    task = None if data_args.task_name is None else get_task(data_args.task_name)
    needed = {"train"} if training_args.do_train else set()
    eval_splits = list(task.validation_splits) if task else ["validation"]
    test_splits = list(task.test_splits) if task else ["test"]
    needed |= set(eval_splits) if training_args.do_eval else set()
    needed |= set(test_splits) if training_args.do_predict else set()
    if not needed <= set(rows):
        raise ValueError(f"The data must have the splits {sorted(needed)}. Got {sorted(rows)}.")
    rows = DatasetDict(
        {split: rows[split] for split in [*(["train"] if "train" in rows else []), *sorted(needed - {"train"})]}
    )
    columns = find_columns(rows, data_args)
    check_texts(rows, columns, data_args.allow_blank_texts)
    label_names = find_label_names(rows, data_args)
    if task and len(label_names) != task.num_labels:
        raise ValueError(f"The task {task.name} has {task.num_labels} labels. The data has {label_names}.")

    # Model
    if gaml_args.exit_strategy is None and training_args.do_train:
        gaml_args.exit_strategy = "patience"  # the paper's (Sec. 6.5)
    model, tokenizer = load_model(model_args, gaml_args, label_names)
    config = model.config
    label_names = [config.id2label[k] for k in range(config.num_labels)]
    submission_labels: list[str] = []
    if task and training_args.do_predict:  # now, not after the training: there may be a class that GLUE does not know
        submission_labels = [task.submission_label(name) for name in label_names]

    # Tokens and labels
    labels = {
        split: encode_labels(part, split, config.label2id, data_args.label_column)
        for split, part in rows.items()
        if split not in test_splits  # whose labels, if any, are not read
    }
    max_length = min(data_args.max_seq_length, tokenizer.model_max_length, config.max_position_embeddings)

    def tokenize(batch: dict) -> dict:
        return tokenizer(
            *(batch[column] for column in columns),
            padding="max_length" if data_args.pad_to_max_length else False,
            max_length=max_length,
            truncation=True,
        )

    encoded = DatasetDict()
    with training_args.main_process_first(desc="tokenizing"):
        for split, part in rows.items():
            encoded[split] = part.map(
                tokenize,
                batched=True,
                remove_columns=part.column_names,
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenizing {split}",
            )
            if split in labels:
                encoded[split] = encoded[split].add_column("labels", labels[split])

    def first(part: datasets.Dataset, limit: int | None) -> datasets.Dataset:
        return part if limit is None else part.select(range(min(limit, len(part))))

    train_rows = holdout_rows = None
    if "train" in encoded:
        # Shuffled before it is cut: the first rows of a sorted file may all be of one class.
        shuffled = encoded["train"].shuffle(seed=training_args.data_seed or training_args.seed)
        shuffled = first(shuffled, data_args.max_train_samples)
        num_holdout = round(len(shuffled) * gaml_args.holdout_fraction)
        holdout_rows = shuffled.select(range(num_holdout)) if num_holdout else None
        train_rows = shuffled.select(range(num_holdout, len(shuffled)))
    if holdout_rows is None:
        if training_args.do_train:
            logger.warning("No rows are set aside (`holdout_fraction`): the last checkpoint is kept, not the best.")
        training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
    if gaml_args.policy_is_open and holdout_rows is None:
        raise ValueError(
            f"`exit_strategy={gaml_args.exit_strategy!r}` needs its parameter, or training rows set aside to choose "
            "it (`holdout_fraction` above 0)."
        )

    # Training
    score, main_metric = selection_scorer(GlueMetric(data_args.task_name, num_labels=len(label_names)))
    if training_args.warmup_epochs is not None and train_rows is not None:
        batch = training_args.per_device_train_batch_size * max(training_args.n_gpu, 1) * training_args.world_size
        steps = math.ceil(math.ceil(len(train_rows) / batch) / training_args.gradient_accumulation_steps)
        training_args.warmup_steps = round(training_args.warmup_epochs * steps)
    callbacks = []
    if training_args.do_train and holdout_rows is not None and training_args.early_stopping_patience > 0:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=training_args.early_stopping_patience))
    trainer = GamlTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows if training_args.do_train else None,
        eval_dataset=holdout_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=ExitMetrics(config, score, main_metric),
        callbacks=callbacks,
    )
    started = time.time()
    run: dict = {
        "command": shown_command(sys.argv[1:] if argv is None else argv),
        "model_arguments": {key: value for key, value in asdict(model_args).items() if key != "token"},
        "data_arguments": asdict(data_args),
        "training_arguments": {k: v for k, v in training_args.to_sanitized_dict().items() if "token" not in k},
        "versions": {
            "gaml_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{training_args.device.type}, threads: {torch.get_num_threads()}"
        if training_args.device.type == "cpu"
        else torch.cuda.get_device_name(training_args.device),
        "rows": {
            "train": 0 if train_rows is None else len(train_rows),
            "holdout": 0 if holdout_rows is None else len(holdout_rows),
        },
    }
    if training_args.do_train:
        if training_args.overwrite_output_dir and not resume and trainer.is_world_process_zero():
            for checkpoint in checkpoints:  # or a resume could take one of the old run
                shutil.rmtree(checkpoint)
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        run["train_metrics"] = result.metrics
        run["global_step"] = trainer.state.global_step
        run["best_step"] = trainer.state.best_global_step
        run["log_history"] = trainer.state.log_history

    # The exit policy, on the rows set aside
    chosen: OperatingPoint | None = None
    if holdout_rows is not None and (gaml_args.policy_is_open or gaml_args.calibrate_exits):
        if gaml_args.calibrate_exits:
            config.exit_temperatures = None
            exit_logits, labels = predict_exits(trainer, holdout_rows)
            config.exit_temperatures = calibrate(exit_logits, labels)
        exit_logits, labels = predict_exits(trainer, holdout_rows)
        if gaml_args.policy_is_open:
            points = sweep(exit_logits, labels, config, gaml_args.exit_strategy, score, main_metric)
            chosen = choose(points, tuple(gaml_args.target_speed_up))
            for key, value in chosen.config_fields().items():
                setattr(config, key, value)
            run["chosen"] = asdict(chosen)
    run["config"] = config.to_dict()

    # Scores
    tables: list[str] = []
    if training_args.do_eval:
        run["evaluation"], results = {}, {}
        for split, prefix in zip(eval_splits, ("eval", "eval_mm"), strict=False):
            part = first(encoded[split], data_args.max_eval_samples)
            evaluation = evaluate(trainer, part, score, main_metric, gaml_args.latency_rows)
            run["evaluation"][split] = evaluation
            flat = {f"exit_{m}": values[main_metric] for m, values in evaluation["exits"].items()}
            flat |= {"exit_mean": evaluation["exit_mean"], **evaluation["policy"], "samples": len(part)}
            results |= {f"{prefix}_{key}": value for key, value in flat.items()}
            tables.append(score_table(split, evaluation, chosen))
            if trainer.is_world_process_zero() and prefix == "eval":
                depth = {m: values[main_metric] for m, values in evaluation["exits"].items()}
                curves = {
                    strategy: [OperatingPoint(**point) for point in points]
                    for strategy, points in evaluation["curves"].items()
                }
                plots.depth_score({"exits": depth}, main_metric, output_dir / "depth_score.png")
                plots.speed_score(curves, main_metric, output_dir / "speed_score.png")
        trainer.save_metrics("eval", results)
    run["seconds"] = time.time() - started

    if training_args.do_predict:
        for i, split in enumerate(test_splits):
            part = first(encoded[split], data_args.max_predict_samples)
            logits, exit_layer = trainer.predict(part, metric_key_prefix="predict").predictions[:2]
            if trainer.is_world_process_zero():
                write_predictions(output_dir / f"predictions_{split}.tsv", logits, exit_layer, label_names)
                if task:
                    answers = [submission_labels[k] for k in logits.argmax(-1)]
                    write_submission(output_dir / task.submission_files[i], answers, task.submission_rows[i])

    # What is left behind
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")
        if training_args.do_train or chosen is not None or gaml_args.calibrate_exits:
            card = card_values(run, data_args, model_args, main_metric)
            save_checkpoint(model, tokenizer, output_dir, card={"model_name": trainer.hub_model_id} | card)
        if training_args.push_to_hub:
            url = push_checkpoint(
                output_dir,
                trainer.hub_model_id,
                private=training_args.hub_private_repo,
                revision=training_args.hub_revision,
                token=training_args.hub_token,
            )
            logger.info("Pushed to %s", url)
    if trainer.is_world_process_zero():
        print("\n".join(tables))
        print(f"Everything is in {output_dir}{os.sep}")
    return run


def evaluate(
    trainer: GamlTrainer,
    part: datasets.Dataset,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    main_metric: str,
    latency_rows: int,
) -> dict:
    """Scores of every exit, of the config's policy with its three speed-ups, and the curve of every strategy."""
    model, config = trainer.model, trainer.model.config
    exit_logits, labels = predict_exits(trainer, part)
    scores = score_exits(exit_logits, labels, config.exit_layers, score)
    predictions, exit_layer = replay(exit_logits, config)
    parameter = EXIT_POLICIES[config.exit_strategy].parameter
    policy = {
        "exit_strategy": config.exit_strategy,
        "parameter": None if parameter is None else getattr(config, parameter),
        **score(predictions, labels),
        "speed_up": layer_speed_up(exit_layer, config.num_hidden_layers),
        "flops_speed_up": flops_speed_up(model, exit_layer, [len(ids) for ids in part["input_ids"]]),
    }
    if latency_rows and config.exit_strategy != "none":
        # Evenly spaced, so that the rows' lengths are those of the split.
        spaced = np.linspace(0, len(part) - 1, min(latency_rows, len(part))).astype(int)
        latency = latency_speed_up(model, part.select(spaced).to_list())
        policy |= {f"latency_{key}": value for key, value in latency.items()}
    return {
        "rows": len(part),
        "exits": scores,
        "exit_mean": exit_mean(scores, main_metric),
        "policy": policy,
        "overthinking": overthinking(scores, main_metric),
        "most_frequent_class": score(np.full_like(labels, np.bincount(labels).argmax()), labels),
        "curves": {
            strategy: [asdict(point) for point in sweep(exit_logits, labels, config, strategy, score, main_metric)]
            for strategy in EXIT_POLICIES
            if strategy != "none"
        },
    }


def predict_exits(trainer: GamlTrainer, part: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every exit `(num_rows, num_exits, num_labels)` and labels `(num_rows,)`, in one pass."""
    output = trainer.predict(part)
    return output.predictions[2], output.label_ids


def score_table(split: str, evaluation: dict, chosen: OperatingPoint | None) -> str:
    """What a person reads at the end."""
    names = list(next(iter(evaluation["exits"].values())))
    width = max(12, *(len(name) + 2 for name in names))
    lines = [
        "",
        f"{split}: {evaluation['rows']} rows",
        "exit".ljust(22) + "".join(name.rjust(width) for name in names),
    ]
    for m, scores in evaluation["exits"].items():
        lines.append(str(m).ljust(22) + "".join(f"{scores[name]:.4f}".rjust(width) for name in names))
    lines.append("mean over exits".ljust(22) + f"{evaluation['exit_mean']:.4f}".rjust(width))
    policy = evaluation["policy"]
    name = policy["exit_strategy"] + ("" if policy["parameter"] is None else f" {policy['parameter']:.4g}")
    lines.append(name.ljust(22) + "".join(f"{policy[key]:.4f}".rjust(width) for key in names))
    lines.append(policy_line("speed-up", policy) + (" (policy chosen on rows set aside)" if chosen else ""))
    return "\n".join(lines)


def write_predictions(path: Path, logits: np.ndarray, exit_layer: np.ndarray, label_names: list[str]) -> None:
    """One line per row: index, label, its probability, and the layer at which the row left."""
    probability = torch.tensor(logits).softmax(dim=-1).numpy()
    lines = ["index\tprediction\tscore\texit_layer"]
    for row, (p, layer) in enumerate(zip(probability, exit_layer, strict=True)):
        lines.append(f"{row}\t{label_names[p.argmax()]}\t{p.max():.6f}\t{layer}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_submission(path: Path, answers: list[str], rows_wanted: int) -> None:
    """What the GLUE server takes: a line for each test row, its number from 0 and the answer."""
    lines = ["index\tprediction", *(f"{row}\t{answer}" for row, answer in enumerate(answers))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if len(answers) != rows_wanted:
        logger.warning(
            f"{path.name} has {len(answers)} rows, and the GLUE server takes {rows_wanted}: predict the whole test "
            "split of nyu-mll/glue, without `max_predict_samples`, before you submit it."
        )


def shown_command(argv: list[str]) -> str:
    """The command as it may be published: without tokens, and without the folders of this machine."""
    words = []
    for word in argv:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = option if equals else words[-1] if words and words[-1].startswith("--") else ""
        if value and "token" in name:
            value = "..."
        elif os.path.isabs(value):
            value = Path(value).name
        words.append(option + equals + value)
    return " ".join(["python run_glue_gaml.py", *map(shlex.quote, words)])


def card_values(run: dict, data_args: DataTrainingArguments, model_args: ModelArguments, main_metric: str) -> dict:
    """What the model card tells, out of what was measured here; see [`gaml_hf.hub.render_card`]."""
    config, arguments = run["config"], run["training_arguments"]
    card = {
        "base_model": model_args.model_name_or_path,
        "dataset": data_args.dataset_name or ("nyu-mll/glue" if data_args.task_name else data_args.train_file),
        "task": data_args.task_name,
        "metric_name": main_metric,
        "versions": run["versions"],
        "command": run["command"],
    }
    if "train_metrics" in run:
        card["training_arguments"] = {key: arguments[key] for key in TOLD_ARGUMENTS}
        card["training_arguments"] |= {key: config[key] for key in TOLD_FIELDS}
        card |= {"seed": arguments["seed"], "date": run["date"], "rows": {**run["rows"]}}
    if "evaluation" in run:
        split, evaluation = next(iter(run["evaluation"].items()))
        card["hardware"] = run["hardware"]
        card["rows"] = {**run["rows"], split: evaluation["rows"]}
        frequent = evaluation["most_frequent_class"][main_metric]
        card["baseline"] = ("answering the most frequent class every time", frequent)
        policy = evaluation["policy"]
        curve = evaluation["curves"].get(policy["exit_strategy"], [])
        card |= {
            "split": split,
            "exit_scores": {m: scores[main_metric] for m, scores in evaluation["exits"].items()},
            "points": [OperatingPoint(**point) for point in curve[:: max(1, len(curve) // 10)]],
            "chosen": OperatingPoint(
                policy["exit_strategy"], policy["parameter"], policy[main_metric], policy["speed_up"]
            ),
            "chosen_scores": {key: policy[key] for key in evaluation["most_frequent_class"] if key != main_metric},
            "chosen_on": "training rows set aside" if "chosen" in run else None,
            "flops_speed_up": policy["flops_speed_up"],
            "latency_speed_up": policy.get("latency_speed_up"),
        }
    return card


if __name__ == "__main__":
    main()
