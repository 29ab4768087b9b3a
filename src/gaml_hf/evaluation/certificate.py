"""
What leaving early may cost, promised: the fastest exit policy whose risk is below a limit, with a given confidence.

Learn-then-Test (Angelopoulos et al., 2021); for early exits, Jazbec et al. (NeurIPS 2024). The best parameter on some
rows looks better there than it is: of many it is the luckiest. Here each is a hypothesis, "its risk is above
`max_loss`", and one is chosen only where its hypothesis, and that of every slower one, was rejected.
"""

import copy
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import bdtr, bdtrc, bdtri
from torch import Tensor
from transformers.utils import logging

from gaml_hf.models.configuration_gaml import CERTIFIED_FIELDS
from gaml_hf.models.exiting_gaml import policy_class

from .checks import check_exit_logits, check_labels
from .choice import policy_fields, replay
from .speed import layer_speed_up


logger = logging.get_logger(__name__)

# The risks that can be promised, and what becomes of a row that counts.
RISKS = {
    "disagreement": "get another answer than the last exit's",
    "accuracy_loss": "get a wrong answer where the last exit's is right",
}
METHOD = "Learn-then-Test, fixed sequence from the slowest parameter, exact binomial tail"
FULL_DEPTH = "full depth: no parameter passed"
# Distances from certainty, of any model and any data: finer where fine-tuned models crowd. No more than four digits,
# so that a threshold can be copied from where it is shown.
THRESHOLDS = np.unique(np.concatenate([np.geomspace(1e-4, 0.1, 61), np.linspace(0.1, 1.0, 91)]).round(4))


@dataclass(frozen=True)
class ExitCertificate:
    """
    A promise about one exit policy: with probability `confidence` over the rows that it was made on, at most a share
    of `max_loss` of all texts lose by leaving early.

    It holds for texts that are exchangeable with those rows (drawn from one source, cut and tokenized alike), which
    neither trained the model nor chose its checkpoint or temperatures; for these weights, run in the precision that
    the logits came from; and for one call of [`certify`]: of ten promises at 0.9, one may be broken.

    Args:
        exit_strategy (`str`): as in [`GamlBertConfig`]; `"none"`, full depth, where nothing passed.
        parameter (`int` or `float`, *optional*): the strategy's patience, threshold or exit; None for `"none"`.
        risk (`str`): `"disagreement"` or `"accuracy_loss"`; see [`certify`].
        max_loss (`float`): the promise: the risk is at most this, in (0, 1).
        confidence (`float`): the probability with which it is kept, in (0, 1).
        num_rows (`int`): rows that it was made on.
        num_lost (`int`): those of them that lost.
        bound (`float`):
            The exact upper limit of the risk (Clopper and Pearson, 1934) for `num_lost` of `num_rows`, at most
            `max_loss`. It would be a promise itself only of a parameter that was set before: promise `max_loss`.
        speed_up (`float`): on these rows, in layers, from 1.
        exit_bounds (`list[float]`):
            Of each exit, shallow to deep, the upper limit of its own risk, were every text to leave there: all of them
            at once with probability `confidence` (Clopper and Pearson, Bonferroni). See [`lowest_cap`].
        method (`str`): how the parameter was found.
        rows_sha256 (`str`): of the rows' logits, and of their labels where the risk reads them.
        date (`str`): as 2026-01-31.
        versions (`dict[str, str]`): of the libraries.
        exits (`dict`): the config's other fields that decide the answers, among them `exit_temperatures`.
    """

    exit_strategy: str
    parameter: int | float | None
    risk: Literal["disagreement", "accuracy_loss"]
    max_loss: float
    confidence: float
    num_rows: int
    num_lost: int
    bound: float
    speed_up: float
    exit_bounds: list[float]
    method: str
    rows_sha256: str
    date: str
    versions: dict[str, str]
    exits: dict[str, Any]

    @classmethod
    def from_config(cls, config: Any) -> "ExitCertificate | None":
        """
        The certificate that a config holds, read from a saved checkpoint say.

        Args:
            config ([`GamlBertConfig`]): its `exit_certificate` is read.

        Returns:
            [`ExitCertificate`]: or None where there is none, or where policy, parameter, temperatures or exits of the
            config are no longer those that were certified.

        Raises:
            ValueError: what the config holds lacks an entry.
        """
        if not config.certificate_holds:
            return None
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in config.exit_certificate]:
            raise ValueError(
                "`exit_certificate` must be what `gaml_hf.evaluation.certify` made. Got one without "
                f"{', '.join(missing)}; take it out of `config.json`, or certify again."
            )
        return cls(**{name: config.exit_certificate[name] for name in names})

    def config_fields(self) -> dict[str, Any]:
        """What to set on the config: the policy, and the certificate itself."""
        return policy_fields(self.exit_strategy, self.parameter) | {"exit_certificate": asdict(self)}

    def lowest_cap(self, max_loss: float) -> int | None:
        """
        The shallowest exit at which rows may be made to leave that the policy would keep, under load say.

        A row that is made to leave at exit m gets the policy's answer or that of exit m, so it loses only where one of
        the two does: the risk is at most the sum of theirs, for each m at once with probability `2 * confidence - 1`.

        Args:
            max_loss (`float`): the highest risk so, a share of the rows.

        Returns:
            `int`: a layer, such that it and all deeper exits keep `max_loss`; None where the policy itself does not.
        """
        own = 0.0 if self.exit_strategy == "none" else self.max_loss
        within = [own + bound <= max_loss for bound in self.exit_bounds[:-1]] + [own <= max_loss]
        lowest = None
        for layer, fits in zip(reversed(self.exits["exit_layers"]), reversed(within), strict=True):
            if not fits:
                break
            lowest = layer
        return lowest

    def is_contradicted(self, num_lost: int, num_rows: int, level: float = 0.001) -> bool:
        """Whether so many lost of other rows would be rarer than `level` if the risk were `max_loss`."""
        return bool(bdtrc(num_lost - 1, num_rows, self.max_loss) < level)

    def promise(self) -> str:
        """The promise as half a sentence."""
        return f"at most {self.max_loss:.4g} of the rows {RISKS[self.risk]}, with confidence {self.confidence:.4g}"


