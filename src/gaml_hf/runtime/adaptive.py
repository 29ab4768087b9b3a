"""
Exits that follow the traffic: when requests pile up, rows leave earlier, so that the wait stays within its bound.

"The speed-up ratio can be controlled ... to handle drastic changes in request traffic" (Zhu et al., 2021, Sec. 1).
[`ExitCap`] decides how deep a row may go at all, [`Capped`] makes it leave there. Neither knows of a server.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gaml_hf.models.exiting_gaml import ExitPolicy, shown


FORGET = 0.9  # share that a measurement keeps of its weight at the next one
BATCHES = 8  # that fit into the latency to keep: the cap moves once a batch, and must reach its lowest in time
FIXED_SHARE = 1 / 3  # of a batch's seconds, at most, do not depend on its tokens: the less, the more are answered
DOUBT = 0.02  # relative variance of the last batches' tokens at which these say as much as a guess


class Capped(ExitPolicy):
    """
    Another policy, up to an exit at which every row that is still there leaves.

    It holds for one call of a model: it notes which rows it made leave, in the order in which the model asks about
    them, which is that of the batch.

    Args:
        policy ([`ExitPolicy`]): decides before the cap.
        num_exits (`int`): exits that run at most, from 1.

    Attributes:
        forced (`list[bool]`): of each row that was there at the cap, whether it would have gone on.
    """

    name = "capped"

    def __init__(self, policy: ExitPolicy, num_exits: int):
        self.policy, self.num_exits = policy, num_exits
        self.forced: list[bool] = []

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        leave = self.policy(exit_logits)
        if exit_logits.shape[1] < self.num_exits:
            return leave
        self.forced += (~leave).tolist()
        return torch.ones_like(leave)

    def may_exit(self, exit_logits: Tensor) -> Tensor:
        guess = self.policy.may_exit(exit_logits)
        return guess if exit_logits.shape[1] + 1 < self.num_exits else torch.ones_like(guess)


class ExitCap:
    """
    The deepest exit that traffic allows.

    Before each batch the expected wait is the number of tokens that wait behind it over the measured tokens a second.
    Above half of `slo` the cap goes down one exit; below a quarter it goes up one, and between the two it stays. Up it
    goes at most one exit for each `slo` of calm, so that an exit must have held before the next is tried, and time
    without a request counts as calm. What a text takes by itself moves nothing: the cap is for texts that pile up.

    Args:
        exit_layers (`list[int]`): of the model, rising.
        slo (`float`): the latency that requests shall keep, in seconds, above 0.
        min_exit (`int`, *optional*): the layer below which the cap never goes; defaults to the first exit.
        clock (`Callable`): seconds, never falling.

    Raises:
        ValueError: `min_exit` is no exit of the model.

    Attributes:
        position (`int`): 0-based position in `exit_layers` of the cap.
        tokens_per_second (`float`, *optional*): what the last batches ran at, the newest weighing most.
    """

    def __init__(
        self,
        exit_layers: Sequence[int],
        slo: float,
        min_exit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        min_exit = exit_layers[0] if min_exit is None else min_exit
        if min_exit not in exit_layers:
            raise ValueError(
                f"`min_exit` must be one of the exits of this model, {list(exit_layers)}. Got "
                f"`min_exit={shown(min_exit)}`."
            )
        self.exit_layers, self.slo, self.clock = list(exit_layers), slo, clock
        self.lowest, self.position = self.exit_layers.index(min_exit), len(exit_layers) - 1
        self._sums = (0.0,) * 5  # of the last batches: 1, tokens, seconds, tokens^2, tokens x seconds
        self._calm_since: float | None = None

    @property
    def exit_layer(self) -> int:
        """The layer of the cap."""
        return self.exit_layers[self.position]

    @property
    def exit_layer_now(self) -> int:
        """The layer that the cap would have if a batch came now, with none behind it."""
        return self.exit_layers[self._risen(self._steps(self.clock()))]

    @property
    def is_acting(self) -> bool:
        """Whether the cap keeps rows from any exit."""
        return self.position < len(self.exit_layers) - 1

    @property
    def tokens_per_second(self) -> float | None:
        _, tokens, seconds, _, _ = self._sums
        return tokens / seconds if seconds > 0 else None

    def expected_wait(self, waiting_tokens: int) -> float:
        """Seconds until `waiting_tokens` are answered; 0 before anything was measured."""
        return waiting_tokens / self.tokens_per_second if self.tokens_per_second else 0.0

    def update(self, waiting_tokens: int) -> None:
        """Move the cap; called before each batch, with the tokens that wait behind it."""
        now, wait = self.clock(), self.expected_wait(waiting_tokens)
        if wait > self.slo / 2:
            self.position = max(self.position - 1, self.lowest)
        if wait >= self.slo / 4:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        else:
            steps = self._steps(now)
            self.position = self._risen(steps)
            self._calm_since += steps * self.slo

    def _steps(self, now: float) -> int:
        """Exits that the cap may rise by after the calm until `now`."""
        since = self._calm_since
        return 0 if since is None else int((now - since) / self.slo)

    def _risen(self, steps: int) -> int:
        return min(self.position + steps, len(self.exit_layers) - 1)

    def batch_tokens(self, max_tokens: int) -> int:
        """
        Tokens of a batch that takes an eighth of `slo`, or as long as its fixed cost is no more than `FIXED_SHARE` of
        it; `max_tokens` where that is less.
        """
        if self.tokens_per_second is None:
            return max_tokens
        fixed, per_token = self._cost()
        seconds = max(self.slo / BATCHES, fixed / FIXED_SHARE)
        if (seconds - fixed) >= max_tokens * per_token:
            return max_tokens
        return max(1, int((seconds - fixed) / per_token))

    def _cost(self) -> tuple[float, float]:
        """
        Seconds of a batch, and of each token in it: least squares over the last batches. As far as these are of one
        size, and do not tell, half of a batch is taken for its fixed cost, so that the next one may be twice as long.
        """
        weight, tokens, seconds, squares, products = self._sums
        tokens, seconds = tokens / weight, seconds / weight  # of a batch, in the mean
        doubt = DOUBT * tokens**2
        variance, covariance = squares / weight - tokens**2, products / weight - tokens * seconds
        per_token = (covariance + doubt * seconds / tokens / 2) / (variance + doubt)
        per_token = min(max(per_token, 0.0), seconds / tokens)
        return seconds - per_token * tokens, per_token

    def ran(self, tokens: int, seconds: float) -> None:
        """Learn from a batch: its tokens and what it took."""
        new = (1.0, tokens, seconds, tokens**2, tokens * seconds)
        self._sums = tuple(FORGET * old + x for old, x in zip(self._sums, new, strict=True))
