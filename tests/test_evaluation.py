"""Scores per exit, replay, sweep, choice, calibration, and the three speed-ups."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx, mark, raises
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer
from gaml_hf.evaluation import (
    ExitMetrics,
    OperatingPoint,
    calibrate,
    choose,
    exit_mean,
    flops_speed_up,
    latency_speed_up,
    layer_speed_up,
    overthinking,
    replay,
    score_exits,
    sweep,
)


NUM_ROWS, LENGTH, NUM_LABELS = 96, 7, 3

POLICIES = [
    {"exit_strategy": "none"},
    {"exit_strategy": "budgeted", "budgeted_exit": 2},
    {"exit_strategy": "patience", "patience": 1},
    {"exit_strategy": "patience", "patience": 2},
    {"exit_strategy": "entropy", "exit_threshold": 0.35},
    {"exit_strategy": "max_prob", "exit_threshold": 0.85},
]


def score(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro")),
    }


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == references).mean())}  # cheap enough for whole curves


@pytest.fixture
def build(bert_kwargs):
    def build(**kwargs) -> GamlBertForSequenceClassification:
        # Large weights, so that the exits of an untrained model disagree and their confidences spread.
        config = GamlBertConfig(**bert_kwargs, num_labels=NUM_LABELS, initializer_range=0.5, **PAPER_LETTER | kwargs)
        return GamlBertForSequenceClassification(config).eval()

    return build


@pytest.fixture
def input_ids(bert_kwargs) -> Tensor:
    return torch.randint(5, bert_kwargs["vocab_size"], (NUM_ROWS, LENGTH))


def spread(model: GamlBertForSequenceClassification, input_ids: Tensor) -> None:
    """Centre each exit's logits: an untrained exit would give nearly every row the same class."""
    for i, exit_classifier in enumerate(model.exit_classifiers.values()):
        with torch.no_grad():
            exit_classifier.bias.zero_()
            means = model(input_ids, output_exit_logits=True).exit_logits[:, i].mean(dim=0)
            temperatures = model.config.exit_temperatures
            exit_classifier.bias -= means if temperatures is None else means * temperatures[i]


@pytest.fixture
def labels() -> np.ndarray:
    return torch.randint(0, NUM_LABELS, (NUM_ROWS,)).numpy()


def exits_of(model: GamlBertForSequenceClassification, input_ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids, output_exit_logits=True).exit_logits.numpy()


def random_exits(num_rows: int = 400, num_exits: int = 4, scale: float = 2.0) -> np.ndarray:
    return (scale * torch.randn(num_rows, num_exits, NUM_LABELS)).numpy()


# Scores


def test_score_exits_is_the_metric_of_each_exit(labels):
    exit_logits = random_exits(NUM_ROWS, 3)
    scores = score_exits(exit_logits, labels, [2, 5, 12], score)
    assert list(scores) == [2, 5, 12]
    for i, m in enumerate([2, 5, 12]):
        predictions = [max(range(NUM_LABELS), key=lambda k, row=row: row[k]) for row in exit_logits[:, i].tolist()]
        assert scores[m] == score(np.array(predictions), labels)


def test_score_exits_by_hand():
    exit_logits = [[[2.0, 1.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 3.0]]]  # exit 1 says 0, 1; exit 2 says 1, 1
    scores = score_exits(np.array(exit_logits), np.array([0, 1]), [1, 2], score)
    assert (scores[1]["accuracy"], scores[2]["accuracy"]) == (1.0, 0.5)


def test_exit_mean_and_overthinking_by_hand():
    scores = {m: {"f1": value, "accuracy": 0.0} for m, value in {3: 0.5, 6: 0.8, 9: 0.8, 12: 0.7}.items()}
    assert exit_mean(scores, "f1") == approx(0.7)
    found = overthinking(scores, "f1")
    assert found == {"best_exit": 6, "best_score": 0.8, "last_exit": 12, "last_score": 0.7, "gap": approx(0.1)}
    assert overthinking({1: {"f1": 0.2}, 2: {"f1": 0.9}}, "f1")["gap"] == 0
    with raises(ValueError, match=r"`main_metric` must be one of the scores, \['accuracy', 'f1'\]. Got .*'mcc'"):
        exit_mean(scores, "mcc")


