"""What leaving early may cost, promised: the test of the promise, and where the certificate goes and is dropped."""

import copy
import hashlib
import json
import logging
from dataclasses import FrozenInstanceError, asdict, replace
from fractions import Fraction
from math import comb

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx, fixture, mark, raises
from scipy.stats import binom, binomtest
from transformers import AutoModelForSequenceClassification

from conftest import Margin
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.evaluation import RISKS, ExitCertificate, certify, observed_risk, replay, rows_needed
from gaml_hf.evaluation.certificate import THRESHOLDS, _parameter_values, passes
from gaml_hf.evaluation.choice import policy_fields
from gaml_hf.hub import save_checkpoint
from gaml_hf.models.exiting_gaml import EXIT_POLICIES
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx
from test_properties import anything


STRATEGIES = ["budgeted", "patience", "entropy", "max_prob"]


def with_exits(num_exits: int, **changes) -> GamlBertConfig:
    return GamlBertConfig(num_hidden_layers=num_exits, **changes)


def texts(num_rows: int, num_exits: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Exits that know the more the deeper they are, of texts that are harder or easier, and the texts' classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=num_rows)
    ease = random.exponential(2.0, size=(num_rows, 1))
    shared = random.normal(size=(num_rows, 1))  # so that exits err on the same texts
    noise = random.normal(size=(num_rows, num_exits)) * np.linspace(1.5, 0.3, num_exits)
    margin = (2 * labels[:, None] - 1) * (ease + 0.7 * shared + noise) * np.linspace(1, 3, num_exits)
    return np.stack([-margin, margin], axis=-1).astype(np.float32), labels


def few_values(exit_strategy: str, config: GamlBertConfig) -> list:
    """Of `certify`'s own, fewer thresholds."""
    values = _parameter_values(exit_strategy, config)
    return values[::4] if len(values) > 100 else values


def losses(exit_logits, labels, config, exit_strategy, parameter, risk) -> list[bool]:
    """Which rows lose, by a plain loop."""
    trial = copy.copy(config)
    vars(trial).update(policy_fields(exit_strategy, parameter))
    lost = []
    for row, label, answer in zip(exit_logits, labels, replay(exit_logits, trial)[0], strict=True):
        full = int(row[-1].argmax())
        lost.append(full != answer if risk == "disagreement" else full == label and answer != label)
    return lost


# The promise


@mark.parametrize(
    ("num_lost", "num_rows", "max_loss", "confidence"),
    [(0, 114, 0.02, 0.9), (0, 113, 0.02, 0.9), (2, 300, 0.02, 0.9), (7, 1000, 0.01, 0.8), (40, 900, 0.05, 0.7)],
)
def test_the_tail_is_that_of_the_binomial(num_lost, num_rows, max_loss, confidence):
    """In whole numbers, term by term."""
    p = Fraction(str(max_loss))
    tail = sum(comb(num_rows, k) * p**k * (1 - p) ** (num_rows - k) for k in range(num_lost + 1))
    assert passes(num_lost, num_rows, max_loss, confidence) == (tail <= 1 - Fraction(str(confidence)))


def test_rows_needed_by_hand():
    assert rows_needed(0.02, 0.9) == 114  # 0.98^113 = 0.10196, 0.98^114 = 0.09992
    assert rows_needed(0.01, 0.9) == 230
    assert rows_needed(0.5, 0.75) == 2  # 0.5^2 = 0.25 exactly
    assert rows_needed(0.999) == 1


@anything
@given(st.floats(1e-6, 0.999), st.floats(0.01, 0.9999))
def test_rows_needed_are_the_fewest(max_loss, confidence):
    needed = rows_needed(max_loss, confidence)
    assert passes(0, needed, max_loss, confidence)
    assert needed == 1 or not passes(0, needed - 1, max_loss, confidence)


def draws(
    population: np.ndarray, labels: np.ndarray, exit_strategy: str, risk: str, num_rows: int, max_loss: float
) -> dict[str, float]:
    """
    Of 2,000 samples of a population whose risks are known, in how many the parameter chosen on the sample has a risk
    above `max_loss` in the population: as `certify` chooses (at 0.9), and as one would who looks at the observed risk
    alone. The first is computed for all samples at once, and compared with `certify` itself on ten of them.
    """
    config = with_exits(population.shape[1])
    values = few_values(exit_strategy, config)
    lost, layers = [], []
    for parameter in values:
        lost.append(losses(population, labels, config, exit_strategy, parameter, risk))
        trial = copy.copy(config)
        vars(trial).update(policy_fields(exit_strategy, parameter))
        layers.append(replay(population, trial)[1])
    lost, layers = np.array(lost, dtype=np.float32).T, np.array(layers, dtype=np.float32).T  # (num_texts, num_values)
    true_risk = lost.mean(axis=0, dtype=np.float64)

    sample = np.random.default_rng(5).integers(len(population), size=(2000, num_rows))
    weight = np.stack([np.bincount(rows, minlength=len(population)) for rows in sample]).astype(np.float32)
    observed, layers = weight @ lost, weight @ layers  # (2000, num_values), whole numbers
    may = np.array([passes(k, num_rows, max_loss, 0.9) for k in range(num_rows + 1)])[observed.astype(int)]
    before_the_first_failure = np.cumprod(may, axis=1).astype(bool)

    def fastest(allowed: np.ndarray) -> np.ndarray:
        position = np.where(allowed, layers, np.inf).argmin(axis=1)
        return np.where(allowed.any(axis=1), position, -1)  # -1: full depth

    certified, naive = fastest(before_the_first_failure), fastest(observed / num_rows <= max_loss)
    for rows, chosen in zip(sample[:10], certified[:10], strict=True):
        found = certify(population[rows], labels[rows], config, exit_strategy, max_loss, risk=risk, values=values)
        assert found.parameter == (None if chosen < 0 else values[chosen])
    broken = {
        name: ((chosen >= 0) & (true_risk[chosen] > max_loss)).mean()
        for name, chosen in (("certified", certified), ("naive", naive), ("alone", fastest(may)))
    }
    return broken | {"fast": (certified >= 0).mean()}


# A promise that is broken with probability 0.1 exactly is broken in more of 2,000 draws than this once in a thousand.
MOST_BROKEN = binom.ppf(0.999, 2000, 0.1) / 2000


@mark.parametrize("risk", RISKS)
@mark.parametrize("exit_strategy", STRATEGIES)
def test_the_promise_is_kept(exit_strategy, risk, caplog):
    caplog.set_level(logging.ERROR)
    population, labels = texts(1500)
    found = draws(population, labels, exit_strategy, risk, num_rows=400, max_loss=0.05)
    assert found["certified"] <= MOST_BROKEN
    if exit_strategy in ("entropy", "max_prob"):
        assert found["naive"] > 0.24  # the control: a promise can be broken on these draws
        assert found["fast"] > 0.9  # and it is not kept by never leaving early


def test_the_promise_is_kept_where_it_is_hardest(caplog):
    """
    Eleven exits, each with a risk a little above the limit, none of them the others': whatever is chosen breaks the
    promise. So does `values` taken from these rows, as the fastest exit that passes alone.
    """
    caplog.set_level(logging.ERROR)
    random, population = np.random.default_rng(0), np.zeros((4000, 12, 2), dtype=np.float32)
    population[..., 0] = 1.0
    for m in range(11):
        population[random.choice(4000, 82, replace=False), m] = [0.0, 1.0]  # 0.0205
    found = draws(population, np.zeros(4000, int), "budgeted", "disagreement", num_rows=114, max_loss=0.02)
    assert 0.07 < found["certified"] <= MOST_BROKEN  # 0.9795^114 = 0.094: the level is used up
    assert found["naive"] > 0.9
    assert found["alone"] > 0.5  # 1 - (1 - 0.094)^11 = 0.66


# The choice


@mark.parametrize("risk", RISKS)
@mark.parametrize("exit_strategy", STRATEGIES)
def test_the_fastest_before_the_first_that_fails(exit_strategy, risk):
    exit_logits, labels = texts(500, seed=1)
    config = with_exits(6)
    values = few_values(exit_strategy, config)
    max_loss = {"budgeted": 0.2, "patience": 0.08}.get(exit_strategy, 0.1)
    found = certify(exit_logits, labels, config, exit_strategy, max_loss, 0.8, risk=risk, values=values)
    lost = [sum(losses(exit_logits, labels, config, exit_strategy, value, risk)) for value in values]
    limits = [binomtest(k, 500, alternative="less").proportion_ci(0.8).high for k in lost]  # another road to the test
    first_failure = next((i for i, limit in enumerate(limits) if limit > max_loss), len(values))
    assert first_failure > 0  # of these rows
    chosen = values.index(found.parameter)
    assert (found.exit_strategy, found.num_rows, found.num_lost) == (exit_strategy, 500, lost[chosen])
    assert found.bound == approx(limits[chosen], abs=1e-9)
    assert chosen < first_failure
    layers = []
    for value in values[:first_failure]:
        trial = copy.copy(config)
        vars(trial).update(policy_fields(exit_strategy, value))
        layers.append(replay(exit_logits, trial)[1].sum())
    assert layers[chosen] == layers[-1]  # none of them is faster
    assert found.speed_up == approx(6 * 500 / layers[-1])
    trial = copy.copy(config)
    vars(trial).update(found.config_fields())
    assert observed_risk(exit_logits, labels, trial, risk) == lost[chosen] / 500


@anything
@given(st.integers(0, 1000), st.sampled_from(STRATEGIES), st.integers(1, 5), st.floats(0.02, 0.3), st.floats(0.5, 0.9))
def test_whatever_the_rows(seed, exit_strategy, num_exits, max_loss, confidence):
    exit_logits, labels = texts(150, num_exits, seed)
    config = with_exits(num_exits)
    values = few_values(exit_strategy, config) or None

    def found(max_loss, confidence, risk="disagreement", order=1):
        rows = exit_logits[::order].copy()
        return certify(rows, labels[::order], config, exit_strategy, max_loss, confidence, risk=risk, values=values)

    disagreement, accuracy = (found(max_loss, confidence, risk) for risk in RISKS)
    for one in (disagreement, accuracy):
        assert one.num_lost / 150 <= one.bound <= max_loss
    assert accuracy.speed_up >= disagreement.speed_up  # it counts fewer rows of each parameter
    assert found(max_loss * 1.5, confidence * 0.9).speed_up >= disagreement.speed_up  # a weaker promise
    turned = found(max_loss, confidence, order=-1)
    assert (turned.parameter, turned.bound) == (disagreement.parameter, disagreement.bound)


@mark.parametrize("exit_strategy", STRATEGIES)
def test_the_sequence_is_of_no_rows_and_goes_from_slow_to_fast(exit_strategy):
    config = with_exits(6)
    values = _parameter_values(exit_strategy, config)
    exit_logits, _ = texts(300, seed=2)
    layers = []
    for value in values:
        trial = copy.copy(config)
        vars(trial).update(policy_fields(exit_strategy, value))
        layers.append(replay(exit_logits, trial)[1])
    assert all((faster <= slower).all() for slower, faster in zip(layers, layers[1:], strict=False))
    if exit_strategy in ("budgeted", "patience"):
        assert values == {"budgeted": [5, 4, 3, 2, 1], "patience": [4, 3, 2, 1]}[exit_strategy]
    else:
        assert len(values) == len(THRESHOLDS) > 100
        assert len({f"{value:.4g}" for value in values}) == len(values)  # as a card shows them
        assert all(float(f"{value:.4g}") == value for value in values)


def test_accuracy_may_rise_where_answers_change():
    """One-sided: the policy's rights do not make up for its wrongs, and where there are no wrongs nothing is lost."""
    exit_logits = np.zeros((200, 2, 2))
    exit_logits[:, 0, 1] = exit_logits[:, 1, 0] = 1.0  # exit 1 says 1, exit 2 says 0
    config, ones = with_exits(2), np.ones(200, int)
    found = certify(exit_logits, ones, config, "budgeted", 0.02, risk="accuracy_loss")
    assert (found.parameter, found.num_lost) == (1, 0)
    assert found.bound == approx(1 - 0.1 ** (1 / 200))
    half = np.arange(200) % 2  # as many mended as spoilt
    assert certify(exit_logits, half, config, "budgeted", 0.02, risk="accuracy_loss").exit_strategy == "none"
    assert certify(exit_logits, ones, config, "budgeted", 0.02).exit_strategy == "none"


def test_full_depth_where_nothing_passes(caplog):
    exit_logits, _ = texts(200)
    exit_logits[:, :-1] = -exit_logits[:, -1:]  # every exit says the opposite
    found = certify(exit_logits, None, with_exits(6), "budgeted", 0.02)
    assert (found.exit_strategy, found.parameter, found.num_lost, found.bound) == ("none", None, 0, 0.0)
    assert (found.speed_up, found.method) == (1.0, "full depth: no parameter passed")
    assert "No parameter of `exit_strategy='budgeted'` keeps `max_loss=0.02` at `confidence=0.9`" in caplog.text
    assert "The answer is full depth" in caplog.text


def test_an_exit_policy_and_values_of_ones_own(monkeypatch):
    monkeypatch.setitem(EXIT_POLICIES, "margin", Margin)
    exit_logits, _ = texts(400)
    with raises(ValueError, match="`values` must say what to test with `exit_strategy='margin'`. Got None."):
        certify(exit_logits, None, with_exits(6), "margin", 0.05)
    found = certify(exit_logits, None, with_exits(6), "margin", 0.05, values=[50.0, 20.0, 10.0, 5.0, 0.0])
    assert found.parameter in (50.0, 20.0, 10.0, 5.0)
    with raises(ValueError, match="`values` must go from the slowest to the fastest. Got 20.0, at which"):
        certify(exit_logits, None, with_exits(6), "margin", 0.05, values=[5.0, 20.0])


@mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"num_rows": 113},
            "must hold at least 114 rows for `max_loss=0.02` at `confidence=0.9`, even if no row loses",
        ),
        ({"max_loss": 0}, "`max_loss` must be a number above 0 and below 1. Got `max_loss=0`."),
        ({"max_loss": 2}, "Got `max_loss=2`."),
        ({"max_loss": float("nan")}, "Got `max_loss=nan`."),
        ({"max_loss": "1%"}, "Got `max_loss='1%'`."),
        ({"confidence": 1.0}, "`confidence` must be a number above 0 and below 1. Got `confidence=1.0`."),
        ({"risk": "f1"}, r"`risk` must be one of \['disagreement', 'accuracy_loss'\]. Got `risk='f1'`."),
        ({"risk": "accuracy_loss", "labels": None}, '`labels` must be given for `risk="accuracy_loss"`. Got None'),
        ({"risk": "accuracy_loss", "labels": [-1] * 200}, "`labels` must lie between 0 and 1"),
        ({"exit_strategy": "none"}, "`exit_strategy` must let rows leave early"),
        ({"exit_strategy": "foo"}, "`exit_strategy` must be one of"),
        ({"values": []}, "`values` must hold at least one value"),
        ({"values": [0.5, 0.1]}, "from the slowest to the fastest. Got 0.1"),
        ({"values": [2.0]}, r"`exit_threshold` must lie in \[0, 1\]"),
    ],
    ids=str,
)
def test_refusals(change, sentence):
    arguments = {"exit_strategy": "entropy", "max_loss": 0.02, "confidence": 0.9} | change
    exit_logits, labels = texts(arguments.pop("num_rows", 200))
    with raises(ValueError, match=sentence):
        certify(exit_logits, arguments.pop("labels", labels), with_exits(6), **arguments)


