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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from gaml_hf import PAPER_LETTER, GamlAutoConfig, GamlAutoModelForSequenceClassification, GamlTrainer, __version__
from gaml_hf.data.files import RowFile, class_names, encode_labels, find_text_columns, known_classes, read_split
from gaml_hf.evaluation import (
    RISKS,
    ExitCertificate,
    ExitMetrics,
    OperatingPoint,
    calibrate,
    certify,
    choose,
    exit_mean,
    flops_speed_up,
    latency_speed_up,
    layer_speed_up,
    observed_risk,
    one_class_exits,
    overthinking,
    plots,
    replay,
    rows_needed,
    score_exits,
    sweep,
    warn_of_one_class,
)
from gaml_hf.evaluation.glue import GLUE_TASKS, GlueMetric, GlueTask, get_task, selection_scorer
from gaml_hf.hub import TOLD_ARGUMENTS, TOLD_FIELDS, push_checkpoint, save_checkpoint
from gaml_hf.hub.folders import training_checkpoints
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.engine_gaml import bfloat16_cost
from gaml_hf.models.exiting_gaml import EXIT_POLICIES
from gaml_hf.models.exits_gaml import ExitsMixin
from gaml_hf.models.pipeline_gaml import MIN_LENGTH


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
            "special tokens were added to it."
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


