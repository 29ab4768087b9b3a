"""The experiments: what a run is, what it leaves behind, and that the tables tell what the JSONs say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from pytest import approx, fixture, mark, raises
from scipy import stats
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, MPNetConfig

from benchmarks import reports, reproduce
from benchmarks.baselines import BASELINES
from benchmarks.runs import EXIT_SYSTEMS, Run, Settings, decode_array, encode_array, fit_exits, perform
from gaml_hf import GamlBertForSequenceClassification
from gaml_hf.evaluation import OperatingPoint, accuracy, sweep


RUN = Run(
    task="cola",
    system="multi-exit",
    backbone="tiny",
    seed=0,
    learning_rate=1e-2,
    batch_size=8,
    warmup_epochs=0.5,
    alpha=0.3,
    epochs=2,
)


@fixture
def settings(tmp_path, bert_kwargs, tokenizer) -> Settings:
    """A tiny backbone, and a CoLA of 80 + 30 sentences in which "good" is acceptable."""
    torch.manual_seed(0)
    backbone = tmp_path / "tiny"
    BertForSequenceClassification(BertConfig(**bert_kwargs)).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    rng = np.random.default_rng(0)
    folder = tmp_path / "glue" / "cola"
    folder.mkdir(parents=True)
    for split, count in (("train", 80), ("validation", 30)):
        labels = rng.integers(0, 2, count)
        fillers = rng.choice(["film", "movie", "story", "plot", "the"], (count, 4))
        texts = [" ".join([*words, "good" if label else "bad"]) for words, label in zip(fillers, labels, strict=True)]
        Dataset.from_dict({"sentence": texts, "label": labels, "idx": range(count)}).to_parquet(
            folder / f"{split}.parquet"
        )
    return Settings(tmp_path / "runs", str(backbone), str(tmp_path / "glue"))


def validation_labels(settings: Settings) -> list[int]:
    """In the order of the file, in which every run's rows must be: McNemar's test compares row by row."""
    return Dataset.from_parquet(f"{settings.data}/cola/validation.parquet")["label"][:]


def test_a_run_is_named_by_everything_that_decides_it():
    assert replace(RUN).name == RUN.name
    others = [
        replace(RUN, **change)
        for change in (
            {"seed": 1},
            {"alpha": 0.5},
            {"layers": 3},
            {"exits": (1, 4)},
            {"max_grad_norm": 0.0},
            {"ga_granularity": "layer"},
            {"watch_angle": True},
            {"fold": 0, "folds": 2},
            {"bf16": True},
        )
    ]
    assert len({run.name for run in [RUN, *others]}) == 10


def test_arrays_survive_json():
    values = np.random.default_rng(0).normal(size=(5, 4, 2)).astype(np.float32)
    back = decode_array(json.loads(json.dumps(encode_array(values))))
    assert back.dtype == np.float32
    assert (back == values).all()


def test_a_run_leaves_one_json_and_is_not_repeated(settings, monkeypatch):
    result = perform(RUN, settings)
    path = settings.path(RUN)
    assert [path] == list(settings.ledger.iterdir())
    assert result["rows"] == {"train": 72, "held_out": 8, "validation": 30}
    assert result["stopped_at_step"] == 2 * 9
    logits = decode_array(result["logits"]["validation"])
    assert logits.shape == (30, 4, 2)
    assert result["labels"]["validation"] == validation_labels(settings)
    # The scores are those of the logits, by the definition of Matthews' correlation.
    labels = np.array(result["labels"]["validation"])
    expected = np.corrcoef(logits[:, 3].argmax(-1), labels)[0, 1]
    assert result["scores"]["validation"][4]["matthews_correlation"] == approx(expected)
    assert expected > 0.9  # "good" and "bad" are easily told apart

    monkeypatch.setattr("benchmarks.runs.train", lambda *_: 1 / 0)
    assert perform(RUN, settings) == json.loads(path.read_text())


def test_a_fold_leaves_the_validation_set_alone(settings):
    first, second = (perform(replace(RUN, fold=i, folds=2, epochs=1), settings) for i in (0, 1))
    assert first["rows"] == {"train": 40, "held_out": 40}
    assert list(first["scores"]) == ["held_out"]
    assert first["labels"]["held_out"] != second["labels"]["held_out"]
    assert abs(sum(first["labels"]["held_out"]) - sum(second["labels"]["held_out"])) <= 1  # stratified


def trained(run: Run, settings: Settings, monkeypatch) -> GamlBertForSequenceClassification:
    kept = []

    def keep(*args):
        kept.append(fit_exits(*args))
        return kept[-1]

    monkeypatch.setattr("benchmarks.runs.fit_exits", keep)
    perform(run, settings)
    return kept[-1][1]


@mark.parametrize("system", ["deebert", "fastbert"])
def test_two_stages(settings, system, monkeypatch):
    plain = trained(replace(RUN, system="multi-exit", layers=4), settings, monkeypatch)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    model = trained(replace(RUN, system=system), settings, monkeypatch)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"exit_classifiers.{m}.{kind}" for m in (1, 2, 3) for kind in ("weight", "bias")}
    result = json.loads(settings.path(replace(RUN, system=system)).read_text())
    assert result["stopped_at_step"] == 2 * 2 * 9  # both stages
    assert result["scores"]["validation"]["4"]["matthews_correlation"] > 0.9


def test_watching_the_angle_changes_nothing(settings, monkeypatch):
    run = replace(RUN, system="ml", epochs=1)
    plain = trained(run, settings, monkeypatch)
    watched = trained(replace(run, watch_angle=True), settings, monkeypatch)
    for name, parameter in plain.named_parameters():
        assert_close(watched.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)
    result = json.loads(settings.path(replace(run, watch_angle=True)).read_text())
    cosines = [entry["alignment/cos_angle"] for entry in result["log"] if "loss" in entry]
    assert len(cosines) == 9
    assert all(-1 <= value <= 1 for value in cosines)
    assert len(set(cosines)) == 9


def test_pairs(settings, monkeypatch):
    for system, pairs in (("pair-deep-teaches", [[4, 1]]), ("pair-shallow-teaches", [[1, 4]])):
        model = trained(replace(RUN, system=system, exits=(1, 4), epochs=1), settings, monkeypatch)
        assert (model.config.exit_layers, model.config.distillation) == ([1, 4], pairs)


def test_static_baselines_are_of_bert(settings, tmp_path):
    MPNetConfig(num_hidden_layers=2).save_pretrained(tmp_path / "mpnet")
    with raises(ValueError, match="`pkd` is made of BERT's layers, and .* is of type `mpnet`"):
        perform(replace(RUN, system="pkd", layers=1), replace(settings, backbone=str(tmp_path / "mpnet")))


def test_a_shallow_bert(settings, monkeypatch):
    run = replace(RUN, system="bert", layers=2, epochs=1)
    model = trained(run, settings, monkeypatch)
    assert (len(model.bert.encoder.layer), model.config.exit_layers) == (2, [2])
    assert json.loads(settings.path(run).read_text())["static_speed_up"] == 2.0


def test_static_baselines_share_one_teacher(settings):
    run = replace(RUN, epochs=1)
    pkd = perform(replace(run, system="pkd"), settings)
    (teacher,) = (settings.ledger / "teachers").iterdir()
    written = teacher.stat().st_mtime_ns
    distilled = perform(replace(run, system="distilbert"), settings)
    assert [teacher] == list((settings.ledger / "teachers").iterdir())
    assert teacher.stat().st_mtime_ns == written
    for result in (pkd, distilled):
        assert (result["layers"], result["exit_layers"], result["static_speed_up"]) == (2, [2], 2.0)
        assert decode_array(result["logits"]["validation"]).shape == (30, 1, 2)
        assert result["labels"]["validation"] == validation_labels(settings)
    pruned = perform(replace(run, system="head_pruning"), settings)
    # Of a layer's 4 d^2 + 2 * d * 64 = 8192 weights, half the heads have 2048.
    assert pruned["static_speed_up"] == approx(8192 / (8192 - 2048))
    assert reports.answer(json.loads(settings.path(replace(run, system="pkd")).read_text()), "none").speed_up == 2.0


# Statistics


def test_holm_by_hand():
    # 3 x 0.01; then 2 x 0.03; then 1 x 0.04, which must not fall below the one before.
    assert reports.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == approx({"a": 0.03, "c": 0.06, "b": 0.06})


def measured(score: float, without: float | list[float] | None = None, rows: int = 9) -> reports.Measured:
    """By default one that the same rows would give whichever is left out."""
    without = np.broadcast_to(score if without is None else without, rows)
    return reports.Measured(score, np.array(without), np.zeros(rows))


def test_differences_are_of_one_speed():
    def at(speed_up: float, score: float, parameter: float | None = 1.0) -> reports.Answer:
        same = measured(score)
        return reports.Answer(score, same.without, same.labels, speed_up=speed_up, parameter=parameter)

    ours = [at(2.0, 80.0), at(2.0, 81.0), at(2.0, 82.0)]
    told = reports.difference_table(
        {
            ("cola", "slow", "entropy"): list(zip(ours, [at(1.5, 90.0), at(1.6, 90.0), at(1.9, 90.0)], strict=True)),
            ("cola", "fair", "entropy"): list(zip(ours, [at(1.9, 79.0), at(1.9, 80.0), at(1.5, 20.0)], strict=True)),
            ("cola", "static", "none"): list(zip(ours, [at(1.0, s, None) for s in (80.1, 81.2, 81.9)], strict=True)),
        }
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[2:]]
    assert lines[0] == ["slow", "entropy", "cola", "2.00x and 1.67x", "1", "not at one speed", ""]
    # One point with both seeds: no doubt at all, twice as little for the two rows that are compared.
    assert lines[1] == ["fair", "entropy", "cola", "2.00x and 1.77x", "2", "+1.0 [+1.0, +1.0], p<0.001 *", "p<0.001"]
    t = stats.ttest_rel([80, 81, 82], [80.1, 81.2, 81.9])
    assert lines[2][:5] == ["static", "none", "cola", "2.00x and 1.00x", "3"]
    assert lines[2][5].endswith(f"p={t.pvalue:.3f}")
    assert lines[2][6] == f"p={t.pvalue:.3f}"  # the larger of two


def test_a_difference_over_seeds_by_hand():
    difference = reports.paired_difference([measured(x) for x in (2, 4, 6)], [measured(x) for x in (1, 2, 3)])
    # Differences 1, 2, 3: standard error 1 / sqrt(3), t = 3.4641 with 2 degrees of freedom, whose 97.5% quantile
    # is 4.3027.
    assert difference.mean == approx(2.0)
    assert (difference.low, difference.high) == approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert difference.p == approx(0.0742, abs=1e-4)
    assert reports.paired_difference([measured(1)], [measured(2)]) is None
    assert reports.paired_difference([measured(1), measured(2)], [measured(1), measured(2)]).p == 1.0


def test_a_difference_of_nothing_on_the_whole():
    difference = reports.paired_difference([measured(1), measured(0)], [measured(0), measured(1)])
    assert (difference.mean, difference.p) == (0, 1.0)
    assert difference.low == -difference.high < -12
    other = reports.Measured(0.0, np.zeros(9), np.ones(9))  # each seed by itself holds its rows in one order
    with raises(ValueError, match="rows in different orders"):
        reports.paired_difference([measured(1), other], [measured(0), other])


def test_a_difference_over_rows_is_the_t_test_of_the_rows():
    rng = np.random.default_rng(0)
    labels = np.zeros(40)
    ours, theirs = rng.random(40) < 0.9, rng.random(40) < 0.6  # right or wrong, with either of two equal seeds

    def accuracies(correct: np.ndarray) -> list[reports.Measured]:
        without = np.array([100 * np.delete(correct, i).mean() for i in range(40)])
        return [reports.Measured(100 * correct.mean(), without, labels)] * 2

    difference = reports.paired_difference(accuracies(ours), accuracies(theirs))
    expected = stats.ttest_rel(100.0 * ours, 100.0 * theirs)
    assert difference.p == approx(expected.pvalue)
    assert (difference.low, difference.high) == approx(tuple(expected.confidence_interval()))


def test_seeds_and_rows_by_hand():
    # Over seeds: differences 0 and 2, standard error sqrt(2 / 2) = 1. Over rows: of three, without each of which the
    # mean is 0, 1 or 2, sqrt(2 / 3 * (1 + 0 + 1)) = 1.1547. The quantiles of t at 1 and 2 degrees of freedom: 12.7062
    # and 4.3027.
    ours = [measured(0, [-1, 0, 1], 3), measured(2, [1, 2, 3], 3)]
    difference = reports.paired_difference(ours, [measured(0, rows=3)] * 2)
    half = (12.7062**2 + (4.3027 * 1.1547) ** 2) ** 0.5
    assert (difference.mean, difference.low, difference.high) == approx((1, 1 - half, 1 + half), abs=1e-3)
    # At the level p the interval ends at 0.
    ends = np.hypot(stats.t.isf(difference.p / 2, 1), stats.t.isf(difference.p / 2, 2) * 1.1547)
    assert ends == approx(1, abs=1e-4)


# Reports


def result_with(held_out: list, validation: list, labels: list, **fields) -> dict:
    """A JSON of four layers whose logits are `(confidence of class 1)` by row and exit."""

    def logits(rows: list) -> dict:
        values = np.array(rows, dtype=np.float32)
        return encode_array(np.stack([np.zeros_like(values), values], axis=-1))

    run = {"task": "sst2", "system": "gaml-soft", "seed": 0} | fields
    return {
        "run": run,
        "full_depth": 4,
        "layers": 4,
        "exit_layers": [1, 2, 3, 4],
        "static_speed_up": 1.0,
        "logits": {"held_out": logits(held_out), "validation": logits(validation)},
        "labels": {"held_out": labels, "validation": labels},
    }


def test_the_policy_is_chosen_on_the_rows_set_aside():
    rising = [[1, 2, 3, 4], [-1, -2, -3, -4]]  # patience 1 leaves at exit 2, a speed-up of 2
    turning = [[1, -1, 1, -1], [-1, 1, -1, 1]]  # patience never leaves before the last exit
    answer = reports.answer(result_with(rising, turning, [1, 0]), "patience")
    assert (answer.parameter, answer.speed_up, answer.score) == (1, 1.0, 0.0)
    assert not answer.in_target
    answer = reports.answer(result_with(rising, rising, [1, 1]), "patience")
    assert (answer.speed_up, answer.score, answer.in_target) == (2.0, 50.0, True)
    assert reports.answer(result_with(rising, rising, [1, 0]), "none").speed_up == 1.0


def test_rows_in_two_orders_are_not_compared():
    one, other = (
        reports.answer(result_with([[1] * 4] * 2, [[1] * 4] * 2, labels), "none") for labels in ([1, 0], [0, 1])
    )
    with raises(ValueError, match="hold their validation rows in different orders"):
        reports.paired_difference([one] * 2, [other] * 2)


def rows_left_out(result: dict) -> list[dict]:
    """The JSON as it would be with one validation row fewer, for each."""
    logits, labels = decode_array(result["logits"]["validation"]), result["labels"]["validation"]
    exits = result["exit_layers"]
    others = []
    for i in range(len(labels)):
        fewer, rest = np.delete(logits, i, axis=0), np.delete(labels, i)
        scores = {str(m): {"accuracy": (fewer[:, k].argmax(-1) == rest).mean()} for k, m in enumerate(exits)}
        others.append(
            result
            | {
                "logits": result["logits"] | {"validation": encode_array(fewer)},
                "labels": {"held_out": [], "validation": rest.tolist()},
                "scores": {"validation": scores},
            }
        )
    return others


def test_what_is_left_without_a_row():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 4)).tolist()
    result = result_with(rows, rows, rng.integers(0, 2, 20).tolist())
    result["scores"] = {"validation": {str(m): {"accuracy": 0.0} for m in (1, 2, 3, 4)}}  # not what is left out
    others = rows_left_out(result)
    for exits in ([4], [1, 2, 3, 4]):
        expected = [np.mean([reports.exit_score(other, m) for m in exits]) for other in others]
        assert reports.at_exits(result, exits).without == approx(np.array(expected))
    answer = reports.answer(result, "none")
    assert answer.without == approx(np.array([reports.answer(other, "none").score for other in others]))
    # Budgets have one speed whichever rows there are, so that the curve without a row is that of the rest.
    for speed_up in (1.0, 1.5, 2.0, 9.0):
        expected = [reports.score_at(other, "budgeted", speed_up) for other in others]
        assert reports.at_speed(result, "budgeted", speed_up).without == approx(np.array(expected))
    # Thresholds move in speed too: the two on either side of 2x, swept over the rest.
    config = SimpleNamespace(num_hidden_layers=4, exit_layers=[1, 2, 3, 4])

    def curve(of: dict, values: list[float] | None = None) -> list[OperatingPoint]:
        logits, labels = decode_array(of["logits"]["validation"]), np.array(of["labels"]["validation"])
        return sweep(logits, labels, config, "entropy", accuracy, "accuracy", values)

    points = sorted(curve(result), key=lambda point: point.speed_up)
    slow = max((point for point in points if point.speed_up < 2), key=lambda point: (point.speed_up, point.score))
    fast = min((point for point in points if point.speed_up >= 2), key=lambda point: (point.speed_up, point.score))
    expected = []
    for other in others:
        one, two = curve(other, [slow.parameter, fast.parameter])
        apart = two.speed_up - one.speed_up  # 0 where the row left out is the only one that they treat differently
        slope = (two.score - one.score) / apart if apart else 0
        expected.append(100 * (one.score + slope * (2 - one.speed_up)))
    assert len(set(expected)) > 3
    assert reports.at_speed(result, "entropy", 2.0).without == approx(np.array(expected))


def test_the_curve_between_its_points():
    # Budgets 1, 2, 4: speed-ups 4, 2, 1 (and 3: 4/3). Of four rows, exits 1 to 4 answer 0, 2, 3 and 4 rightly.
    labels = [1, 1, 1, 1]
    answers = [[-1, 1, 1, 1], [-1, 1, 1, 1], [-1, -1, 1, 1], [-1, -1, -1, 1]]
    result = result_with(answers, answers, labels)
    assert reports.score_at(result, "budgeted", 2.0) == approx(50.0)
    assert reports.score_at(result, "budgeted", 3.0) == approx(25.0)  # half-way between 4x (0) and 2x (50)
    assert reports.score_at(result, "budgeted", 9.0) == approx(0.0)


def test_what_leaving_early_costs_by_hand(monkeypatch):
    def result(seed: int, early: float, last: float, exits: int = 4) -> dict:
        return {
            "run": {"task": "sst2", "seed": seed},
            "full_depth": 4,
            "exit_layers": list(range(5 - exits, 5)),
            "scores": {"validation": {"4": {"accuracy": last / 100}}},
            "early": early,
        }

    monkeypatch.setattr(reports, "at_speed", lambda result: measured(result["early"]))
    monkeypatch.setattr(reports, "at_exits", lambda result, *_: measured(reports.exit_score(result, 4, "accuracy")))
    kind = ("mean", "", "x10", "yes")
    groups = {
        ("multi-exit", *kind): [result(0, 80, 82), result(1, 81, 85)],
        ("ml", *kind): [result(1, 83, 83), result(0, 81, 83), result(2, 50, 60)],
        ("ml", "cls", "", "x1", "no"): [result(0, 70, 80)],  # one seed says nothing
        ("plain, 2 layers", *kind): [result(1, 0, 80, exits=1), result(0, 0, 79, exits=1)],
        ("plain", *kind): [result(0, 0, 90, exits=1), result(1, 0, 90, exits=1)],
    }
    # Two seeds: mean ± 12.706 |d1 - d2| / 2, for that is the 97.5% quantile of t at one degree of freedom. Three, -2,
    # 0 and -10: -4 ± 4.3027 * 3.055, and p = 1 - 1.309 / sqrt(2 + 1.309^2).
    assert reports.price_of_leaving(groups) == [
        [
            *("multi-exit", *kind),
            "-3.0 [-15.7, +9.7], p=0.205",  # its last exit
            "-9.5 [-15.9, -3.1], p=0.033",  # plain: -10 and -9
            "+1.0 [+1.0, +1.0], p<0.001",
            "",
            "-6.5 [-25.6, +12.6], p=0.144",  # its last exit, less plain: -8 and -5
        ],
        [
            *("ml", *kind),
            "-4.0 [-17.1, +9.1], p=0.321",
            "-8.0 [-20.7, +4.7], p=0.079",
            "+2.5 [-3.9, +8.9], p=0.126",
            "+1.5 [-4.9, +7.9], p=0.205",
            "-7.0 [-7.0, -7.0], p<0.001",
        ],
    ]


def test_spread():
    assert reports.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0 (n=3)"
    assert reports.spread([1.0]) == "1.0 (n=1)"
    assert reports.spread([]) == "not run"


def words(settings: Settings, *more: str) -> list[str]:
    common = f"--tasks cola --backbone {settings.backbone} --data {settings.data} --ledger {settings.ledger}"
    return [*common.split(), "--epochs", "1", "--seeds", "0", "1", "--learning_rates", "1e-2", *more]


def test_a_table_from_the_command_line(settings, capsys):
    asked = words(settings, "--systems", "multi-exit", "ml", "gaml-soft")
    reproduce.main(["table2", *asked, "--dry-run"])
    assert capsys.readouterr().out == "table2: 6 runs, 6 to do, about 0.0 h and 6 runs of unknown length\n"
    assert not settings.ledger.exists()

    reproduce.main(["table2", *asked, "--shard", "1/2"])
    assert len(list(settings.ledger.glob("*.json"))) == 3
    reproduce.main(["table2", *asked])  # goes on
    printed = capsys.readouterr().out
    assert "6 runs, 3 to do, about 0.0 h\n" in printed
    assert "[3/3]" in printed
    text = (settings.ledger / "reports" / "table2.md").read_text()
    scores = [
        reports.answer(json.loads(path.read_text()), "patience").score
        for path in sorted(settings.ledger.glob("cola-gaml-soft-*.json"))
    ]
    assert f"| GAML-BERT (GA-soft) | patience | {reports.spread(scores)} |" in text
    assert "| FastBERT-GA | patience | not run |" in text
    assert "6 runs" in text

    # Other tables take the same runs.
    reproduce.main(["table5", *words(settings), "--report"])
    assert "| cola | entropy | gaml-soft |" in (settings.ledger / "reports" / "table5.md").read_text()


@mark.parametrize(
    ("experiment", "systems", "figure"),
    [
        ("table1", ["pair-mutual"], None),
        ("table3", ["ml"], None),
        ("table4", ["multi-exit"], None),
        ("fig3", ["ml"], "fig3-*.png"),
        ("fig4", ["multi-exit"], "fig4-cola.png"),
        ("fig5", ["bert"], "fig5.png"),
        ("ga", ["gaml-hard"], None),
    ],
)
def test_every_report(settings, experiment, systems, figure):
    asked = words(settings, "--max_train_rows", "16", "--systems", *systems)
    asked[asked.index("--seeds") + 2 : asked.index("--seeds") + 3] = []  # one seed
    reproduce.main([experiment, *asked])
    folder = settings.ledger / "reports"
    text = (folder / f"{experiment}.md").read_text()
    assert "cola" in text
    if figure:
        (path,) = folder.glob(figure)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"({path.name})" in text


def test_the_grid_and_its_winner(settings, capsys):
    asked = words(settings, "--folds", "2", "--systems", "multi-exit", "--batch_sizes", "8", "--epochs", "3")
    asked[asked.index("--learning_rates") + 1 : asked.index("--learning_rates") + 2] = ["1e-5", "1e-2"]
    reproduce.main(["grid", *asked, "--warmups", "0.5"])
    assert "'learning_rate': 0.01" in capsys.readouterr().out
    options = parse(words(settings, "--epochs", "3"))
    options.learning_rates = None
    # The others take it too, but for α, which the multi-exit model does not have.
    found = reproduce.recipe("cola", "ml", options)
    assert (found.learning_rate, found.batch_size, found.warmup_epochs, found.alpha) == (0.01, 8, 0.5, 0.3)
    # It is the winner of this encoder, these exits and these settings: others have Table 7's values.
    for other in (
        ["--exits", "learning"],
        ["--backbone", "google-bert/bert-base-uncased"],
        ["--epochs", "4"],
        ["--max_train_rows", "16"],
        ["--bf16"],
    ):
        others = parse([*words(settings, "--epochs", "3"), *other])
        others.learning_rates = None
        found = reproduce.recipe("cola", "ml", others)
        assert (found.learning_rate, found.batch_size, found.warmup_epochs) == (5e-5, 32, 1.2)
    # A second seed of which one fold is done takes nothing away.
    for path in list(settings.ledger.glob("*-fold0-*.json")):
        result = json.loads(path.read_text())
        result["run"]["seed"], result["exit_mean"] = 7, 1.0
        path.with_name(f"copy-{path.name}").write_text(json.dumps(result))
    assert reproduce.recipe("cola", "ml", options).learning_rate == 0.01
    options.learning_rates = [3e-5]
    assert reproduce.recipe("cola", "ml", options).learning_rate == 3e-5
    assert reproduce.recipe("rte", "ml", options).batch_size == 16  # Table 7
    options = parse(["--tasks", "cola", "sst2", "mrpc", "--seeds", "0", "--backbone", settings.backbone])
    runs = reproduce.experiment("table1", options, 4)
    assert {(run.task, run.learning_rate, run.warmup_epochs, run.batch_size, run.alpha) for run in runs} == {
        # Table 6, and of a task that is not there Table 7
        ("cola", 1e-5, 1.0, 32, 0.2),
        ("sst2", 2e-5, 0.8, 128, 0.1),
        ("mrpc", 2e-5, 1.0, 16, 0.2),
    }
    options = parse(words(settings, "--ga_granularity", "layer"))
    assert reproduce.recipe("cola", "gaml-soft", options).ga_granularity == "layer"


def test_the_tables_of_the_paper_with_exits_that_learn(settings, capsys):
    options = parse(words(settings, "--exits", "learning", "--early_stopping_patience", "2"))
    found = reproduce.recipe("cola", "ml", options)
    assert (found.exit_pooling, found.exit_learning_rate_multiplier, found.exit_warm_start) == ("mean", 10.0, True)
    assert found.early_stopping_patience == 2
    # The table of exits trains the same runs, and SWEET, which no other table has.
    common = ["--tasks", "cola", "--seeds", "0", "--backbone", settings.backbone]
    of_paper, of_exits = (
        {run.name for run in reproduce.experiment(name, parse([*common, *more]), 4)}
        for name, more in (("ga", ["--exits", "learning"]), ("exits", []))
    )
    assert len(of_paper & of_exits) == 8  # multi-exit, ML, and both alignments with three granularities
    sweet = [run for run in reproduce.experiment("exits", parse(common), 4) if run.stop_gradient_between_exits]
    assert [run.system for run in sweet] == ["multi-exit"]
    with raises(SystemExit):
        reproduce.main(["exits", *words(settings), "--exits", "learning"])
    assert "leave out `--exits`. Got learning" in capsys.readouterr().err


def test_runs_of_two_encoders_of_one_name_are_not_mixed(settings, tmp_path, bert_kwargs, tokenizer, capsys):
    asked = words(settings, "--systems", "multi-exit")
    reproduce.main(["table2", *asked])
    (first, second) = sorted(settings.ledger.glob("*.json"))
    second.unlink()
    torch.manual_seed(1)
    other = tmp_path / "elsewhere" / "tiny"
    BertForSequenceClassification(BertConfig(**bert_kwargs)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    moved = [str(other) if word == settings.backbone else word for word in asked]
    with raises(SystemExit):
        reproduce.main(["table2", *moved])
    assert f"are not those of {first.stem}.\n" in capsys.readouterr().err
    assert not second.exists()
    reproduce.main(["table2", *asked])  # those of the first go on
    assert second.exists()


def test_baselines_of_bert_are_left_out_for_another_encoder(settings, tmp_path, capsys):
    MPNetConfig(num_hidden_layers=4).save_pretrained(tmp_path / "mpnet")
    asked = [str(tmp_path / "mpnet") if word == settings.backbone else word for word in words(settings)]
    reproduce.main(["exits", *asked, "--dry-run"])
    assert "left out for mpnet: theseus\nexits: " in capsys.readouterr().out
    with raises(SystemExit):
        reproduce.main(["table2", *asked, "--systems", "pkd"])
    assert "has no run of `--systems pkd`" in capsys.readouterr().err


def test_a_backbone_that_is_not_there(settings, tmp_path, capsys):
    asked = [str(tmp_path / "none") if word == settings.backbone else word for word in words(settings)]
    with raises(SystemExit):
        reproduce.main(["table2", *asked, "--dry-run"])
    assert "`--backbone` must be an encoder's folder, or its name on the Hub. " in capsys.readouterr().err


def test_an_unknown_combination(settings):
    with raises(SystemExit):
        reproduce.main(["table3", *words(settings), "--systems", "deebert"])


def test_every_system_of_table_2_can_be_run():
    systems = {system for _, system, _ in reports.SYSTEMS} - {"bert-half"}
    assert systems <= EXIT_SYSTEMS.keys() | BASELINES.keys()
    assert all(set(scores) == set(reports.TASKS) for scores in reports.PAPER_TABLE_2.values())
    assert set(reports.PAPER_TABLE_2) <= {name for name, _, _ in reports.SYSTEMS}


def parse(argv: list[str]):
    return reproduce.parser().parse_args(["table2", *argv])


def test_shards_are_the_same_runs_however_far_the_others_are(settings, monkeypatch, capsys):
    done = []

    def perform(run, settings):
        done.append(run.name)
        settings.ledger.mkdir(exist_ok=True)
        settings.path(run).write_text("{}")
        return {"exit_mean": 0.0, "best_step": 0, "stopped_at_step": 0}

    monkeypatch.setattr(reproduce, "perform", perform)
    monkeypatch.setattr(reproduce, "ledger", lambda folder, pattern="*.json": [])
    monkeypatch.setattr(reproduce, "seconds_of", lambda run, known: None)
    monkeypatch.setattr(reproduce.reports, "write", lambda *_: "")
    asked = words(settings, "--systems", "multi-exit", "ml", "gaml-soft")
    for shard in ("0/2", "1/2"):  # the second begins when the first is through
        reproduce.main(["table2", *asked, "--shard", shard])
    assert len(done) == len(set(done)) == 6


@mark.parametrize("word", ["1", "2/2", "a/b", "-1/2", "0/0"])
def test_a_shard_that_is_none(word, capsys):
    with raises(SystemExit):
        reproduce.parser().parse_args(["table2", f"--shard={word}"])
    assert f"must be such as 0/2 or 1/2. Got {word}." in capsys.readouterr().err


def test_no_run_is_longer_than_needed(tmp_path: Path):
    """Table 4 and Figure 4 add nothing that Table 2 did not train."""
    options = parse(["--tasks", "cola", "--ledger", str(tmp_path), "--backbone", "tiny"])
    names = {
        name: {run.name for run in reproduce.experiment(name, options, 12)} for name in ("table2", "table4", "fig4")
    }
    assert names["table4"] <= names["table2"]
    assert names["fig4"] <= names["table2"]


def test_the_tables_of_the_docs_are_those_of_the_ledger(tmp_path: Path):
    """docs/experiments.md shows what its commands make of benchmarks/ledger, to the last digit."""
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs" / "experiments.md").read_text(encoding="utf-8")
    settings = re.search(r'^SETTINGS="(.*?)"$', text, re.M).group(1).replace("$MINILM", "all-MiniLM-L6-v2")
    commands = re.findall(r"^`(\w+ --tasks .*)`$", text, re.M)
    assert {command.split()[0] for command in commands} == reports.REPORTS.keys() - {"table8"}  # docs/images.md
    for command in commands:
        depth = 12 if "$MPNET" in command else 6
        words = [*settings.split(), *command.replace("$MPNET", "all-mpnet-base-v2").split()]
        options = reproduce.parser().parse_args(words)
        runs = reproduce.experiment(command.split()[0], options, depth)
        paths = [root / options.ledger / f"{run.name}.json" for run in runs]
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        path = reports.write(command.split()[0], results, tmp_path)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith("|") and line not in text] == []
