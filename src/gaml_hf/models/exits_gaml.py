"""
What an exit reads: the states of a layer's tokens, pooled to one vector and scaled.

The paper's exit reads [CLS] as it is (Zhu et al., 2021, Sec. 6.4). In the shallow layers of a pre-trained encoder that
state hardly differs from text to text, and an exit on it learns the most frequent class; the mean over the tokens
differs (docs/choices.md).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def layer_norm(state: Tensor) -> Tensor:
    """LayerNorm without parameters: each row on its own, `(batch_size, hidden_size)` to the same."""
    return F.layer_norm(state, state.shape[-1:])
