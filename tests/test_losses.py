"""Eqs. 1-3: numbers worked by hand, the loops of `reference.py`, and what has gone wrong in other implementations."""

import math

import torch
from pytest import approx, mark
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close

from gaml_hf.models.losses_gaml import (
    cross_entropy_loss,
    distillation_loss,
    distillation_pairs,
    exit_weights,
    total_loss,
)
from reference import ce_loss_reference, kd_loss_reference


EXITS = [2, 3, 5, 6]  # not 1..M, for a layer is not a position
GRAPHS = [  # as in the config, in layers; what the loops take, in positions
    ("mutual", [(i, j) for i in range(4) for j in range(4) if i != j]),
    ("last_to_all", [(3, 0), (3, 1), (3, 2)]),
    ([[3, 2], [2, 6]], [(1, 0), (0, 3)]),
]


def kd(exit_logits, distillation, exit_layers=EXITS, **kwargs):
    return distillation_loss(exit_logits, distillation_pairs(distillation, exit_layers), exit_layers, **kwargs)


def random_logits(batch_size=5, num_exits=4, num_labels=3):
    return 2 * torch.randn(batch_size, num_exits, num_labels)


def test_losses_of_float64_are_float64():
    """And right to its last digits, as a check of gradients needs them."""
    logits, labels = random_logits().double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    for loss in (
        lambda x: cross_entropy_loss(x, labels, exit_weights(EXITS, "linear")),
        lambda x: kd(x, "mutual", temperature=2.0),
    ):
        assert loss(logits).dtype == torch.float64
        assert loss(logits.float()).dtype == loss(logits.bfloat16()).dtype == torch.float32
    assert cross_entropy_loss(logits, labels, exit_weights(EXITS, "linear")).item() == approx(
        ce_loss_reference(logits.tolist(), labels.tolist(), exit_weights(EXITS, "linear")), rel=1e-14
    )
    assert kd(logits, "mutual").item() == approx(kd_loss_reference(logits.tolist(), GRAPHS[0][1]), rel=1e-13)


def test_equations_1_to_3_by_hand():
    # One row of class 0 and two exits: p_1 = (1/2, 1/2), p_2 = (3/4, 1/4).
    logits, labels = tensor([[[0.0, 0.0], [math.log(3), 0.0]]]), tensor([0])
    ce_loss = cross_entropy_loss(logits, labels, exit_weights([1, 2], "linear"))
    kd_loss = kd(logits, "mutual", [1, 2])
    assert ce_loss.item() == approx(0.42284, abs=1e-5)  # 1/3 * ln 2 + 2/3 * ln 4/3 = 0.23105 + 0.19179
    assert kd_loss.item() == approx(0.27465, abs=1e-5)  # KL(p_1 || p_2) + KL(p_2 || p_1) = 0.14384 + 0.13081
    assert total_loss(ce_loss, kd_loss, alpha=0.2).item() == approx(0.39320, abs=1e-5)  # 0.8 * L^CE + 0.2 * L^KD


@mark.parametrize(
    ("exit_layers", "scheme", "expected"),
    [
        ([1, 2, 3, 4], "linear", [0.1, 0.2, 0.3, 0.4]),
        ([6, 12], "linear", [1 / 3, 2 / 3]),  # m / sum(m): m is the layer, the sum is over the exits that are there
        ([1, 12], "linear", [1 / 13, 12 / 13]),
        ([6, 12], "uniform", [0.5, 0.5]),
        ([6, 12], "last", [0.0, 1.0]),
    ],
)
def test_exit_weights(exit_layers, scheme, expected):
    assert exit_weights(exit_layers, scheme) == approx(expected)