def certify(
    exit_logits: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | None,
    config: Any,
    exit_strategy: str,
    max_loss: float,
    confidence: float = 0.9,
    *,
    risk: Literal["disagreement", "accuracy_loss"] = "disagreement",
    values: Sequence[Any] | None = None,
) -> ExitCertificate:
    """
    The fastest parameter of an exit strategy whose risk is at most `max_loss` with probability `confidence`.

    A row loses, by the policy's answer and that of the last exit,
    - `"disagreement"`: where they differ. No labels are needed, so this can be done again on texts of production.
    - `"accuracy_loss"`: where the last exit is right and the policy is wrong. Rows that the policy mends are not set
      off against them. So the risk is never below the loss of accuracy (full depth's minus the policy's), nor above
      the disagreement: a promise about the one-sided count is one about the difference, if not the tightest.

    From the slowest parameter on, "the risk of this one is above `max_loss`" is rejected where
    `P[Binomial(num_rows, max_loss) <= rows lost] <= 1 - confidence`, and the first that cannot be rejected ends it. If
    all tests are right about the first true hypothesis, and they are with probability `confidence`, no wrong one is
    chosen: no correction for their number, and no need for a risk that rises from one to the next, which of patience
    it does not (Angelopoulos et al., 2021, fixed sequence testing).

    That needs a sequence which does not depend on the rows. The thresholds of [`sweep`] do: they lie between the rows'
    own confidences. Here they are the same for all, 140 from certainty to none; a threshold at which these rows leave
    as they did at the one before is not preferred to it.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`):
            Of every exit, as the model returns them, on rows that chose nothing: neither trained on, nor used for
            the checkpoint, `exit_temperatures` or `values`; exchangeable with the texts to come.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`, *optional*):
            Classes. Read for `"accuracy_loss"` alone.
        config ([`GamlBertConfig`]): its layers and exits are read; its own exit policy is not.
        exit_strategy (`str`): `"budgeted"`, `"patience"`, `"entropy"`, `"max_prob"`, or one of your own.
        max_loss (`float`): the highest risk, a share of the rows, in (0, 1).
        confidence (`float`, *optional*, defaults to 0.9): in (0, 1).
        risk (`str`, *optional*, defaults to `"disagreement"`): or `"accuracy_loss"`.
        values (`list`, *optional*):
            Values of the strategy's parameter, from the slowest to the fastest, set without a look at these rows.
            Needed for a strategy of your own.

    Returns:
        [`ExitCertificate`]: of full depth, with a warning in the log, where no parameter passes.

    Raises:
        ValueError: there are too few rows for this promise even if none were lost ([`rows_needed`]); `values` are not
            from slow to fast; or another argument is not as above.
    """
    exit_logits = check_exit_logits(exit_logits, config.exit_layers)
    num_rows, needed = len(exit_logits), rows_needed(max_loss, confidence)
    lost = _lost(exit_logits, labels, risk)
    if num_rows < needed:
        raise ValueError(
            f"`exit_logits` must hold at least {needed} rows for `max_loss={max_loss}` at `confidence={confidence}`, "
            f"even if no row loses. Got {num_rows}; take more rows, a higher `max_loss` or a lower `confidence`."
        )
    values = _parameter_values(exit_strategy, config) if values is None else _check_values(values)

    points, slower = [], 1.0
    for parameter in values:
        trial = copy.copy(config)
        vars(trial).update(policy_fields(exit_strategy, parameter))
        position = _leave_at(exit_logits, trial)
        speed_up = layer_speed_up(np.asarray(config.exit_layers)[position], config.num_hidden_layers)
        if speed_up < slower:
            raise ValueError(
                f"`values` must go from the slowest to the fastest. Got {parameter}, at which these rows run more "
                "layers than at the value before it."
            )
        slower = speed_up
        points.append((parameter, int(lost[np.arange(num_rows), position].sum()), speed_up))
    passed = list(takewhile(lambda point: passes(point[1], num_rows, max_loss, confidence), points))
    if passed:
        parameter, num_lost, speed_up = max(passed, key=lambda point: point[2])  # of equals, the slowest
        bound, method = float(bdtri(num_lost, num_rows, 1 - confidence)), METHOD
    else:
        logger.warning(
            f"No parameter of `exit_strategy={exit_strategy!r}` keeps `max_loss={max_loss}` at "
            f"`confidence={confidence}` on these {num_rows} rows. The answer is full depth: no text leaves early."
        )
        exit_strategy, parameter, num_lost, speed_up, bound, method = "none", None, 0, 1.0, 0.0, FULL_DEPTH
    return ExitCertificate(
        exit_strategy=exit_strategy,
        parameter=parameter,
        risk=risk,
        max_loss=float(max_loss),
        confidence=float(confidence),
        num_rows=num_rows,
        num_lost=num_lost,
        bound=bound,
        speed_up=speed_up,
        exit_bounds=_exit_bounds(lost, confidence),
        method=method,
        rows_sha256=_sha256(exit_logits, labels if risk == "accuracy_loss" else None),
        date=time.strftime("%Y-%m-%d"),
        versions=dict(_versions()),
        exits={field: copy.deepcopy(getattr(config, field)) for field in CERTIFIED_FIELDS},
    )


