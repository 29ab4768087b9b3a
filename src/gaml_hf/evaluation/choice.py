"""Exit policies, replayed on the logits of all exits: what each would answer and save, and which one to run with."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from gaml_hf.models.exiting_gaml import normalized_entropy, policy_class, policy_from_config

from .checks import check_exit_logits, check_labels, main_score
from .scores import Score
from .speed import layer_speed_up


logger = logging.get_logger(__name__)
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
        return policy_fields(self.exit_strategy, self.parameter)

    def within(self, target: tuple[float, float]) -> bool:
        """Whether the speed-up lies in `target`, both ends included."""
        return target[0] <= self.speed_up <= target[1]


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
    exit_logits = check_exit_logits(exit_logits, config.exit_layers)
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
    exit_logits = check_exit_logits(exit_logits, config.exit_layers)
    labels = check_labels(labels, exit_logits)
    points = []
    for parameter in _parameter_values(exit_strategy, exit_logits, config) if values is None else values:
        trial = copy.copy(config)
        vars(trial).update(policy_fields(exit_strategy, parameter))
        predictions, exit_layer = replay(exit_logits, trial)
        points.append(
            OperatingPoint(
                exit_strategy=exit_strategy,
                parameter=parameter,
                score=main_score(score(predictions, labels), main_metric),
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
    is_pair = isinstance(target, Sequence) and len(target) == 2 and all(isinstance(x, int | float) for x in target)
    if not is_pair or not 0 < target[0] <= target[1]:
        raise ValueError(f"`target` must be the lowest and the highest speed-up, rising and above 0. Got {target!r}.")
    low, high = target
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
    exit_logits = check_exit_logits(exit_logits)
    labels = torch.from_numpy(check_labels(labels, exit_logits))
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


def policy_fields(exit_strategy: str, parameter: int | float | None) -> dict[str, Any]:
    """What to set on a config for a strategy with this parameter."""
    name = policy_class(exit_strategy).parameter
    return {"exit_strategy": exit_strategy} | ({} if name is None else {name: parameter})


def has_candidates(exit_strategy: str) -> bool:
    """Whether [`sweep`] knows by itself what to try: of a strategy with a parameter, only where it is one of ours."""
    return exit_strategy in _CANDIDATES or policy_class(exit_strategy).parameter is None


def _parameter_values(exit_strategy: str, exit_logits: Tensor, config: Any) -> list[Any]:
    """What to try, in rising order."""
    if exit_strategy in _CANDIDATES:
        return _CANDIDATES[exit_strategy](exit_logits, config.exit_layers)
    if len(policy_fields(exit_strategy, None)) > 1:
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


# What to try of each strategy with a parameter, by the logits of all exits and their layers.
_CANDIDATES: dict[str, Callable[[Tensor, Sequence[int]], list[Any]]] = {
    "budgeted": lambda _, exit_layers: list(exit_layers),
    "patience": lambda _, exit_layers: list(range(1, max(2, len(exit_layers)))),
    "entropy": lambda logits, exit_layers: _thresholds(normalized_entropy(logits).numpy(), exit_layers, np.minimum),
    "max_prob": lambda logits, exit_layers: _thresholds(
        logits.float().softmax(dim=-1).amax(dim=-1).numpy(), exit_layers, np.maximum
    ),
}