def test_the_schedule_of_shallow_deep_networks():
    """tau_m = min(C_m, 0.01 + C_m * progress) with C = 1/4, 1/2 (Kaya et al., 2019), and 1 for the last."""
    for progress, raw in ((0.0, [0.01, 0.01, 1.0]), (0.5, [0.135, 0.26, 1.0]), (1.0, [0.25, 0.5, 1.0])):
        expected = [weight / sum(raw) for weight in raw]
        assert exit_weights([2, 4, 8], "shallow_deep", progress) == approx(expected)


@mark.parametrize(
    ("distillation", "expected"),
    [
        ("none", []),
        ("mutual", [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]),
        ("last_to_all", [(4, 1), (4, 2)]),  # FastBERT: (teacher, student)
        ([[4, 1], [2, 4]], [(4, 1), (2, 4)]),
    ],
)
def test_distillation_pairs(distillation, expected):
    assert distillation_pairs(distillation, [1, 2, 4]) == expected


@mark.parametrize("scheme", ["linear", "uniform", "last"])
def test_ce_loss_agrees_with_the_loops(scheme):
    logits, labels = random_logits(), tensor([0, 1, 2, 2, 0])
    weights = exit_weights(EXITS, scheme)
    expected = ce_loss_reference(logits.tolist(), labels.tolist(), weights)
    assert cross_entropy_loss(logits, labels, weights).item() == approx(expected, rel=1e-5)
    # Not contiguous: exits first, as a caller may have stacked them.
    shuffled = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert cross_entropy_loss(shuffled, labels, weights).item() == approx(expected, rel=1e-5)


CLASS_WEIGHTS = [0.25, 4.0, 1.0]


@mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@mark.parametrize("smoothing", [0.0, 0.3])
def test_weighted_and_smoothed_ce_loss_agrees_with_the_loops(class_weights, smoothing):
    logits, labels, weights = random_logits(), tensor([0, 1, 2, 2, 0]), exit_weights(EXITS, "linear")
    found = cross_entropy_loss(logits, labels, weights, class_weights=class_weights, label_smoothing=smoothing)
    expected = ce_loss_reference(logits.tolist(), labels.tolist(), weights, class_weights, smoothing)
    assert found.item() == approx(expected, rel=1e-5)


def test_weights_and_smoothing_are_pytorchs():
    """But for the divisor of a weighted mean: the number of rows, and not the sum of their weights."""
    logits, labels = random_logits(num_exits=1), tensor([0, 1, 2, 2, 0])
    smoothed = cross_entropy_loss(logits, labels, [1.0], label_smoothing=0.3)
    assert_close(smoothed, F.cross_entropy(logits[:, 0], labels, label_smoothing=0.3))
    weighted = cross_entropy_loss(logits, labels, [1.0], class_weights=CLASS_WEIGHTS)
    assert_close(weighted, F.cross_entropy(logits[:, 0], labels, weight=tensor(CLASS_WEIGHTS), reduction="sum") / 5)


def test_a_heavy_class_does_not_draw_the_rows_of_others():
    """
    A weight is of a row: each row's loss is least at its own smoothed target, whatever the weights are.

    `torch.nn.CrossEntropyLoss` weighs the classes within the target: with these numbers a row that is surely of class
    0 would be answered with class 1, 0.05 * 20 against 0.95 * 0.5.
    """
    target = tensor([0.95, 0.05])
    logits = target.log().repeat(1, 1, 1).requires_grad_()
    cross_entropy_loss(logits, tensor([0]), [1.0], class_weights=[0.5, 20.0], label_smoothing=0.1).backward()
    assert_close(logits.grad, torch.zeros(1, 1, 2), atol=1e-6, rtol=0)


@mark.parametrize("temperature", [1.0, 2.5])
@mark.parametrize(("distillation", "positions"), GRAPHS)
def test_kd_loss_agrees_with_the_loops(distillation, positions, temperature):
    logits = random_logits()
    expected = kd_loss_reference(logits.tolist(), positions, temperature)
    assert kd(logits, distillation, temperature=temperature).item() == approx(expected, rel=1e-5)
    mean = kd(logits, distillation, temperature=temperature, reduction="mean")
    assert mean.item() == approx(expected / len(positions), rel=1e-5)