def test_what_it_tells():
    exit_logits, labels = texts(300)
    config = with_exits(6, exit_temperatures=[1.0, 1.5, 1, 1, 1, 1])
    found = certify(torch.tensor(exit_logits), None, config, "patience", 0.05)
    plain = hashlib.sha256(b"(300, 6, 2)" + exit_logits.astype("<f8").tobytes())
    assert found.rows_sha256 == plain.hexdigest()
    plain.update(labels.astype("<i8").tobytes())
    assert (
        certify(exit_logits, labels, config, "patience", 0.05, risk="accuracy_loss").rows_sha256 == plain.hexdigest()
    )
    assert found.versions.keys() == {"gaml_hf", "torch", "transformers", "scipy"}
    assert (
        found.versions["torch"] == torch.__version__.partition("+")[0] or found.versions["torch"] == torch.__version__
    )
    assert found.exits["exit_temperatures"] == [1.0, 1.5, 1, 1, 1, 1]
    assert len(found.date.split("-")) == 3
    assert found.promise() == ("at most 0.05 of the rows get another answer than the last exit's, with confidence 0.9")
    with raises(FrozenInstanceError):
        found.max_loss = 0.01


# What it allows under load


def test_bounds_of_the_exits_and_the_lowest_cap():
    exit_logits, labels = texts(800)
    config = with_exits(6)
    found = certify(exit_logits, labels, config, "entropy", 0.05, 0.9)
    for m in range(5):
        lost = sum(losses(exit_logits, labels, config, "budgeted", m + 1, "disagreement"))
        limit = binomtest(lost, 800, alternative="less").proportion_ci(1 - 0.1 / 5).high
        assert found.exit_bounds[m] == approx(limit, abs=1e-9)
    assert found.exit_bounds[5] == 0.0  # the last exit never differs from itself
    assert found.lowest_cap(0.049) is None  # below what the policy itself may cost
    assert found.lowest_cap(0.05) == 6
    assert found.lowest_cap(0.05 + found.exit_bounds[4]) == 5
    assert found.lowest_cap(0.05 + found.exit_bounds[4] - 1e-9) == 6
    assert found.lowest_cap(2.0) == 1
    uneven = replace(found, exit_bounds=[0.01, 0.5, 0.02, 0.02, 0.01, 0.0])
    assert uneven.lowest_cap(0.1) == 3  # though exit 1 would fit: on its way down the cap stands at exit 2
    assert replace(found, exit_strategy="none").lowest_cap(0.0) == 6


