"""
What an exit reads: the states of a layer's tokens, pooled to one vector and scaled.

The paper's exit reads [CLS] as it is (Zhu et al., 2021, Sec. 6.4). In the shallow layers of a pre-trained encoder that
state hardly differs from text to text, and an exit on it learns the most frequent class; the mean over the tokens
differs (docs/choices.md).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


RELATIVE_EPS = 1e-6


def mean_over_tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """
    Mean of each row's tokens, summed in float32 at least. What padding holds, NaN too, does not matter.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Not 0 where there is a token, of which each row has one at least. `None`: everywhere.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, in the type of `hidden_states`.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.mean(dim=1, dtype=wide).to(hidden_states.dtype)
    mask = mask.bool()
    total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(dim=1, dtype=wide)
    return (total / mask.sum(dim=1, keepdim=True)).to(hidden_states.dtype)


def inverse_deviation(variance: Tensor) -> Tensor:
    """
    `1 / standard deviation` of each feature, finite also for one that never varies: a share of the mean variance of
    all features, which may be far from 1, is added.
    """
    return (variance + RELATIVE_EPS * variance.mean()).clamp(min=torch.finfo(variance.dtype).tiny).rsqrt()


class RunningNorm(nn.Module):
    """
    Scales each feature of an exit's input by its mean and standard deviation over the training rows.

    Batch normalization without parameters, as it is at inference, in training too: a row is scaled by what was seen
    before its step, never by the rows beside it. So a step does not depend on how it is cut into ranks and
    micro-batches.

    Args:
        size (`int`): number of features, `hidden_size`.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def scale(self) -> Tensor:
        """`1 / standard deviation` of each feature, `(hidden_size,)`, in float32."""
        return inverse_deviation(self.variance.float())

    def forward(self, state: Tensor) -> Tensor:
        return ((state - self.mean) * self.scale()).to(state.dtype)

    @torch.no_grad()
    def blend(self, mean: Tensor, variance: Tensor, momentum: float) -> None:
        """
        Move towards the statistics of a step: those of the mixture of both, weighing `1 - momentum` and `momentum`.

        Args:
            mean, variance (`torch.Tensor` of shape `(hidden_size,)`): over the rows of the step. Not taken where one
                of them is not finite.
            momentum (`float`): in `(0, 1]`; 1 takes the step's as they are.
        """
        shift = mean - self.mean
        mixed = (1 - momentum) * (self.variance + momentum * shift.square()) + momentum * variance
        finite = (mean.isfinite() & variance.isfinite()).all()
        self.mean.copy_(torch.where(finite, self.mean + momentum * shift, self.mean))
        self.variance.copy_(torch.where(finite, mixed, self.variance))


def layer_norm(state: Tensor) -> Tensor:
    """LayerNorm without parameters: each row on its own, `(batch_size, hidden_size)` to the same."""
    return F.layer_norm(state, state.shape[-1:])
