"""Eqs. 4-7: by hand, against plain loops, by their properties, and where the paper is silent."""

import math

import torch
from pytest import approx, fixture, mark
from torch import nn, tensor
from torch.testing import assert_close

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, align_, alignment_coefficient, cos_angle
from gaml_hf.training.alignment import RELATIVE_FLOOR, parameter_groups
from reference import alignment_reference


G_CE, G_KD = tensor([3.0, 4.0]), tensor([1.0, 2.0])  # |g_CE|^2 = 25, g_CE . g_KD = 11, so r = 0.44

BY_HAND = [
    ("soft", +1, 0.888),  # 0.8 + 0.2 * 0.44
    ("soft", -1, 0.712),  # 0.8 - 0.2 * 0.44: in conflict, a shorter step
    ("hard", +1, 0.888),
    ("hard", -1, 1.000),  # g_CE alone, with weight 1 and not 1 - alpha
]


@mark.parametrize(("mode", "sign", "expected"), BY_HAND)
def test_coefficient_by_hand(mode, sign, expected):
    c = alignment_coefficient(G_CE @ G_CE, G_CE @ (sign * G_KD), alpha=0.2, mode=mode)
    assert_close(c, tensor(expected))


@mark.parametrize(("mode", "sign", "expected"), BY_HAND)
def test_align_by_hand(mode, sign, expected):
    g_ce, g_kd = [tensor([3.0]), tensor([[4.0]])], [tensor([sign * 1.0]), tensor([[sign * 2.0]])]
    alignment = align_(g_ce, g_kd, [0, 0], alpha=0.2, mode=mode)
    assert_close(g_ce, [tensor([expected * 3]), tensor([[expected * 4]])])  # in place
    assert_close(alignment.coefficient, tensor([expected]))
    assert_close(alignment.cos_angle, tensor(sign * 11 / math.sqrt(25 * 5)))


def test_right_angle():
    """Eq. 7 says θ <= 90°: at 90° the projection is zero, and g_CE keeps the weight 1 - alpha in both modes."""
    for mode in ("soft", "hard"):
        assert_close(alignment_coefficient(tensor(4.0), tensor(0.0), alpha=0.2, mode=mode), tensor(0.8))


def test_ascent():
    """Soft: with g_KD = -10 g_CE and α = 0.2, c = 0.8 - 2: the step goes up the cross-entropy. Hard never does."""
    products = tensor(1.0), tensor(-10.0)
    assert_close(alignment_coefficient(*products, alpha=0.2, mode="soft"), tensor(-1.2))
    assert_close(alignment_coefficient(*products, alpha=0.2, mode="hard"), tensor(1.0))


@mark.parametrize("mode", ["soft", "hard"])
def test_no_weight_on_distillation(mode):
    assert_close(alignment_coefficient(tensor(25.0), tensor(11.0), alpha=0.0, mode=mode), tensor(1.0))


def test_cos_angle():
    assert_close(cos_angle(tensor(25.0), tensor(11.0), tensor(5.0)), tensor(0.98387), atol=1e-5, rtol=0)
    assert_close(cos_angle(tensor(4.0), tensor(-6.0), tensor(9.0)), tensor(-1.0))
    assert_close(cos_angle(tensor([0.0, 1.0]), tensor([0.0, 0.0]), tensor([1.0, 0.0])), tensor([0.0, 0.0]))
    # |g|^2 = 1e30 each: their product is out of the range of float32, cos γ is not.
    assert_close(cos_angle(tensor(1e30), tensor(5e29), tensor(1e30)), tensor(0.5))


SHAPES, GROUPS = [(4, 3), (3,), (2, 2, 2), (5,), (1,)], [0, 1, 0, 2, 2]


def random_gradients(scale=1.0):
    return [[scale * torch.randn(shape) for shape in SHAPES] for _ in range(2)]


def flat(gradients):
    return [gradient.flatten().tolist() for gradient in gradients]


@mark.parametrize("mode", ["soft", "hard"])
@mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_align_agrees_with_plain_loops(mode, alpha):
    conflicts = []
    for _ in range(20):
        g_ce, g_kd = random_gradients()
        expected, c, cosine = alignment_reference(flat(g_ce), flat(g_kd), GROUPS, alpha, mode)
        alignment = align_(g_ce, g_kd, GROUPS, alpha=alpha, mode=mode)
        for values, expected_values in zip(flat(g_ce), expected, strict=True):
            assert values == approx(expected_values, rel=1e-4, abs=1e-5)
        assert alignment.coefficient.tolist() == approx(c, rel=1e-4, abs=1e-5)
        assert alignment.cos_angle.item() == approx(cosine, abs=1e-5)
        conflicts.append(cosine < 0)
    assert any(conflicts)
    assert not all(conflicts)


