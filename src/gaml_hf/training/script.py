"""
What the scripts `run_glue_gaml.py` and `run_image_classification_gaml.py` share: arguments of the exits and of the
training, and the steps that do not ask what a row is.
"""

import argparse
import contextlib
import csv
import difflib
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import transformers
import yaml
from huggingface_hub.errors import HFValidationError
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from gaml_hf.evaluation import (
    RISKS,
    ExitCertificate,
    ExitMetrics,
    OperatingPoint,
    calibrate,
    certify,
    choose,
    exit_mean,
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
from gaml_hf.evaluation.choice import has_candidates
from gaml_hf.hub import TOLD_ARGUMENTS, TOLD_FIELDS, push_checkpoint, save_checkpoint
from gaml_hf.hub.folders import training_checkpoints
from gaml_hf.models.configuration_gaml import PAPER_LETTER, GamlConfigMixin
from gaml_hf.models.engine_gaml import bfloat16_cost
from gaml_hf.models.exiting_gaml import EXIT_FIELDS, EXIT_POLICIES, changed_exits, policy_from_config
from gaml_hf.models.losses_gaml import distillation_pairs

from .trainer import GamlTrainer


logger = logging.getLogger(__name__)
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]


SWITCH = {"nargs": "?", "const": True}  # of a `bool` that may be left out: named alone, it is on


