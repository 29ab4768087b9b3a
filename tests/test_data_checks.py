"""Datasets given to GamlTrainer are looked at before the first step."""

import time

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from pytest import fixture, mark, raises

from gaml_hf.data.checks import check_dataset, column_values
from test_trainer import IS_OLD_TRANSFORMERS, Rows, make_model, make_trainer


LIMITS = {"num_labels": 3, "max_length": 8}


def rows(**changes):
    columns = {"input_ids": [[1, 2], [3], [4, 5, 6]], "label": [0, 2, 1], **changes}
    return Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


WRONG = {
    "empty": (rows(input_ids=[], label=[]), "The train dataset has no rows"),
    "no tokens": (
        rows(input_ids=None, text=["a", "b", "c"]),
        r"must have the column 'input_ids'.* It has \['label'",
    ),
    "no labels": (
        rows(label=None, labls=[0, 1, 2]),
        r"must have the column 'labels' or 'label'.*'labls'",
    ),
    "too high": (rows(label=[0, 3, 9]), "Row 1 of the train dataset, column 'label', must be .* from 0 to 2 .* Got 3"),
    "ignored": (rows(label=[-100] * 3), "Row 0 of the train dataset, column 'label'.* Got -100.* take such rows out"),
    "missing": (rows(label=[0, None, 1]), "Row 1 of the train dataset, column 'label'.* Got None"),
    "all missing": (rows(label=[None] * 3), "Row 0 of the train dataset, column 'label'.* Got None"),
    "a name": (rows(label=["bad", "good", "bad"]), "Row 0 of the train dataset, column 'label'.* Got 'bad'"),
    "a fraction": (rows(label=[0.5, 1.0, 2.0]), r"Row 0 of the train dataset, column 'label'.* Got 0\.5"),
    "a row without tokens": (
        rows(input_ids=[[1], [], [2]]),
        "Row 1 .*'input_ids', must be a list of 1 to 8 .* 0",
    ),
    "too long": (rows(input_ids=[[1], [2], [3] * 9]), "Row 2 .*, column 'input_ids', must be .* Got a list of 9"),
    "text as tokens": (rows(input_ids=["a", "b", "c"]), "Row 0 .*, column 'input_ids', must be a list .* Got 'a'"),
    "a list of rows": (
        [{"input_ids": [1], "labels": label} for label in (0, 1, 3)],
        "Row 2 of the train dataset, column 'labels', must be a whole number from 0 to 2",
    ),
}


