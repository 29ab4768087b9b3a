"""
Exit policies: at which exit does each row leave? Appendix B of Zhu et al. (2021) reviews entropy, score and patience.

A policy is a pure function of the logits of the exits run so far, so one object decides live, row by row, and in
replay over logits that were computed once. It keeps no counter: threads may share it, and a row never sees its
neighbours.

A new strategy is one class with a `name`, the decorator `@register`, and its test.
"""

import math
import reprlib
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


# In a batch of at least so many rows some row leaves at most exits, and a needless split of a layer costs little; in a
# smaller one a wrong guess costs more than a right one saves (docs/performance.md).
MIN_ROWS_TO_GUESS = 16

EXIT_POLICIES: dict[str, type["ExitPolicy"]] = {}
EXIT_FIELDS = ("exit_strategy", "patience", "budgeted_exit", "exit_threshold")  # of a config


def register(policy: type["ExitPolicy"]) -> type["ExitPolicy"]:
    """
    Make `policy` available as `exit_strategy=policy.name`, in processes that come by here. A class that stands in this
    file goes with every checkpoint; one of your own must be registered before a checkpoint that names it is loaded.
    """
    EXIT_POLICIES[policy.name] = policy
    return policy


class ExitPolicy:
    """
    Decides after each exit which rows leave.

    Subclasses implement `should_exit` and `from_config`; callers use the object as a function or call `replay`.
    """

    name: ClassVar[str]  # the `exit_strategy`
    parameter: ClassVar[str | None] = None  # the config field that the strategy reads, if any

    @classmethod
    def from_config(cls, config: Any) -> "ExitPolicy":
        """Read the strategy's own fields from a [`GamlBertConfig`] and check them."""
        return cls()

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        """
        Args:
            exit_logits (`torch.Tensor` of shape `(batch_size, num_exits_run, num_labels)`):
                Logits of the exits run so far, shallowest first; the last one has just been computed.

        Returns:
            `torch.BoolTensor` of shape `(batch_size,)`: `True` where the row leaves with the last exit's answer. A
            row is decided by its own logits alone: live, its neighbours are not those of a replay.
        """
        raise TypeError(f"{type(self).__name__} must implement `should_exit`.")

    def may_exit(self, exit_logits: Tensor) -> Tensor:
        """
        Guess which rows leave at the next exit. No answer depends on it, only the speed: where rows may leave, the
        next layer runs for [CLS] first.

        Args:
            exit_logits (`torch.Tensor` of shape `(batch_size, num_exits_run, num_labels)`):
                Logits of the exits run so far; before the first exit, `num_exits_run` is 0.

        Returns:
            `torch.BoolTensor` of shape `(batch_size,)`: `False` where the row will hardly leave at the next exit.
            Here, where nothing is known of the strategy: `True` in a batch of some size.
        """
        guess = len(exit_logits) >= MIN_ROWS_TO_GUESS
        return torch.full(exit_logits.shape[:1], guess, dtype=torch.bool, device=exit_logits.device)

    def fixed_exit(self, num_exits: int) -> int | None:
        """
        Where every row leaves: one exit is asked, and nothing is decided. A graph, traced or exported, needs that.

        Args:
            num_exits (`int`): of the model.

        Returns:
            `int`, *optional*: 0-based position of the exit at which every row leaves, whatever its (finite) logits.
            `None` where the logits decide, as here.
        """
        return None

    def __call__(self, exit_logits: Tensor) -> Tensor:
        # Every comparison with NaN is False: without this a row with broken logits would run on to the last exit.
        broken = ~torch.isfinite(exit_logits[:, -1]).all(dim=-1)
        decided = self.should_exit(exit_logits)
        if not isinstance(decided, Tensor) or decided.dtype != torch.bool or decided.shape != broken.shape:
            got = f"{decided.dtype}, {tuple(decided.shape)}" if isinstance(decided, Tensor) else shown(decided)
            raise TypeError(
                f"`{type(self).__name__}.should_exit` must return a bool tensor of shape {tuple(broken.shape)}. "
                f"Got {got}."
            )
        return decided | broken

    def replay(self, exit_logits: Tensor) -> Tensor:
        """
        The decisions a live run would have taken, from logits of all exits.

        Args:
            exit_logits (`torch.Tensor` of shape `(batch_size, num_exits, num_labels)`): logits of every exit.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`: 0-based position of the exit at which each row leaves, in
            `[0, num_exits - 1]`. Position `i` is layer `config.exit_layers[i]`.
        """
        num_exits = exit_logits.shape[1]
        position = torch.full(exit_logits.shape[:1], num_exits - 1, dtype=torch.int64, device=exit_logits.device)
        for last in reversed(range(num_exits - 1)):
            position = torch.where(self(exit_logits[:, : last + 1]), last, position)
        return position