@dataclass
class GamlArguments:
    """The exits: how they are trained, and when a text leaves. `None` keeps what the model's config says."""

    exit_layers: list[int] | None = field(default=None, metadata={"help": "Layers with an exit. Defaults to all."})
    paper_letter: bool = field(
        default=False,
        metadata={"help": "Exits, losses and alignment to the letter of the paper, but for what else is given."},
    )
    exit_pooling: str | None = field(
        default=None, metadata={"help": "What an exit reads: the mean over the tokens, or cls (the paper)."}
    )
    exit_pooler: str | None = field(default=None, metadata={"help": "none, shared or per_exit."})
    exit_norm: str | None = field(
        default=None, metadata={"help": "What scales an exit's input: none (the paper), or layer."}
    )
    exit_learning_rate_multiplier: float | None = field(
        default=None, metadata={"help": "The exits' learning rate, in times the encoder's; 1 in the paper."}
    )
    exit_warm_start: bool | None = field(
        default=None, metadata={"help": "Start new exits at a regression on the layers as they were pre-trained."}
    )
    stop_gradient_between_exits: bool | None = field(
        default=None, metadata={"help": "Let each layer learn from the next exit above it alone (SWEET)."}
    )
    mixed_training: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the last exit learns alone, before all do."}
    )
    exit_loss_weights: str | None = field(
        default=None, metadata={"help": "linear (Eq. 1), uniform, or last (plain fine-tuning)."}
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "What a row of each class weighs in the loss of every exit: one number per class, in their "
            "order, or balanced: rows / (classes * rows of the class), counted on the training rows."
        },
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
    target_speed_up: list[float] | None = field(
        default=None,
        metadata={"help": "Range of the speed-up in layers for which the policy is chosen (1.8 to 2.1, as Sec. 6.4)."},
    )
    max_loss: float | None = field(
        default=None,
        metadata={
            "help": "In the place of `target_speed_up`: the fastest policy that is promised to cost at most this "
            "share of the texts. The promise is made on half of the rows set aside, which choose nothing else."
        },
    )
    confidence: float = field(default=0.9, metadata={"help": "The probability with which `max_loss` is kept."})
    risk: str = field(
        default="disagreement",
        metadata={
            "help": "What `max_loss` limits: disagreement (another answer than the last exit's) or accuracy_loss "
            "(a wrong answer where the last exit's is right)."
        },
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
        if self.max_loss is not None:
            if self.target_speed_up is not None:
                raise ValueError("`target_speed_up` and `max_loss` both choose the exit policy. Give one of them.")
            rows_needed(self.max_loss, self.confidence)  # says what is wrong with them
            if self.risk not in RISKS:
                raise ValueError(f"`risk` must be one of {list(RISKS)}. Got `risk={self.risk!r}`.")
        self.target_speed_up = [1.8, 2.1] if self.target_speed_up is None else self.target_speed_up
        if len(self.target_speed_up) != 2 or not 1 <= self.target_speed_up[0] <= self.target_speed_up[1]:
            raise ValueError(
                f"`target_speed_up` must be a range such as `1.8 2.1`, from 1 up. Got {self.target_speed_up}."
            )
        if not 0 <= self.holdout_fraction < 1:
            raise ValueError(f"`holdout_fraction` must lie in [0, 1). Got {self.holdout_fraction}.")
        if self.class_weights is not None and not self.balances_classes:
            try:
                self.class_weights = [float(weight) for weight in self.class_weights]
            except ValueError:
                raise ValueError(
                    "`class_weights` must be `balanced` or one number for each class, such as `1 2.5`. "
                    f"Got {' '.join(self.class_weights)}."
                ) from None

    @property
    def balances_classes(self) -> bool:
        """Whether the weights of the classes are still to be counted."""
        return self.class_weights == ["balanced"]

    @property
    def policy_is_open(self) -> bool:
        """Whether the strategy's parameter is still to be chosen."""
        parameter = getattr(EXIT_POLICIES.get(self.exit_strategy), "parameter", None)
        return parameter is not None and getattr(self, parameter) is None

    def config_fields(self) -> dict:
        """What goes into the config; a policy whose parameter is open waits for it."""
        own = {field.name for field in fields(GamlConfigMixin)}
        chosen = {key: value for key, value in asdict(self).items() if key in own}
        if self.policy_is_open:
            chosen["exit_strategy"] = None
        if self.balances_classes:
            chosen["class_weights"] = None
        letter = PAPER_LETTER if self.paper_letter else {}
        return letter | {key: value for key, value in chosen.items() if value is not None}


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
        if not torch.accelerator.is_available():  # else the parent refuses bf16, and torch warns of pinned memory
            self.use_cpu, self.dataloader_pin_memory = True, False
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


def balanced_class_weights(labels: list[int], label_names: list[str]) -> list[float]:
    """One per class, so that all classes weigh the same together and a row weighs 1 in the mean."""
    counts = np.bincount(labels, minlength=len(label_names))
    if not counts.all():
        raise ValueError(
            "`--class_weights balanced` needs a row of each class among the training rows. "
            f"{label_names[counts.argmin()]!r} has none there."
        )
    return (len(labels) / (len(counts) * counts)).tolist()


def load_model(
    model_args: ModelArguments, gaml_args: GamlArguments, label_names: list[str] | None, task: GlueTask | None
) -> tuple[ExitsMixin, PreTrainedTokenizerBase]:
    """A model for these classes. One that was trained for them keeps its own names and their order."""
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
            f"the model can read (`max_position_embeddings`). Got {length}."
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


def policy_line(name: str, point: dict) -> str:
    speeds = [f"{point['speed_up']:.2f}x layers"]
    speeds += [f"{point['flops_speed_up']:.2f}x FLOPs"]
    speeds += [f"{point['latency_speed_up']:.2f}x wall clock at batch 1"] if "latency_speed_up" in point else []
    return f"{name}: {', '.join(speeds)}"


def main(argv: list[str] | None = None) -> dict:
    started = time.time()
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, gaml_args, training_args = parse_arguments(argv)
    set_up(training_args)
    old_checkpoints, resume = what_to_resume(training_args)
    if gaml_args.exit_strategy is None and training_args.do_train:
        gaml_args.exit_strategy = "patience"  # the paper's (Sec. 6.5)
    if gaml_args.max_loss is not None and not gaml_args.policy_is_open:
        raise ValueError(
            "`max_loss` chooses the parameter of an exit strategy: give an `exit_strategy` such as entropy, and no "
            f"parameter of it. Got `exit_strategy={gaml_args.exit_strategy!r}`."
        )
    load_config(model_args, gaml_args, class_weights=None)  # before any row is read; the classes are not known yet

    data = read_data(model_args, data_args, training_args)
    model, tokenizer = load_model(model_args, gaml_args, data.label_names, data.task)
    encode(data, model.config, tokenizer, data_args, training_args)
    train_rows, holdout_rows, promise_rows = set_aside(data, data_args, gaml_args, training_args)
    score, main_metric = make_score(data, model.config, data_args)
    trainer = make_trainer(model, tokenizer, train_rows, holdout_rows, score, main_metric, gaml_args, training_args)
    rows = {"train": len(train_rows or ()), "holdout": len(holdout_rows or ())}
    rows |= {} if promise_rows is None else {"promise": len(promise_rows)}
    run = describe(argv, data, tokenizer, rows, model_args, data_args, training_args)

    if training_args.do_train:
        if training_args.overwrite_output_dir and not resume and trainer.is_world_process_zero():
            for checkpoint in old_checkpoints:  # or a resume could take one of the old run
                shutil.rmtree(checkpoint)
        run |= train(trainer, resume)
    is_chosen = holdout_rows is not None and (gaml_args.policy_is_open or gaml_args.calibrate_exits)
    if is_chosen:
        run |= choose_policy(trainer, holdout_rows, promise_rows, score, main_metric, gaml_args)
    run["config"] = model.config.to_dict()
    tables = []
    if training_args.do_eval:
        run["evaluation"], tables = evaluate_splits(trainer, data, run, score, main_metric, data_args, gaml_args)
    run["seconds"] = time.time() - started
    if training_args.do_predict:
        predict(trainer, data, data_args.max_predict_samples)
    if trainer.is_world_process_zero():
        leave(trainer, tokenizer, run, card_values(run, data_args, model_args, main_metric), is_chosen)
        print("\n".join(tables))
        print(f"Everything is in {training_args.output_dir.rstrip(os.sep)}{os.sep}")
    return run


def set_up(training_args: GamlTrainingArguments) -> None:
    """Log, seed, and a word where bfloat16 will crawl."""
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


def what_to_resume(training_args: GamlTrainingArguments) -> tuple[list[Path], str | bool | None]:
    """The training checkpoints in `output_dir`, and what the Trainer is to go on from: a folder, or `True`."""
    output_dir = Path(training_args.output_dir)
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
    return checkpoints, resume


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


def read_data(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments) -> Data:
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
    if columns is None:
        columns = find_text_columns(sources[splits[0]], data_args.label_column)
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
            if len(label_names) < 2:
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


def first(part: Dataset, limit: int | None) -> Dataset:
    return part if limit is None else part.select(range(min(limit, len(part))))


def set_aside(
    data: Data, data_args: DataTrainingArguments, gaml_args: GamlArguments, training_args: GamlTrainingArguments
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The rows to train on, those set aside to choose checkpoint and policy, and those set aside to promise on."""
    train_rows = holdout_rows = promise_rows = None
    if "train" in data.rows:
        # Shuffled before it is cut: the first rows of a sorted file may all be of one class.
        shuffled = data.rows["train"].shuffle(seed=training_args.data_seed or training_args.seed)
        shuffled = first(shuffled, data_args.max_train_samples)
        num_holdout = round(len(shuffled) * gaml_args.holdout_fraction)
        holdout_rows = shuffled.select(range(num_holdout)) if num_holdout else None
        train_rows = shuffled.select(range(num_holdout, len(shuffled)))
        if gaml_args.max_loss is not None and num_holdout:
            num_choice = num_holdout // 2
            needed = rows_needed(gaml_args.max_loss, gaml_args.confidence)
            if num_holdout - num_choice < needed:
                raise ValueError(
                    f"`max_loss={gaml_args.max_loss}` at `confidence={gaml_args.confidence}` needs at least {needed} "
                    "rows, and as many to choose the checkpoint. "
                    f"`holdout_fraction={gaml_args.holdout_fraction}` sets {num_holdout} of {len(shuffled)} aside. "
                    "Raise it or `max_loss`, or lower `confidence`."
                )
            promise_rows = holdout_rows.select(range(num_choice, num_holdout))
            holdout_rows = holdout_rows.select(range(num_choice))
    if holdout_rows is None:
        if training_args.do_train:
            logger.warning("No rows are set aside (`holdout_fraction`): the last checkpoint is kept, not the best.")
        training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
        if gaml_args.policy_is_open:
            raise ValueError(
                f"`exit_strategy={gaml_args.exit_strategy!r}` needs its parameter, or training rows set aside to "
                "choose it (`holdout_fraction` above 0)."
            )
    return train_rows, holdout_rows, promise_rows


# Training


def make_score(
    data: Data, config: GamlConfigMixin, data_args: DataTrainingArguments
) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str]:
    """The scores of one list of predictions, and the name of the one that is compared."""
    positive_class = data.classes.get(data.positive_label)
    return selection_scorer(GlueMetric(data_args.task_name, config.num_labels, positive_class=positive_class))


def make_trainer(
    model: ExitsMixin,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset | None,
    holdout_rows: Dataset | None,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    main_metric: str,
    gaml_args: GamlArguments,
    training_args: GamlTrainingArguments,
) -> GamlTrainer:
    config, callbacks = model.config, []
    if training_args.do_train:
        label_names = [config.id2label[k] for k in range(config.num_labels)]
        if gaml_args.balances_classes:
            config.class_weights = balanced_class_weights(train_rows["labels"][:], label_names)
        if config.class_weights is not None:
            logger.info("Weights of the classes: %s.", dict(zip(label_names, config.class_weights, strict=True)))
        if holdout_rows is not None and training_args.early_stopping_patience > 0:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=training_args.early_stopping_patience))
    if training_args.warmup_epochs is not None and train_rows is not None:
        batch = training_args.per_device_train_batch_size * max(training_args.n_gpu, 1) * training_args.world_size
        steps = math.ceil(math.ceil(len(train_rows) / batch) / training_args.gradient_accumulation_steps)
        training_args.warmup_steps = round(training_args.warmup_epochs * steps)
    return GamlTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows if training_args.do_train else None,
        eval_dataset=holdout_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        compute_metrics=ExitMetrics(config, score, main_metric),
        callbacks=callbacks,
    )


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
    return {
        "command": shown_command(argv),
        "model_arguments": {key: value for key, value in asdict(model_args).items() if key != "token"},
        "data_arguments": asdict(data_args),
        "training_arguments": {key: value for key, value in training_args.to_dict().items() if "token" not in key},
        "max_length": tokenizer.model_max_length,
        "split_special_tokens": tokenizer.split_special_tokens,
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
        "rows": rows,
        "columns": {"text": data.columns, "label": data_args.label_column},
        "classes": data.class_counts(),
        "positive_label": data.positive_label,
    }


def train(trainer: GamlTrainer, resume: str | bool | None) -> dict:
    """Train; what `run.json` tells of it."""
    trainer.add_callback(first_step := FirstStep())
    result = trainer.train(resume_from_checkpoint=resume)
    run = {"global_step": trainer.state.global_step, "best_step": trainer.state.best_global_step}
    steps = trainer.state.global_step - first_step.value
    if steps > 0:
        metrics = result.metrics | {"train_steps": steps}  # after a resume, not all there were
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        return run | {"train_metrics": metrics, "log_history": trainer.state.log_history}
    # The Trainer has told, and logged, a training of no time and a loss of 0.
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return run | {"log_history": log} | finished_run(Path(trainer.args.output_dir), trainer.state.global_step)


def choose_policy(
    trainer: GamlTrainer,
    holdout_rows: Dataset,
    promise_rows: Dataset | None,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    main_metric: str,
    gaml_args: GamlArguments,
) -> dict:
    """Temperatures, the policy's parameter and what is promised of it, by the rows set aside, into the config."""
    config, run = trainer.model.config, {}
    if gaml_args.calibrate_exits:
        config.exit_temperatures = None
        exit_logits, labels = predict_exits(trainer, holdout_rows)
        config.exit_temperatures = calibrate(exit_logits, labels)
    exit_logits, labels = predict_exits(trainer, holdout_rows)
    if promise_rows is not None:
        found = certify(
            *predict_exits(trainer, promise_rows),
            config,
            gaml_args.exit_strategy,
            gaml_args.max_loss,
            gaml_args.confidence,
            risk=gaml_args.risk,
        )
        for key, value in found.config_fields().items():
            setattr(config, key, value)
        run = {"certificate": asdict(found)}
    elif gaml_args.policy_is_open:
        points = sweep(exit_logits, labels, config, gaml_args.exit_strategy, score, main_metric)
        chosen = choose(points, tuple(gaml_args.target_speed_up))
        for key, value in chosen.config_fields().items():
            setattr(config, key, value)
        run = {"chosen": asdict(chosen), "target_speed_up": gaml_args.target_speed_up}
    warn_of_one_class(exit_logits, config)
    return run


# Use


def evaluate_splits(
    trainer: GamlTrainer,
    data: Data,
    run: dict,
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    main_metric: str,
    data_args: DataTrainingArguments,
    gaml_args: GamlArguments,
) -> tuple[dict, list[str]]:
    """Score each validation split once: what `run.json` tells of each, and a table of each. Draws the first."""
    evaluations, tables, results = {}, [], {}
    for split, prefix in zip(data.eval_splits, ("eval", "eval_mm"), strict=False):
        part = first(data.rows[split], data_args.max_eval_samples)
        evaluation = evaluations[split] = evaluate(trainer, part, score, main_metric, gaml_args.latency_rows)
        depth = {m: values[main_metric] for m, values in evaluation["exits"].items()}
        flat = {f"exit_{m}": value for m, value in depth.items()}
        flat |= {"exit_mean": evaluation["exit_mean"], **evaluation["policy"], "samples": len(part)}
        results |= {f"{prefix}_{key}": value for key, value in flat.items()}
        tables.append(score_table(split, evaluation, run))
        if trainer.is_world_process_zero() and prefix == "eval":
            curves = {
                strategy: [OperatingPoint(**point) for point in points]
                for strategy, points in evaluation["curves"].items()
            }
            output_dir = Path(trainer.args.output_dir)
            plots.depth_score({"exits": depth}, main_metric, output_dir / "depth_score.png")
            plots.speed_score(curves, main_metric, output_dir / "speed_score.png")
    trainer.save_metrics("eval", results)
    return evaluations, tables


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


def leave(trainer: GamlTrainer, tokenizer: PreTrainedTokenizerBase, run: dict, card: dict, is_chosen: bool) -> None:
    """Write `run.json` and, where model or policy are new, the checkpoint; push it where that is wanted."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")
    if args.do_train or is_chosen:
        save_checkpoint(trainer.model, tokenizer, output_dir, card={"model_name": trainer.hub_model_id} | card)
    if args.push_to_hub:
        url = push_checkpoint(
            output_dir,
            trainer.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        logger.info("Pushed to %s", url)


class FirstStep(TrainerCallback):
    """Remembers the step at which the training began: not 0 after a resume."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.value = state.global_step


def finished_run(output_dir: Path, step: int) -> dict:
    """What `run.json` tells of a training that had already made its last step when it was resumed."""
    path = output_dir / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = run.get("global_step") == step and "train_metrics" in run
    logger.info(
        f"The training was over, at step {step}. "
        + ("Its time and loss stay as they were." if known else "Its time and loss are not known any more.")
    )
    return {key: run[key] for key in ("train_metrics", "log_history")} if known else {}


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
    if (certificate := ExitCertificate.from_config(config)) is not None:
        policy["observed_risk"] = observed_risk(exit_logits, labels, config, certificate.risk)
    if latency_rows and config.exit_strategy != "none":
        # Evenly spaced, so that the rows' lengths are those of the split.
        spaced = np.linspace(0, len(part) - 1, min(latency_rows, len(part))).astype(int)
        latency = latency_speed_up(model, part.select(spaced).to_list())
        policy |= {f"latency_{key}": value for key, value in latency.items()}
    return {
        "rows": len(part),
        "classes": class_counts(labels, [config.id2label[k] for k in range(config.num_labels)]),
        "exits": scores,
        "exit_mean": exit_mean(scores, main_metric),
        "one_class_exits": one_class_exits(exit_logits, config.exit_layers),
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


def class_counts(labels: Sequence[int], label_names: list[str]) -> dict[str, int]:
    """How many rows each class has."""
    return dict(zip(label_names, np.bincount(labels, minlength=len(label_names)).tolist(), strict=True))


def score_table(split: str, evaluation: dict, run: dict) -> str:
    """What a person reads at the end."""
    f1_of = "" if run["positive_label"] is None else f"; f1 is that of class {run['positive_label']}"
    names = list(next(iter(evaluation["exits"].values())))
    width = max(12, *(len(name) + 2 for name in names))
    lines = [
        "",
        f"{split}: {evaluation['rows']} rows, cut to {run['max_length']} tokens; "
        f"text: {' + '.join(run['columns']['text'])}; "
        f"{run['columns']['label']}: {', '.join(f'{name!r} {n}' for name, n in evaluation['classes'].items())}{f1_of}",
        "exit".ljust(22) + "".join(name.rjust(width) for name in names),
    ]
    for m, scores in evaluation["exits"].items():
        mark = "  one class" if m in evaluation["one_class_exits"] else ""
        lines.append(str(m).ljust(22) + "".join(f"{scores[name]:.4f}".rjust(width) for name in names) + mark)
    lines.append("mean over exits".ljust(22) + f"{evaluation['exit_mean']:.4f}".rjust(width))
    policy = evaluation["policy"]
    name = policy["exit_strategy"] + ("" if policy["parameter"] is None else f" {policy['parameter']:.4g}")
    lines.append(name.ljust(22) + "".join(f"{policy[key]:.4f}".rjust(width) for key in names))
    lines.append(policy_line("speed-up", policy))
    if run["config"]["exit_certificate"] is not None:
        found = ExitCertificate(**run["config"]["exit_certificate"])
        lines.append(
            f"promised: {found.promise()} ({found.num_rows} rows set aside, {found.num_lost} lost); "
            f"here {policy['observed_risk']:.4f}"
        )
    if "chosen" in run:
        low, high = run["target_speed_up"]
        missed = "" if low <= policy["speed_up"] <= high else ": missed"
        lines.append(
            f"wanted: {low:.2f}x to {high:.2f}x layers{missed} (policy chosen on rows set aside, where it gave "
            f"{run['chosen']['speed_up']:.2f}x)"
        )
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
        "text_columns": run["columns"]["text"],
        "label_column": run["columns"]["label"],
        "max_length": run["max_length"],
    }
    if "global_step" in run:
        card["training_arguments"] = {"max_seq_length": run["max_length"]}
        card["training_arguments"] |= {key: arguments[key] for key in TOLD_ARGUMENTS}
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
            "chosen_scores": {
                f"f1 of class {run['positive_label']}" if key == "f1" else key: policy[key]
                for key in evaluation["most_frequent_class"]
                if key != main_metric
            },
            "chosen_on": "training rows set aside" if "chosen" in run else None,
            "chosen_on_speed_up": run.get("chosen", {}).get("speed_up"),
            "target_speed_up": run.get("target_speed_up"),
            "flops_speed_up": policy["flops_speed_up"],
            "latency_speed_up": policy.get("latency_speed_up"),
        }
    return card


def command() -> str | None:
    """[`main`], with what is wrong with its arguments or its rows in a sentence, where this code has one for it."""
    try:
        main()
    except (ValueError, OSError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].partition(".")[0] not in ("__main__", "gaml_hf"):
            raise
        return f"{Path(sys.argv[0]).name}: error: {error}"


if __name__ == "__main__":
    sys.exit(command())
