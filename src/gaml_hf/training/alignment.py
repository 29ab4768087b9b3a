"""
Gradient alignment (GA) of Zhu et al. (2021), Eqs. 4-7: the distillation gradient, projected on the cross-entropy one.

GA needs inner products of the two gradients, and gives back one coefficient per group of parameters.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


# A group whose g_CE has a root mean square below 1e-3 of the whole model's is divided by the floor and not by its own
# |g_CE|^2: the gradient of an attention key's bias, say, is zero in theory, and Eq. 5 would divide noise by noise.
RELATIVE_FLOOR = 1e-6


def alignment_coefficient(
    ce_dot_ce: Tensor, ce_dot_kd: Tensor, *, alpha: float, mode: Literal["soft", "hard"], floor: Tensor | float = 0.0
) -> Tensor:
    """
    Coefficient `c` of the aligned gradient `g_GA = c * g_CE` (Zhu et al., 2021, Eqs. 5-7).

        g_KD^P = r * g_CE,  r = (g_KD . g_CE) / |g_CE|^2        Eq. 5
        soft:   c = (1 - alpha) + alpha * r                     Eq. 6
        hard:   c = (1 - alpha) + alpha * r if r >= 0 else 1    Eq. 7

    Args:
        ce_dot_ce (`torch.Tensor` of shape `(...)`): `|g_CE|^2`, one per group of parameters.
        ce_dot_kd (`torch.Tensor` of shape `(...)`): `g_CE . g_KD`, likewise; it has the sign of cos θ.
        alpha (`float`): KD weight α in `[0, 1]`.
        mode (`"soft"` or `"hard"`): what to do when the two gradients conflict (θ > 90°).
        floor (`torch.Tensor` of shape `(...)`, *optional*): lower bound of the divisor `|g_CE|^2`.

    Returns:
        `torch.Tensor` of shape `(...)`. Where `g_CE` is zero the paper defines nothing; here `r = 0`. Where an inner
        product has overflowed, `c` is not finite, in both modes, so that a gradient scaler sees it and skips the step.
    """
    # torch.where, not `if`: a branch on a device scalar would wait for the GPU on every step.
    divisor = torch.maximum(ce_dot_ce, torch.as_tensor(floor, dtype=ce_dot_ce.dtype, device=ce_dot_ce.device))
    # With |g_CE| = 0 the dividend is 0 too, and so is r; or NaN, where g_KD has overflowed, and so is r.
    r = ce_dot_kd / torch.where(divisor == 0, 1.0, divisor)
    r = torch.where(divisor.isinf(), torch.nan, r)  # x / inf is a quiet 0
    c = (1 - alpha) + alpha * r
    if mode == "hard":
        c = torch.where((r < 0) & r.isfinite(), torch.ones_like(c), c)
    return c


def cos_angle(ce_dot_ce: Tensor, ce_dot_kd: Tensor, kd_dot_kd: Tensor) -> Tensor:
    """
    `cos γ = (g_KD . g_CE) / (|g_KD| * |g_CE|)` (Eq. 4); γ of Eq. 4 and θ of Eqs. 5-7 are one angle.

    Args:
        ce_dot_ce, ce_dot_kd, kd_dot_kd (`torch.Tensor` of shape `(...)`): inner products of the two gradients.

    Returns:
        `torch.Tensor` of shape `(...)`, in `[-1, 1]`; 0 where one of the gradients is zero.
    """
    # The product of the roots, not the root of the product, which would leave the range of float32 sooner.
    norms = ce_dot_ce.sqrt() * kd_dot_kd.sqrt()
    return torch.where(norms == 0, torch.zeros_like(norms), ce_dot_kd / torch.where(norms == 0, 1.0, norms))


def parameter_groups(names: Sequence[str], granularity: Literal["global", "layer", "tensor"]) -> list[int]:
    """
    Which parameters share one angle.

    Args:
        names (`list[str]`): parameter names, as `named_parameters()` gives them.
        granularity (`str`):
            `"global"`: all of Θ, as the paper writes it. `"layer"`: the embeddings, each encoder layer, each exit and,
            where there is one, the shared pooler. `"tensor"`: each parameter tensor.

    Returns:
        `list[int]`: the group of each parameter, numbered from 0 without gaps.
    """
    if granularity == "global":
        keys = [""] * len(names)
    elif granularity == "layer":
        keys = [_layer_of(name) for name in names]
    else:
        keys = list(names)
    number: dict[str, int] = {}
    return [number.setdefault(key, len(number)) for key in keys]


def _layer_of(name: str) -> str:
    """
    `"bert.encoder.layer.3"`, `"resnet.encoder.stages.0.layers.3"`, `"exit_classifiers.3"` (its pooler goes with it),
    or `"bert.embeddings"`.
    """
    numbered = re.match(r"\D*\.\d+(\.layers\.\d+)?(?=\.)", name.replace("exit_poolers.", "exit_classifiers."))
    return numbered.group() if numbered else name.rpartition(".")[0].rpartition(".")[0]


def inner_products(g_ce: Sequence[Tensor], g_kd: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """
    `|g_CE|^2`, `g_CE . g_KD` and `|g_KD|^2` of each parameter, three tensors of shape `(num_parameters,)`.

    In float32 where the gradients are in half precision, in which a sum of squares loses its digits, or overflows.
    """
    dtype = torch.promote_types(g_ce[0].dtype, torch.float32)
    ce_dot_ce, kd_dot_kd = (torch.stack(torch._foreach_norm(g, 2, dtype)).square() for g in (g_ce, g_kd))
    ce_dot_kd = [ce.flatten().to(dtype).dot(kd.flatten().to(dtype)) for ce, kd in zip(g_ce, g_kd, strict=True)]
    return ce_dot_ce, torch.stack(ce_dot_kd), kd_dot_kd


class Alignment(NamedTuple):
    """
    What [`align_`] did.

    Attributes:
        cos_angle (`torch.Tensor` of shape `()`): Eq. 4 over all parameters at once, whatever the granularity.
        coefficient (`torch.Tensor` of shape `(num_groups,)`): `c` of each group.
    """

    cos_angle: Tensor
    coefficient: Tensor


@torch.no_grad()
def align_(
    g_ce: Sequence[Tensor],
    g_kd: Sequence[Tensor],
    groups: Sequence[int],
    *,
    alpha: float,
    mode: Literal["soft", "hard"],
) -> Alignment:
    """
    Replace `g_CE` by `g_GA = c * g_CE` in place (Eqs. 6 and 7), with one `c` for each group of parameters.

    Args:
        g_ce (`list[torch.Tensor]`): gradient of `L^CE`, one tensor per parameter; overwritten with `g_GA`.
        g_kd (`list[torch.Tensor]`): gradient of `L^KD`, of the same shapes.
        groups (`list[int]`): the group of each parameter, see [`parameter_groups`].
        alpha (`float`): KD weight α in `[0, 1]`.
        mode (`"soft"` or `"hard"`): Eq. 6 or Eq. 7.

    Returns:
        [`Alignment`]: on the gradients' device; nothing here waits for the GPU.
    """
    device = g_ce[0].device
    index = torch.tensor(groups).to(device, non_blocking=True)
    sizes = torch.tensor([g.numel() for g in g_ce], dtype=torch.float32).to(device, non_blocking=True)

    def per_group(values: Tensor) -> Tensor:  # (num_parameters,) -> (num_groups,)
        return values.new_zeros(max(groups) + 1).index_add_(0, index, values)

    ce_dot_ce, ce_dot_kd, kd_dot_kd = map(per_group, inner_products(g_ce, g_kd))
    floor = RELATIVE_FLOOR * ce_dot_ce.sum() * per_group(sizes) / sizes.sum()
    c = alignment_coefficient(ce_dot_ce, ce_dot_kd, alpha=alpha, mode=mode, floor=floor)
    torch._foreach_mul_(list(g_ce), list(c[index].unbind()))
    return Alignment(cos_angle(ce_dot_ce.sum(), ce_dot_kd.sum(), kd_dot_kd.sum()), c)