@mark.parametrize("name", WRONG)
def test_wrong_rows_before_the_first_step(tmp_path, name):
    dataset, sentence = WRONG[name]
    trainer = make_trainer(tmp_path, make_model())
    trainer.train_dataset = dataset
    with raises(ValueError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0


@mark.parametrize("name", WRONG)
def test_wrong_evaluation_rows_before_the_first_step(tmp_path, name):
    """And not after an epoch of training."""
    dataset, sentence = WRONG[name]
    more = {"eval_dataset": {"other": dataset}}
    trainer = make_trainer(tmp_path, make_model(), more=more, eval_strategy="epoch")
    with raises(ValueError, match=sentence.replace("train dataset", r"eval \(other\) dataset")):
        trainer.train()
    assert trainer.state.global_step == 0
    with raises(ValueError, match=sentence.replace("train dataset", "eval dataset")):
        trainer.evaluate(dataset)


def test_predictions_need_no_labels(tmp_path):
    trainer = make_trainer(tmp_path, make_model())
    unlabelled = rows(label=None, input_ids=[[1, 2], [3, 3], [4, 5]])
    assert trainer.predict(unlabelled).predictions.shape == (3, 3)
    with raises(ValueError, match="Row 1 of the test dataset, column 'label'.* Got -1.*leave the column out"):
        trainer.predict(rows(label=[0, -1, 1]))


@mark.parametrize(
    "label", [[0, 2, 1], np.array([0, 2, 1], dtype=np.uint8), np.array([0, 2, 1], dtype=np.int32)], ids=repr
)
def test_right_rows(label):
    check_dataset(rows(label=label), "train", **LIMITS)
    check_dataset(rows(label=label).with_format("torch"), "train", **LIMITS)


def test_rows_that_are_not_selected_may_be_as_they_like():
    dataset = rows(label=[7, 1, 8])
    check_dataset(dataset.select([1]), "train", **LIMITS)
    with raises(ValueError, match=r"Row 1 of the train dataset.* Got 8"):  # of the selection
        check_dataset(dataset.select([1, 2, 0]), "train", **LIMITS)


def test_classes_by_name():
    features = Features({"input_ids": List(Value("int32")), "labels": ClassLabel(names=["a", "b", "c"])})
    dataset = Dataset.from_dict({"input_ids": [[1], [2]], "labels": [1, -1]}, features=features)
    with raises(ValueError, match="Row 1 of the train dataset, column 'labels'"):
        check_dataset(dataset, "train", **LIMITS)


def own_collator(features):
    """Makes tokens and labels out of what the model does not know."""
    names = ["bad", "good", "so so"]
    return {
        "input_ids": torch.tensor([[len(row["text"]), 1] for row in features]),
        "labels": torch.tensor([names.index(row["label"]) for row in features]),
    }


def test_a_collator_of_ones_own_may_make_the_labels(tmp_path):
    dataset = Dataset.from_dict({"text": ["a", "bb"], "label": ["good", "bad"]})
    more = {"data_collator": own_collator}
    trainer = make_trainer(tmp_path, make_model(), more=more, remove_unused_columns=False, max_steps=1)
    trainer.train_dataset = dataset
    trainer.train()
    trainer.train_dataset = Dataset.from_dict({"text": ["a", "bb"], "label": ["good", "worse"]})
    with raises(ValueError, match="Row 0 of a batch of the train dataset, column 'label'.* Got 'good'"):
        trainer.train()


def test_a_transform_may_make_the_columns(tmp_path):
    dataset = Dataset.from_dict({"text": ["a", "bb"], "label": ["good", "bad"]})
    dataset.set_transform(
        lambda batch: {"input_ids": [[len(text), 1] for text in batch["text"]], "labels": [1] * len(batch["text"])}
    )
    trainer = make_trainer(tmp_path, make_model(), remove_unused_columns=False, max_steps=1)
    trainer.train_dataset = dataset
    trainer.train()


class OneWrongLabel(torch.utils.data.Dataset):
    def __init__(self, label):
        self.rows = Rows()
        self.label = label

    def __getitem__(self, row):
        return self.rows[row] | ({"labels": self.label} if row == 5 else {})

    def __len__(self):
        return len(self.rows)


@mark.parametrize("label", [3, -100, None, "good", 0.5, torch.tensor(3), np.float32(1.5)], ids=repr)
def test_any_other_dataset_is_checked_batch_by_batch(tmp_path, label):
    trainer = make_trainer(tmp_path, make_model(), train_sampling_strategy="sequential")
    trainer.train_dataset = OneWrongLabel(label)
    with raises(ValueError, match="Row 5 of a batch of the train dataset, column 'labels', must be a whole number"):
        trainer.train()


def test_a_stream_is_checked_batch_by_batch(tmp_path):
    def generate():
        for row in range(8):
            yield {"input_ids": [1, 2], "labels": 9 if row == 6 else 0}

    trainer = make_trainer(tmp_path, make_model())
    trainer.train_dataset = IterableDataset.from_generator(generate)
    with raises(ValueError, match="Row 6 of a batch of the train dataset, column 'labels'.* Got 9"):
        trainer.train()


@mark.skipif(IS_OLD_TRANSFORMERS, reason="its own TypeError comes first")
def test_a_stream_without_rows(tmp_path):
    def generate():
        yield from ()

    # Where one process reads for all, as by default, accelerate itself says that there is no data.
    own_reading = {"accelerator_config": {"dispatch_batches": False}}
    trainer = make_trainer(tmp_path, make_model(), **own_reading)
    trainer.train_dataset = IterableDataset.from_generator(generate)
    with raises(ValueError, match="The train dataset gave no rows"):
        trainer.train()
    with raises(ValueError, match="Evaluation: the dataset gave no rows"):
        trainer.evaluate(trainer.train_dataset)


@fixture(scope="module")
def million():
    columns = {
        "input_ids": pa.FixedSizeListArray.from_arrays(np.ones(2_000_000, dtype=np.int32), 2),
        "label": np.arange(1_000_000) % 3,
        "text": pa.array(np.full(1_000_000, "good")),
    }
    return Dataset(pa.table(columns))


def test_a_million_rows_take_no_time(million):
    shuffled = million.shuffle(seed=0)
    for dataset in (million, shuffled):
        started = time.process_time()
        check_dataset(dataset, "train", **LIMITS)
        assert time.process_time() - started < 1


def test_a_column_is_read_quickly(million):
    started = time.process_time()
    assert sum(len(text) for text in column_values(million, "text")) == 4_000_000
    assert time.process_time() - started < 3
