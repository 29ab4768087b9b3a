"""
What must hold for any numbers: policies, losses, alignment, replay and packing, on examples that hypothesis makes up.

`GAML_HF_EXAMPLES=1000 pytest tests/test_properties.py` takes other and more examples than the suite does.
"""

import copy
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pytest import approx, fixture, raises
from torch.testing import assert_close

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, align_, policy_from_config
from gaml_hf.evaluation import OperatingPoint, calibrate, choose, layer_speed_up, replay, sweep
from gaml_hf.models.engine_gaml import Layout
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience, normalized_entropy
from gaml_hf.models.losses_gaml import cross_entropy_loss, distillation_loss, exit_weights, total_loss
from gaml_hf.models.pipeline_gaml import checked_texts
from gaml_hf.training.alignment import RELATIVE_FLOOR
from reference import alignment_reference, ce_loss_reference, kd_loss_reference


EXAMPLES = os.environ.get("GAML_HF_EXAMPLES")
anything = settings(
    max_examples=int(EXAMPLES or 50),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)

sizes = st.integers(1, 5)
num_labels = st.integers(2, 4)
# Whole numbers among them: ties.
numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32))
huge_numbers = st.one_of(numbers, st.floats(-(2.0**100), 2.0**100, width=32))
thresholds = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def exit_logits(draw, elements=numbers, num_rows=sizes, num_exits=sizes):
    shape = draw(num_rows), draw(num_exits), draw(num_labels)
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)))


policies = st.one_of(
    st.just(FullDepth()),
    st.integers(1, 6).map(Budgeted),
    st.integers(1, 6).map(Patience),
    thresholds.map(Entropy),
    thresholds.map(MaxProb),
)


# Policies


@anything
@given(exit_logits(huge_numbers), thresholds, thresholds)
def test_a_laxer_threshold_never_exits_later(logits, one, other):
    lax, strict = max(one, other), min(one, other)
    assert (Entropy(lax).replay(logits) <= Entropy(strict).replay(logits)).all()
    assert (MaxProb(strict).replay(logits) <= MaxProb(lax).replay(logits)).all()


@anything
@given(exit_logits(huge_numbers), st.integers(1, 6), st.integers(1, 6))
def test_more_patience_or_budget_never_exits_earlier(logits, one, other):
    for policy in (Patience, Budgeted):
        assert (policy(min(one, other)).replay(logits) <= policy(max(one, other)).replay(logits)).all()
    assert (Patience(one).replay(logits) >= min(one, logits.shape[1] - 1)).all()


@anything
@given(exit_logits(st.one_of(huge_numbers, st.sampled_from([math.nan, math.inf, -math.inf]))), policies)
def test_replay_is_the_live_walk_and_broken_logits_leave_at_once(logits, policy):
    found = policy.replay(logits)
    for row, position in enumerate(found.tolist()):
        assert 0 <= position < logits.shape[1]
        leaves = [
            bool(policy(logits[row : row + 1, : m + 1])) for m in range(logits.shape[1])
        ]  # one row, step by step
        assert position == next((m for m, leave in enumerate(leaves[:-1]) if leave), logits.shape[1] - 1)
        broken = [m for m in range(logits.shape[1]) if not logits[row, m].isfinite().all()]
        assert position <= min(broken, default=logits.shape[1] - 1)