@mark.parametrize("temperature", [1.0, 2.5])
@mark.parametrize(("distillation", "positions"), GRAPHS)
def test_teachers_are_detached(distillation, positions, temperature):
    """Then the gradient at student j is `sum_i (p_j - p_i)`, times T^2 / T, over the batch size. Worked in loops."""
    logits = random_logits().requires_grad_()
    kd(logits, distillation, temperature=temperature).backward()
    expected = torch.zeros_like(logits)
    for row in range(5):
        p = (logits[row].detach().double() / temperature).softmax(dim=-1).tolist()
        for teacher, student in positions:
            for k in range(3):
                expected[row, student, k] += temperature * (p[student][k] - p[teacher][k]) / 5
    assert_close(logits.grad, expected)


@mark.parametrize(
    "loss",
    [
        lambda logits, labels: cross_entropy_loss(logits, labels, exit_weights(EXITS, "linear")),
        lambda logits, labels: cross_entropy_loss(
            logits, labels, exit_weights(EXITS, "linear"), class_weights=[0.25, 4.0, 1.0], label_smoothing=0.3
        ),
        lambda logits, labels: kd(logits, "mutual"),
    ],
    ids=["ce", "weighted ce", "kd"],
)
class TestBoth:
    def test_mean_over_the_batch(self, loss):
        """A sum over the batch, or a mean over batch x classes, would make alpha depend on their sizes."""
        logits, labels = random_logits(), tensor([0, 1, 2, 2, 0])
        once = loss(logits, labels)
        assert_close(loss(logits.repeat(3, 1, 1), labels.repeat(3)), once)
        rows = [loss(logits[i : i + 1], labels[i : i + 1]) for i in range(5)]
        assert_close(torch.stack(rows).mean(), once)

    @mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits(self, loss, dtype):
        logits, labels = random_logits().to(dtype).requires_grad_(), tensor([0, 1, 2, 2, 0])
        value = loss(logits, labels)
        value.backward()
        assert value.dtype == torch.float32
        assert_close(value, loss(logits.detach().float(), labels))  # as good as the logits are
        assert logits.grad.dtype == dtype
        assert logits.grad.isfinite().all()

    @mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_huge_logits_stay_finite(self, loss, dtype):
        huge = tensor([[[1000.0, -1000.0], [-1000.0, 1000.0]] * 2], dtype=dtype, requires_grad=True)
        value = loss(huge, tensor([1]))
        value.backward()
        assert value.isfinite()
        assert huge.grad.isfinite().all()


def test_huge_logits_by_hand():
    logits = tensor([[[1000.0, -1000.0], [-1000.0, 1000.0]]])
    assert cross_entropy_loss(logits, tensor([1]), [0.5, 0.5]).item() == 1000.0  # 0.5 * 2000 + 0.5 * 0
    assert kd(logits, "mutual", [1, 2]).item() == 4000.0  # 2000 each way


def test_temperature_divides_the_logits():
    """Not the probabilities: so T^2 * KL tends to |z_i - z_j|^2 / (2 K) for centred logits (Hinton et al., 2015)."""
    logits = tensor([[[1.0, -1.0], [0.0, 0.0]]])
    assert kd(logits, [[1, 2]], [1, 2], temperature=10.0).item() == approx(0.5, rel=1e-2)  # (1 + 1) / (2 * 2)


def test_exits_that_agree_have_nothing_to_learn():
    logits = random_logits(num_exits=1).repeat(1, 4, 1).requires_grad_()
    loss = kd(logits, "mutual")
    loss.backward()
    assert loss.item() == approx(0.0, abs=1e-5)
    assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0.0)


def test_no_pair_no_loss():
    assert kd(random_logits().half(), "none", reduction="mean").tolist() == 0.0
