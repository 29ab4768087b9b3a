"""The model card: what was measured, and how to use the model."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import requires
from math import isfinite
from pathlib import Path

import torch
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gaml_hf.evaluation import ExitCertificate, OperatingPoint
from gaml_hf.models.auto import classes_of
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.exiting_gaml import EXIT_POLICIES


# What a card tells of a training: fields of TrainingArguments and of the config.
TOLD_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "max_grad_norm",
    "optim",
    "fp16",
    "bf16",
)
TOLD_FIELDS = (
    "exit_pooling",
    "exit_norm",
    "exit_learning_rate_multiplier",
    "exit_warm_start",
    "stop_gradient_between_exits",
    "mixed_training",
    "exit_loss_weights",
    "class_weights",
    "distillation",
    "kd_reduction",
    "kd_temperature",
    "alpha",
    "ga_mode",
    "ga_granularity",
)
# Drawn by `plots.py`; shown in the card when they lie in the folder.
FIGURES = {
    "depth_score.png": "Score of each exit against its depth",
    "speed_score.png": "Score against speed-up",
}


def render_card(
    config: GamlConfigMixin,
    *,
    model_name: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    task: str | None = None,
    split: str | None = None,
    metric_name: str | None = None,
    exit_scores: Mapping[int, float] | None = None,
    points: Sequence[OperatingPoint] = (),
    chosen: OperatingPoint | None = None,
    chosen_scores: Mapping[str, float] | None = None,
    chosen_on: str | None = None,
    chosen_on_speed_up: float | None = None,
    target_speed_up: Sequence[float] | None = None,
    flops_speed_up: float | None = None,
    latency_speed_up: float | None = None,
    rows: Mapping[str, int] | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    baseline: tuple[str, float] | None = None,
    training_arguments: Mapping | None = None,
    seed: int | None = None,
    date: str | None = None,
    hardware: str | None = None,
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
    license: str | None = None,
    language: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """
    The model card, from `model_card.md`. Only what is given appears; a score that is None or NaN was not measured.

    All scores are of `metric_name`, in its own unit.

    Args:
        config ([`GamlConfigMixin`]): of the model; gives exits, labels and the exit strategy it is saved with.
        model_name (`str`, *optional*): the Hub id (`user/name`), or a name.
        base_model (`str`, *optional*): the checkpoint it started from; a local folder is named, never linked.
        dataset (`str`, *optional*): what it was trained on, if possible a Hub id (`nyu-mll/glue`).
        task (`str`, *optional*): the configuration of that dataset (`sst2`).
        split (`str`, *optional*): the split that gave the scores (`validation`).
        metric_name (`str`, *optional*): the metric of the scores (`accuracy`). Without it no score is shown.
        exit_scores (`dict[int, float]`, *optional*): score of each exit, by layer.
        points (`list[OperatingPoint]`, *optional*): the curve of score against speed-up.
        chosen ([`OperatingPoint`], *optional*): the one to use, which is the first number a reader sees.
        chosen_scores (`dict[str, float]`, *optional*): of `chosen`, where `metric_name` is the mean of several.
        chosen_on (`str`, *optional*): the rows that `chosen` was chosen on.
        chosen_on_speed_up (`float`, *optional*): the speed-up in layers on those rows.
        target_speed_up (`list[float]` of two numbers, *optional*):
            The range of speed-ups that was wanted. The card says where `chosen` missed it.
        flops_speed_up (`float`, *optional*): of `chosen`, in FLOPs instead of layers.
        latency_speed_up (`float`, *optional*): of `chosen`, on the clock at batch 1 on `hardware`.
        rows (`dict[str, int]`, *optional*): how many rows were used for what.
        label_column (`str`, *optional*): the column of the classes.
        max_length (`int`, *optional*): tokens to which a text is cut.
        baseline (`tuple[str, float]`, *optional*): something to compare with: its name and score.
        training_arguments (`dict`, *optional*): those worth printing, as they come: no paths, no tokens.
        seed (`int`), date (`str`), hardware (`str`), command (`str`), *optional*: of the training run.
        versions (`dict[str, str]`, *optional*): of the libraries.
        license (`str`), language (`str`), *optional*: Hub identifiers (`apache-2.0`, `en`).
        figures (`list[str]`, *optional*): file names in the folder, out of `FIGURES`.

    Returns:
        `str`: the text of `README.md`.
    """
    exit_scores = {int(layer): score for layer, score in (exit_scores or {}).items() if _measured(score)}
    points = [point for point in points if _measured(point.score, point.speed_up)]
    chosen = chosen if chosen and _measured(chosen.score, chosen.speed_up) else None
    baseline = baseline if baseline and _measured(baseline[1]) else None
    parts = {name: score for name, score in (chosen_scores or {}).items() if _measured(score)}
    if metric_name is None:
        exit_scores, points, chosen, baseline = {}, [], None, None
    if chosen is None or len(parts) < 2:
        parts = {}
    run = {f"rows, {use}": number for use, number in (rows or {}).items()}
    run |= {"seed": seed, "date": date, "hardware": hardware, **{f"`{k}`": v for k, v in (versions or {}).items()}}

    is_text = config.pipeline_type == "text"
    name = model_name or ("gaml-bert" if is_text else "gaml-images")
    layers = config.num_hidden_layers
    results = []  # metric, what it is of, score
    if chosen is not None:
        at = f"at {chosen.speed_up:.2f}x ({_policy(chosen.config_fields())})"
        results += [(key, f"{key} {at}", score) for key, score in (parts or {metric_name: chosen.score}).items()]
    if layers in exit_scores:
        results.append((metric_name, f"{metric_name}, last exit", exit_scores[layers]))
    data = ModelCardData(
        model_name=name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=config.pipeline_task,
        base_model=_hub_id(base_model),
        datasets=[dataset] if _hub_id(dataset) else None,
        metrics=list(parts) or ([metric_name] if metric_name else None),
        tags=["gaml-bert" if is_text else "gaml", "early-exit"],
        eval_results=[
            EvalResult(
                task_type=config.pipeline_task,
                dataset_type=dataset,
                dataset_name=f"{dataset} ({task})" if task else dataset,
                dataset_config=task,
                dataset_split=split,
                metric_type=metric,
                metric_name=label,
                metric_value=score,
            )
            for metric, label, score in results
            if _hub_id(dataset)
        ]
        or None,
    )
    if data.eval_results is None:  # the name belongs to the results; alone it is not a field of the Hub
        data.model_name = None
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=name,
        config=config,
        is_text=is_text,
        heads=None if is_text else _head_parameters(config),
        requirement=next(name for name in requires("gaml_hf") if name.startswith("transformers")),
        labels=[config.id2label[index] for index in sorted(config.id2label)],
        start=base_model if _hub_id(base_model) else base_model and Path(base_model).name,
        start_is_on_hub=_hub_id(base_model) is not None,
        dataset=dataset if _hub_id(dataset) else dataset and Path(dataset).name,
        task=task,
        split=split,
        metric_name=metric_name,
        exits=[(m, layers / m, exit_scores.get(m)) for m in config.exit_layers],
        has_scores=bool(exit_scores),
        policy=_policy(_config_fields(config)),
        certificate=ExitCertificate.from_config(config),
        points=[(_policy(p.config_fields()), p.score, p.speed_up) for p in sorted(points, key=lambda p: p.speed_up)],
        chosen=chosen and (_policy(chosen.config_fields()), chosen.score, chosen.speed_up),
        parts=parts,
        chosen_on=chosen_on,
        chosen_on_speed_up=chosen_on_speed_up,
        target_speed_up=target_speed_up,
        missed=chosen is not None and target_speed_up is not None and not chosen.within(tuple(target_speed_up)),
        text_columns=config.text_columns or [],
        label_column=label_column,
        max_length=max_length,
        flops_speed_up=flops_speed_up if _measured(flops_speed_up) else None,
        latency_speed_up=latency_speed_up if _measured(latency_speed_up) else None,
        baseline=baseline,
        training_arguments=_printable(training_arguments),
        run=_printable(run),
        command=command,
        figures=[(figure, FIGURES[figure]) for figure in figures],
    )
    return str(card) + "\n"


def _head_parameters(config: GamlConfigMixin) -> tuple[int, int]:
    """Parameters of the exits that a plain network has not, and of the network."""
    with torch.device("meta"):  # shapes alone
        return classes_of(config.model_type)[1](config).head_parameters()


def _measured(*values: float | None) -> bool:
    return all(value is not None and isfinite(value) for value in values)


def _config_fields(config: GamlConfigMixin) -> dict:
    """The exit strategy of `config` and the one field that it reads."""
    parameter = EXIT_POLICIES[config.exit_strategy].parameter
    return {"exit_strategy": config.exit_strategy} | ({parameter: getattr(config, parameter)} if parameter else {})


def _policy(fields: Mapping) -> str:
    """How a card names a policy: as keyword arguments, which can be copied from there."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in fields.items())


def _printable(values: Mapping | None) -> dict[str, str]:
    """Cells of a Markdown table, without those that say nothing."""
    nothing = [("max_steps", -1)]  # to TrainingArguments, no limit
    shown = {key: value for key, value in (values or {}).items() if value is not None and (key, value) not in nothing}
    return {key: str(value).replace("|", r"\|") for key, value in shown.items()}


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository on the Hub; the Hub refuses a card whose metadata name anything else."""
    if name is None or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