@anything
@given(exit_logits(huge_numbers), policies, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_exit(logits, policy, random):
    order = list(range(len(logits)))
    random.shuffle(order)
    assert policy.replay(logits[order]).equal(policy.replay(logits)[order])


@anything
@given(exit_logits(huge_numbers), st.one_of(st.integers(1, 6).map(Patience), st.integers(1, 6).map(Budgeted)))
def test_a_policy_that_knows_its_next_step_never_misses_it(logits, policy):
    for run in range(logits.shape[1]):
        assert not (policy(logits[:, : run + 1]) & ~policy.may_exit(logits[:, :run])).any()


@anything
@given(exit_logits(huge_numbers))
def test_entropy_lies_between_0_and_1(logits):
    entropy = normalized_entropy(logits)
    assert (entropy >= 0).all()
    assert (entropy <= 1 + 1e-6).all()
    assert_close(normalized_entropy(logits.flip(-1)), entropy, rtol=0, atol=1e-6)  # classes have no order


# Losses


@st.composite
def taught(draw):
    """Logits, the layers of their exits, and pairs `teacher -> student` of them."""
    logits = draw(exit_logits(num_exits=st.integers(2, 5)))
    num_exits = logits.shape[1]
    layers = draw(st.lists(st.integers(1, 12), min_size=num_exits, max_size=num_exits, unique=True).map(sorted))
    all_pairs = [(i, j) for i in layers for j in layers if i != j]
    return logits, layers, draw(st.lists(st.sampled_from(all_pairs), min_size=1, max_size=8, unique=True))


temperatures = st.sampled_from([0.5, 1.0, 4.0])


def near(value, logits, number=1):
    """Equal up to the rounding of sums of `number` terms of the size of the logits."""
    return approx(value, rel=1e-5, abs=1e-5 * number * (1 + logits.abs().max().item()))


@anything
@given(exit_logits(), st.sampled_from(["linear", "uniform", "last"]), st.data())
def test_ce_loss_is_that_of_the_loops(logits, scheme, data):
    size, num_exits, classes = logits.shape
    labels = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)))
    weights = exit_weights(list(range(1, num_exits + 1)), scheme)
    assert sum(weights) == approx(1)
    loss = cross_entropy_loss(logits, labels, weights).item()
    assert loss >= 0
    assert loss == near(ce_loss_reference(logits.tolist(), labels.tolist(), weights), logits)
    shifted = logits + torch.arange(size * num_exits, dtype=torch.float32).view(size, num_exits, 1)
    assert cross_entropy_loss(shifted, labels, weights).item() == near(loss, shifted)  # a softmax sees no constant
    renamed = cross_entropy_loss(logits.flip(-1), classes - 1 - labels, weights).item()
    assert renamed == near(loss, logits)


@anything
@given(taught(), temperatures)
def test_kd_loss_is_that_of_the_loops_and_never_negative(case, temperature):
    logits, layers, pairs = case
    positions = [(layers.index(i), layers.index(j)) for i, j in pairs]
    number = len(pairs) * max(temperature, temperature**2)
    loss = distillation_loss(logits, pairs, layers, temperature=temperature).item()
    expected = kd_loss_reference(logits.tolist(), positions, temperature)
    assert loss == near(expected, logits, number)
    assert loss >= -near(0, logits, number).abs
    mean = distillation_loss(logits, pairs, layers, temperature=temperature, reduction="mean").item()
    assert mean * len(pairs) == near(loss, logits, number)
    apart = [distillation_loss(logits, [pair], layers, temperature=temperature).item() for pair in pairs]
    assert sum(apart) == near(loss, logits, number)  # each pair adds its own


@anything
@given(taught(), temperatures)
def test_kd_loss_teaches_students_alone_and_nothing_to_equals(case, temperature):
    logits, layers, pairs = case
    logits.requires_grad_()
    distillation_loss(logits, pairs, layers, temperature=temperature).backward()
    students = [layers.index(j) for _, j in pairs]
    others = [m for m in range(len(layers)) if m not in students]
    assert not logits.grad[:, others].any()
    # A softmax sees no constant, so its gradient has none.
    assert_close(logits.grad.sum(dim=-1), torch.zeros(logits.shape[:2]), rtol=0, atol=1e-4)
    alike = logits.detach()[:, :1].expand_as(logits)
    assert distillation_loss(alike, pairs, layers, temperature=temperature).item() == near(0, logits, 16 * len(pairs))


@anything
@given(st.floats(0, 100, width=32), st.floats(0, 100, width=32), st.floats(0, 1))
def test_the_total_lies_between_its_parts(ce, kd, alpha):
    total = total_loss(torch.tensor(ce), torch.tensor(kd), alpha).item()
    assert min(ce, kd) * (1 - 1e-5) - 1e-30 <= total <= max(ce, kd) * (1 + 1e-5) + 1e-30


# Alignment


