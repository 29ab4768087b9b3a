"""Exits that follow the traffic: the cap by hand, the capped policy against a plain loop, and a burst, simulated."""

import random
from collections import deque

import torch
from pytest import approx, mark, raises

from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience
from gaml_hf.runtime.adaptive import Capped, ExitCap
from gaml_hf.runtime.batching import Item, take_batch


POLICIES = [FullDepth(), Budgeted(3), Patience(1), Entropy(0.6), MaxProb(0.6)]


@mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@mark.parametrize("cap", [1, 2, 5])
def test_capped_rows_leave_where_they_would_or_at_the_cap(policy, cap):
    exit_logits = 2 * torch.randn(40, 6, 3)
    free, capped = policy.replay(exit_logits), Capped(policy, cap)
    assert capped.replay(exit_logits).tolist() == free.clamp(max=cap - 1).tolist()
    live, rows = Capped(policy, cap), list(range(40))  # as an engine asks: of the rows still there
    for num_exits in range(1, cap + 1):
        leave = live(exit_logits[rows, :num_exits])
        assert live.may_exit(exit_logits[rows, : num_exits - 1]).all() or num_exits < cap
        at_last, rows = rows, [row for row, leaves in zip(rows, leave.tolist(), strict=True) if not leaves]
    assert rows == []
    assert live.forced == [int(free[row]) > cap - 1 for row in at_last]
    assert capped.fixed_exit(6) is None  # it must be asked, or it could not count


def test_the_cap_by_hand():
    now = 0.0
    cap = ExitCap([2, 4, 6, 8], slo=0.8, min_exit=4, clock=lambda: now)
    assert (cap.exit_layer, cap.is_acting, cap.tokens_per_second) == (8, False, None)
    cap.update(10**9)  # nothing measured
    assert (cap.exit_layer, cap.batch_tokens(500)) == (8, 500)
    cap.ran(tokens=100, seconds=0.1)
    assert cap.tokens_per_second == approx(1000)
    # One batch does not tell: half of its 0.1 s counts as fixed, and three times that, 0.15 s, is above 0.8 s / 8.
    assert cap.batch_tokens(500) == 200  # (0.15 s - 0.05 s) / (0.05 s / 100)
    assert cap.batch_tokens(50) == 50
    for waiting, layer in [
        (400, 8),
        (401, 6),
        (400, 6),
        (201, 6),
        (401, 4),
        (4000, 4),
    ]:  # half of 0.8 s, and a quarter
        cap.update(waiting)
        assert cap.exit_layer == layer
    assert cap.is_acting
    for seconds, waiting, layer in [
        (0, 199, 4),
        (0.7, 199, 4),
        (0.2, 199, 6),
        (0.6, 300, 6),
        (0.9, 199, 6),
        (0.9, 0, 8),
    ]:
        now += seconds
        cap.update(waiting)
        assert cap.exit_layer == layer
    cap.ran(tokens=200, seconds=0.1)
    assert cap.tokens_per_second == approx((0.9 * 100 + 200) / (0.9 * 0.1 + 0.1))


@mark.parametrize(("fixed", "tokens"), [(0.004, 46), (0.04, 80), (0.0, 50)])
def test_a_batch_is_long_enough_to_be_worth_its_fixed_cost(fixed, tokens):
    """Else batches would shrink to a row each, for each costs so much, and cost so much for being a row each."""
    cap = ExitCap([2, 4], slo=0.4, clock=lambda: 0.0)
    for n in (10, 30, 20, 10):
        cap.ran(n, fixed + 0.001 * n)
        assert cap.batch_tokens(4096) >= 10
    assert cap.batch_tokens(4096) == approx(tokens, rel=0.15)  # (max(0.4 / 8, 3 * fixed) - fixed) / 0.001
    assert cap.batch_tokens(30) == 30
    for n in (10, 30, 20) * 20:
        cap.ran(n, 0.01)  # tokens cost nothing at all
    assert cap.batch_tokens(4096) > 1000


