import json
import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path

import evaluate
import numpy as np
import pyarrow.parquet
import pytest
import torch

from gaml_hf.evaluation.glue import GLUE_TASKS, GlueMetric, GlueTask, get_task, selection_score


GLUE_DATA = Path(__file__).resolve().parents[2] / "shared" / "glue"

# Class 1 is the positive one: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
#                 reference 1  reference 0
# prediction 1         3            1
# prediction 0         2            4
REFERENCES = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def whole(message):
    """A pattern for `pytest.raises` that accepts this sentence and nothing more."""
    return rf"^{re.escape(message)}$"


# ---------------------------------------------------------------------------------------------------- the tasks


def test_recipes_are_those_of_table_7():
    table_7 = {  # learning rate, warm-up steps (/epoch), batch size, α
        "cola": (5e-5, 1.2, 32, 0.3),
        "mnli": (2e-5, 0.8, 256, 0.2),
        "mrpc": (2e-5, 1.0, 16, 0.2),
        "qnli": (1e-5, 1.0, 128, 0.5),
        "qqp": (1e-5, 0.8, 256, 0.3),
        "rte": (5e-5, 1.2, 16, 0.2),
        "sst2": (5e-5, 0.8, 128, 0.3),
    }
    recipes = {n: (t.learning_rate, t.warmup_epochs, t.batch_size, t.alpha) for n, t in GLUE_TASKS.items()}
    assert recipes == table_7


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_a_task_fits_together(task):
    assert get_task(task.name) is get_task(task.name.upper()) is task
    assert task.main_metric in task.metrics
    assert task.num_labels == len(task.submission_labels) == (3 if task.name == "mnli" else 2)
    assert len(task.submission_files) == len(task.test_splits) == len(task.validation_splits)
    assert len(task.submission_files) == len(task.submission_rows)
    assert len(task.text_columns) in (1, 2)
    # The server takes names for the inference tasks and 0 / 1 for the others.
    inference = task.name in ("mnli", "qnli", "rte")
    assert task.submission_labels == (task.label_names if inference else ("0", "1"))
    for k, name in enumerate(task.label_names):
        assert task.class_index(name) == task.class_index(str(k)) == task.class_index(f"LABEL_{k}") == k
    message = f"The classes of {task.name} must be called {', '.join(task.label_names)}, or by their numbers from 0"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}.*Got 'maybe'"):
        task.class_index("maybe")
    assert set(GlueMetric(task.name).compute(predictions=[0, 1], references=[0, 1])) == set(task.metrics)


def test_only_mnli_has_two_of_each_split():
    mnli = GLUE_TASKS["mnli"]
    assert mnli.validation_splits == ("validation_matched", "validation_mismatched")
    assert mnli.test_splits == ("test_matched", "test_mismatched")
    assert mnli.submission_files == ("MNLI-m.tsv", "MNLI-mm.tsv")
    others = [task for name, task in GLUE_TASKS.items() if name != "mnli"]
    assert all(task.validation_splits == ("validation",) and task.test_splits == ("test",) for task in others)


def test_a_task_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        GLUE_TASKS["cola"].alpha = 0.5
    assert isinstance(GLUE_TASKS["cola"], GlueTask)


CHOICES = "`task_name` must be one of cola, mnli, mrpc, qnli, qqp, rte, sst2."