@mark.parametrize("kind", [GamlTrainer, Trainer])
def test_exit_metrics_in_a_trainer(build, input_ids, labels, tmp_path, kind):
    model = build(exit_strategy="patience", patience=1)
    metrics = ExitMetrics(model.config, score, "macro_f1")
    trainer = kind(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=32
        ),
        compute_metrics=metrics,
    )
    rows = [{"input_ids": ids, "label": label} for ids, label in zip(input_ids, labels.tolist(), strict=True)]
    if kind is Trainer:
        with raises(ValueError, match="a stock Trainer keeps with `ignore_keys=ExitMetrics.ignore_keys`"):
            trainer.evaluate(rows)
        found = trainer.evaluate(rows, ignore_keys=ExitMetrics.ignore_keys)
    else:
        found = trainer.evaluate(rows)
        trainer.args.eval_do_concat_batches = False
        in_batches = trainer.evaluate(rows)
        assert {name: in_batches[name] for name in found if "per_second" not in name and "time" not in name} == {
            name: value for name, value in found.items() if "per_second" not in name and "time" not in name
        }

    with torch.no_grad():
        live = model(input_ids)
    assert found["eval_accuracy"] == score(live.logits.argmax(-1).numpy(), labels)["accuracy"]
    assert found["eval_speed_up"] == approx(4 / live.exit_layer.double().mean().item())
    exit_scores = score_exits(exits_of(model, input_ids), labels, [1, 2, 3, 4], score)
    each = [exit_scores[m]["macro_f1"] for m in (1, 2, 3, 4)]
    assert [found[f"eval_exit_{m}"] for m in (1, 2, 3, 4)] == each
    assert found["eval_exit_mean"] == approx(sum(each) / 4)
    assert found["eval_best_exit"] == 1 + each.index(max(each))


def test_exit_metrics_names_what_it_needs(build, labels):
    metrics = ExitMetrics(build().config, score, "accuracy")
    with raises(ValueError, match=r"must be the tuple \(logits, exit_layer, exit_logits\).*Got ndarray"):
        metrics(EvalPrediction(predictions=np.zeros((NUM_ROWS, NUM_LABELS)), label_ids=labels))


# Replay


@mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy.values())))
@mark.parametrize("changes", [{}, {"exit_layers": [2, 4]}, {"exit_temperatures": [0.5, 3.0, 1.0, 2.0]}], ids=str)
def test_replay_decides_as_the_live_model(build, input_ids, policy, changes):
    model = build(**policy, **changes)
    input_ids = input_ids[:32]
    spread(model, input_ids)
    with torch.no_grad():
        live = [model(ids[None]) for ids in input_ids]  # one row at a time: no neighbour can matter
    predictions, exit_layer = replay(exits_of(model, input_ids), model.config)
    assert exit_layer.tolist() == [output.exit_layer.item() for output in live]
    assert predictions.tolist() == [output.logits.argmax().item() for output in live]
    if policy["exit_strategy"] in ("patience", "entropy", "max_prob") and not changes:
        assert len(set(exit_layer.tolist())) >= 2  # else constants would have been compared


# Sweep