@dataclass
class GamlArguments:
    """The exits: how they are trained, and when a row leaves. `None` keeps what the model's config says."""

    config_class: ClassVar[type[GamlConfigMixin]] = GamlConfigMixin  # whose defaults a new model has
    usual_speed_up: ClassVar[tuple[float, float]] = (1.8, 2.1)  # Sec. 6.4

    exit_layers: list[int] | None = field(default=None, metadata={"help": "Layers with an exit. Defaults to all."})
    paper_letter: bool = field(
        default=False,
        metadata={
            "help": "Exits, losses, alignment and patience to the letter of the paper, but for what else is given."
        },
    )
    exit_pooling: str | None = field(
        default=None, metadata={"help": "What an exit reads: the mean over the tokens, or cls, as we read the paper."}
    )
    exit_pooler: str | None = field(default=None, metadata={"help": "none, shared or per_exit."})
    exit_norm: str | None = field(
        default=None, metadata={"help": "What scales an exit's input: none (the paper), or layer."}
    )
    exit_learning_rate_multiplier: float | None = field(
        default=None, metadata={"help": "The exits' learning rate, in times the encoder's; 1 in the paper."}
    )
    exit_warm_start: bool | None = field(
        default=None,
        metadata={"help": "Start new exits at a regression on the layers as they were pre-trained.", **SWITCH},
    )
    stop_gradient_between_exits: bool | None = field(
        default=None,
        metadata={"help": "Let each layer learn from the next exit above it alone (SWEET).", **SWITCH},
    )
    mixed_training: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the last exit learns alone, before all do."}
    )
    exit_loss_weights: str | None = field(
        default=None, metadata={"help": "linear (Eq. 1), uniform, last (plain fine-tuning), or shallow_deep."}
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
    kd_temperature_growth: float | None = field(
        default=None, metadata={"help": "Factor of the temperature where the last exit is sure (1.05: annealed)."}
    )
    alpha: float | None = field(default=None, metadata={"help": "α of Eqs. 2, 6 and 7, in [0, 1]."})
    ga_mode: str | None = field(default=None, metadata={"help": "soft (Eq. 6), hard (Eq. 7) or none (Eq. 2)."})
    ga_granularity: str | None = field(
        default=None, metadata={"help": "global (the letter of the paper), layer or tensor."}
    )
    exit_strategy: str | None = field(
        default=None,
        metadata={
            "help": "none, budgeted, patience, entropy or max_prob. Texts train for entropy, images for patience."
        },
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
            "share of the rows. The promise is made on half of the rows set aside, which choose nothing else."
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
            try:
                self.distillation = json.loads(self.distillation)
            except json.JSONDecodeError as error:
                raise ValueError(
                    "`distillation` must be mutual, last_to_all, none, or a JSON list of [teacher, student] layers "
                    f"such as `[[12, 6], [12, 3]]`. Got {self.distillation}, where JSON says: {error}."
                ) from None
        if self.max_loss is not None:
            if self.target_speed_up is not None:
                raise ValueError("`target_speed_up` and `max_loss` both choose the exit policy. Give one of them.")
            rows_needed(self.max_loss, self.confidence)  # says what is wrong with them
            if self.risk not in RISKS:
                raise ValueError(f"`risk` must be one of {list(RISKS)}. Got `risk={self.risk!r}`.")
        self.target_is_given = self.target_speed_up is not None
        if not self.target_is_given:
            self.target_speed_up = list(self.usual_speed_up)
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
        return parameter is not None and getattr(self, parameter, None) is None

    @property
    def chooses(self) -> bool:
        """Whether the rows set aside change the config: by the policy's parameter, or by temperatures."""
        return self.policy_is_open or self.calibrate_exits

    def settle_strategy(self, usual: str) -> None:
        """Where none is named: the one whose parameter is given, the paper's by its letter (Sec. 6.6), or `usual`."""
        if self.exit_strategy is None:
            usual = "patience" if self.paper_letter else usual
            given = {name: getattr(self, name) for name in EXIT_FIELDS}
            self.exit_strategy = changed_exits({"exit_strategy": usual}, given)["exit_strategy"]

    def check_policy(self) -> None:
        """Before the training: refuse a parameter that nobody could choose, and `max_loss` without one to choose."""
        if self.policy_is_open and not has_candidates(self.exit_strategy):
            parameter = EXIT_POLICIES[self.exit_strategy].parameter
            raise ValueError(
                f"`{parameter}` must be given with `exit_strategy={self.exit_strategy!r}`, a strategy of yours: what "
                "to choose it from is known of entropy, max_prob, patience and budgeted alone."
                + ("" if hasattr(self, parameter) else f" Its parameter must be one of {', '.join(EXIT_FIELDS[1:])}.")
            )
        if self.max_loss is not None and not self.policy_is_open:
            raise ValueError(
                "`max_loss` chooses the parameter of an exit strategy: give an `exit_strategy` such as entropy, and "
                f"no parameter of it. Got `exit_strategy={self.exit_strategy!r}`."
            )
        if self.target_is_given and not self.policy_is_open:
            logger.warning(
                "`target_speed_up` is not used: "
                + (
                    "the model keeps its exit policy. To choose another, give an `exit_strategy` such as entropy."
                    if self.exit_strategy is None
                    else f"of `exit_strategy={self.exit_strategy!r}` there is no parameter to choose."
                )
            )
        if self.calibrate_exits and self.exit_strategy is None:
            raise ValueError(
                "`calibrate_exits` changes the probabilities that a threshold was chosen for: give an `exit_strategy` "
                "such as entropy, whose threshold is then chosen anew. Got none."
            )

    def warn_of_unused(self, config: GamlConfigMixin) -> None:
        """Tell what is given and, as the model's config is, changes nothing in the training."""
        given = {name for name, value in asdict(self).items() if value is not None}
        if "ga_granularity" in given and config.ga_mode == "none":
            logger.warning("`ga_granularity` is not used: without `ga_mode` soft or hard nothing is aligned.")
        unused = sorted(given & {"alpha", "kd_reduction", "kd_temperature", "kd_temperature_growth"})
        if unused and not distillation_pairs(config.distillation, config.exit_layers):
            logger.warning(
                "%s not used: no exit teaches another (`distillation=%r`).",
                " and ".join(f"`{name}`" for name in unused) + (" are" if len(unused) > 1 else " is"),
                config.distillation,
            )

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
    # With 1, the last one goes at the end, and a resume could not tell that the training was over.
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best among them."})
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
        if self.prediction_loss_only:
            raise ValueError("`prediction_loss_only` must be false: exits are scored by their predictions. Got true.")
        if not self.eval_do_concat_batches:
            raise ValueError("`eval_do_concat_batches` must be true: exits are scored on all rows at once. Got false.")
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"`label_names` is labels here, whatever the data call them. Got {self.label_names}.")
        if str(self.resume_from_checkpoint).lower() == "false":  # as a recipe says it
            self.resume_from_checkpoint = None
        do_eval = self.do_eval  # which the parent sets to True, for rows are scored during training; ours are held out
        if not torch.accelerator.is_available():  # else the parent refuses bf16, and torch warns of pinned memory
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        self.do_eval = do_eval


def parse_arguments(argv: list[str], kinds: Sequence[type]) -> tuple[Any, ...]:
    """An object of each kind of arguments, out of the command line's words, of which the first may be a file."""
    # Whole names alone: of a shortened one nobody could tell that it is a token, in the command that is published.
    parser = HfArgumentParser(kinds, allow_abbrev=False, formatter_class=_defaults_of(kinds))
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        # Turned into command-line words, so that what follows the file overrides it and both are checked alike.
        try:
            recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))  # JSON is YAML
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ValueError(f"The file of arguments cannot be read: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"`{argv[0]}` must hold names and values of arguments. Got a {type(recipe).__name__}.")
        words: list[str] = []
        for key, value in recipe.items():
            if isinstance(value, list) and not any(isinstance(item, list) for item in value):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:
                words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        argv = words + argv[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except ValueError as error:  # of TrainingArguments: told as ours are
        raise ValueError(str(error)) from error
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        meant = f" Did you mean `{near[0]}`?" if near else " `--help` lists all."
        raise ValueError(f"`{unknown[0]}` is not an argument of this script.{meant}")
    return tuple(parsed)


def _defaults_of(kinds: Sequence[type]) -> type[argparse.HelpFormatter]:
    """A formatter of the help which tells what an exit's field is where nothing is given: `None` says nothing."""
    of_new = next((kind.config_class for kind in kinds if issubclass(kind, GamlArguments)), None)

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            if action.default is not None:
                return super()._get_help_string(action)
            usual = None if action.dest == "exit_strategy" else getattr(of_new, action.dest, None)
            return action.help if usual is None else f"{action.help} (default: the model's; of a new one {usual})"

    return Formatter


def balanced_class_weights(labels: list[int], label_names: list[str]) -> list[float]:
    """One per class, so that all classes weigh the same together and a row weighs 1 in the mean."""
    counts = np.bincount(labels, minlength=len(label_names))
    if not counts.all():
        raise ValueError(
            "`--class_weights balanced` needs a row of each class among the training rows. "
            f"{label_names[counts.argmin()]!r} has none there."
        )
    return (len(labels) / (len(counts) * counts)).tolist()


def policy_line(name: str, point: dict) -> str:
    speeds = [f"{point['speed_up']:.2f}x layers"]
    speeds += [f"{point['flops_speed_up']:.2f}x FLOPs"]
    speeds += [f"{point['latency_speed_up']:.2f}x wall clock at batch 1"] if "latency_speed_up" in point else []
    return f"{name}: {', '.join(speeds)}"


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


def is_own_folder(training_args: GamlTrainingArguments, model_name_or_path: str | None) -> bool:
    """Whether `output_dir` is the folder of the model that is begun with."""
    output_dir = Path(training_args.output_dir)
    model = Path(model_name_or_path) if model_name_or_path else None  # a folder, or a name on the Hub
    return model is not None and model.is_dir() and output_dir.is_dir() and model.samefile(output_dir)


def check_output_dir(
    training_args: GamlTrainingArguments, gaml_args: GamlArguments, model_name_or_path: str | None
) -> None:
    """Refuse to write over the model that is begun with, or over what its folder tells of its training."""
    if is_own_folder(training_args, model_name_or_path) and (training_args.do_train or gaml_args.chooses):
        lost = "weights" if training_args.do_train else "exit policy and model card"
        raise ValueError(
            f"`output_dir` must be another folder than `model_name_or_path`, whose {lost} this run would replace. "
            f"Got `{training_args.output_dir}` for both."
        )


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


def first(part: Any, limit: int | None) -> Any:
    return part if limit is None else part.select(range(min(limit, len(part))))


def seed_of_rows(training_args: TrainingArguments) -> int:
    """What rows are drawn by: `data_seed`, 0 as well, else `seed`."""
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def set_aside(
    rows: Any | None, limit: int | None, gaml_args: GamlArguments, training_args: GamlTrainingArguments
) -> tuple[Any | None, Any | None, Any | None]:
    """Of at most `limit` rows: those to train on, to choose checkpoint and policy, and to promise `max_loss` on."""
    train_rows = holdout_rows = promise_rows = None
    if rows is not None:
        # Shuffled before it is cut: the first rows of a sorted file may all be of one class.
        shuffled = first(rows.shuffle(seed=seed_of_rows(training_args)), limit)
        num_holdout = round(len(shuffled) * gaml_args.holdout_fraction)
        holdout_rows = shuffled.select(range(num_holdout)) if num_holdout else None
        train_rows = shuffled.select(range(num_holdout, len(shuffled)))
        if gaml_args.max_loss is not None and num_holdout:
            num_choice = num_holdout // 2
            needed = rows_needed(gaml_args.max_loss, gaml_args.confidence)
            if num_choice < needed:
                raise ValueError(
                    f"`max_loss={gaml_args.max_loss}` at `confidence={gaml_args.confidence}` needs at least {needed} "
                    "rows, and as many to choose the checkpoint. "
                    f"`holdout_fraction={gaml_args.holdout_fraction}` sets {num_holdout} of {len(shuffled)} aside. "
                    "Raise it or `max_loss`, or lower `confidence`."
                )
            promise_rows = holdout_rows.select(range(num_choice, num_holdout))
            if not training_args.do_train:
                logger.warning(
                    "What `max_loss` promises holds only if these rows had no part in making this checkpoint: neither "
                    "trained on nor set aside then. Give others than its training file, or train with `max_loss`."
                )
            holdout_rows = holdout_rows.select(range(num_choice))
        elif num_holdout and gaml_args.chooses and not training_args.do_train:
            logger.warning(
                "The exit policy is chosen on rows of the file named for training. If these made this checkpoint, its "
                "exits are surer of them than of others: give rows that had no part in it."
            )
    if holdout_rows is None:
        if training_args.do_train:
            logger.warning("No rows are set aside (`holdout_fraction`): the last checkpoint is kept, not the best.")
        training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
        if gaml_args.policy_is_open:
            raise ValueError(
                f"`exit_strategy={gaml_args.exit_strategy!r}` needs its parameter, or training rows set aside to "
                f"choose it (`holdout_fraction` above 0). Got `holdout_fraction={gaml_args.holdout_fraction}` of "
                f"{0 if rows is None else len(shuffled)} rows."
            )
        if gaml_args.calibrate_exits:
            raise ValueError(
                "`calibrate_exits` needs training rows set aside (`holdout_fraction` above 0). Got "
                f"`holdout_fraction={gaml_args.holdout_fraction}` of {0 if rows is None else len(shuffled)} rows."
            )
    return train_rows, holdout_rows, promise_rows


def count_rows(
    train_rows: Any | None, holdout_rows: Any | None, promise_rows: Any | None, do_train: bool
) -> dict[str, int]:
    """How many rows were used for what, as `run.json` and the card tell it."""
    counts = {"train": len(train_rows or ()) if do_train else 0, "holdout": len(holdout_rows or ())}
    return counts if promise_rows is None else counts | {"promise": len(promise_rows)}


def make_trainer(
    model: torch.nn.Module,
    processing_class: Any,
    data_collator: Callable,
    train_rows: Any | None,
    holdout_rows: Any | None,
    score: Score,
    main_metric: str,
    gaml_args: GamlArguments,
    training_args: GamlTrainingArguments,
) -> GamlTrainer:
    """The trainer; `train_rows["labels"]` holds their classes."""
    config, callbacks = model.config, []
    compute_metrics = ExitMetrics(config, score, main_metric)
    if training_args.do_train:
        label_names, labels = [config.id2label[k] for k in range(config.num_labels)], train_rows["labels"][:]
        callbacks.append(TrainRows.of(labels))
        gaml_args.warn_of_unused(config)
        if absent := sorted(set(range(config.num_labels)) - set(labels)):
            logger.warning(
                "No row to train on is of %s: all that there are were set aside (`holdout_fraction`), or there are "
                "none.",
                ", ".join(repr(label_names[k]) for k in absent),
            )
        if gaml_args.balances_classes:
            config.class_weights = balanced_class_weights(labels, label_names)
        if config.class_weights is not None:
            logger.info("Weights of the classes: %s.", dict(zip(label_names, config.class_weights, strict=True)))
        scores = holdout_rows is not None and training_args.eval_strategy != "no"
        if scores and training_args.early_stopping_patience > 0:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=training_args.early_stopping_patience))
        if scores and training_args.load_best_model_at_end:
            check_metric(training_args.metric_for_best_model or "loss", compute_metrics, config)
    if training_args.warmup_epochs is not None and train_rows is not None:
        batch = training_args.per_device_train_batch_size * max(training_args.n_gpu, 1) * training_args.world_size
        steps = math.ceil(math.ceil(len(train_rows) / batch) / training_args.gradient_accumulation_steps)
        training_args.warmup_steps = round(training_args.warmup_epochs * steps)
    return GamlTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows if training_args.do_train else None,
        eval_dataset=holdout_rows,
        processing_class=processing_class,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def check_metric(name: str, compute_metrics: ExitMetrics, config: GamlConfigMixin) -> None:
    """Before the training, and not after its first epoch: whether what chooses the best checkpoint is a score."""
    exit_logits = np.eye(config.num_labels, dtype=np.float32)[:, None].repeat(config.num_exits, axis=1)
    known = {"loss", *compute_metrics(EvalPrediction((None, None, exit_logits), np.arange(config.num_labels)))}
    if name.removeprefix("eval_") not in known:
        raise ValueError(f"`metric_for_best_model` must be one of {', '.join(sorted(known))}. Got {name!r}.")