@mark.parametrize("mode", ["soft", "hard"])
def test_aligned_gradient_is_parallel_to_g_ce_in_every_group(mode):
    g_ce, g_kd = random_gradients()
    before = [gradient.clone() for gradient in g_ce]
    alignment = align_(g_ce, g_kd, GROUPS, alpha=0.5, mode=mode)
    assert len(set(alignment.coefficient.tolist())) == 3
    for gradient, g, group in zip(before, g_ce, GROUPS, strict=True):
        assert_close(g, alignment.coefficient[group] * gradient)


@mark.parametrize("mode", ["soft", "hard"])
@mark.parametrize("scale", [2.0**-30, 65536.0])
def test_both_gradients_scaled_scale_the_aligned_one(mode, scale):
    """So a gradient scaler changes nothing, and GA on a sum over micro-batches is GA on their mean."""
    g_ce, g_kd = random_gradients()
    scaled = [scale * gradient for gradient in g_ce]
    align_(scaled, [scale * gradient for gradient in g_kd], GROUPS, alpha=0.5, mode=mode)
    align_(g_ce, g_kd, GROUPS, alpha=0.5, mode=mode)
    for gradient, unscaled in zip(scaled, g_ce, strict=True):
        assert_close(gradient / scale, unscaled)


@mark.parametrize("mode", ["soft", "hard"])
def test_identical_gradients_change_nothing(mode):
    g_ce, _ = random_gradients()
    before = [gradient.clone() for gradient in g_ce]
    align_(g_ce, [gradient.clone() for gradient in g_ce], GROUPS, alpha=0.3, mode=mode)
    assert_close(g_ce, before)  # r = 1, so c = 0.7 + 0.3


@mark.parametrize("mode", ["soft", "hard"])
def test_zero_g_ce(mode):
    """The paper divides by zero here. r = 0, in one group as well as everywhere."""
    assert_close(alignment_coefficient(tensor(0.0), tensor(0.0), alpha=0.2, mode=mode), tensor(0.8))
    for first in ([0.0, 0.0], [3.0, 4.0]):
        g_ce = [tensor(first), tensor([0.0])]
        alignment = align_(g_ce, [tensor([1.0, 2.0]), tensor([5.0])], [0, 1], alpha=0.2, mode=mode)
        assert_close(alignment.coefficient, tensor([0.888 if any(first) else 0.8, 0.8]))
        assert_close(g_ce[1], tensor([0.0]))


def test_floor_by_hand():
    """Two groups of one number each: the floor is a half of 1e-6 * |g_CE|^2, and 1e-4 is below its root."""
    g_ce, g_kd = [tensor([1.0]), tensor([1e-4])], [tensor([1.0]), tensor([-1.0])]
    alignment = align_(g_ce, g_kd, [0, 1], alpha=0.5, mode="soft")
    floor = 0.5 * RELATIVE_FLOOR * (1.0 + 1e-8)
    assert RELATIVE_FLOOR == 1e-6
    assert_close(alignment.coefficient, tensor([1.0, 0.5 + 0.5 * -1e-4 / floor]))  # -99.5; Eq. 5 alone gives -4999.5
    just_above = align_([tensor([1.0]), tensor([1e-3])], g_kd, [0, 1], alpha=0.5, mode="soft")
    assert_close(just_above.coefficient, tensor([1.0, 0.5 - 0.5 * 1e3]))  # untouched


def test_the_letter_of_the_paper_has_no_floor():
    """With one group the floor is a millionth of |g_CE|^2 itself."""
    c = align_([tensor([1e-15])], [tensor([-1e-12])], [0], alpha=0.5, mode="soft").coefficient
    assert_close(c, tensor([0.5 - 0.5 * 1e3]))


@fixture
def model(bert_kwargs):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, **no_dropout)).train()


def test_attention_key_biases_do_not_explode(model):
    """Their gradients are zero in theory and rounding in practice; Eq. 5 divides one rounding error by another."""
    outputs = model(input_ids=torch.randint(0, 20, (8, 6)), labels=torch.randint(0, 2, (8,)))
    names, parameters = zip(*model.named_parameters(), strict=True)
    g_kd = torch.autograd.grad(outputs.kd_loss, parameters, retain_graph=True, materialize_grads=True)
    g_ce = torch.autograd.grad(outputs.ce_loss, parameters)
    keys = [position for position, name in enumerate(names) if name.endswith("key.bias")]
    assert len(keys) == 4
    assert any(g_ce[position].any() for position in keys)
    # Distillation 1,000 times as strong, as with many exits: the noise is then 1,000 times larger too.
    alignment = align_(g_ce, [1e3 * g for g in g_kd], list(range(len(names))), alpha=0.2, mode="soft")
    assert_close(alignment.coefficient[keys], torch.full((4,), 0.8), atol=0.05, rtol=0)