def test_bounds_where_every_row_loses():
    exit_logits, _ = texts(200)
    exit_logits[:, :-1] = -exit_logits[:, -1:]
    assert certify(exit_logits, None, with_exits(6), "budgeted", 0.02).exit_bounds == [1.0] * 5 + [0.0]
    assert certify(exit_logits[:, -1:], None, with_exits(6, exit_layers=[6]), "entropy", 0.02).exit_bounds == [0.0]


@mark.parametrize("cap", [1, 3, 5])
def test_rows_made_to_leave_lose_where_policy_or_exit_does(cap):
    exit_logits, labels = texts(800, seed=3)
    config = with_exits(6, exit_strategy="entropy", exit_threshold=0.3)
    position = np.minimum(replay(exit_logits, config)[1], cap) - 1
    answers = exit_logits.argmax(-1)
    capped = (answers[np.arange(800), position] != answers[:, -1]).mean()
    assert (
        0
        < capped
        <= observed_risk(exit_logits, None, config, "disagreement") + (answers[:, cap - 1] != answers[:, -1]).mean()
    )


def test_rows_that_contradict_it():
    found = certify(*texts(800), with_exits(6), "entropy", 0.05)
    tail = [binom.sf(k - 1, 500, 0.05) for k in range(60)]
    for lost in range(60):
        assert found.is_contradicted(lost, 500) == (tail[lost] < 0.001)