@mark.parametrize("scale", [0.3, 2.0, 4.0])  # above it, float32 rounds many of the largest probabilities to 1
@mark.parametrize(("exit_strategy", "faster"), [("entropy", +1), ("max_prob", -1)])
def test_sweep_of_thresholds_is_monotone_and_covers_the_range(exit_strategy, faster, scale):
    exit_logits, labels = random_exits(num_exits=6, scale=scale), np.zeros(400, dtype=np.int64)
    config = SimpleNamespace(exit_layers=[1, 2, 3, 6, 9, 12], num_hidden_layers=12)
    points = sweep(exit_logits, labels, config, exit_strategy, accuracy, "accuracy")
    assert 25 <= len(points) <= 51
    assert [point.parameter for point in points] == sorted({point.parameter for point in points})
    speeds = [point.speed_up for point in points][::faster]
    assert speeds == sorted(speeds)
    assert speeds[0] == 1.0
    assert speeds[-1] == 12.0
    # Even steps: 11 layers over 48 intervals are 0.23 each; a row surest at once brings up to 11 / 400 at either end.
    assert max(np.diff([-12 / speed for speed in speeds])) < 11 / 48 + 2 * 11 / 400


def test_sweep_of_whole_numbers(labels):
    exit_logits = random_exits(NUM_ROWS)
    config = SimpleNamespace(exit_layers=[1, 2, 3, 4], num_hidden_layers=4)
    budgeted = sweep(exit_logits, labels, config, "budgeted", accuracy, "accuracy")
    assert [(point.parameter, point.speed_up) for point in budgeted] == [(1, 4.0), (2, 2.0), (3, 4 / 3), (4, 1.0)]
    exit_scores = score_exits(exit_logits, labels, [1, 2, 3, 4], score)
    assert [point.score for point in budgeted] == [exit_scores[m]["accuracy"] for m in (1, 2, 3, 4)]

    patience = sweep(exit_logits, labels, config, "patience", accuracy, "accuracy")
    assert [point.parameter for point in patience] == [1, 2, 3]
    speeds = [point.speed_up for point in patience]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > speeds[-1] == 1.0

    (full,) = sweep(exit_logits, labels, config, "none", accuracy, "accuracy")
    assert full == OperatingPoint("none", None, exit_scores[4]["accuracy"], 1.0)


@mark.parametrize("exit_strategy", ["none", "budgeted", "patience", "entropy", "max_prob"])
def test_sweep_of_a_single_exit_finds_no_speed_up(labels, exit_strategy):
    config = SimpleNamespace(exit_layers=[4], num_hidden_layers=4)
    points = sweep(random_exits(NUM_ROWS, 1), labels, config, exit_strategy, accuracy, "accuracy")
    assert {point.speed_up for point in points} == {1.0}