@st.composite
def gradients(draw):
    """g_CE, g_KD, their groups, and how to align them."""
    shapes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    elements = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    g_ce, g_kd = (
        [torch.from_numpy(draw(arrays(np.float32, size, elements=elements))) for size in shapes] for _ in "ab"
    )
    groups = draw(st.lists(st.integers(0, len(shapes) - 1), min_size=len(shapes), max_size=len(shapes)))
    numbered = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return g_ce, g_kd, [numbered[g] for g in groups], draw(st.floats(0, 1)), draw(st.sampled_from(["soft", "hard"]))


def aligned(g_ce, g_kd, groups, alpha, mode):
    copies = [gradient.clone() for gradient in g_ce]
    return copies, align_(copies, g_kd, groups, alpha=alpha, mode=mode)


def close(found, expected, scale=1.0):
    # Where g_KD . g_CE nearly cancels, what is left is the rounding of its largest terms.
    assert_close(found, expected, rtol=1e-4, atol=1e-3 * scale)


def coefficient_scale(g_ce, g_kd):
    """How large `c` may be: |g_KD| / |g_CE|, with the floor below the divisor."""
    ce, kd = (math.sqrt(sum(float(g.double().square().sum()) for g in gradient)) for gradient in (g_ce, g_kd))
    return 1 + kd / (ce * math.sqrt(RELATIVE_FLOOR)) if ce else 1.0


@anything
@given(gradients())
def test_alignment_is_that_of_the_loops_in_every_group(case):
    g_ce, g_kd, groups, alpha, mode = case
    assume(any(g.any() for g in g_ce) and any(g.any() for g in g_kd))
    flat = [[g.tolist() for g in gradient] for gradient in (g_ce, g_kd)]
    expected, c, cosine = alignment_reference(*flat, groups, alpha, mode, relative_floor=RELATIVE_FLOOR)
    found, alignment = aligned(*case)
    scale = coefficient_scale(g_ce, g_kd) * 1e-3
    for group, (value, wanted) in enumerate(zip(alignment.coefficient.tolist(), c, strict=True)):
        if mode == "hard" and abs(wanted - value) > scale:  # at a right angle rounding decides
            products = [float(g_ce[i].double() @ g_kd[i].double()) for i, g in enumerate(groups) if g == group]
            sizes = [
                float((g_ce[i].double() * g_kd[i].double()).abs().sum()) for i, g in enumerate(groups) if g == group
            ]
            assert abs(sum(products)) < 1e-5 * sum(sizes)
        else:
            assert value == approx(wanted, rel=1e-3, abs=scale)
    for gradient, g, group in zip(g_ce, found, groups, strict=True):  # parallel to g_CE, in every group with its own c
        assert_close(g, alignment.coefficient[group] * gradient)
    assert alignment.cos_angle.item() == approx(cosine, abs=1e-4)
    assert len(expected) == len(found)


@anything
@given(gradients())
def test_hard_never_goes_up_the_cross_entropy_and_soft_agrees_where_there_is_no_conflict(case):
    g_ce, g_kd, groups, alpha, _ = case
    hard, soft = (aligned(g_ce, g_kd, groups, alpha, mode)[1].coefficient for mode in ("hard", "soft"))
    assert (hard >= 1 - alpha - 1e-6).all()
    without_conflict = soft >= 1 - alpha
    assert_close(hard[without_conflict], soft[without_conflict])
    assert_close(hard[soft < 1 - alpha - 1e-6], torch.ones(int((soft < 1 - alpha - 1e-6).sum())))


@anything
@given(gradients(), st.integers(-12, 12))
def test_alignment_knows_no_scale(case, power):
    """A gradient scaler multiplies both by a power of two: exactly the same coefficients."""
    g_ce, g_kd, *rest = case
    _, alignment = aligned(*case)
    _, scaled = aligned([2.0**power * g for g in g_ce], [2.0**power * g for g in g_kd], *rest)
    assert_close(scaled.coefficient, alignment.coefficient, rtol=1e-5, atol=1e-6)
    assert scaled.cos_angle.item() == approx(alignment.cos_angle.item(), abs=1e-6)


