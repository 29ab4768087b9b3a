"""
The losses of GAML-BERT (Zhu et al., 2021, Eqs. 1-3), as pure functions of the logits of all exits.

Exits are named by their layer, from 1. `exit_logits` is always `(batch_size, num_exits, num_labels)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def exit_weights(exit_layers: Sequence[int], scheme: str, progress: float = 0.0) -> list[float]:
    """
    Weight of each exit in `L^CE` (Eq. 1): `m / sum(m)` over the exits that are there.

    Args:
        exit_layers (`list[int]`): the layer `m` of each exit, rising.
        scheme (`str`): `"linear"` is Eq. 1; `"uniform"` weighs all exits alike; `"last"` is plain fine-tuning.
            `"shallow_deep"` (Kaya et al., 2019): `min(C_m, 0.01 + C_m * progress)` for all but the last, which weighs
            1, with `C_m = m / M` the share of the layers below exit `m`. Theirs do not sum to 1: with an exit after
            each of 27 layers the first steps would be as safe, and the last ones 14 times as long.
        progress (`float`): share of the training that is over, in `[0, 1]`; for `"shallow_deep"`.

    Returns:
        `list[float]`: one weight per exit; they sum to 1.
    """
    raw = {
        "linear": [float(m) for m in exit_layers],
        "uniform": [1.0] * len(exit_layers),
        "last": [0.0] * (len(exit_layers) - 1) + [1.0],
        "shallow_deep": [min(c, 0.01 + c * progress) for c in (m / exit_layers[-1] for m in exit_layers[:-1])] + [1.0],
    }[scheme]
    return [weight / sum(raw) for weight in raw]


def cross_entropy_loss(
    exit_logits: Tensor,
    labels: Tensor,
    weights: Sequence[float],
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """
    `L^CE = sum_m w_m * L_m^CE`, with `w_m = m / sum(m)` in the paper (Eq. 1).

    Args:
        exit_logits (`torch.Tensor` of shape `(batch_size, num_exits, num_labels)`): one row of logits per exit.
        labels (`torch.LongTensor` of shape `(batch_size,)`): in `[0, num_labels - 1]`.
        weights (`list[float]`): one per exit, see [`exit_weights`].
        class_weights (`list[float]`, *optional*):
            What a row of each class weighs, one per class; 1 by default. The sum over rows is divided by their number
            and not, as in `torch.nn.CrossEntropyLoss`, by the sum of their weights: a row would then weigh more or
            less by its neighbours. A row's weight is of its whole loss, smoothed or not.
        label_smoothing (`float`): share of the target, in `[0, 1]`, that is spread evenly over all classes.

    Returns:
        `torch.Tensor` of shape `()`, in nats: the mean over the batch of the weighted sum over exits.
    """
    batch_size, num_exits, num_labels = exit_logits.shape
    per_exit = F.cross_entropy(
        _precise(exit_logits).flatten(0, 1),
        labels.repeat_interleave(num_exits),
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(batch_size, num_exits)
    if class_weights is not None:
        per_exit = per_exit * per_exit.new_tensor(class_weights)[labels, None]
    return (per_exit.mean(dim=0) * per_exit.new_tensor(weights)).sum()


def distillation_pairs(
    distillation: str | Sequence[Sequence[int]], exit_layers: Sequence[int]
) -> list[tuple[int, int]]:
    """
    The ordered pairs `i -> j` of Eq. 3: exit `j`, the student, learns from exit `i`, the teacher.

    Args:
        distillation (`str` or `list[list[int]]`):
            `"none"`: no pair. `"mutual"`: every `i != j` (Eq. 3). `"last_to_all"`: the last exit teaches all others,
            as in FastBERT. A list of `[teacher, student]` layers, as in the pilot experiments of Sec. 3.
        exit_layers (`list[int]`): the layer of each exit, rising.

    Returns:
        `list[tuple[int, int]]`: pairs of layers `(teacher, student)`.
    """
    if distillation == "none":
        return []
    if distillation == "mutual":
        return [(i, j) for i in exit_layers for j in exit_layers if i != j]
    if distillation == "last_to_all":
        return [(exit_layers[-1], j) for j in exit_layers[:-1]]
    return [(i, j) for i, j in distillation]


def distillation_loss(
    exit_logits: Tensor,
    pairs: Sequence[tuple[int, int]],
    exit_layers: Sequence[int],
    *,
    temperature: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """
    `L^KD = sum_{i -> j} KL(p_i || p_j)` (Eq. 3), with the teacher `p_i` detached.

    With `A[i, j] = 1` for each pair `i -> j`, the double sum is

        sum_i outdegree_i * (p_i . log p_i)  -  sum_j (sum_i A[i, j] * p_i) . log p_j

    so one small matrix product takes the place of the loop over pairs. The gradient at the logits of student `j` is
    `sum_i A[i, j] * (p_j - p_i)` (times `temperature`).

    Args:
        exit_logits (`torch.Tensor` of shape `(batch_size, num_exits, num_labels)`): one row of logits per exit.
        pairs (`list[tuple[int, int]]`): layers `(teacher, student)`, see [`distillation_pairs`].
        exit_layers (`list[int]`): the layer of each exit, rising.
        temperature (`float`): divides the logits of both; the loss is multiplied by its square (Hinton et al., 2015).
        reduction (`"sum"` or `"mean"`): `"sum"` is Eq. 3 to the letter; `"mean"` divides by the number of pairs.

    Returns:
        `torch.Tensor` of shape `()`, in nats: the mean over the batch. Zero where there is no pair.
    """
    if not pairs:
        return exit_logits.new_zeros((), dtype=torch.float32)
    adjacency = torch.zeros(len(exit_layers), len(exit_layers))  # A[teacher, student]
    for teacher, student in pairs:
        adjacency[exit_layers.index(teacher), exit_layers.index(student)] += 1.0
    student_log_p = F.log_softmax(_precise(exit_logits) / temperature, dim=-1)
    adjacency = adjacency.to(exit_logits.device, student_log_p.dtype, non_blocking=True)
    teacher_log_p = student_log_p.detach()
    teacher_p = teacher_log_p.exp()
    negative_entropy = (teacher_p * teacher_log_p).sum(dim=-1) @ adjacency.sum(dim=1)  # (batch_size,)
    taught = torch.einsum("ij,bik->bjk", adjacency, teacher_p)  # (batch_size, num_exits, num_labels)
    kl = negative_entropy - (taught * student_log_p).sum(dim=(1, 2))
    loss = kl.mean() * temperature**2
    return loss / len(pairs) if reduction == "mean" else loss


def _precise(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total_loss(ce_loss: Tensor, kd_loss: Tensor, alpha: float) -> Tensor:
    """`L = (1 - alpha) * L^CE + alpha * L^KD` (Eq. 2), with `alpha` in `[0, 1]`."""
    return (1 - alpha) * ce_loss + alpha * kd_loss