@mark.parametrize("exit_strategy", ["none", "budgeted", "patience", "entropy", "max_prob"])
def test_a_point_set_on_the_config_gives_its_speed_up_live(build, input_ids, labels, exit_strategy):
    model = build()
    spread(model, input_ids)
    points = sweep(exits_of(model, input_ids), labels, model.config, exit_strategy, accuracy, "accuracy")
    point = points[len(points) // 2]
    for field, value in point.config_fields().items():
        setattr(model.config, field, value)
    with torch.no_grad():
        live = model(input_ids)
    assert layer_speed_up(live.exit_layer, 4) == point.speed_up
    assert score(live.logits.argmax(-1).numpy(), labels)["accuracy"] == point.score


def test_config_fields_by_hand():
    assert OperatingPoint("patience", 3, 0.9, 2.0).config_fields() == {"exit_strategy": "patience", "patience": 3}
    assert OperatingPoint("none", None, 0.9, 1.0).config_fields() == {"exit_strategy": "none"}


def test_sweep_refuses_what_it_cannot_draw(labels):
    config = SimpleNamespace(exit_layers=[1, 2, 3, 4], num_hidden_layers=4)
    with raises(ValueError, match=r"`exit_strategy` must be one of .*'patience'.*Got `exit_strategy='pabee'`"):
        sweep(random_exits(NUM_ROWS), labels, config, "pabee", score, "accuracy")
    with raises(ValueError, match="The score 'accuracy' must be finite"):
        sweep(random_exits(NUM_ROWS), labels, config, "none", lambda p, r: {"accuracy": float("nan")}, "accuracy")


# Choice


def points(*pairs: tuple[float, float]) -> list[OperatingPoint]:
    return [OperatingPoint("patience", i, score, speed_up) for i, (score, speed_up) in enumerate(pairs, start=1)]


@mark.parametrize(
    ("pairs", "chosen"),
    [
        ([(0.95, 1.5), (0.90, 1.9), (0.80, 2.0), (0.70, 3.0)], 2),  # the best inside; better ones are too slow
        ([(0.90, 1.9), (0.90, 2.05), (0.89, 2.1)], 2),  # a tie: the faster
        ([(0.50, 1.8), (0.40, 2.0)], 1),  # both ends belong to the range
        ([(0.50, 2.1), (0.40, 2.0)], 1),
    ],
)
def test_choose_inside_the_range(pairs, chosen, caplog):
    point = choose(points(*pairs))
    assert (point.parameter, point.within((1.8, 2.1))) == (chosen, True)
    assert not caplog.records


@mark.parametrize(
    ("pairs", "chosen"),
    [
        ([(0.95, 1.0), (0.60, 1.7), (0.40, 3.0)], 2),  # 0.1 below the range is nearer than 0.9 above it
        ([(0.95, 1.0), (0.60, 2.2), (0.70, 2.3)], 2),  # the nearest, not the best
        ([(0.95, 1.6), (0.60, 2.2)], 2),  # the range has two ends
        ([(0.60, 2.2), (0.70, 2.2)], 2),  # as near: the better
    ],
)
def test_choose_outside_the_range_says_so(pairs, chosen, caplog):
    point = choose(points(*pairs), target=(1.8, 2.1))
    assert (point.parameter, point.within((1.8, 2.1))) == (chosen, False)
    assert "No point has a speed-up between 1.8 and 2.1. Taking the nearest" in caplog.text
    assert f"speed-up of {point.speed_up:.2f}" in caplog.text


def test_choose_refuses_nothing_to_choose_from():
    with raises(ValueError, match="`points` must hold at least one point"):
        choose([])
    with raises(ValueError, match=r"`target` must be the lowest and the highest speed-up.*Got \(2.1, 1.8\)"):
        choose(points((0.9, 2.0)), target=(2.1, 1.8))
    for target in (2, None, ("1", "2"), (1, 2, 3)):
        with raises(ValueError, match="`target` must be the lowest and the highest speed-up"):
            choose(points((0.9, 2.0)), target)


# Calibration


def labelled_exits(temperatures: list[float], num_rows: int = 20_000) -> tuple[Tensor, Tensor]:
    """Labels drawn from `softmax(z)`, and exits that say `z * T`: each is wrong by exactly its own temperature."""
    z = 1.5 * torch.randn(num_rows, NUM_LABELS, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(z, dim=-1), 1)[:, 0]
    return torch.stack([z * t for t in temperatures], dim=1), labels


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return torch.nn.functional.cross_entropy(logits / temperature, labels).item()


def test_calibrate_recovers_known_temperatures():
    exit_logits, labels = labelled_exits([1.0, 3.0, 0.4])
    found = calibrate(exit_logits.float(), labels)
    assert found == approx([1.0, 3.0, 0.4], rel=0.05)  # 20,000 draws
    assert found[1] / found[0] == approx(3.0, rel=1e-5)  # the same draws, so the sampling error is the same


def test_calibrate_finds_the_minimum_and_keeps_the_answers():
    exit_logits, labels = labelled_exits([2.5, 0.7], num_rows=300)
    for i, temperature in enumerate(calibrate(exit_logits, labels)):
        logits = exit_logits[:, i]
        best = minimize_scalar(lambda t, z=logits: nll(z, labels, t), bounds=(0.05, 20), method="bounded")
        assert temperature == approx(best.x, rel=1e-3)
        assert nll(logits, labels, temperature) <= min(best.fun, nll(logits, labels, 1.0)) + 1e-12
        assert torch.equal((logits / temperature).argmax(-1), logits.argmax(-1))


def test_calibrate_stays_in_bounds():
    z, labels = torch.randn(50, NUM_LABELS), torch.randint(0, NUM_LABELS, (50,))
    right = 4.0 * torch.nn.functional.one_hot(labels, NUM_LABELS)  # the surer the better, without end
    exit_logits = torch.stack([right + 0 * z, -right, torch.ones_like(z), 1e30 * z], dim=1)
    temperatures = calibrate(exit_logits, labels)
    assert temperatures == approx([0.05, 20.0, 1.0, 20.0])
    GamlBertConfig(num_hidden_layers=4, exit_temperatures=temperatures)  # accepts them


def test_calibrated_model_has_no_temperature_left(build, input_ids, labels):
    model = build()
    before = exits_of(model, input_ids)
    model.config.exit_temperatures = calibrate(before, before.argmax(-1)[:, 3])
    after = exits_of(model, input_ids)
    np.testing.assert_array_equal(after.argmax(-1), before.argmax(-1))
    inside = [i for i, t in enumerate(model.config.exit_temperatures) if 0.051 < t < 19.9]
    assert inside
    assert [calibrate(after, before.argmax(-1)[:, 3])[i] for i in inside] == approx([1.0] * len(inside), rel=1e-4)


# The three speed-ups


@mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_layer_speed_up_by_hand(as_type):
    assert layer_speed_up(as_type([1, 2, 12, 12]), 12) == approx(12 / 6.75)  # 27 layers for 4 rows
    assert layer_speed_up(as_type([12]), 12) == 1.0


@mark.parametrize(("exit_layer", "row"), [([1, 0], 1), ([13, 1], 0), ([1, 2, -1], 2)])
def test_layer_speed_up_refuses_layers_that_do_not_exist(exit_layer, row):
    with raises(ValueError, match=rf"`exit_layer` must hold exit layers.*Row {row} holds {exit_layer[row]}\."):
        layer_speed_up(exit_layer, 12)


def layer_flops(length: int) -> int:
    """A layer of hidden size 32 and intermediate size 64. A multiply-add is 2 FLOPs."""
    projections = 4 * length * 32 * 32  # query, key, value and output
    attention = 2 * length * length * 32  # scores, and values weighted with them
    feed_forward = 2 * length * 32 * 64
    return 2 * (projections + attention + feed_forward)


EXIT_FLOPS = 2 * 32 * NUM_LABELS
POOLER_FLOPS = 2 * 32 * 32


@mark.parametrize("attn_implementation", ["sdpa", "eager"])
@mark.parametrize(
    ("exit_pooler", "exit_flops"),
    [("none", EXIT_FLOPS), ("shared", EXIT_FLOPS + POOLER_FLOPS), ("per_exit", EXIT_FLOPS + POOLER_FLOPS)],
)
def test_flops_speed_up_by_hand(build, exit_pooler, exit_flops, attn_implementation):
    model = build(exit_pooler=exit_pooler, attn_implementation=attn_implementation)
    full = 4 * layer_flops(7) + exit_flops
    assert flops_speed_up(model, [1], [7]) == approx(full / (layer_flops(7) + exit_flops), rel=1e-12)
    # Full depth runs three exits more than plain BERT: a speed-up just below 1.
    assert flops_speed_up(model, [4], [7]) == approx(full / (full + 3 * exit_flops), rel=1e-12)
    assert flops_speed_up(model, [4], [7], one_exit=True) == approx(1, rel=1e-12)
    # Totals, so that a long row counts for more.
    full += 4 * layer_flops(30) + exit_flops
    run = 4 * layer_flops(7) + 4 * exit_flops + 2 * layer_flops(30) + 2 * exit_flops
    assert flops_speed_up(model, np.array([4, 2]), np.array([7, 30])) == approx(full / run, rel=1e-12)
    assert model.config._attn_implementation == attn_implementation


def test_flops_speed_up_counts_only_exits_that_are_there(build):
    model = build(exit_layers=[2, 4])
    full = 4 * layer_flops(7) + EXIT_FLOPS
    assert flops_speed_up(model, [2], [7]) == approx(full / (2 * layer_flops(7) + EXIT_FLOPS), rel=1e-12)
    with raises(ValueError, match=r"`exit_layer` must hold exit layers of this model, \[2, 4\].*Row 1 holds 3"):
        flops_speed_up(model, [2, 3], [7, 7])


def test_flops_speed_up_refuses_lengths_that_do_not_fit(build):
    with raises(ValueError, match=r"`lengths` must hold one number of tokens for each of the 2 rows.*shape \(1,\)"):
        flops_speed_up(build(), [1, 2], [7])
    with raises(ValueError, match=r"`lengths` must lie between 1 and 64 \(`config.max_input_length`\). Got 7 to 65"):
        flops_speed_up(build(), [1, 2], [7, 65])


@pytest.fixture
def rows() -> list[dict]:
    """Tokenized texts as a tokenizer without padding leaves them, with a label beside."""
    return [
        {"input_ids": [2, *range(5, 5 + n), 3], "token_type_ids": [0] * (n + 2), "label": 1} for n in (3, 9, 1, 6, 4)
    ]


@mark.parametrize(("batch_size", "num_batches"), [(1, 5), (2, 3), (8, 1)])
def test_latency_speed_up_on_a_clock_of_layers(build, rows, monkeypatch, batch_size, num_batches):
    """On a clock that ticks once per layer, a budgeted exit at 1 of 4 is exactly four times as fast."""
    model = build(exit_strategy="budgeted", budgeted_exit=1, exit_temperatures=[1.0, 2.0, 3.0, 4.0])
    calls = {"layer": 0, "exit_1": 0, "exit_4": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    for layer in model.bert.encoder.layer:
        layer.attention.self.key.register_forward_hook(count("layer"))
    for m in (1, 4):
        model.exit_classifiers[str(m)].register_forward_hook(count(f"exit_{m}"))
    monkeypatch.setattr("gaml_hf.evaluation.speed.time", SimpleNamespace(perf_counter=lambda: float(calls["layer"])))
    found = latency_speed_up(model, rows, batch_size=batch_size, repeats=3)
    assert found == {
        "speed_up": 4.0,
        "speed_up_min": 4.0,
        "speed_up_max": 4.0,
        "full_depth_seconds": 4.0 * num_batches,
        "exiting_seconds": 1.0 * num_batches,
        "batch_size": batch_size,
        "num_rows": 5,
        "repeats": 3,
    }
    # A warm-up and three rounds. Plain BERT has no exit but the last, so it pays for none.
    assert (calls["exit_1"], calls["exit_4"]) == (4 * num_batches, 4 * num_batches)


def test_latency_speed_up_pads_rows_as_they_are(build, rows):
    model, seen = build(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latency_speed_up(model, rows, batch_size=2, repeats=1)
    for batch, part in zip(seen[:3], (rows[:2], rows[2:4], rows[4:]), strict=True):
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name].shape == (len(part), max(len(row["input_ids"]) for row in part))
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], part, strict=True):
            length = len(row["input_ids"])
            assert ids.tolist() == row["input_ids"] + [0] * (len(ids) - length)
            assert mask.tolist() == [1] * length + [0] * (len(ids) - length)