@register
class FullDepth(ExitPolicy):
    """Run every layer; the answer is the last exit's."""

    name = "none"

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        return torch.zeros(exit_logits.shape[:1], dtype=torch.bool, device=exit_logits.device)

    may_exit = should_exit

    def fixed_exit(self, num_exits: int) -> int | None:
        return num_exits - 1 if type(self).should_exit is FullDepth.should_exit else None  # not a subclass's


@register
class Budgeted(ExitPolicy):
    """
    Budgeted exiting (Zhu et al., 2021, Sec. 2.2.2): every row leaves at the same exit.

    Args:
        num_exits (`int`): how many exits to run, from 1.
    """

    name = "budgeted"
    parameter = "budgeted_exit"

    def __init__(self, num_exits: int):
        if isinstance(num_exits, bool) or not isinstance(num_exits, int) or num_exits < 1:
            raise ValueError(
                f"`num_exits` must be a whole number of at least 1: how many exits to run. Got {shown(num_exits)}."
            )
        self.num_exits = num_exits

    @classmethod
    def from_config(cls, config: Any) -> "Budgeted":
        if type(config.budgeted_exit) is not int or config.budgeted_exit not in config.exit_layers:
            raise ValueError(
                f"`budgeted_exit` must be one of the exits of this model, {list(config.exit_layers)} (the first layer "
                f'is 1), when `exit_strategy="budgeted"`. Got `budgeted_exit={shown(config.budgeted_exit)}`.'
            )
        return cls(config.exit_layers.index(config.budgeted_exit) + 1)

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        # Not `torch.full`: in a trace the comparison is a tensor, with which ONNX fills nothing.
        fill = torch.ones if exit_logits.shape[1] >= self.num_exits else torch.zeros
        return fill(exit_logits.shape[:1], dtype=torch.bool, device=exit_logits.device)

    def may_exit(self, exit_logits: Tensor) -> Tensor:
        leave = exit_logits.shape[1] + 1 >= self.num_exits
        return torch.full(exit_logits.shape[:1], leave, dtype=torch.bool, device=exit_logits.device)

    def fixed_exit(self, num_exits: int) -> int | None:
        if type(self).should_exit is not Budgeted.should_exit:  # but a subclass's
            return None
        return min(self.num_exits, num_exits) - 1


@register
class Patience(ExitPolicy):
    """
    PABEE (Zhou et al., 2020): leave once the predicted class has stayed the same for `patience` comparisons in a row.

    Args:
        patience (`int`): agreeing comparisons between neighbouring exits, from 1. The earliest exit is `patience + 1`.
    """

    name = "patience"
    parameter = "patience"

    def __init__(self, patience: int):
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(
                "`patience` must be a whole number of at least 1: how many exits in a row must confirm the prediction "
                f"of the one before. Got `patience={shown(patience)}`."
            )
        self.patience = patience

    @classmethod
    def from_config(cls, config: Any) -> "Patience":
        return cls(config.patience)

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        return self._agree(exit_logits, self.patience + 1)

    def may_exit(self, exit_logits: Tensor) -> Tensor:
        return self._agree(exit_logits, self.patience)  # one comparison short

    @staticmethod
    def _agree(exit_logits: Tensor, num_exits: int) -> Tensor:
        """Whether the last `num_exits` exits predict one class."""
        if exit_logits.shape[1] < num_exits:
            return torch.zeros(exit_logits.shape[:1], dtype=torch.bool, device=exit_logits.device)
        predictions = exit_logits[:, -num_exits:].argmax(dim=-1)  # (batch_size, num_exits)
        return (predictions == predictions[:, -1:]).all(dim=1)


class _Threshold(ExitPolicy):
    """What the two confidence policies share: one number in `[0, 1]`."""

    parameter = "exit_threshold"

    def __init__(self, exit_threshold: float):
        if isinstance(exit_threshold, bool) or not isinstance(exit_threshold, int | float):
            raise ValueError(
                f"`exit_threshold` must be a number in [0, 1]. Got `exit_threshold={shown(exit_threshold)}`."
            )
        if not 0.0 <= exit_threshold <= 1.0:
            raise ValueError(f"`exit_threshold` must lie in [0, 1]. Got `exit_threshold={shown(exit_threshold)}`.")
        self.exit_threshold = float(exit_threshold)

    @classmethod
    def from_config(cls, config: Any) -> "_Threshold":
        return cls(config.exit_threshold)