# Where it goes, and where it is dropped


@fixture
def model(bert_kwargs):
    config = GamlBertConfig(**bert_kwargs, exit_temperatures=[1.0, 1.0, 2.0, 1.0])
    model = GamlBertForSequenceClassification(config).eval()
    found = certify(*texts(300, num_exits=4), config, "entropy", 0.1)
    assert found.exit_strategy == "entropy"
    for name, value in found.config_fields().items():
        setattr(config, name, value)
    return model


def read(folder) -> ExitCertificate | None:
    return ExitCertificate.from_config(GamlBertConfig.from_pretrained(folder))


def test_it_is_read_back_from_a_saved_checkpoint(model, tokenizer, tmp_path):
    found = ExitCertificate.from_config(model.config)
    save_checkpoint(model, tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["exit_certificate"] == asdict(found)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert ExitCertificate.from_config(loaded.config) == found
    save_checkpoint(loaded, tokenizer, tmp_path / "again")
    assert read(tmp_path / "again") == found
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (found.promise(), f"{found.num_rows} rows", found.rows_sha256, found.date, "exchangeable"):
        assert part in card


@mark.parametrize(
    "change",
    [
        {"exit_threshold": 0.9999},
        {"exit_strategy": "max_prob", "exit_threshold": 0.9},
        {"exit_strategy": "none"},
        {"exit_temperatures": [1.0, 1.0, 2.5, 1.0]},
        {"exit_temperatures": None},
        {"exit_layers": [2, 4], "exit_temperatures": None},
        {"exit_norm": "layer"},
    ],
    ids=str,
)
def test_it_is_of_what_was_certified_alone(model, tokenizer, tmp_path, caplog, change):
    model.save_pretrained(tmp_path / "before")
    assert GamlBertConfig.from_pretrained(tmp_path / "before", alpha=0.3).exit_certificate is not None  # not its own
    assert not caplog.text
    loaded = GamlBertConfig.from_pretrained(tmp_path / "before", **change)
    assert loaded.exit_certificate is None
    assert "`exit_certificate` was made for another exit policy, other temperatures or other exits" in caplog.text
    # Set by hand later: still there, but neither read nor saved.
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not model.config.certificate_holds
    assert ExitCertificate.from_config(model.config) is None
    model.config.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after" / "config.json").read_text())["exit_certificate"] is None


def test_a_smaller_model_has_none(model):
    assert model.truncate(4).config.exit_certificate == model.config.exit_certificate
    assert model.truncate(2).config.exit_certificate is None


def test_training_drops_it(model, caplog):
    model.eval()
    assert model.config.exit_certificate is not None
    model.train()
    assert model.config.exit_certificate is None
    assert "`exit_certificate` was made for the weights as they were before this training" in caplog.text


def test_new_exits_have_none(model, tmp_path):
    model.save_pretrained(tmp_path)
    new = GamlBertForSequenceClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert new.config.exit_certificate is None


def test_an_export(model, tmp_path, caplog):
    export_onnx(model, tmp_path / "fp32")
    assert read(tmp_path / "fp32") == ExitCertificate.from_config(model.config)
    other = GamlOrtModelForSequenceClassification.from_pretrained(tmp_path / "fp32", exit_threshold=0.9999)
    assert other.config.exit_certificate is None
    caplog.clear()
    export_onnx(model, tmp_path / "int8", precision="int8")
    assert read(tmp_path / "int8") is None
    assert "The int8 export has others, and none" in caplog.text
    assert model.config.exit_certificate is not None


def test_one_that_lacks_an_entry(model, tmp_path):
    del model.config.exit_certificate["max_loss"]
    model.save_pretrained(tmp_path)
    with raises(ValueError, match="must be what `gaml_hf.evaluation.certify` made. Got one without max_loss"):
        read(tmp_path)
