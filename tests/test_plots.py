"""Each figure shows its numbers, is a PNG, and touches no global state of matplotlib."""

import importlib
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from pytest import mark, raises

from gaml_hf.evaluation import OperatingPoint, plots


DEPTH = {"GAML-BERT": {1: 0.5, 2: 0.7, 3: 0.9, 4: 0.8}, "ML-BERT": {4: 0.6, 2: 0.4}}
SWEEP = {"patience": [OperatingPoint("patience", 2, 0.9, 1.2), OperatingPoint("patience", 1, 0.8, 2.0)]}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved, to look at what they show."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def lines(figure: Figure) -> dict[str, tuple[list, list]]:
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in drawn.items()}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@mark.parametrize(
    "draw",
    [
        lambda path: plots.depth_score(DEPTH, "accuracy", path, baseline=0.75),
        lambda path: plots.overthinking(DEPTH, "accuracy", path),
        lambda path: plots.speed_score(SWEEP, "accuracy", path),
        lambda path: plots.gradient_angles([0.5, -0.5, 0.0], path),
    ],
    ids=["depth_score", "overthinking", "speed_score", "gradient_angles"],
)
def test_writes_a_png_with_labels(draw, tmp_path, drawn):
    path = tmp_path / "new" / "figure.png"
    draw(path)
    pixels = imread(path)
    assert min(pixels.shape[:2]) >= 600  # 4 inches at 150 dpi
    assert pixels.std() > 0.05  # something is on it
    axes = drawn[0].axes[0]
    assert axes.get_title()
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_depth_score_shows_the_curves(tmp_path, drawn):
    plots.depth_score(DEPTH, "matthews_correlation", tmp_path / "figure.png", baseline=0.75)
    shown = lines(drawn[0])
    assert shown["GAML-BERT"] == ([1, 2, 3, 4], [0.5, 0.7, 0.9, 0.8])
    assert shown["ML-BERT"] == ([2, 4], [0.4, 0.6])  # in the order of the layers
    assert shown["plain fine-tuning, all layers"][1] == [0.75, 0.75]
    axes = drawn[0].axes[0]
    assert list(axes.get_xticks()) == [1, 2, 3, 4]
    assert axes.get_ylabel() == "matthews_correlation"
    assert legend(drawn[0]) == ["GAML-BERT", "ML-BERT", "plain fine-tuning, all layers"]


def test_overthinking_marks_the_best_exit(tmp_path, drawn):
    plots.overthinking(DEPTH, "accuracy", tmp_path / "figure.png")
    assert legend(drawn[0]) == ["GAML-BERT (best: exit 3, 0.900)", "ML-BERT (best: exit 4, 0.600)"]
    rings = [line.get_xydata().tolist() for line in drawn[0].axes[0].lines if line.get_markerfacecolor() == "none"]
    assert rings == [[[3, 0.9]], [[4, 0.6]]]


def test_speed_score_shows_the_points(tmp_path, drawn):
    plots.speed_score(SWEEP, "accuracy", str(tmp_path / "figure.png"))
    assert lines(drawn[0])["patience"] == ([1.2, 2.0], [0.9, 0.8])


@mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_gradient_angles_by_hand(as_type, tmp_path, drawn):
    # 62, 62, 118 and 180 degrees: half of them in conflict. The last is off by rounding.
    plots.gradient_angles(as_type([0.46947, 0.46947, -0.46947, -1.0000001]), tmp_path / "figure.png")
    axes = drawn[0].axes[0]
    assert "50% of steps above 90°" in axes.get_title()
    bars = {round(bar.get_x()): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert bars == {60: 2, 115: 1, 175: 1}  # by the left edge of bars 5 degrees wide


@mark.parametrize("cos_angles", [[], [0.5, 1.2], [float("nan")], [[0.5]]], ids=str)
def test_gradient_angles_refuses_what_is_no_cosine(cos_angles, tmp_path):
    with raises(ValueError, match=r"`cos_angles` must be cosines in \[-1, 1\], at least one"):
        plots.gradient_angles(cos_angles, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@mark.parametrize("draw", [plots.depth_score, plots.overthinking, plots.speed_score])
def test_nothing_to_draw_is_an_error(draw, tmp_path):
    with raises(ValueError, match="`curves` must hold at least one entry to draw"):
        draw({}, "accuracy", tmp_path / "figure.png")
    with raises(ValueError, match=r"`curves\['a'\]` must hold at least one entry to draw"):
        draw({"a": {}}, "accuracy", tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_pyplot_stays_out(tmp_path, monkeypatch):
    """A caller's backend and open figures are its own; on a server there is no display to ask for."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    backend = matplotlib.rcParams["backend"]
    importlib.reload(plots)
    plots.gradient_angles([0.5], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
    assert matplotlib.rcParams["backend"] == backend
