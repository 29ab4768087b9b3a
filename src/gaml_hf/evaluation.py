"""
What one pass over the data tells: the score of every exit, and the score and speed-up of every exit policy.

The speed-up has three names for three quantities, and none stands in for another:
- in layers (`layer_speed_up`; the paper's and PABEE's): `num_hidden_layers / mean layers run`. Counts layers only.
- in FLOPs (`flops_speed_up`): matrix multiplications of plain BERT over those of the layers and exits that ran.
- in latency (`latency_speed_up`): seconds of plain BERT over seconds with exiting; of one machine and batch size.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import logging

from .exiting_gaml import ExitPolicy, FullDepth, normalized_entropy, policy_class, policy_from_config


logger = logging.get_logger(__name__)

# `(predictions, references)`, both of shape `(num_rows,)`, to the scores by name; `GlueMetric.compute`, say.
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]

NUM_THRESHOLDS = 49  # of a sweep, beside 0 and 1

# Beyond these the NLL has no minimum worth the name: every row is right, or the logits know less than chance.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class OperatingPoint:
    """
    One point of the speed-score curve.

    Args:
        exit_strategy (`str`): as in [`GamlBertConfig`].
        parameter (`int` or `float`, *optional*): the strategy's patience, threshold or exit; None for `"none"`.
        score (`float`): the main metric of the policy's answers.
        speed_up (`float`): in layers, `num_hidden_layers / mean layers run`, from 1.
    """

    exit_strategy: str
    parameter: int | float | None
    score: float
    speed_up: float

    def config_fields(self) -> dict[str, Any]:
        """What to set on the config for this point, as `{"exit_strategy": "patience", "patience": 3}`."""
        return _policy_fields(self.exit_strategy, self.parameter)

    def within(self, target: tuple[float, float]) -> bool:
        """Whether the speed-up lies in `target`, both ends included."""
        return target[0] <= self.speed_up <= target[1]


# Scores


def score_exits(
    exit_logits: np.ndarray | Tensor, labels: np.ndarray | Tensor, exit_layers: Sequence[int], score: Score
) -> dict[int, dict[str, float]]:
    """
    Score of each exit, as if every row left there (budgeted exiting; Fig. 4 of Zhu et al., 2021).

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): classes.
        exit_layers (`list[int]`): the layers of the exits, from 1; `config.exit_layers`.
        score (`Callable`): `(predictions, references) -> dict[str, float]`, `GlueMetric.compute` say.

    Returns:
        `dict[int, dict[str, float]]`: the scores by exit layer.

    Raises:
        ValueError: shapes do not agree, there is no row, or a logit is not finite.
    """
    exit_logits = _check_exit_logits(exit_logits, exit_layers)
    labels = _check_labels(labels, exit_logits)
    predictions = exit_logits.argmax(dim=-1).numpy()  # (num_rows, num_exits)
    return {m: score(predictions[:, i], labels) for i, m in enumerate(exit_layers)}


def exit_mean(scores: Mapping[int, Mapping[str, float]], main_metric: str) -> float:
    """
    Mean of the main metric over all exits, by which the paper chooses checkpoints (Zhu et al., 2021, Sec. 6.4).

    Args:
        scores (`dict[int, dict[str, float]]`): what `score_exits` returned.
        main_metric (`str`): one of the names in it.
    """
    return float(np.mean([_main_score(scores[m], main_metric) for m in scores]))


def overthinking(scores: Mapping[int, Mapping[str, float]], main_metric: str) -> dict[str, int | float]:
    """
    Does the deepest exit answer best? Where it does not, the model over-thinks (Zhu et al., 2021, Appendix A, Fig. 5).

    Args:
        scores (`dict[int, dict[str, float]]`): what `score_exits` returned.
        main_metric (`str`): one of the names in it.

    Returns:
        `dict`: `best_exit` (the shallowest among equals), `best_score`, `last_exit`, `last_score`, and `gap`, best
        minus last: 0 where nothing is over-thought.
    """
    main = {m: _main_score(scores[m], main_metric) for m in sorted(scores)}
    best, last = max(main, key=main.get), max(main)
    return {
        "best_exit": best,
        "best_score": main[best],
        "last_exit": last,
        "last_score": main[last],
        "gap": main[best] - main[last],
    }


def one_class_exits(exit_logits: np.ndarray | Tensor, exit_layers: Sequence[int]) -> list[int]:
    """
    The exits that answer every row with one and the same class: they have learned nothing yet, and what they agree on
    is no evidence.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        exit_layers (`list[int]`): the layers of the exits, from 1; `config.exit_layers`.

    Returns:
        `list[int]`: their layers. None of one row.
    """
    predictions = _check_exit_logits(exit_logits, exit_layers).argmax(dim=-1)  # (num_rows, num_exits)
    same = (predictions == predictions[:1]).all(dim=0) & (len(predictions) > 1)
    return [m for m, is_same in zip(exit_layers, same.tolist(), strict=True) if is_same]


def warn_of_one_class(exit_logits: np.ndarray | Tensor, config: Any) -> None:
    """Warn where the config's exit policy lets rows leave at exits that answer everything with one class."""
    blind = one_class_exits(exit_logits, config.exit_layers)
    _, exit_layer = replay(exit_logits, config)
    share = np.isin(exit_layer, blind).mean()
    if share:
        logger.warning(
            f"{share:.0%} of the rows leave at the exits {str(blind)[1:-1]}, which answer every row with one class. "
            "Choose a slower policy, `entropy` or `max_prob` in place of `patience`, or train longer."
        )