# Whatever overflows, a gradient scaler has to see it in the aligned gradient.
OVERFLOWS = {
    "inf in g_KD": ([1.0, 1.0], [math.inf, 1.0]),
    "-inf in g_KD": ([1.0, 1.0], [-math.inf, 1.0]),
    "nan in g_KD": ([1.0, 1.0], [math.nan, 1.0]),
    "inf in g_CE": ([math.inf, 1.0], [1.0, 1.0]),
    "-inf in g_CE": ([-math.inf, 1.0], [1.0, 1.0]),
    "nan in g_CE": ([math.nan, 1.0], [1.0, 1.0]),
    "inf in g_KD where g_CE is zero": ([0.0, 0.0], [math.inf, 1.0]),
    "g_CE . g_KD": ([1e18, 1e18], [1e21, 1e21]),
    "g_CE . g_KD, in conflict": ([1e18, 1e18], [-1e21, -1e21]),
    "g_CE . g_KD, terms of both signs": ([1e18, 1e18], [1e21, -1e21]),
    "|g_CE|^2": ([1e20, 1.0], [1.0, 1.0]),
    "|g_CE|^2, in conflict": ([1e20, 1.0], [0.0, -1.0]),
}


@mark.parametrize("mode", ["soft", "hard"])
@mark.parametrize("overflow", OVERFLOWS)
@mark.parametrize("groups", [[0, 0], [0, 1]], ids=str)
def test_overflow_is_never_hidden(overflow, mode, groups):
    ce, kd = OVERFLOWS[overflow]
    g_ce, g_kd = [tensor(ce), tensor([1.0])], [tensor(kd), tensor([1.0])]
    align_(g_ce, g_kd, groups, alpha=0.2, mode=mode)
    assert not g_ce[0].isfinite().all()


@mark.parametrize("mode", ["soft", "hard"])
@mark.parametrize(("kd", "steps"), [(-2.0, True), (-math.inf, False)])
def test_a_gradient_scaler_skips_what_overflowed(mode, kd, steps):
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    align_([parameter.grad], [scaler.scale(torch.full((2,), kd))], [0], alpha=0.5, mode=mode)
    scaler.step(optimizer)
    scaler.update()
    c = {"soft": 0.5 + 0.5 * -2, "hard": 1.0}[mode]
    assert_close(parameter.detach(), torch.full((2,), 1 - c if steps else 1.0))
    assert scaler.get_scale() == (4.0 if steps else 2.0)


@mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients(dtype):
    """Products in float32: here |g_CE|^2 = 10^8, out of the range of float16."""
    g_ce, g_kd = [torch.full((10_000,), 100.0, dtype=dtype)], [torch.full((10_000,), 50.0, dtype=dtype)]
    alignment = align_(g_ce, g_kd, [0], alpha=0.5, mode="soft")
    assert_close(alignment.coefficient, tensor([0.75]))
    assert_close(g_ce[0], torch.full((10_000,), 75.0, dtype=dtype))


@mark.parametrize("exit_pooler", ["none", "shared", "per_exit"])
def test_parameter_groups(bert_kwargs, exit_pooler):
    config = GamlBertConfig(**bert_kwargs, exit_layers=[2, 4], exit_pooler=exit_pooler)
    names = [name for name, _ in GamlBertForSequenceClassification(config).named_parameters()]
    assert parameter_groups(names, "global") == [0] * len(names)
    assert parameter_groups(names, "tensor") == list(range(len(names)))

    groups = {}
    for name, group in zip(names, parameter_groups(names, "layer"), strict=True):
        groups.setdefault(group, set()).add(name)
    assert sorted(groups) == list(range(len(groups)))
    expected = [{name for name in names if ".embeddings." in name}]
    expected += [{name for name in names if f"encoder.layer.{i}." in name} for i in range(4)]
    expected += [{name for name in names if name.startswith("exit_") and f".{m}." in name} for m in (2, 4)]
    expected += [{name for name in names if "bert.pooler" in name}] if exit_pooler == "shared" else []
    assert {frozenset(group) for group in groups.values()} == {frozenset(group) for group in expected}