@register
class Entropy(_Threshold):
    """
    DeeBERT (Xin et al., 2020) and FastBERT (Liu et al., 2020): leave once the prediction's entropy is low enough.

    Args:
        exit_threshold (`float`): leave where `H(p) / log(num_labels) < exit_threshold`, in `[0, 1]`. With 0, no row
            leaves early.
    """

    name = "entropy"

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        return normalized_entropy(exit_logits[:, -1]) < self.exit_threshold


@register
class MaxProb(_Threshold):
    """
    Shallow-Deep networks (Kaya et al., 2019): leave once the largest class probability is high enough.

    Args:
        exit_threshold (`float`): leave where `max p > exit_threshold`, in `[0, 1]`. With 1, no row leaves early.
    """

    name = "max_prob"

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        log_p = F.log_softmax(exit_logits[:, -1].float(), dim=-1)
        return log_p.amax(dim=-1).exp() > self.exit_threshold


def normalized_entropy(logits: Tensor) -> Tensor:
    """
    Entropy of `softmax(logits)` divided by its maximum `log(num_labels)`.

    Computed in float32 from log-softmax, so that logits of any finite size, and half precision, are safe.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels)`): finite, `num_labels >= 2`.

    Returns:
        `torch.Tensor` of shape `(...)`, in `[0, 1]`: 0 is certainty.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    # A probability that underflows to 0 has log p of at most -1000s, never -inf, so the product is a plain 0.
    return -(log_p.exp() * log_p).sum(dim=-1) / math.log(logits.shape[-1])


def policy_from_config(config: Any) -> ExitPolicy:
    """
    The policy that `config.exit_strategy` names, with its parameters checked.

    Args:
        config ([`GamlBertConfig`]): or anything with its exit fields.

    Raises:
        ValueError: the strategy is unknown, or a field it reads is missing or out of range.
    """
    return policy_class(config.exit_strategy).from_config(config)


def policy_for_call(exit_policy: ExitPolicy | None, config: Any) -> ExitPolicy:
    """
    The policy of one call: its own, or where it gives none the config's.

    Raises:
        ValueError: it is no policy, or the config has none that is valid.
    """
    if exit_policy is None:
        return policy_from_config(config)
    if not hasattr(exit_policy, "replay"):  # not asked for its class, which remote code has twice
        raise ValueError(
            "`exit_policy` must be an ExitPolicy, such as `Patience(6)`; a name goes into `exit_strategy` of the "
            f"config. Got {shown(exit_policy)}."
        )
    return exit_policy


def policy_class(exit_strategy: str) -> type[ExitPolicy]:
    """
    The class that an `exit_strategy` names.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(exit_strategy, str) or exit_strategy not in EXIT_POLICIES:
        raise ValueError(
            f"`exit_strategy` must be one of {sorted(EXIT_POLICIES)}, or one of your own that is registered by then. "
            f"Got `exit_strategy={shown(exit_strategy)}`."
        )
    return EXIT_POLICIES[exit_strategy]


def changed_exits(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """
    The exit fields of a config, changed by what a caller gave; `None` means not given.

    A parameter that one strategy alone reads implies that strategy. A threshold means opposite things to its two
    readers, so no strategy is guessed from it, and a change of strategy does not inherit it.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    readers = {
        name: [strategy for strategy, policy in EXIT_POLICIES.items() if policy.parameter == name]
        for name in EXIT_FIELDS
        if name in changes and name != "exit_strategy"
    }
    strategy = changes.get("exit_strategy", fields["exit_strategy"])
    policy_class(strategy)
    if "exit_strategy" not in changes:
        implied = [names[0] for names in readers.values() if strategy not in names and len(names) == 1]
        strategy = implied[0] if implied else strategy
    for name, names in readers.items():
        if strategy not in names:
            choices = " or ".join(f'`exit_strategy="{reader}"`' for reader in names)
            raise ValueError(
                f"`{name}` is read with {choices} alone; name the strategy you want. Got "
                f"`{name}={shown(changes[name])}` with `exit_strategy={strategy!r}`."
            )
    inherited = fields if strategy == fields["exit_strategy"] else {**fields, "exit_threshold": None}
    return {**inherited, **changes, "exit_strategy": strategy}


def shown(value: Any) -> str:
    """`value` as an error message shows it: like `repr`, but short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number too long to show"
