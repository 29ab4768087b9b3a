"""
The figures: depth-score curves with over-thinking marked (Figs. 4 and 5 of Zhu et al., 2021), speed-score curves, and
the angles between the two gradients (Fig. 3). Each function writes one PNG, without pyplot and its global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from torch import Tensor


if TYPE_CHECKING:
    from gaml_hf.evaluation import OperatingPoint

# Told apart by colour-blind readers (Okabe and Ito, 2008), and by their markers in a print without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def depth_score(
    curves: Mapping[str, Mapping[int, float]],
    metric_name: str,
    path: str | Path,
    baseline: float | None = None,
    *,
    title: str = "Score of each exit",
    mark_best: bool = False,
) -> None:
    """
    Depth-score curves: the score when every row leaves at exit m, against m (Fig. 4).

    Args:
        curves (`dict[str, dict[int, float]]`): by name, the score of each exit layer, from 1.
        metric_name (`str`): label of the y axis.
        path (`str` or `Path`): the PNG to write; its folder is made.
        baseline (`float`, *optional*): score of the same encoder with one exit at its end, a dashed line.
        title (`str`, *optional*): of the figure.
        mark_best (`bool`, *optional*, defaults to `False`): mark each curve's best exit (the shallowest among equals).
    """
    figure, axes = _figure(title, "Exit layer", metric_name)
    for position, (name, scores) in enumerate(_not_empty("curves", curves).items()):
        layers = sorted(_not_empty(f"curves[{name!r}]", scores))
        best = max(layers, key=scores.get)
        label = f"{name} (best: exit {best}, {scores[best]:.3f})" if mark_best else name
        _curve(axes, position, layers, [scores[m] for m in layers], label)
        if mark_best:
            axes.plot(best, scores[best], "o", ms=13, mfc="none", mew=1.6, color=_color(position))
    if baseline is not None:
        axes.axhline(baseline, color="0.4", ls="--", lw=1.2, label="plain fine-tuning, all layers")
    layers = sorted({m for scores in curves.values() for m in scores})
    axes.set_xticks(layers)
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.margins(y=0.12)
    _save(figure, path)


def overthinking(scores: Mapping[str, Mapping[int, float]], metric_name: str, path: str | Path) -> None:
    """
    Over-thinking: `depth_score` with the best exit of each curve marked (Fig. 5).

    Args:
        scores (`dict[str, dict[int, float]]`): by name, the score of each exit layer, from 1.
        metric_name (`str`): label of the y axis.
        path (`str` or `Path`): the PNG to write; its folder is made.
    """
    depth_score(scores, metric_name, path, title="Over-thinking: is the last exit the best?", mark_best=True)


def speed_score(curves: Mapping[str, Sequence["OperatingPoint"]], metric_name: str, path: str | Path) -> None:
    """
    Speed-score curves: one point for each parameter of an exit policy.

    Args:
        curves (`dict[str, list[OperatingPoint]]`): by name, what `sweep` returned.
        metric_name (`str`): label of the y axis.
        path (`str` or `Path`): the PNG to write; its folder is made.
    """
    figure, axes = _figure("Score against speed-up", "Speed-up in layers (all layers / mean layers run)", metric_name)
    for position, (name, points) in enumerate(_not_empty("curves", curves).items()):
        points = sorted(_not_empty(f"curves[{name!r}]", points), key=lambda point: point.speed_up)
        _curve(axes, position, [point.speed_up for point in points], [point.score for point in points], name)
    axes.xaxis.set_major_formatter("{x:g}x")
    _save(figure, path)


def gradient_angles(
    cos_angles: Sequence[float] | np.ndarray | Tensor, path: str | Path, *, title: str = "Angle of the two gradients"
) -> None:
    """
    Histogram of the angle γ between g_CE and g_KD over training steps (Eq. 4, Fig. 3). Above 90° they conflict.

    Args:
        cos_angles (`list[float]`, `np.ndarray` or `torch.Tensor` of shape `(num_steps,)`):
            cos γ, in `[-1, 1]`; `alignment/cos_angle` of [`GamlTrainer`]'s log, with `logging_steps=1`.
        path (`str` or `Path`): the PNG to write; its folder is made.
        title (`str`, *optional*): of the figure.
    """
    cos_angles = np.asarray(cos_angles, dtype=np.float64)
    if cos_angles.ndim != 1 or cos_angles.size == 0 or not (np.abs(cos_angles) <= 1 + 1e-6).all():
        raise ValueError(
            "`cos_angles` must be cosines in [-1, 1], at least one, in one dimension. "
            f"Got shape {cos_angles.shape}, {np.sum(~(np.abs(cos_angles) <= 1 + 1e-6))} of them out of range or NaN."
        )
    degrees = np.degrees(np.arccos(np.clip(cos_angles, -1, 1)))
    conflict = degrees > 90
    figure, axes = _figure(f"{title}: {conflict.mean():.0%} of steps above 90°", "γ (degrees)", "Training steps")
    axes.hist(
        [degrees[~conflict], degrees[conflict]],
        bins=np.arange(0, 181, 5),
        stacked=True,
        color=COLORS[:2],
        edgecolor="white",
        linewidth=0.5,
        label=["γ ≤ 90°", "γ > 90°: conflict"],
    )
    axes.axvline(90, color="0.3", ls="--", lw=1.2)
    axes.set_xlim(0, 180)
    axes.xaxis.set_major_locator(MultipleLocator(30))
    _save(figure, path)


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(axes: Axes, position: int, x: Sequence[float], y: Sequence[float], name: str) -> None:
    marker = MARKERS[position % len(MARKERS)]
    every = 1 + len(x) // 20  # a long sweep is a line with a marker here and there
    axes.plot(x, y, color=_color(position), marker=marker, markevery=every, ms=4.5, lw=1.6, label=name)


def _color(position: int) -> str:
    return COLORS[position % len(COLORS)]


def _not_empty(name: str, values):
    if not values:
        raise ValueError(f"`{name}` must hold at least one entry to draw. Got {values!r}.")
    return values


def _save(figure: Figure, path: str | Path) -> None:
    figure.axes[0].legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