def describe(
    argv: list[str], script: str, model_args: Any, data_args: Any, training_args: TrainingArguments
) -> dict[str, Any]:
    """What `run.json` tells of any run before a step is made: arguments, versions, machine. No tokens."""
    return {
        "command": shown_command(argv, script),
        "model_arguments": {key: value for key, value in asdict(model_args).items() if not is_secret(key)},
        "data_arguments": asdict(data_args),
        "training_arguments": {key: value for key, value in training_args.to_dict().items() if not is_secret(key)},
        "versions": {
            "gaml_hf": version("gaml_hf"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{training_args.device.type}, threads: {torch.get_num_threads()}"
        if training_args.device.type == "cpu"
        else torch.cuda.get_device_name(training_args.device),
    }


def train(trainer: GamlTrainer, resume: str | bool | None, old_checkpoints: Sequence[Path]) -> dict:
    """Train, anew or on from `resume`; what `run.json` tells of it."""
    if trainer.args.overwrite_output_dir and not resume and trainer.is_world_process_zero():
        for checkpoint in old_checkpoints:  # or a resume could take one of the old run
            shutil.rmtree(checkpoint)
    check_resume(trainer, resume)
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


def check_resume(trainer: GamlTrainer, resume: str | bool | None) -> None:
    """Before PyTorch does, and in a sentence: whether a checkpoint is of the model that is to go on."""
    folders = list(training_checkpoints(Path(trainer.args.output_dir)).values()) if resume is True else [resume]
    rows = next((each for each in trainer.callback_handler.callbacks if isinstance(each, TrainRows)), None)
    for folder in filter(None, folders):
        try:
            saved = type(trainer.model.config).from_pretrained(folder)
        except (OSError, ValueError):  # which the Trainer refuses or passes over
            continue
        for name in ("exit_layers", "num_hidden_layers", "id2label"):
            before, now = getattr(saved, name), getattr(trainer.model.config, name)
            if before != now:
                raise ValueError(
                    f"`resume_from_checkpoint` must go on with the model of `{folder}`, with `{name}` {before}. "
                    f"Got {now}."
                )
        if rows is not None and TrainRows.digest_in(folder) not in (None, rows.digest):
            raise ValueError(
                f"`resume_from_checkpoint` must go on with the rows of `{folder}`. Got others, so that rows which "
                "have trained would choose checkpoint and policy. Give the same training data, `seed` (or "
                "`data_seed`), `holdout_fraction` and number of rows."
            )


def leave_autocast(trainer: GamlTrainer) -> None:
    """
    From here on the model runs in the type of its weights, as everybody will run who loads them: what is chosen,
    promised, scored and timed is of that, and not of the training's `bf16` or `fp16`.
    """
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.native_amp = False


def choose_policy(
    trainer: GamlTrainer,
    holdout_rows: Any,
    promise_rows: Any | None,
    score: Score,
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


def leave(trainer: GamlTrainer, processing_class: Any, run: dict, card: dict, is_chosen: bool) -> None:
    """
    Write `run.json` and, where model or policy are new, the checkpoint; push it where that is wanted. In the model's
    own folder `run.json` goes on telling of its training, and of this run under `later`.
    """
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not args.do_train:  # nothing is said of the training that this run did not do
        if is_own_folder(args, card.get("base_model")):  # and what is known of it stays
            with contextlib.suppress(OSError, ValueError):
                run = json.loads((output_dir / "run.json").read_text(encoding="utf-8")) | {"later": run}
        card = {name: value for name, value in card.items() if name not in ("base_model", "dataset", "task")}
    (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")
    if args.do_train or is_chosen:
        _keep_readme(output_dir / "README.md")
        save_checkpoint(trainer.model, processing_class, output_dir, card={"model_name": trainer.hub_model_id} | card)
    if args.push_to_hub:
        url = push_checkpoint(
            output_dir,
            trainer.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
        )
        logger.info("Pushed to %s", url)


def _keep_readme(path: Path) -> None:
    """A README that is no model card of ours, or of a Trainer, is not lost."""
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if "2021.emnlp-main.242" not in text and "generated_from_trainer" not in text:
            path.replace(path.with_name("README.old.md"))
            logger.warning("`%s` was not a model card of this script: it is now `README.old.md`.", path)


class TrainRows(TrainerCallback, ExportableState):
    """Has each checkpoint know which rows trained it, by their classes in their order."""

    def __init__(self, digest: str):
        self.digest = digest

    @classmethod
    def of(cls, labels: Sequence[int]) -> "TrainRows":
        return cls(hashlib.sha256(np.asarray(labels, dtype=np.int64).tobytes()).hexdigest()[:16])

    @classmethod
    def digest_in(cls, checkpoint: str | Path) -> str | None:
        """That of the rows that trained `checkpoint`; None where it does not say, as one of an older version."""
        try:
            state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
            return state["stateful_callbacks"][cls.__name__]["args"]["digest"]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def state(self) -> dict:
        return {"args": {"digest": self.digest}, "attributes": {}}


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


def evaluate_splits(
    trainer: GamlTrainer,
    parts: Mapping[str, tuple[str, Any]],
    evaluate: Callable[[Any], dict],
    main_metric: str,
    *,
    draws: bool,
) -> dict[str, dict]:
    """
    Score each split once: what `run.json` tells of each.

    Args:
        parts (`dict`): of each split, the prefix of its scores and its rows.
        evaluate (`Callable`): [`evaluate`], of rows.
        draws (`bool`): whether to draw the first, for the card; not in a model's own folder, whose card stays.
    """
    evaluations, results = {}, {}
    for split, (prefix, part) in parts.items():
        evaluation = evaluations[split] = evaluate(part)
        depth = {m: values[main_metric] for m, values in evaluation["exits"].items()}
        flat = {f"exit_{m}": value for m, value in depth.items()}
        flat |= {"exit_mean": evaluation["exit_mean"], **evaluation["policy"], "samples": len(part)}
        results |= {f"{prefix}_{key}": value for key, value in flat.items()}
        if draws and trainer.is_world_process_zero() and prefix == "eval":
            curves = {
                strategy: [OperatingPoint(**point) for point in points]
                for strategy, points in evaluation["curves"].items()
            }
            output_dir = Path(trainer.args.output_dir)
            plots.depth_score({"exits": depth}, main_metric, output_dir / "depth_score.png")
            plots.speed_score(curves, main_metric, output_dir / "speed_score.png")
    trainer.save_metrics("eval", results)
    return evaluations


def evaluate(
    trainer: GamlTrainer,
    part: Any,
    score: Score,
    main_metric: str,
    latency_rows: int,
    *,
    flops: Callable[[np.ndarray], float],
    rows_of: Callable[[Any, np.ndarray], list],
) -> dict:
    """
    Scores of every exit, of the config's policy with its three speed-ups, and the curve of every strategy.

    Args:
        flops (`Callable`): from the layers at which rows left to the speed-up in FLOPs.
        rows_of (`Callable`): some rows, by their numbers, as [`latency_speed_up`] takes them.
    """
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
        "flops_speed_up": flops(
            exit_layer, one_exit=policy_from_config(config).fixed_exit(len(config.exit_layers)) is not None
        ),
    }
    if (certificate := ExitCertificate.from_config(config)) is not None:
        policy["observed_risk"] = observed_risk(exit_logits, labels, config, certificate.risk)
    if latency_rows and config.exit_strategy != "none":
        # Evenly spaced, so that the rows' lengths are those of the split.
        spaced = np.linspace(0, len(part) - 1, min(latency_rows, len(part))).astype(int)
        latency = latency_speed_up(model, rows_of(part, spaced))
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
            if strategy != "none" and has_candidates(strategy)
        },
    }


def predict_exits(trainer: GamlTrainer, part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every exit `(num_rows, num_exits, num_labels)` and labels `(num_rows,)`, in one pass."""
    output = trainer.predict(part)
    return output.predictions[2], output.label_ids


def class_counts(labels: Sequence[int], label_names: list[str]) -> dict[str, int]:
    """How many rows each class has."""
    return dict(zip(label_names, np.bincount(labels, minlength=len(label_names)).tolist(), strict=True))


def score_table(head: str, evaluation: dict, run: dict) -> str:
    """What a person reads at the end; `head` says what the rows are."""
    names = list(next(iter(evaluation["exits"].values())))
    width = max(12, *(len(name) + 2 for name in names))
    lines = ["", head, "exit".ljust(22) + "".join(name.rjust(width) for name in names)]
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


def card_values(run: dict, main_metric: str) -> dict[str, Any]:
    """What the model card tells, out of what was measured here; see [`gaml_hf.hub.render_card`]."""
    config, arguments = run["config"], run["training_arguments"]
    card = {"metric_name": main_metric, "versions": run["versions"], "command": run["command"]}
    if "global_step" in run:
        card["training_arguments"] = {key: arguments[key] for key in TOLD_ARGUMENTS}
        card["training_arguments"] |= {key: config[key] for key in TOLD_FIELDS}
        card |= {"seed": arguments["seed"], "date": run["date"], "rows": {**run["rows"]}}
    if "evaluation" in run:
        split, evaluation = next(iter(run["evaluation"].items()))
        card["hardware"] = run["hardware"]
        card["rows"] = {use: number for use, number in run["rows"].items() if number} | {split: evaluation["rows"]}
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
            "chosen_on": ("training rows set aside" if "global_step" in run else "rows of the file named for training")
            if "chosen" in run
            else None,
            "chosen_on_speed_up": run.get("chosen", {}).get("speed_up"),
            "target_speed_up": run.get("target_speed_up"),
            "flops_speed_up": policy["flops_speed_up"],
            "latency_speed_up": policy.get("latency_speed_up"),
        }
    return card


def write_predictions(
    path: Path,
    logits: np.ndarray,
    exit_layer: np.ndarray,
    label_names: list[str],
    row_names: Sequence[str] | None = None,
) -> None:
    """One line per row: index, label, its probability, the layer at which the row left, and what the row is called."""
    probability = torch.tensor(logits).softmax(dim=-1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")  # a class may be named with a tab
        table.writerow(["index", "prediction", "score", "exit_layer", *(["image"] if row_names else [])])
        for row, (p, layer) in enumerate(zip(probability, exit_layer, strict=True)):
            called = [row_names[row]] if row_names else []
            table.writerow([row, label_names[p.argmax()], f"{p.max():.6f}", layer, *called])


def is_secret(name: str) -> bool:
    """Whether an argument holds an access token: `token`, `hub_token` and the like, and no `tokenizer_name`."""
    return name == "token" or name.endswith("_token")


def shown_command(argv: list[str], script: str) -> str:
    """The command as it may be published: without tokens, and without folders outside the one it was given in."""
    words = []
    for word in argv:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = option if equals else words[-1] if words and words[-1].startswith("--") else ""
        if value and is_secret(name.lstrip("-").replace("-", "_")):
            value = "..."
        elif os.path.isabs(value) or value.startswith(("..", "~")):
            value = Path(value).name
        words.append(option + equals + value)
    return " ".join([f"python {script}", *map(shlex.quote, words)])


def command(main: Callable[[], Any]) -> str | None:
    """`main`, with what is wrong with its arguments or its rows in a sentence, where this code has one for it."""
    try:
        main()
    except (ValueError, OSError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = frame.f_globals["__name__"].partition(".")[0] in ("__main__", "gaml_hf")
        if not ours and not isinstance(error, (OSError, HFValidationError)):  # files, the network, names of models
            raise
        return f"{Path(sys.argv[0]).name}: error: {error}"