@pytest.mark.parametrize(
    ("task_name", "message"),
    [
        ("sst-2", f"{CHOICES} Got 'sst-2'."),
        (None, f"{CHOICES} Got None."),
        (["cola"], f"{CHOICES} Got ['cola']."),
        (
            "STSB",
            (
                f"{CHOICES} Got 'STSB'. STS-B is a regression task and the exits here are classifiers; "
                "the paper leaves it out (Sec. 6.1)."
            ),
        ),
        ("wnli", f"{CHOICES} Got 'wnli'. The paper leaves WNLI out (Sec. 6.1), as BERT's authors did."),
    ],
)
def test_unknown_and_excluded_tasks(task_name, message):
    with pytest.raises(ValueError, match=whole(message)):
        get_task(task_name)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cola", {"train": 8551, "validation": 1043, "test": 1063}),
        ("mrpc", {"train": 3668, "validation": 408, "test": 1725}),
        ("sst2", {"train": 67349, "validation": 872, "test": 1821}),
    ],
)
def test_the_table_agrees_with_the_data(name, rows):
    if not (GLUE_DATA / name).is_dir():
        pytest.skip(f"needs the data in {GLUE_DATA / name}")
    task = GLUE_TASKS[name]
    assert set(rows) == {"train", *task.validation_splits, *task.test_splits}
    for split, num_rows in rows.items():
        file = GLUE_DATA / name / f"{split}.parquet"
        assert pyarrow.parquet.read_metadata(file).num_rows == num_rows
        schema = pyarrow.parquet.read_schema(file)
        assert schema.names == [*task.text_columns, "label", "idx"]
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert tuple(features["label"]["names"]) == task.label_names


# --------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize(
    ("config_name", "expected"),
    [
        # (3 * 4 - 1 * 2) / sqrt(4 * 5 * 5 * 6)
        ("cola", {"matthews_correlation": 10 / math.sqrt(600)}),
        # 7 of 10 right; F1 of class 1 is 2 * 3 / (2 * 3 + 1 + 2). F1 of class 0 would be 8 / 11.
        ("mrpc", {"accuracy": 0.7, "f1": 2 / 3}),
        ("qqp", {"accuracy": 0.7, "f1": 2 / 3}),
        ("mnli", {"accuracy": 0.7}),
        ("qnli", {"accuracy": 0.7}),
        ("rte", {"accuracy": 0.7}),
        ("sst2", {"accuracy": 0.7}),
        (None, {"accuracy": 0.7, "macro_f1": (2 / 3 + 8 / 11) / 2}),
        ("classification", {"accuracy": 0.7, "macro_f1": (2 / 3 + 8 / 11) / 2}),
    ],
)
def test_scores_by_hand(config_name, expected):
    scores = GlueMetric(config_name).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert GlueMetric(config_name).compute(PREDICTIONS, REFERENCES) == scores
    assert scores == pytest.approx(expected)
    assert all(type(score) is float for score in scores.values())
    json.dumps(scores)


def test_three_classes_by_hand():
    #               reference 0   1   2
    # prediction 0            2   0   0      F1 = 4 / 5
    # prediction 1            1   1   0      F1 = 2 / 4
    # prediction 2            0   1   1      F1 = 2 / 3
    scores = GlueMetric().compute(predictions=[0, 0, 1, 1, 2, 2], references=[0, 0, 0, 1, 1, 2])
    assert scores == pytest.approx({"accuracy": 4 / 6, "macro_f1": (4 / 5 + 1 / 2 + 2 / 3) / 3})


def test_macro_f1_counts_a_class_that_is_only_predicted():
    # Class 0: 1 right, 1 missed, F1 = 2 / 3. Class 7: predicted once, wrongly, F1 = 0. No other class takes part.
    scores = GlueMetric(num_labels=9).compute(predictions=[0, 7], references=[0, 0])
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 1 / 3})


@pytest.mark.parametrize(
    ("config_name", "predictions", "references", "expected"),
    [
        # One class on either side: MCC is 0 / 0, and 0 by convention.
        ("cola", [1, 1, 1], [1, 0, 1], {"matthews_correlation": 0.0}),
        ("cola", [1, 0, 1], [1, 1, 1], {"matthews_correlation": 0.0}),
        ("cola", [1, 1, 1], [1, 1, 1], {"matthews_correlation": 0.0}),
        ("cola", [0], [0], {"matthews_correlation": 0.0}),
        ("cola", [0, 1, 1], [0, 1, 1], {"matthews_correlation": 1.0}),
        ("cola", [1, 0, 0], [0, 1, 1], {"matthews_correlation": -1.0}),
        # No positive anywhere: F1 is 0 / 0, and 0 by convention; class 0 alone is right, so macro F1 is 1.
        ("mrpc", [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0}),
        (None, [0, 0], [0, 0], {"accuracy": 1.0, "macro_f1": 1.0}),
        ("mrpc", [0, 0], [1, 1], {"accuracy": 0.0, "f1": 0.0}),
        # Everything called "equivalent" on MRPC's validation set, 279 of 408 rows: F1 = 2 * 279 / (408 + 279).
        ("mrpc", [1] * 408, [1] * 279 + [0] * 129, {"accuracy": 279 / 408, "f1": 558 / 687}),
    ],
)
def test_edges(config_name, predictions, references, expected):
    assert GlueMetric(config_name).compute(predictions=predictions, references=references) == pytest.approx(expected)