@anything
@given(gradients(), st.randoms(use_true_random=False))
def test_the_order_of_parameters_changes_nothing(case, random):
    g_ce, g_kd, groups, alpha, mode = case
    order = list(range(len(groups)))
    random.shuffle(order)
    found, _ = aligned(*case)
    shuffled, _ = aligned([g_ce[i] for i in order], [g_kd[i] for i in order], [groups[i] for i in order], alpha, mode)
    largest = max(float(g.abs().max()) for g in g_ce)
    for i, gradient in zip(order, shuffled, strict=True):
        conflict_may_turn = mode == "hard"  # at a right angle rounding decides, and it depends on the order
        if not conflict_may_turn:
            close(gradient, found[i], scale=1e-3 * largest * coefficient_scale(g_ce, g_kd))


# Replay


@st.composite
def evaluations(draw):
    logits = draw(exit_logits(num_rows=st.integers(1, 8)))
    num_rows, num_exits, classes = logits.shape
    layers = draw(st.lists(st.integers(1, 12), min_size=num_exits, max_size=num_exits, unique=True).map(sorted))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=num_rows, max_size=num_rows))
    config = SimpleNamespace(
        exit_layers=layers,
        num_hidden_layers=layers[-1],
        exit_strategy="none",
        patience=None,
        exit_threshold=None,
        budgeted_exit=None,
    )
    return logits, np.array(labels), config


def accuracy(predictions, references):
    return {"accuracy": float((predictions == references).mean())}


@anything
@given(evaluations(), st.sampled_from(["none", "budgeted", "patience", "entropy", "max_prob"]))
def test_a_sweep_is_sorted_bounded_and_what_replay_gives(case, exit_strategy):
    logits, labels, config = case
    points = sweep(logits, labels, config, exit_strategy, accuracy, "accuracy")
    parameters = [point.parameter for point in points]
    assert len(set(parameters)) == len(parameters)
    if exit_strategy != "none":
        assert parameters == sorted(parameters)
    speeds = [point.speed_up for point in points]
    assert all(1 <= speed <= config.num_hidden_layers for speed in speeds)
    assert speeds == sorted(speeds, reverse=exit_strategy != "entropy")
    for point in points:
        trial = copy.copy(config)
        vars(trial).update(point.config_fields())
        answers, exit_layer = replay(logits, trial)
        assert set(exit_layer) <= set(config.exit_layers)
        assert point.speed_up == approx(config.num_hidden_layers * len(exit_layer) / sum(exit_layer.tolist()))
        assert point.score == approx(sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels))


@anything
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_speed_up_in_layers_has_its_bounds(exit_layer):
    speed = layer_speed_up(exit_layer, 12)
    assert 12 / max(exit_layer) - 1e-9 <= speed <= 12 / min(exit_layer) + 1e-9


points = st.builds(OperatingPoint, st.just("patience"), st.integers(1, 9), st.floats(0, 1), st.floats(1, 12))


@anything
@given(st.lists(points, min_size=1, max_size=8), st.floats(1, 12), st.floats(1, 12))
def test_the_chosen_point_is_the_best_in_range_or_the_nearest(candidates, one, other):
    target = min(one, other), max(one, other)
    point = choose(candidates, target)
    inside = [p for p in candidates if target[0] <= p.speed_up <= target[1]]
    if inside:
        assert (point.score, point.speed_up) == max((p.score, p.speed_up) for p in inside)
    else:
        distance = min(min(abs(p.speed_up - end) for end in target) for p in candidates)
        assert min(abs(point.speed_up - end) for end in target) == distance


@anything
@given(evaluations())
def test_calibration_keeps_answers_and_betters_the_nll(case):
    logits, labels, _ = case
    found = calibrate(logits, labels)
    assert all(0.05 <= temperature <= 20 for temperature in found)
    labels = torch.from_numpy(labels)
    for m, temperature in enumerate(found):
        nll = [torch.nn.functional.cross_entropy(logits[:, m].double() / t, labels).item() for t in (temperature, 1.0)]
        assert nll[0] <= nll[1] * (1 + 1e-9) + 1e-9


# Packing


@st.composite
def masks(draw):
    num_rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    mask = torch.from_numpy(draw(arrays(np.bool_, (num_rows, length))))
    mask[:, 0] = True  # [CLS]
    return mask


