"""
One training of the experiments, and the JSON it leaves behind (Zhu et al., 2021, Sec. 6.4).

A run is decided by a `Run`; the same `Run` always has the same file name, so that a stopped series goes on where it
stopped. The file holds arguments, versions, seconds, the log and the logits of every exit on the rows set aside and
on the validation set. Policies, scores, tables and figures are made from it later, see `reports.py`.
"""

import base64
import copy
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, load_dataset
from sklearn.model_selection import StratifiedKFold
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.baselines import BASELINES, Context
from benchmarks.machine import processor_name
from gaml_hf import PAPER_LETTER, GamlAutoConfig, GamlAutoModelForSequenceClassification, GamlTrainer
from gaml_hf.evaluation import ExitMetrics, accuracy
from gaml_hf.evaluation.glue import GlueMetric, get_task, selection_scorer
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.losses_gaml import total_loss
from gaml_hf.training.alignment import cos_angle, inner_products


# The systems that are a configuration of our own model.
ONE_EXIT = {"exit_loss_weights": "last", "distillation": "none", "ga_mode": "none"}
EXIT_SYSTEMS: dict[str, dict[str, Any]] = {
    "bert": ONE_EXIT,  # the first `layers` layers, one exit at their end; BERT-kL
    "multi-exit": {"distillation": "none", "ga_mode": "none"},  # Eq. 1: PABEE, Shallow-Deep and joint DeeBERT
    "fastbert-joint": {"distillation": "last_to_all", "ga_mode": "none"},  # FastBERT's direction, in one stage
    "fastbert-ga": {"distillation": "last_to_all", "ga_mode": "soft"},
    "ml": {"distillation": "mutual", "ga_mode": "none"},
    "gaml-hard": {"distillation": "mutual", "ga_mode": "hard"},
    "gaml-soft": {"distillation": "mutual", "ga_mode": "soft"},
    # Two stages: the second trains the exits below the last one, and nothing else.
    "deebert": ONE_EXIT,
    "fastbert": ONE_EXIT,
    # Two exits that weigh the same (Table 1).
    "pair-joint": {"exit_loss_weights": "uniform", "distillation": "none", "ga_mode": "none"},
    "pair-deep-teaches": {"exit_loss_weights": "uniform", "distillation": "deep", "ga_mode": "none"},
    "pair-shallow-teaches": {"exit_loss_weights": "uniform", "distillation": "shallow", "ga_mode": "none"},
    "pair-mutual": {"exit_loss_weights": "uniform", "distillation": "mutual", "ga_mode": "none"},
}
SECOND_STAGE = {
    "deebert": {"exit_loss_weights": "uniform", "distillation": "none"},  # Xin et al. (2020), Sec. 3.2
    "fastbert": {"distillation": "last_to_all", "alpha": 1.0},  # Liu et al. (2020), Sec. 3.3: the KL term alone
}


IMAGE_TASKS = {"cifar10": 10, "cifar100": 100}  # of images, see `images.py`; and their numbers of classes