def test_latency_speed_up_cuts_padding_off(build, rows):
    model, seen = build(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pad = [0] * 9
    padded = [
        {name: row[name] + pad for name in ("input_ids", "token_type_ids")}
        | {"attention_mask": [1] * len(row["input_ids"]) + pad}
        for row in rows
    ]
    for part in (rows, padded):
        latency_speed_up(model, part, batch_size=2, repeats=1)
    plain, cut = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for one, other in zip(plain, cut, strict=True):
        assert all(one[name].equal(other[name]) for name in ("input_ids", "attention_mask", "token_type_ids"))


def test_latency_speed_up_of_a_model_that_was_trained_under_autocast(build, rows, tmp_path):
    """Accelerate puts a `forward` of its own on the model: plain BERT is timed with its own all the same."""
    model, calls = build(exit_strategy="budgeted", budgeted_exit=1), {1: 0, 4: 0}
    for m in calls:
        model.exit_classifiers[str(m)].register_forward_hook(lambda *_, m=m: calls.update({m: calls[m] + 1}))
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, dataloader_pin_memory=False)
    Trainer(model, arguments).accelerator.prepare_model(model)
    latency_speed_up(model, rows, repeats=1)
    assert calls == {1: 2 * len(rows), 4: 2 * len(rows)}