def observed_risk(
    exit_logits: np.ndarray | Tensor, labels: np.ndarray | Tensor | None, config: Any, risk: str
) -> float:
    """
    The share of these rows that lose by the config's exit policy: a number of these rows, no promise.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`, *optional*): for `"accuracy_loss"`.
        config ([`GamlBertConfig`]): its exit policy is the one.
        risk (`str`): as in [`certify`].

    Returns:
        `float`, in `[0, 1]`.
    """
    exit_logits = check_exit_logits(exit_logits, config.exit_layers)
    position = _leave_at(exit_logits, config)
    return float(_lost(exit_logits, labels, risk)[np.arange(len(position)), position].mean())


def rows_needed(max_loss: float, confidence: float = 0.9) -> int:
    """
    The fewest rows on which a promise can be made, if none of them loses: `(1 - max_loss)^n <= 1 - confidence`.

    Args:
        max_loss (`float`): the highest risk, in (0, 1).
        confidence (`float`, *optional*, defaults to 0.9): in (0, 1).

    Returns:
        `int`: 114 for 0.02 at 0.9.

    Raises:
        ValueError: one of the two does not lie in (0, 1).
    """
    for name, value in (("max_loss", max_loss), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"`{name}` must be a number above 0 and below 1. Got `{name}={value!r}`.")
    rows = max(1, math.floor(math.log(1 - confidence) / math.log1p(-max_loss)))
    return rows if passes(0, rows, max_loss, confidence) else rows + 1