def plain_scores(predictions, references):
    """The definitions of the four scores, in plain Python."""
    pairs = list(zip(predictions, references, strict=True))

    def f1(label):
        tp = sum(p == label and r == label for p, r in pairs)
        wrong = sum((p == label) != (r == label) for p, r in pairs)
        return 2 * tp / (2 * tp + wrong) if tp + wrong else 0.0

    tp, fp = pairs.count((1, 1)), pairs.count((1, 0))
    fn, tn = pairs.count((0, 1)), pairs.count((0, 0))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    labels = set(predictions) | set(references)
    return {
        "accuracy": sum(p == r for p, r in pairs) / len(pairs),
        "f1": f1(1),
        "macro_f1": sum(f1(label) for label in labels) / len(labels),
        "matthews_correlation": (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0,
    }


@pytest.mark.parametrize("config_name", ["cola", "mrpc", "mnli", "classification"])
def test_scores_agree_with_the_definitions_on_random_data(config_name):
    generator = np.random.default_rng(0)
    metric = GlueMetric(config_name)
    num_labels = metric.num_labels or 5
    for _ in range(40):  # short lists, so that single-class ones occur too
        predictions, references = generator.integers(0, num_labels, (2, generator.integers(1, 30))).tolist()
        scores = metric.compute(predictions=predictions, references=references)
        plain = plain_scores(predictions, references)
        assert scores == pytest.approx({name: plain[name] for name in metric.metric_names})


@pytest.mark.parametrize(
    "convert",
    [np.asarray, torch.tensor, tuple, lambda rows: np.array(rows, np.uint8), lambda rows: np.array(rows) > 0],
)
def test_containers_and_integer_types(convert):
    metric = GlueMetric("mrpc")
    expected = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert metric.compute(predictions=convert(PREDICTIONS), references=convert(REFERENCES)) == expected


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_rows_added_one_by_one_or_in_batches(keep_in_memory, tmp_path):
    metric = GlueMetric("mrpc", keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    expected = GlueMetric("mrpc").compute(predictions=PREDICTIONS, references=REFERENCES)
    for _ in range(2):  # the rows of the first round must not stay
        metric.add_batch(predictions=PREDICTIONS[:4], references=REFERENCES[:4])
        metric.add(prediction=PREDICTIONS[4], reference=REFERENCES[4])
        metric.add_batch(predictions=np.array(PREDICTIONS[5:]), references=np.array(REFERENCES[5:]))
        assert metric.compute() == expected
    metric.add_batch(predictions=PREDICTIONS[:4], references=REFERENCES[:4])
    assert metric.compute(predictions=PREDICTIONS[4:], references=REFERENCES[4:]) == expected


def test_it_is_an_evaluate_metric_that_leaves_no_files(tmp_path):
    metric = GlueMetric("cola", cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    assert (metric.name, metric.config_name, list(metric.features)) == (
        "glue_metric",
        "cola",
        ["predictions", "references"],
    )
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.compute()
    metric.compute(predictions=[0, 1], references=[0, 1])
    assert list(tmp_path.iterdir()) == []  # no file, no lock: nothing for two processes to collide on
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute(predictions=[0, 1], references=[0, 1]) == {"matthews_correlation": 1.0}


def test_one_metric_serves_many_threads():
    metric = GlueMetric("mrpc")

    def score(num_right):
        predictions = [1] * num_right + [0] * (100 - num_right)
        return metric.compute(predictions=predictions, references=[1] * 100)["accuracy"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(score, range(101))) == [n / 100 for n in range(101)]


def test_the_global_random_state_is_left_alone():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    GlueMetric("mrpc").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert np.random.rand() == expected


PREDICTED, REFERENCE = (
    "`predictions` must hold one class index per row",
    "`references` must hold one class index per row",
)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (
            [0, 1, 1],
            [0, 1],
            "`predictions` and `references` must have the same length. Got 3 predictions and 2 references.",
        ),
        ([], [], f"{PREDICTED}, and at least one row. Got no rows."),
        ([0], [], f"{REFERENCE}, and at least one row. Got no rows."),
        ([0], None, f"{REFERENCE}. Got None."),
        (None, [0], f"{PREDICTED}. Got None."),
        ([[1], [0, 1]], [0, 1], f"{PREDICTED}. Got rows of different lengths."),
        (
            [[0.1, 0.9]],
            [1],
            f"{PREDICTED}, in the shape `(num_rows,)`. Got the shape (1, 2); take the argmax of logits first.",
        ),
        (1, [1], f"{PREDICTED}, in the shape `(num_rows,)`. Got the shape ()."),
        ([0.4, 0.6], [0, 1], f"{PREDICTED}, as integers. Got the type float64."),
        ([0, 1], [0, None], f"{REFERENCE}, as integers. Got the type object."),
        (["1"], [1], f"{PREDICTED}, as integers. Got the type <U1."),
        ([0, 2], [0, 1], f"{PREDICTED}, at least 0 and below 2, the number of labels. Got 2 in row 1."),
        (
            [0, 1, 1],
            [0, 1, -1],
            (
                f"{REFERENCE}, at least 0 and below 2, the number of labels. Got -1 in row 2. "
                "A negative label marks a row without one, as in GLUE's test splits."
            ),
        ),
    ],
)
def test_bad_input(predictions, references, message):
    metric = GlueMetric("mrpc")
    for method in (metric.compute, metric.add_batch):
        with pytest.raises(ValueError, match=whole(message)):
            method(predictions=predictions, references=references)
    # The metric is as good as new afterwards.
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0, "f1": 1.0}