def test_latency_speed_up_leaves_the_model_as_it_was(build, rows):
    model = build(exit_strategy="patience", patience=1).train()
    model.dropout.eval()  # a mixture of modes must survive as well
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    found = latency_speed_up(model, rows, repeats=3)
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert found["speed_up_min"] <= found["speed_up"] <= found["speed_up_max"]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_latency_speed_up_refuses_nothing_to_time(build, rows):
    with raises(ValueError, match="the number of `rows` must be at least 1. Got 0"):
        latency_speed_up(build(), [])
    with raises(ValueError, match="`repeats` must be at least 1. Got 0"):
        latency_speed_up(build(), rows, repeats=0)


# Bad input


def functions(config):
    """Everything that reads exit logits, as `(exit_logits, labels)`."""
    return {
        "score_exits": lambda exit_logits, labels: score_exits(exit_logits, labels, config.exit_layers, score),
        "sweep": lambda exit_logits, labels: sweep(exit_logits, labels, config, "entropy", accuracy, "accuracy"),
        "calibrate": calibrate,
        "metrics": lambda exit_logits, labels: ExitMetrics(config, score, "accuracy")(
            EvalPrediction(predictions=(None, None, exit_logits), label_ids=labels)
        ),
    }


@mark.parametrize("function", ["score_exits", "sweep", "calibrate", "metrics"])
def test_bad_input_is_named(build, labels, function):
    call = functions(build().config)[function]
    exit_logits = random_exits(NUM_ROWS)
    call(exit_logits, labels)

    broken = exit_logits.copy()
    broken[[5, 9], 2, 1] = np.nan
    with raises(ValueError, match=r"`exit_logits` must be finite.*Row 5 holds .*nan.* at exit .*3; 2 of 96 rows"):
        call(broken, labels)
    with raises(ValueError, match=r"`exit_logits` must have shape .*at least one row. Got shape \(0, 4, 3\)"):
        call(exit_logits[:0], labels[:0])
    with raises(ValueError, match=r"`exit_logits` must have shape \(num_rows, num_exits.*Got shape \(96, 3\)"):
        call(exit_logits[:, 0], labels)
    with raises(ValueError, match=r"`labels` must be whole numbers, one class for each of the 96 rows.*\(95,\)"):
        call(exit_logits, labels[1:])
    with raises(ValueError, match=r"`labels` must be whole numbers.*float64"):
        call(exit_logits, labels.astype(np.float64))
    unlabelled = labels.copy()
    unlabelled[7] = -1
    with raises(ValueError, match=r"`labels` must lie between 0 and 2.*Row 7 holds -1"):
        call(exit_logits, unlabelled)


@mark.parametrize("function", ["score_exits", "sweep", "metrics"])
def test_the_number_of_exits_must_fit(build, labels, function):
    with raises(ValueError, match=r"`exit_logits` must hold the 4 exits \[1, 2, 3, 4\].*Got shape \(96, 3, 3\)"):
        functions(build().config)[function](random_exits(NUM_ROWS, 3), labels)


@mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@mark.parametrize("function", ["score_exits", "calibrate", "metrics"])
def test_any_float_type_is_read(build, labels, function, dtype):
    exit_logits = torch.from_numpy(random_exits(NUM_ROWS)).to(torch.bfloat16)  # exact in every type
    call = functions(build().config)[function]
    assert call(exit_logits.to(dtype), labels) == call(exit_logits.float(), labels)