def passes(num_lost: int, num_rows: int, max_loss: float, confidence: float) -> bool:
    """Whether so few lost rows show that the risk is at most `max_loss`, by the exact tail of the binomial."""
    return bool(bdtr(num_lost, num_rows, max_loss) <= 1 - confidence)


def _lost(exit_logits: Tensor, labels: np.ndarray | Tensor | None, risk: str) -> np.ndarray:
    """Whether each row would lose by leaving at each exit, `(num_rows, num_exits)`; never at the last."""
    if risk not in RISKS:
        raise ValueError(f"`risk` must be one of {list(RISKS)}. Got `risk={risk!r}`.")
    predictions = exit_logits.argmax(dim=-1).numpy()  # (num_rows, num_exits)
    if risk == "disagreement":
        return predictions != predictions[:, -1:]
    if labels is None:
        raise ValueError('`labels` must be given for `risk="accuracy_loss"`. Got None; "disagreement" needs none.')
    right = predictions == check_labels(labels, exit_logits)[:, None]
    return right[:, -1:] & ~right


def _exit_bounds(lost: np.ndarray, confidence: float) -> list[float]:
    num_rows, num_exits = lost.shape
    level = (1 - confidence) / max(num_exits - 1, 1)
    counts = lost.sum(axis=0)
    return [1.0 if k == num_rows else float(bdtri(k, num_rows, level)) for k in counts[:-1]] + [0.0]


def _leave_at(exit_logits: Tensor, config: Any) -> np.ndarray:
    """0-based position of the exit at which each row leaves, `(num_rows,)`."""
    return np.searchsorted(config.exit_layers, replay(exit_logits, config)[1])


def _parameter_values(exit_strategy: str, config: Any) -> list[Any]:
    """From the slowest to the fastest, of any rows; without those that are full depth, of which nothing is to test."""
    if exit_strategy == "budgeted":
        return list(config.exit_layers[-2::-1])
    if exit_strategy == "patience":
        return list(range(len(config.exit_layers) - 2, 0, -1))
    if exit_strategy == "entropy":
        return THRESHOLDS.tolist()
    if exit_strategy == "max_prob":
        return (1 - THRESHOLDS).round(4).tolist()
    policy_class(exit_strategy)  # says what there is
    if exit_strategy == "none":
        raise ValueError('`exit_strategy` must let rows leave early: at full depth none can lose. Got "none".')
    raise ValueError(f"`values` must say what to test with `exit_strategy={exit_strategy!r}`. Got None.")


def _check_values(values: Sequence[Any]) -> Sequence[Any]:
    if len(values) == 0:
        raise ValueError("`values` must hold at least one value of the strategy's parameter. Got none.")
    return values


def _sha256(exit_logits: Tensor, labels: np.ndarray | Tensor | None) -> str:
    """Of the numbers, in whatever type they came."""
    digest = hashlib.sha256(repr(tuple(exit_logits.shape)).encode())
    digest.update(np.ascontiguousarray(exit_logits.numpy(), dtype="<f8").tobytes())
    if labels is not None:
        digest.update(torch.as_tensor(labels).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in ("gaml_hf", "torch", "transformers", "scipy"))