EXIT_FIELDS = (
    "exit_pooling",
    "exit_norm",
    "exit_learning_rate_multiplier",
    "exit_warm_start",
    "stop_gradient_between_exits",
    "mixed_training",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    Everything that decides one training.

    Args:
        task (`str`): a GLUE task.
        system (`str`): a key of `EXIT_SYSTEMS` or of `baselines.BASELINES`.
        backbone (`str`): name of the encoder's checkpoint; its folder is `Settings.backbone`.
        seed (`int`): of everything that is drawn; the rows set aside depend on it too.
        learning_rate, batch_size, warmup_epochs, alpha: as in Table 7.
        epochs (`int`): at most; `early_stopping_patience` (`int`) epochs without a better mean over exits end it.
        layers (`int`, *optional*): keep only the first layers of the backbone.
        exits (`tuple[int, ...]`, *optional*): exit layers; all by default.
        max_grad_norm (`float`): clipping; 0 clips nothing.
        ga_granularity, kd_reduction (`str`): as in [`GamlConfigMixin`].
        exit_pooling, exit_norm, exit_learning_rate_multiplier, exit_warm_start, stop_gradient_between_exits,
        mixed_training: as in [`GamlConfigMixin`], by default as the paper has them. BERT-of-Theseus takes the
            first three for its one classifier; the other static baselines keep BERT's own.
        watch_angle (`bool`): measure γ of Eq. 4 at each step of a training without alignment (Fig. 3).
        fold, folds (`int`, *optional*): fold `fold` of `folds` is set aside, and validation is left alone.
        holdout_fraction (`float`): else, the share of the training rows set aside.
        max_train_rows (`int`, *optional*): use this many training rows only.
        max_length (`int`): tokens.
        bf16 (`bool`): train under bfloat16 autocast.
    """

    task: str
    system: str
    backbone: str
    seed: int
    learning_rate: float
    batch_size: int
    warmup_epochs: float
    alpha: float
    epochs: int
    early_stopping_patience: int = 5
    layers: int | None = None
    exits: tuple[int, ...] | None = None
    max_grad_norm: float = 1.0
    ga_granularity: str = "global"  # the letter of the paper, not the default of the configuration
    kd_reduction: str = GamlConfigMixin.kd_reduction
    watch_angle: bool = False
    fold: int | None = None
    folds: int | None = None
    holdout_fraction: float = 0.1
    max_train_rows: int | None = None
    max_length: int = 128
    bf16: bool = False
    exit_pooling: str = PAPER_LETTER["exit_pooling"]
    exit_norm: str = "none"
    exit_learning_rate_multiplier: float = PAPER_LETTER["exit_learning_rate_multiplier"]
    exit_warm_start: bool = PAPER_LETTER["exit_warm_start"]
    stop_gradient_between_exits: bool = False
    mixed_training: float = 0.0

    @property
    def exit_fields(self) -> dict[str, Any]:
        """What the last fields say of the exits."""
        return {name: getattr(self, name) for name in EXIT_FIELDS}

    @property
    def name(self) -> str:
        """Of its file: readable, and different for any two runs."""
        decides = asdict(self)
        for name in EXIT_FIELDS:  # left out where they are the paper's, as before there was a choice
            if decides[name] == getattr(Run, name):
                del decides[name]
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"{self.task}-{self.system}-seed{self.seed}{fold}-{digest(decides)}"

    def train(self, settings: "Settings", folder: str) -> dict[str, Any]:
        """One training, from the checkpoint to the logits."""
        return train(self, settings, folder)


def digest(decides: dict[str, Any]) -> str:
    """Ten digits that differ wherever anything that decides a run does."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Settings:
    """
    Where things are; none of it decides a result.

    Args:
        ledger (`Path`): the folder of the JSONs.
        backbone (`str`): folder or Hub name of an encoder's checkpoint.
        data (`str`, *optional*): a folder with a folder of parquet files per task; else `nyu-mll/glue`. Of images,
            `<data>/<task>/{train,test}/<class>/<image>`.
    """

    ledger: Path
    backbone: str
    data: str | None = None

    def path(self, run: Run) -> Path:
        return self.ledger / f"{run.name}.json"


def perform(run: Any, settings: Settings) -> dict[str, Any]:
    """Train, measure and write the JSON of a [`Run`] or an `ImageRun`; one whose file exists is read instead."""
    path = settings.path(run)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        result = run.train(settings, folder)
    result = {
        "run": asdict(run),
        "name": run.name,
        "seconds": time.time() - started,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{processor_name()}, {torch.get_num_threads()} thread(s)"
        ),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **result,
    }
    settings.ledger.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    line = json.dumps(result, allow_nan=False, separators=(",", ":"))  # one line a run: thousands of numbers each
    unfinished.write_text(line + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return result


def train(run: Run, settings: Settings, folder: str) -> dict[str, Any]:
    """One training, from the checkpoint to the logits."""
    kind = AutoConfig.from_pretrained(settings.backbone).model_type
    if run.system in BASELINES and kind != "bert":
        raise ValueError(
            f"The static baseline `{run.system}` is made of BERT's layers, and `{settings.backbone}` is of type "
            f"`{kind}`. Take `bert` with fewer `layers` as the static system of another encoder."
        )
    full_depth = AutoConfig.from_pretrained(settings.backbone).num_hidden_layers
    task = get_task(run.task)
    tokenizer, encoded = load_task(run.task, settings.backbone, settings.data, run.max_length)
    train_rows, held_out = set_aside(encoded["train"], run)
    steps_per_epoch = -(-len(train_rows) // run.batch_size)
    arguments = TrainingArguments(
        folder,
        seed=run.seed,
        learning_rate=run.learning_rate,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=64,
        num_train_epochs=run.epochs,
        warmup_steps=round(run.warmup_epochs * steps_per_epoch),
        max_grad_norm=run.max_grad_norm,
        bf16=run.bf16,
        use_cpu=not torch.accelerator.is_available(),
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="exit_mean",
        logging_steps=1 if run.watch_angle else 0.05,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    common = {
        "train_dataset": train_rows,
        "eval_dataset": held_out,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }
    set_seed(run.seed)
    fit = fit_exits if run.system in EXIT_SYSTEMS else fit_static
    trainer, model = fit(run, settings, arguments, common, full_depth)
    layers = model.config.num_hidden_layers
    exit_layers = list(getattr(model.config, "exit_layers", [layers]))

    score, _ = scorer(run.task)
    # Grouped by length, a stock Trainer would predict in an order that changes with the seed.
    trainer.args.train_sampling_strategy = "random"
    parts = {"held_out": held_out}
    if run.fold is None:
        parts["validation"] = encoded[task.validation_splits[0]]
    logits, labels = {}, {}
    for name, part in parts.items():
        output = trainer.predict(part)
        # (num_rows, num_exits, num_labels); a static model has one exit
        values = output.predictions[2] if isinstance(output.predictions, tuple) else output.predictions[:, None]
        logits[name], labels[name] = values.astype(np.float32), output.label_ids
    return {
        "encoder": encoder_digest(settings.backbone),
        "full_depth": full_depth,
        "layers": layers,
        "exit_layers": exit_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # Of a model without early exits: by the weights that are left to multiply by, which is by layers or heads.
        "static_speed_up": full_encoder_weights(settings.backbone) / encoder_weights(model),
        "rows": {name: len(part) for name, part in {"train": train_rows, **parts}.items()},
        "steps_per_epoch": steps_per_epoch,
        "stopped_at_step": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "exit_mean": trainer.state.best_metric,  # on the rows set aside
        "scores": {
            name: {m: score(values[:, i].argmax(-1), labels[name]) for i, m in enumerate(exit_layers)}
            for name, values in logits.items()
        },
        "log": trainer.state.log_history,
        "logits": {name: encode_array(values) for name, values in logits.items()},
        "labels": {name: values.tolist() for name, values in labels.items()},
    }


def fit_exits(
    run: Run, settings: Settings, arguments: TrainingArguments, common: dict[str, Any], full_depth: int
) -> tuple[Trainer, PreTrainedModel]:
    """Train a system of `EXIT_SYSTEMS`."""
    layers = run.layers or full_depth
    exits = list(run.exits or ([layers] if run.system == "bert" else range(1, layers + 1)))
    fields = dict(EXIT_SYSTEMS[run.system])
    if fields["distillation"] == "deep":
        fields["distillation"] = [exits[::-1]]  # [teacher, student]
    elif fields["distillation"] == "shallow":
        fields["distillation"] = [exits]
    config = GamlAutoConfig.from_pretrained(
        settings.backbone,
        num_labels=get_task(run.task).num_labels,
        num_hidden_layers=layers,
        exit_layers=exits,
        alpha=run.alpha,
        kd_reduction=run.kd_reduction,
        ga_granularity=run.ga_granularity,
        **run.exit_fields,
        **fields,
    )
    model = GamlAutoModelForSequenceClassification.from_pretrained(settings.backbone, config=config)
    kind = AngleWatcher if run.watch_angle else GamlTrainer

    def fit() -> Trainer:
        trainer = kind(
            model,
            arguments,
            compute_metrics=ExitMetrics(model.config, *scorer(run.task)),
            callbacks=[EarlyStoppingCallback(run.early_stopping_patience)],
            **common,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer

    if run.system not in SECOND_STAGE:
        return fit(), model
    arguments.metric_for_best_model = f"exit_{layers}"  # the others are not trained yet
    first = fit()
    arguments.metric_for_best_model = "exit_mean"
    vars(model.config).update(SECOND_STAGE[run.system])
    last = f"exit_classifiers.{layers}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("exit_") and not name.startswith(last)
    second = fit()
    for step in ("global_step", "best_global_step"):  # what both stages cost
        setattr(second.state, step, getattr(second.state, step) + first.state.global_step)
    return second, model


def fit_static(
    run: Run, settings: Settings, arguments: TrainingArguments, common: dict[str, Any], full_depth: int
) -> tuple[Trainer, PreTrainedModel]:
    """Train a static baseline; its model is plain BERT, with one answer."""
    baseline = BASELINES[run.system]
    plain_scores = {
        "compute_metrics": partial(one_exit_metrics, run.task),
        "callbacks": [EarlyStoppingCallback(run.early_stopping_patience)],
    }
    context = Context(
        backbone=settings.backbone,
        num_labels=get_task(run.task).num_labels,
        arguments=arguments,
        trainer_arguments=common | plain_scores,
        teacher=partial(teacher, "truncated", run, settings, arguments, common, full_depth),
        plain=partial(teacher, "bert", run, settings, arguments, common, full_depth),
        layers=run.layers or full_depth // 2,
    )
    trainer = baseline.make(context)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, baseline.finish(trainer)


def teacher(
    system: str, run: Run, settings: Settings, arguments: TrainingArguments, common: dict[str, Any], full_depth: int
) -> PreTrainedModel:
    """Plain BERT at full depth, stock or with one exit, by the same seed and recipe; kept beside the JSONs."""
    of = replace(run, system=system, layers=full_depth)
    folder = settings.ledger / "teachers" / of.name
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            arguments = copy.copy(arguments)
            arguments.output_dir = scratch
            fit = fit_exits if system in EXIT_SYSTEMS else fit_static
            _, model = fit(of, settings, arguments, common, full_depth)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(unfinished)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(unfinished)  # another shard was first, with the same one
        set_seed(run.seed)
    of_system = GamlAutoModelForSequenceClassification if system in EXIT_SYSTEMS else BertForSequenceClassification
    return of_system.from_pretrained(folder)


class AngleWatcher(GamlTrainer):
    """Mutual learning without alignment (Eq. 2), with the angle of its two gradients logged (Eq. 4, Fig. 3)."""

    @property
    def aligns(self) -> bool:
        return True  # so that the two gradients come apart

    def _align_gradients(self) -> None:
        g_kd, self._g_kd = self._g_kd, None
        pairs = [(p.grad, kd) for p, kd in zip(self._parameters(), g_kd, strict=True) if p.grad is not None]
        products = inner_products(*map(list, zip(*pairs, strict=True)))
        self.cos_angle = float(cos_angle(*(product.sum() for product in products)))
        for ce, kd in pairs:
            ce.copy_(total_loss(ce, kd, self.model.config.alpha))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs | ({"alignment/cos_angle": self.cos_angle} if "loss" in logs else {}), *args, **kwargs)


# ------------------------------------------------------------------------------------------------------------- data


@cache
def load_task(task_name: str, backbone: str, data: str | None, max_length: int) -> tuple[Any, DatasetDict]:
    """The tokenizer and the tokenized splits, with `labels`."""
    task = get_task(task_name)
    rows = load_dataset(f"{data}/{task_name}") if data else load_dataset("nyu-mll/glue", task_name)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.model_max_length = max_length

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(*(batch[column] for column in task.text_columns), truncation=True)

    encoded = DatasetDict()
    for name in ("train", *task.validation_splits):
        columns = [column for column in rows[name].column_names if column != "label"]
        encoded[name] = rows[name].map(tokenize, batched=True, remove_columns=columns).rename_column("label", "labels")
    return tokenizer, encoded


def set_aside(rows: Dataset, run: Run) -> tuple[Dataset, Dataset]:
    """The rows to train on, and those that choose the checkpoint and the policy."""
    shuffled = rows.shuffle(seed=0 if run.folds else run.seed)
    if run.max_train_rows is not None:
        shuffled = shuffled.select(range(min(run.max_train_rows, len(shuffled))))
    if run.folds:
        folds = StratifiedKFold(run.folds).split(np.zeros(len(shuffled)), shuffled["labels"])
        train, held_out = list(folds)[run.fold]
    else:
        cut = round(len(shuffled) * run.holdout_fraction)
        train, held_out = range(cut, len(shuffled)), range(cut)
    return shuffled.select(train), shuffled.select(held_out)


# ----------------------------------------------------------------------------------------------------------- scores


def scorer(task_name: str) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str]:
    """What scores a task's answers, and the name of the score that compares exits and checkpoints."""
    if task_name in IMAGE_TASKS:
        return accuracy, "accuracy"
    return selection_scorer(GlueMetric(task_name))


def main_metric(task_name: str) -> str:
    """The name of the score that tables tell."""
    return "accuracy" if task_name in IMAGE_TASKS else get_task(task_name).main_metric


def one_exit_metrics(task_name: str, prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a model with one answer."""
    score, main_metric = scorer(task_name)
    scores = score(prediction.predictions.argmax(-1), prediction.label_ids)
    return scores | {"exit_mean": scores[main_metric]}


def encoder_weights(model: torch.nn.Module) -> int:
    """Weights that each token is multiplied by in the encoder's matrices (of ALBERT, at one depth)."""
    return sum(
        module.weight.numel()
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("pooler")
    )


@cache
def full_encoder_weights(backbone: str) -> int:
    """Of the plain encoder at full depth; no weights are made for it."""
    with torch.device("meta"):
        return encoder_weights(AutoModel.from_config(AutoConfig.from_pretrained(backbone)))


@cache
def encoder_digest(backbone: str) -> str:
    """Ten digits of the encoder's weights: another checkpoint of the same name has others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a pooler that the checkpoint lacks is drawn
        weights = AutoModel.from_pretrained(backbone, dtype=torch.float32).state_dict()
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        sha256.update(name.encode() + weights[name].numpy().tobytes())
    return sha256.hexdigest()[:10]


def encode_array(values: np.ndarray) -> dict[str, Any]:
    """float32, exactly, as JSON can hold it."""
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return {"shape": list(values.shape), "float32": base64.b64encode(zlib.compress(data, 9)).decode()}


def decode_array(encoded: dict[str, Any]) -> np.ndarray:
    data = bytearray(zlib.decompress(base64.b64decode(encoded["float32"])))  # an array of bytes would be read-only
    return np.frombuffer(data, dtype="<f4").reshape(encoded["shape"])
