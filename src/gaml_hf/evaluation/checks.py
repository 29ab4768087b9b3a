"""What logits, labels and scores must be like, or one clear error."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def check_exit_logits(exit_logits: np.ndarray | Tensor, exit_layers: Sequence[int] | None = None) -> Tensor:
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


def check_labels(labels: np.ndarray | Tensor, exit_logits: np.ndarray | Tensor) -> np.ndarray:
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


def check_exit_layer(exit_layer: np.ndarray | Tensor | Sequence[int], exit_layers: Sequence[int]) -> np.ndarray:
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


def main_score(scores: Mapping[str, float], main_metric: str) -> float:
    if main_metric not in scores:
        raise ValueError(
            f"`main_metric` must be one of the scores, {sorted(scores)}. Got `main_metric={main_metric!r}`."
        )
    value = float(scores[main_metric])
    if not np.isfinite(value):
        raise ValueError(f"The score {main_metric!r} must be finite to be compared. Got {value}.")
    return value