def test_bad_input_without_a_known_number_of_labels():
    message = (
        f"{REFERENCE}, at least 0. Got -100 in row 0. "
        "A negative label marks a row without one, as in GLUE's test splits."
    )
    with pytest.raises(ValueError, match=whole(message)):
        GlueMetric().compute(predictions=[0], references=[-100])
    with pytest.raises(ValueError, match="at least 0 and below 3, the number of labels. Got 3 in row 0."):
        GlueMetric(num_labels=3).compute(predictions=[3], references=[0])


def test_nothing_to_score():
    message = "`predictions` and `references` must be given, or added with `add_batch`. Got no rows."
    with pytest.raises(ValueError, match=whole(message)):
        GlueMetric("mrpc").compute()


def test_bad_configuration():
    with pytest.raises(ValueError, match=whole("`num_labels` must be 3 for mnli. Got 2.")):
        GlueMetric("mnli", num_labels=2)
    with pytest.raises(ValueError, match="STS-B is a regression task"):
        GlueMetric("stsb")


# -------------------------------------------------------------------------------------------- the selection score


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"accuracy": 0.7, "f1": 0.8}, 0.75),  # `combined_score` of run_glue.py
        ({"matthews_correlation": 0.5}, 0.5),
        ({"accuracy": 0.6, "macro_f1": 0.3}, 0.45),
    ],
)
def test_selection_score_by_hand(scores, expected):
    score = selection_score(scores)
    assert score == pytest.approx(expected)
    assert type(score) is float


def test_selection_score_of_nothing():
    message = "`scores` must hold at least one score, as returned by `GlueMetric`. Got an empty mapping."
    with pytest.raises(ValueError, match=whole(message)):
        selection_score({})