class ExitMetrics:
    """
    `compute_metrics` of a Trainer: one evaluation scores every exit, and the config's exit policy.

    Its keys (to which the Trainer adds `eval_`) are those of `score`, for the answers of the policy; `speed_up`, in
    layers, of the policy; `exit_{m}`, the main metric of exit m; `exit_mean`, by which to choose checkpoints
    (`metric_for_best_model="exit_mean"`); `best_exit`; and `one_class_exits`, how many exits answer every row with one
    class, which are named in the log.

    It needs the logits of every exit. `ignore_keys` asks a [`GamlTrainer`] for them; the stock Trainer takes it as
    `train(ignore_keys_for_eval=ExitMetrics.ignore_keys)` and `evaluate(ignore_keys=ExitMetrics.ignore_keys)`.

    Args:
        config ([`GamlBertConfig`]): of the model that is evaluated; its policy is read at each call.
        score (`Callable`): `(predictions, references) -> dict[str, float]`.
        main_metric (`str`): the name of the one score that is compared.

    Raises:
        ValueError: when called, where the predictions lack the exits.
    """

    ignore_keys: ClassVar[list[str]] = ["ce_loss", "kd_loss"]  # of the output; what else it has are the predictions

    def __init__(self, config: Any, score: Score, main_metric: str):
        self.config, self.score, self.main_metric = config, score, main_metric

    def __call__(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        predictions = eval_prediction.predictions
        if not isinstance(predictions, tuple) or len(predictions) < 3:
            raise ValueError(
                "`predictions` must be the tuple (logits, exit_layer, exit_logits), which the model returns for rows "
                "with labels and a stock Trainer keeps with `ignore_keys=ExitMetrics.ignore_keys` (in `train`, "
                f"`ignore_keys_for_eval`). Got {type(predictions).__name__}."
            )
        exit_logits, labels = predictions[2], eval_prediction.label_ids
        scores = score_exits(exit_logits, labels, self.config.exit_layers, self.score)
        answers, exit_layer = replay(exit_logits, self.config)
        blind = one_class_exits(exit_logits, self.config.exit_layers)
        if blind:
            logger.info(f"Exits {str(blind)[1:-1]} answer every row with one class.")
        return {
            **self.score(answers, _check_labels(labels, exit_logits)),
            "speed_up": layer_speed_up(exit_layer, self.config.num_hidden_layers),
            "exit_mean": exit_mean(scores, self.main_metric),
            "best_exit": overthinking(scores, self.main_metric)["best_exit"],
            "one_class_exits": len(blind),
            **{f"exit_{m}": _main_score(scores[m], self.main_metric) for m in scores},
        }


# Policies, replayed


def replay(exit_logits: np.ndarray | Tensor, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """
    What the config's exit policy would have answered, and where each row would have left.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`):
            Of every exit, as the model returns them: `exit_temperatures` are in them already.
        config ([`GamlBertConfig`]): or anything with its exit fields.

    Returns:
        `tuple[np.ndarray, np.ndarray]`, each of shape `(num_rows,)`: predicted classes, and exit layers, from 1.

    Raises:
        ValueError: the shape does not fit the config's exits, there is no row, or a logit is not finite.
    """
    exit_logits = _check_exit_logits(exit_logits, config.exit_layers)
    position = policy_from_config(config).replay(exit_logits).numpy()  # (num_rows,)
    predictions = exit_logits.argmax(dim=-1).numpy()  # (num_rows, num_exits)
    return predictions[np.arange(len(position)), position], np.asarray(config.exit_layers)[position]


def sweep(
    exit_logits: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    config: Any,
    exit_strategy: str,
    score: Score,
    main_metric: str,
    values: Sequence[Any] | None = None,
) -> list[OperatingPoint]:
    """
    The speed-score curve of one exit strategy.

    Patience and the budgeted exit take every value they can. Thresholds are taken from the data, about 50 of them,
    such that the mean number of layers run falls in even steps from all to the first exit's: the confidences of a
    fine-tuned model crowd near certainty, and an even grid of thresholds would miss most of the curve.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): classes.
        config ([`GamlBertConfig`]): its layers and exits are read; its own exit policy is not.
        exit_strategy (`str`): `"none"`, `"budgeted"`, `"patience"`, `"entropy"` or `"max_prob"`.
        score (`Callable`): `(predictions, references) -> dict[str, float]`.
        main_metric (`str`): the name of the score of a point.
        values (`list`, *optional*):
            Values of the strategy's parameter. Needed for a strategy of your own that has one.

    Returns:
        `list[OperatingPoint]`: in rising order of the parameter, or in that of `values`.
    """
    exit_logits = _check_exit_logits(exit_logits, config.exit_layers)
    labels = _check_labels(labels, exit_logits)
    points = []
    for parameter in _parameter_values(exit_strategy, exit_logits, config) if values is None else values:
        trial = copy.copy(config)
        vars(trial).update(_policy_fields(exit_strategy, parameter))
        predictions, exit_layer = replay(exit_logits, trial)
        points.append(
            OperatingPoint(
                exit_strategy=exit_strategy,
                parameter=parameter,
                score=_main_score(score(predictions, labels), main_metric),
                speed_up=layer_speed_up(exit_layer, config.num_hidden_layers),
            )
        )
    return points


def choose(points: Sequence[OperatingPoint], target: tuple[float, float] = (1.8, 2.1)) -> OperatingPoint:
    """
    The point to run with: the best score whose speed-up lies in `target` (the paper's range, Sec. 6.4).

    Choose on held-out rows of the training set, not on the rows whose score is reported.

    Args:
        points (`list[OperatingPoint]`): one sweep, or several.
        target (`tuple[float, float]`, *optional*, defaults to `(1.8, 2.1)`): lowest and highest speed-up, in layers.

    Returns:
        [`OperatingPoint`]: among equal scores, the fastest. Where no point lies in `target`: the one nearest to it,
        with a warning in the log; `point.within(target)` tells.
    """
    if not points:
        raise ValueError("`points` must hold at least one point of a sweep. Got none.")
    low, high = target
    if not 0 < low <= high:
        raise ValueError(f"`target` must be the lowest and the highest speed-up, rising and above 0. Got {target}.")
    inside = [point for point in points if point.within(target)]
    if inside:
        return max(inside, key=lambda point: (point.score, point.speed_up))

    def distance(point: OperatingPoint) -> float:
        return max(low - point.speed_up, point.speed_up - high)

    nearest = min(points, key=lambda point: (distance(point), -point.score, -point.speed_up))
    logger.warning(
        f"No point has a speed-up between {low} and {high}. Taking the nearest: {nearest.config_fields()}, with a "
        f"speed-up of {nearest.speed_up:.2f}."
    )
    return nearest


def calibrate(exit_logits: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> list[float]:
    """
    Temperature of each exit that makes its probabilities honest (Guo et al., 2017; for exits, Schwartz et al., 2020).

        T_m = argmin_T  - sum_n log softmax(z_nm / T)[y_n]

    In 1 / T this is convex, so the sign of its slope leads to the minimum. No prediction changes, only how sure it is.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`):
            Of every exit, on rows that were not trained on, from a model without `exit_temperatures`. With them, the
            result is the factor by which each has to be multiplied.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): classes.

    Returns:
        `list[float]`: for `config.exit_temperatures`, each in `[0.05, 20]`. At an end of it where the NLL has no
        minimum (every row is right, or chance is better); 1 where an exit's logits of a row never differ.
    """
    exit_logits = _check_exit_logits(exit_logits)
    labels = torch.from_numpy(_check_labels(labels, exit_logits))
    z = exit_logits.double().transpose(0, 1)  # (num_exits, num_rows, num_labels)
    z_label = z.gather(-1, labels.expand(len(z), -1)[..., None])[..., 0].mean(dim=1)  # (num_exits,)

    def slope(temperature: Tensor) -> Tensor:
        """Of the mean NLL along 1 / T: the mean of `E_p[z] - z_label`, rising with 1 / T."""
        p = torch.softmax(z / temperature[:, None, None], dim=-1)
        return (p * z).sum(dim=-1).mean(dim=1) - z_label

    # Bisection, in log T: 60 halvings of a range of 6 leave less than the rounding.
    low, high = z.new_full((len(z),), MIN_TEMPERATURE), z.new_full((len(z),), MAX_TEMPERATURE)
    for _ in range(60):
        middle = (low * high).sqrt()
        too_cold = slope(middle) > 0
        low, high = torch.where(too_cold, middle, low), torch.where(too_cold, high, middle)
    says_nothing = (z == z[..., :1]).flatten(1).all(dim=1)
    return torch.where(says_nothing, 1.0, (low * high).sqrt().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)).tolist()


# The three speed-ups


def layer_speed_up(exit_layer: np.ndarray | Tensor | Sequence[int], num_hidden_layers: int) -> float:
    """
    Speed-up in layers, the one the paper and PABEE report: `num_hidden_layers / mean layers run`.

    It says nothing of exits, decisions, padding or kernels: that is for `flops_speed_up` and `latency_speed_up`.

    Args:
        exit_layer (`np.ndarray`, `torch.Tensor` or `list[int]`, of shape `(num_rows,)`):
            The layer at which each row left, in `[1, num_hidden_layers]`.
        num_hidden_layers (`int`): layers of the full model.

    Returns:
        `float`, in `[1, num_hidden_layers]`.
    """
    return float(num_hidden_layers / _check_exit_layer(exit_layer, range(1, num_hidden_layers + 1)).mean())


def flops_speed_up(
    model: PreTrainedModel, exit_layer: np.ndarray | Tensor | Sequence[int], lengths: np.ndarray | Sequence[int]
) -> float:
    """
    Speed-up in FLOPs: plain BERT's (all layers, the last exit alone) over those of the layers and exits that ran.

    Counted, not estimated: PyTorch counts the matrix multiplications of a layer and an exit at each length (a
    multiply-add is 2 FLOPs), in eager attention, for the fused kernels are undercounted. Each row counts with its own
    length: padding is not in it, and neither is anything that multiplies no matrices (softmax, LayerNorm, decisions).
    A row's last layer counts whole, though the engine runs it for [CLS] alone where it can.

    Args:
        model ([`GamlBertForSequenceClassification`]): any copy of it. It is not run; only its shapes are read.
        exit_layer (`np.ndarray`, `torch.Tensor` or `list[int]`, of shape `(num_rows,)`):
            The layer at which each row left, one of `config.exit_layers`.
        lengths (`np.ndarray` or `list[int]` of shape `(num_rows,)`): tokens of each row, [CLS] and [SEP] included.

    Returns:
        `float`: total over total, as `layer_speed_up`.
    """
    config = model.config
    exit_layer = _check_exit_layer(exit_layer, config.exit_layers)
    lengths = np.asarray(lengths)
    if lengths.shape != exit_layer.shape:
        raise ValueError(
            f"`lengths` must hold one number of tokens for each of the {len(exit_layer)} rows of `exit_layer`. "
            f"Got shape {lengths.shape}."
        )
    if lengths.min() < 1 or lengths.max() > config.max_position_embeddings:
        raise ValueError(
            f"`lengths` must lie between 1 and {config.max_position_embeddings} (`max_position_embeddings`). "
            f"Got {lengths.min()} to {lengths.max()}."
        )
    distinct, row_length = np.unique(lengths, return_inverse=True)
    costs = np.array(_layer_and_exit_flops(model, distinct.tolist()), dtype=np.float64)  # (num_lengths, 2)
    layer, exit_ = costs[row_length].T
    exits_run = np.searchsorted(config.exit_layers, exit_layer, side="right")
    return float((config.num_hidden_layers * layer + exit_).sum() / (exit_layer * layer + exits_run * exit_).sum())


def latency_speed_up(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    exit_policy: ExitPolicy | None = None,
    *,
    batch_size: int = 1,
    repeats: int = 7,
) -> dict[str, float]:
    """
    Speed-up in latency: seconds of plain BERT (all layers, the last exit alone) over seconds with exiting.

    Both run the same batches on the same weights, in turn, after a warm-up round; a round gives one ratio. It holds
    for this machine, its load, this dtype, these lengths and this batch size only.

    Args:
        model ([`GamlBertForSequenceClassification`]): on the device and in the dtype to measure. Left as it was.
        rows (`list[dict]`): tokenized texts without padding, with `input_ids` and, if the task has them,
            `token_type_ids`; other columns are ignored. Batched in this order, padded on the right.
        exit_policy ([`ExitPolicy`], *optional*): defaults to the config's.
        batch_size (`int`, *optional*, defaults to 1): rows that run together; 1 is the paper's setting.
        repeats (`int`, *optional*, defaults to 7): rounds, from 1.

    Returns:
        `dict[str, float]`: `speed_up` (median of the rounds), `speed_up_min`, `speed_up_max`, `full_depth_seconds` and
        `exiting_seconds` (median, for all rows), `batch_size`, `num_rows`, `repeats`.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("the number of `rows`", len(rows))):
        if value < 1:
            raise ValueError(f"{name if ' ' in name else f'`{name}`'} must be at least 1. Got {value}.")
    batches = [
        _pad(rows[start : start + batch_size], model.config.pad_token_id, model.device)
        for start in range(0, len(rows), batch_size)
    ]
    runs = {
        # All exits, of which there is one: the stock layers, padded, without our engine's savings.
        "full_depth": (_without_early_exits(model), {"exit_policy": FullDepth(), "output_exit_logits": True}),
        "exiting": (model, {"exit_policy": exit_policy or policy_from_config(model.config)}),
    }
    seconds = {name: [] for name in runs}
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    runs["full_depth"][0].eval()
    try:
        with torch.inference_mode():
            for name in runs:
                _seconds(*runs[name], batches)
            for round_ in range(repeats):
                # The order alternates: whichever comes second finds warmer caches and a warmer processor.
                for name in sorted(runs, reverse=round_ % 2 == 1):
                    seconds[name].append(_seconds(*runs[name], batches))
    finally:
        for module in was_training:
            module.training = True
    ratios = np.array(seconds["full_depth"]) / np.array(seconds["exiting"])
    return {
        "speed_up": float(np.median(ratios)),
        "speed_up_min": float(ratios.min()),
        "speed_up_max": float(ratios.max()),
        "full_depth_seconds": float(np.median(seconds["full_depth"])),
        "exiting_seconds": float(np.median(seconds["exiting"])),
        "batch_size": batch_size,
        "num_rows": len(rows),
        "repeats": repeats,
    }


def _layer_and_exit_flops(model: PreTrainedModel, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """FLOPs of one layer and of one exit for one row, at each length; layers are of one shape, and so are exits."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):  # shapes without numbers: nothing is computed
        shapes = type(model)(config).eval()
        costs = []
        for length in lengths:
            hidden_states = torch.empty(1, length, config.hidden_size)
            with FlopCounterMode(display=False) as layer, torch.no_grad():
                hidden_states = shapes._run_layer(1, hidden_states, None)
            with FlopCounterMode(display=False) as exit_, torch.no_grad():
                shapes._run_exit(config.exit_layers[0], hidden_states[:, 0])
            costs.append((layer.get_total_flops(), exit_.get_total_flops()))
    return costs


def _without_early_exits(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, as plain BERT: the last exit alone, so that full depth pays for no exit and no decision."""
    config = copy.deepcopy(model.config)
    if config.exit_temperatures is not None:
        config.exit_temperatures = config.exit_temperatures[-1:]
    config.exit_layers = config.exit_layers[-1:]
    plain = copy.copy(model)  # shares every module
    plain.config = config
    return plain


def _seconds(model: PreTrainedModel, options: Mapping[str, Any], batches: list[dict[str, Tensor]]) -> float:
    """Wall-clock time of all batches. A GPU is waited for: its kernels are still queued when `forward` returns."""
    wait = torch.accelerator.synchronize if model.device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    for batch in batches:
        model(**batch, **options)
    wait()
    return time.perf_counter() - start


def _pad(rows: Sequence[Mapping[str, Any]], pad_token_id: int | None, device: torch.device) -> dict[str, Tensor]:
    """One batch, padded on the right, on `device`."""
    input_ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    }
    if "token_type_ids" in rows[0]:
        token_type_ids = [torch.as_tensor(row["token_type_ids"]) for row in rows]
        batch["token_type_ids"] = pad_sequence(token_type_ids, batch_first=True)
    return {name: tensor.to(device) for name, tensor in batch.items()}


# Parameters of a sweep


def _policy_fields(exit_strategy: str, parameter: int | float | None) -> dict[str, Any]:
    name = policy_class(exit_strategy).parameter
    return {"exit_strategy": exit_strategy} | ({} if name is None else {name: parameter})


def _parameter_values(exit_strategy: str, exit_logits: Tensor, config: Any) -> list[Any]:
    """What to try, in rising order."""
    if exit_strategy == "budgeted":
        return list(config.exit_layers)
    if exit_strategy == "patience":
        return list(range(1, max(2, len(config.exit_layers))))
    if exit_strategy == "entropy":
        return _thresholds(normalized_entropy(exit_logits).numpy(), config.exit_layers, np.minimum)
    if exit_strategy == "max_prob":
        return _thresholds(exit_logits.float().softmax(dim=-1).amax(dim=-1).numpy(), config.exit_layers, np.maximum)
    if len(_policy_fields(exit_strategy, None)) > 1:
        raise ValueError(f"`values` must say what to try with `exit_strategy={exit_strategy!r}`. Got None.")
    return [None]


def _thresholds(confidences: np.ndarray, exit_layers: Sequence[int], surest: np.ufunc) -> list[float]:
    """
    Thresholds at which the mean number of layers run falls in even steps.

    A row has left by exit m if its surest confidence up to m passes the threshold; if not, it runs on to the next
    exit. So the layers run beyond the first exit are the share of these running extremes that fail, each weighted
    with the layers to the next exit, and even quantiles of them are even steps in layers.
    """
    running = surest.accumulate(confidences, axis=1)[:, :-1].astype(np.float64)  # (num_rows, num_exits - 1)
    layers_to_next = np.broadcast_to(np.diff(exit_layers).astype(np.float64), running.shape)
    if running.size == 0:
        return [0.0, 1.0]
    quantiles = np.quantile(
        running.ravel(), np.linspace(0, 1, NUM_THRESHOLDS), weights=layers_to_next.ravel(), method="inverted_cdf"
    )
    # Half-way to the next value: on a value itself, rounding would decide whether its row leaves.
    distinct = np.unique(running)
    position = np.searchsorted(distinct, quantiles)
    between = (distinct[position] + distinct[np.minimum(position + 1, len(distinct) - 1)]) / 2
    return np.unique(np.clip(np.concatenate([[0.0], between, [1.0]]), 0.0, 1.0)).tolist()


# Checks


def _check_exit_logits(exit_logits: np.ndarray | Tensor, exit_layers: Sequence[int] | None = None) -> Tensor:
    """`exit_logits` on the CPU, in float32 at least; or one clear error."""
    exit_logits = torch.as_tensor(exit_logits).detach().cpu()
    if exit_logits.dim() != 3 or 0 in exit_logits.shape:
        raise ValueError(
            "`exit_logits` must have shape (num_rows, num_exits, num_labels), with at least one row. "
            f"Got shape {tuple(exit_logits.shape)}."
        )
    if exit_layers is not None and exit_logits.shape[1] != len(exit_layers):
        raise ValueError(
            f"`exit_logits` must hold the {len(exit_layers)} exits {list(exit_layers)} in its second dimension. "
            f"Got shape {tuple(exit_logits.shape)}."
        )
    finite = torch.isfinite(exit_logits).all(dim=-1)
    if not finite.all():
        row, position = (~finite).nonzero()[0].tolist()
        name = f"exit number {position + 1}" if exit_layers is None else f"exit {exit_layers[position]}"
        raise ValueError(
            f"`exit_logits` must be finite: a score of NaN would mean nothing. Row {row} holds "
            f"{exit_logits[row, position].tolist()} at {name}; {int((~finite).any(dim=1).sum())} of {len(finite)} "
            "rows are affected."
        )
    return exit_logits if exit_logits.dtype == torch.float64 else exit_logits.float()


def _check_labels(labels: np.ndarray | Tensor, exit_logits: np.ndarray | Tensor) -> np.ndarray:
    labels = torch.as_tensor(labels).cpu().numpy()
    num_rows, _, num_labels = exit_logits.shape
    if labels.shape != (num_rows,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`labels` must be whole numbers, one class for each of the {num_rows} rows of `exit_logits`. "
            f"Got shape {labels.shape}, {labels.dtype}."
        )
    wrong = (labels < 0) | (labels >= num_labels)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"`labels` must lie between 0 and {num_labels - 1}, the classes of `exit_logits`. Row {row} holds "
            f"{labels[row]}. (GLUE's test splits have no labels: -1.)"
        )
    return labels.astype(np.int64)


def _check_exit_layer(exit_layer: np.ndarray | Tensor | Sequence[int], exit_layers: Sequence[int]) -> np.ndarray:
    exit_layer = torch.as_tensor(exit_layer).cpu().numpy()
    if exit_layer.ndim != 1 or exit_layer.size == 0:
        raise ValueError(
            f"`exit_layer` must hold one layer for each row, and at least one row. Got shape {exit_layer.shape}."
        )
    wrong = ~np.isin(exit_layer, exit_layers)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"`exit_layer` must hold exit layers of this model, {list(exit_layers)}; the first layer is 1. "
            f"Row {row} holds {exit_layer[row]}."
        )
    return exit_layer


def _main_score(scores: Mapping[str, float], main_metric: str) -> float:
    if main_metric not in scores:
        raise ValueError(
            f"`main_metric` must be one of the scores, {sorted(scores)}. Got `main_metric={main_metric!r}`."
        )
    value = float(scores[main_metric])
    if not np.isfinite(value):
        raise ValueError(f"The score {main_metric!r} must be finite to be compared. Got {value}.")
    return value