def test_time_without_a_request_is_calm():
    now = 0.0
    cap = ExitCap(range(1, 13), slo=0.1, clock=lambda: now)
    cap.ran(tokens=100, seconds=0.1)
    for _ in range(20):
        cap.update(10_000)
    assert cap.exit_layer == 1
    cap.update(10)
    now += 0.55
    assert (cap.exit_layer, cap.exit_layer_now) == (1, 6)
    cap.update(10)
    assert cap.exit_layer == cap.exit_layer_now == 6
    now += 60
    cap.update(10)
    assert cap.exit_layer == 12


def test_the_lowest_exit_must_be_one():
    with raises(ValueError, match=r"`min_exit` must be one of the exits of this model, \[2, 4\]. Got `min_exit=3`."):
        ExitCap([2, 4], slo=1, min_exit=3)


# Rows of 100 that would leave at each of 12 layers: mean 6.3.
LEAVE = [0, 8, 13, 16, 14, 12, 10, 8, 6, 0, 0, 13]
TOKENS = range(10, 41)
SECONDS_PER_LAYER = 1 / (250 * 25 * 6.3)  # of a token: 250 requests a second, at the exits that rows choose
SECONDS_PER_BATCH = 0.002


def burst(adaptive, seed, slo, min_exit=1, seconds_per_batch=SECONDS_PER_BATCH, lengths=TOKENS):
    """
    A server, event by event: 60 requests a second and, for 20 of 60 seconds, 600. Batches and cap are the real ones.

    Returns: the share of answers later than `slo`, the share of rows that left at the cap, the cap at the end.
    """
    rng, now, arrivals = random.Random(seed), 0.0, deque()
    time = 0.0
    while time < 60:
        time += rng.expovariate(600 if 20 <= time < 40 else 60)
        arrivals.append((time, rng.choice(lengths), rng.choices(range(1, 13), LEAVE)[0]))
    num_requests, late, forced, queue = len(arrivals), 0, 0, deque()
    cap = ExitCap(range(1, 13), slo, min_exit, clock=lambda: now)
    while arrivals or queue:
        if not queue:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            since, tokens, exit_layer = arrivals.popleft()
            queue.append(Item(exit_layer, tokens, None, None, since))
        batch = take_batch(queue, cap.batch_tokens(4096) if adaptive else 4096)
        if adaptive:
            cap.update(sum(item.tokens for item in queue))
        seconds = seconds_per_batch + SECONDS_PER_LAYER * sum(
            item.tokens * min(item.value, cap.exit_layer) for item in batch
        )
        now += seconds
        cap.ran(sum(item.tokens for item in batch), seconds)
        late += sum(now - item.since > slo for item in batch)
        forced += sum(item.value > cap.exit_layer for item in batch)
    return late / num_requests, forced / num_requests, cap.exit_layer


@mark.parametrize("slo", [0.1, 0.2, 0.5])
def test_a_burst_is_answered_in_time(slo):
    for seed in range(2):
        late, forced, _ = burst(True, seed, slo)
        assert late < 0.01
        assert 0.2 < forced < 0.9
    assert burst(False, 0, slo)[0] > 0.6  # with fixed exits


@mark.parametrize("seed", range(3))
@mark.parametrize("lengths", [TOKENS, [25]], ids=["any", "one length"])
def test_a_burst_where_batches_have_a_price_of_their_own(seed, lengths):
    """As on a GPU, or of a small encoder: in batches of one row, a sixth of the requests could be answered."""
    more = {"seconds_per_batch": 0.01, "lengths": lengths}
    assert burst(True, seed, 0.2, **more)[0] < 0.05
    assert burst(True, seed, 0.1, **more)[0] < 0.6  # more than can be had, and better than fixed exits
    assert burst(False, seed, 0.1, **more)[0] > 0.9


def test_in_calm_nothing_is_forced_and_the_lowest_exit_holds(monkeypatch):
    late, _, at_the_end = burst(True, 0, 0.2)
    assert at_the_end == 12
    held = burst(True, 0, 0.2, min_exit=6)  # too slow for such a burst, and rightly so
    assert held[0] > 0.5
    monkeypatch.setattr(random.Random, "expovariate", lambda self, rate: 1 / 60)
    assert burst(True, 0, 0.2)[:2] == (0, 0)