@anything
@given(masks())
def test_packing_loses_and_invents_no_token(mask):
    layout = Layout(mask, torch.device("cpu"))
    hidden_states = torch.arange(1.0, mask.numel() + 1).view(*mask.shape, 1)
    tokens = layout.pack(hidden_states)
    assert sorted(tokens.flatten().tolist()) == sorted(hidden_states[mask].flatten().tolist())
    assert tokens[: len(mask)].equal(hidden_states[:, 0])  # [CLS] first
    unpacked = torch.zeros(len(mask) * layout.length, 1).index_copy(0, layout.rows.place, tokens)
    assert unpacked.view(len(mask), layout.length, 1).equal((hidden_states * mask[..., None])[:, : layout.length])
    assert layout.rows.grid.flatten()[layout.rows.place].equal(torch.arange(len(tokens)))
    assert (layout.rows.mask is None) == bool(mask[:, : layout.length].all())
    assert mask[:, layout.length :].any().item() is False


@anything
@given(masks(), st.data())
def test_rows_that_leave_one_after_the_other_or_at_once(mask, data):
    layout = Layout(mask, torch.device("cpu"))
    some_rows = st.lists(st.integers(0, len(mask) - 1), min_size=1, unique=True).map(sorted)
    kept = data.draw(some_rows)
    again = data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1, unique=True).map(sorted))
    first, numbers = layout.keep(torch.tensor(kept))
    second, more_numbers = first.keep(torch.tensor(again))
    at_once, all_numbers = layout.keep(torch.tensor([kept[i] for i in again]))
    assert numbers[more_numbers].equal(all_numbers)
    assert second.mask.equal(at_once.mask)
    assert second.rows.grid.equal(at_once.rows.grid)


# Live


@fixture(scope="module")
def model():
    """In float64: near a threshold, what float32 rounds away would decide."""
    torch.manual_seed(0)
    config = GamlBertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        exit_layers=[1, 2, 4, 5],
        initializer_range=0.5,
    )
    return GamlBertForSequenceClassification(config).double().eval()


@anything
@given(
    st.lists(st.lists(st.integers(5, 39), min_size=1, max_size=8), min_size=1, max_size=6),
    st.one_of(
        st.just({"exit_strategy": "none"}),
        st.sampled_from([1, 2, 4, 5]).map(lambda m: {"exit_strategy": "budgeted", "budgeted_exit": m}),
        st.integers(1, 4).map(lambda p: {"exit_strategy": "patience", "patience": p}),
        thresholds.map(lambda t: {"exit_strategy": "entropy", "exit_threshold": t}),
        thresholds.map(lambda t: {"exit_strategy": "max_prob", "exit_threshold": t}),
    ),
)
def test_live_is_replay_for_any_rows(model, rows, fields):
    """A batch of any lengths, against each row alone without padding through all layers."""
    config = copy.copy(model.config)
    vars(config).update(fields)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        live = model(input_ids, attention_mask=attention_mask, exit_policy=policy_from_config(config))
        logits = torch.cat([model(torch.tensor([row]), output_exit_logits=True).exit_logits for row in rows])
    answers, exit_layer = replay(logits, config)
    assert live.exit_layer.tolist() == exit_layer.tolist()
    assert live.logits.argmax(dim=-1).tolist() == answers.tolist()
    position = [config.exit_layers.index(m) for m in exit_layer]
    assert_close(live.logits, logits[torch.arange(len(rows)), position], rtol=1e-9, atol=1e-9)


# Texts


@anything
@given(st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Cc", "Zs", "Ll"]))))
def test_a_text_is_read_as_it_is_or_refused(text):
    if text.strip() and not any("\ud800" <= character <= "\udfff" for character in text):
        assert checked_texts(text) == {"text": text}
        assert checked_texts({"text_pair": text, "text": "good"}) == {"text": "good", "text_pair": text}
    else:
        for row in (text, {"text": text}, {"text": "good", "text_pair": text}):
            with raises(ValueError, match="must (hold more than blanks|be valid Unicode)"):
                checked_texts(row)
