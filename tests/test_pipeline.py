"""The pipeline: the stock one's answers and shapes, exits of direct model calls, and a clear error for bad input."""

import itertools
import multiprocessing
import pickle
import random
import re

import numpy as np
import torch
from datasets import Dataset as HubDataset
from pytest import approx, fixture, mark, param, raises
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertJapaneseTokenizer,
    BertTokenizer,
    TextClassificationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset, KeyPairDataset
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from conftest import sharpen
from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline
from gaml_hf.models import pipeline_gaml
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience


WORDS = """
film movie story plot actor scene good great bad awful dull funny sad fine very too so not never
""".split()
rng = random.Random(0)
TEXTS = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(16)]
PAIR = {"text": "a good film", "text_pair": "the story is dull"}

EXITS = [
    param({}, FullDepth(), id="config"),
    param({"patience": 1}, Patience(1), id="patience"),
    param({"exit_strategy": "entropy", "exit_threshold": 0.3}, Entropy(0.3), id="entropy"),
    param({"exit_strategy": "max_prob", "exit_threshold": 0.8}, MaxProb(0.8), id="max_prob"),
    param({"budgeted_exit": 2}, Budgeted(2), id="budgeted"),
    param({"exit_policy": Entropy(0.2)}, Entropy(0.2), id="policy"),
]


@fixture
def model(bert_kwargs) -> GamlBertForSequenceClassification:
    """Weights large enough that texts differ in class and in exit."""
    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, **PAPER_LETTER, num_labels=3)).eval()
    sharpen(model)
    return model


@fixture
def classifier(model, tokenizer) -> GamlTextClassificationPipeline:
    return GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")


def exit_layers(classifier, **arguments):
    return exits(classifier(TEXTS, batch_size=16, **arguments))


def exits(answers):
    return [answer["exit_layer"] for answer in answers]


def scores(answers):
    return approx([answer["score"] for answer in answers], abs=1e-5)


def without_exits(answers):
    """What the stock pipeline would have answered, in the same shape."""
    if isinstance(answers, list):
        return [without_exits(answer) for answer in answers]
    return {"label": answers["label"], "score": approx(answers["score"], abs=1e-6)}


# What it answers


@mark.parametrize(("arguments", "policy"), EXITS)
def test_each_answer_is_the_models(classifier, arguments, policy):
    for text, answer in zip(TEXTS, classifier(TEXTS, **arguments), strict=True):
        with torch.no_grad():
            outputs = classifier.model(**classifier.tokenizer(text, return_tensors="pt"), exit_policy=policy)
        score, label = outputs.logits[0].softmax(-1).max(-1)
        assert answer == {
            "label": f"LABEL_{int(label)}",
            "score": approx(float(score), abs=1e-6),
            "exit_layer": int(outputs.exit_layer),
            "truncated": False,
        }
        assert type(answer["exit_layer"]) is int


def test_the_test_model_leaves_at_several_exits(classifier):
    assert len(set(exit_layers(classifier, exit_strategy="entropy", exit_threshold=0.3))) > 1
    assert len(set(exit_layers(classifier, patience=1))) > 1


@mark.parametrize(("arguments", "policy"), EXITS)
@mark.parametrize("batch_size", [3, 16])
def test_a_batch_answers_as_one_by_one(classifier, arguments, policy, batch_size):
    alone = [classifier(text, **arguments)[0] for text in TEXTS]
    batched = classifier(TEXTS, batch_size=batch_size, **arguments)
    assert exits(batched) == exits(alone)
    assert [answer["label"] for answer in batched] == [answer["label"] for answer in alone]
    assert [answer["score"] for answer in batched] == scores(alone)
    others = classifier(TEXTS[::-1], batch_size=batch_size, **arguments)[::-1]  # other neighbours
    assert exits(others) == exits(alone)
    assert [answer["score"] for answer in others] == scores(alone)


@mark.parametrize(
    "arguments",
    [
        {},
        {"top_k": None},
        {"top_k": 1},
        {"top_k": 2},
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "NONE"},
        {"function_to_apply": "softmax", "top_k": 9},
        {"batch_size": 2},
        {"truncation": True, "max_length": 5},
        {"padding": True},
        {"padding": "max_length", "max_length": 20, "truncation": "longest_first"},
    ],
    ids=str,
)
def test_labels_scores_and_shapes_are_the_stock_pipelines(classifier, arguments):
    stock = TextClassificationPipeline(model=classifier.model, tokenizer=classifier.tokenizer, device="cpu")
    for inputs in (TEXTS[0], TEXTS[:1], TEXTS[:2], PAIR, [PAIR, {"text": "fine"}], [PAIR, "fine"]):
        assert without_exits(classifier(inputs, **arguments)) == stock(inputs, **arguments)


@mark.parametrize("arguments", [{"top_k": None}, {"top_k": 1}, {"function_to_apply": "sigmoid"}, {"max_length": 6}])
def test_arguments_at_construction_are_the_stock_pipelines(model, tokenizer, arguments):
    parts = {"model": model, "tokenizer": tokenizer, "device": "cpu", "truncation": True}
    ours, stock = (
        GamlTextClassificationPipeline(**parts, **arguments),
        TextClassificationPipeline(**parts, **arguments),
    )
    for inputs in (TEXTS[0], TEXTS[:2], PAIR):
        assert without_exits(ours(inputs)) == stock(inputs)


def test_function_to_apply_default_is_softmax(model, tokenizer):
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, function_to_apply="none")
    total = sum(answer["score"] for answer in classifier(TEXTS[0], function_to_apply="default", top_k=None))
    assert total == approx(1, abs=1e-6)
    assert sum(answer["score"] for answer in classifier(TEXTS[0], top_k=None)) != approx(1, abs=1e-2)


def test_half_precision_answers_are_finite_floats(model, tokenizer):
    parts = {"tokenizer": tokenizer, "budgeted_exit": 1, "batch_size": 8}
    full = GamlTextClassificationPipeline(model=model, **parts)(TEXTS)
    half = GamlTextClassificationPipeline(model=model.to(torch.bfloat16), **parts)(TEXTS)
    assert all(type(answer["score"]) is float for answer in half)
    assert [answer["score"] for answer in half] == approx([answer["score"] for answer in full], abs=0.1)


# How rows may come


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TEXTS[:5])


class SizedStream(Stream):
    def __len__(self):
        return 5


@mark.parametrize(
    "rows",
    [
        param(lambda: tuple(TEXTS[:5]), id="tuple"),
        param(lambda: np.array(TEXTS[:5]), id="array"),
        param(lambda: np.array(TEXTS[:5], dtype=object), id="array of objects"),
        param(lambda: HubDataset.from_dict({"text": TEXTS[:5]})["text"], id="column"),
        param(lambda: HubDataset.from_dict({"text": TEXTS[:5]}).to_pandas()["text"], id="series"),
    ],
)
def test_what_holds_texts_is_read_like_a_list(classifier, rows):
    assert classifier(rows(), batch_size=2) == classifier(TEXTS[:5], batch_size=2)


@mark.parametrize(
    "rows",
    [
        param(lambda: KeyDataset(HubDataset.from_dict({"text": TEXTS[:5]}), "text"), id="KeyDataset"),
        param(lambda: (text for text in TEXTS[:5]), id="generator"),
        param(lambda: iter(TEXTS[:5]), id="iterator"),
        param(lambda: map(str, TEXTS[:5]), id="map"),
        param(Stream, id="IterableDataset"),
        param(SizedStream, id="IterableDataset that knows its length"),
        param(lambda: HubDataset.from_dict({"text": TEXTS[:5]}).to_iterable_dataset(), id="stream of dicts"),
    ],
)
@mark.parametrize("batch_size", [1, 2])
def test_what_streams_is_answered_in_order(classifier, rows, batch_size):
    answers = classifier(rows(), batch_size=batch_size, patience=1)
    assert not isinstance(answers, list)
    assert list(answers) == classifier(TEXTS[:5], batch_size=batch_size, patience=1)


def test_pairs_from_a_dataset(classifier):
    rows = [PAIR, {"text": "so sad", "text_pair": "not funny"}]
    dataset = KeyPairDataset(HubDataset.from_list(rows), "text", "text_pair")
    assert list(classifier(dataset)) == classifier(rows)
    assert classifier(rows[0]) != classifier(rows[0]["text"])[0]


def test_an_iterable_dataset_can_be_read_again(classifier):
    answers = classifier(Stream())
    assert list(answers) == list(answers) != []


def test_an_endless_generator_is_read_as_it_is_consumed(classifier):
    seen = []
    texts = (seen.append(text) or text for text in itertools.cycle(TEXTS))
    answers = list(itertools.islice(iter(classifier(texts, batch_size=2)), 4))
    assert answers == classifier(TEXTS[:4], batch_size=2)
    assert len(seen) < 10


@mark.parametrize(
    "rows",
    [[], (), np.array([], dtype=str), KeyDataset([], "text"), (text for text in ())],
    ids=lambda rows: type(rows).__name__,
)
def test_nothing_gives_no_answers(classifier, rows):
    assert list(classifier(rows, batch_size=2)) == []


def test_nothing_with_a_misspelt_argument_is_still_an_error(classifier):
    with raises(ValueError, match="Did you mean `patience`"):
        classifier([], patiense=2)


def test_a_worker(classifier):  # one: torch warns of more workers than the process has processors
    rows = [*TEXTS[:5], None]
    expected = classifier(rows, batch_size=2, on_error="skip", max_length=9)
    assert classifier(rows, batch_size=2, on_error="skip", max_length=9, num_workers=1) == expected


# When rows leave


def test_exit_arguments_at_construction_hold_until_a_call_changes_them(model, tokenizer):
    patient = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, patience=1)
    plain = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)
    patient_exits = exit_layers(plain, exit_policy=Patience(1))
    assert exit_layers(patient) == patient_exits
    assert exit_layers(patient, patience=2) == exit_layers(plain, exit_policy=Patience(2)) != patient_exits
    assert exit_layers(patient, exit_strategy="none") == [4] * len(TEXTS)
    assert exit_layers(patient, budgeted_exit=3) == [3] * len(TEXTS)
    assert exit_layers(patient, patience=None) == patient_exits  # None: not given
    assert exit_layers(patient) == patient_exits  # a call changes that call alone


def test_the_configs_policy_is_the_default_and_its_parameters_can_be_changed_alone(model, tokenizer):
    model.config.exit_strategy, model.config.exit_threshold = "entropy", 0.2
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)
    assert exit_layers(classifier) == exit_layers(classifier, exit_policy=Entropy(0.2))
    changed = exit_layers(classifier, exit_threshold=0.5)
    assert changed == exit_layers(classifier, exit_policy=Entropy(0.5)) != exit_layers(classifier)
    assert (model.config.exit_strategy, model.config.exit_threshold) == ("entropy", 0.2)


def test_a_policy_at_construction_and_strategies_in_a_call(model, tokenizer):
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, exit_policy=Budgeted(1))
    assert exits(classifier(TEXTS[:2])) == [1, 1]
    assert exits(classifier(TEXTS[:2], budgeted_exit=3)) == [3, 3]


EXIT_ERRORS = [
    ({"exit_threshold": 0.3}, '`exit_threshold` is read with `exit_strategy="entropy"` or `exit_strategy="max_prob"`'),
    ({"exit_threshold": 0.3}, "Got `exit_threshold=0.3` with `exit_strategy='none'`"),
    ({"exit_strategy": "entropy"}, "`exit_threshold` must be a number in [0, 1]. Got `exit_threshold=None`"),
    ({"exit_strategy": "entropy", "exit_threshold": 1.5}, "Got `exit_threshold=1.5`"),
    ({"exit_strategy": "entropy", "exit_threshold": float("nan")}, "Got `exit_threshold=nan`"),
    ({"exit_strategy": "entropy", "patience": 2}, '`patience` is read with `exit_strategy="patience"` alone'),
    ({"patience": 2, "budgeted_exit": 2}, "name the strategy you want"),
    ({"exit_strategy": "patience"}, "Got `patience=None`"),
    ({"patience": 0}, "`patience` must be a whole number of at least 1"),
    ({"patience": "3"}, "Got `patience='3'`"),
    ({"budgeted_exit": 5}, "`budgeted_exit` must be one of the exits of this model, [1, 2, 3, 4]"),
    ({"exit_strategy": "fastest"}, "`exit_strategy` must be one of ['budgeted', 'entropy', 'max_prob'"),
    ({"exit_policy": Patience}, "`exit_policy` must be an object such as `Patience(2)`"),
    ({"exit_policy": "patience"}, "Got 'patience' (str)"),
    ({"exit_policy": lambda exit_logits: exit_logits[:, -1, 0] > 0}, "`exit_policy` must be an object such as"),
    ({"exit_strategy": np.array(["entropy", "none"])}, "Got `exit_strategy=array(['entro"),
    ({"exit_strategy": [], "patience": 2}, "`exit_strategy` must be one of ['budgeted', 'entropy', 'max_prob'"),
    ({"patience": -(10**5000)}, "Got `patience=a number too long to show`"),
    ({"budgeted_exit": 10**5000}, "Got `budgeted_exit=a number too long to show`"),
    ({"exit_strategy": "entropy", "exit_threshold": 10**5000}, "Got `exit_threshold=a number too long to show`"),
    ({"exit_policy": Patience(1), "patience": 2}, "`exit_policy` takes the place of `patience`"),
]


@mark.parametrize(("arguments", "sentence"), EXIT_ERRORS)
def test_exit_argument_errors(classifier, arguments, sentence):
    with raises(ValueError, match=re.escape(sentence)):
        classifier(TEXTS[0], **arguments)
    with raises(ValueError, match=re.escape(sentence)):
        GamlTextClassificationPipeline(model=classifier.model, tokenizer=classifier.tokenizer, **arguments)


def test_a_threshold_does_not_outlive_its_strategy(model, tokenizer):
    """0.2 is a strict threshold on entropy, and on the largest probability none at all."""
    arguments = {"exit_strategy": "entropy", "exit_threshold": 0.2}
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, **arguments)
    with raises(ValueError, match="Got `exit_threshold=None`"):
        classifier(TEXTS[0], exit_strategy="max_prob")
    assert exit_layers(classifier, exit_strategy="entropy") == exit_layers(classifier)


# Arguments

ARGUMENT_ERRORS = [
    ({"treshold": 0.5}, "`treshold` is not an argument of this pipeline. Did you mean `exit_threshold`?"),
    ({"topk": 2}, "Did you mean `top_k`?"),
    ({"return_tensors": "np"}, "The arguments are exit_policy, exit_strategy"),
    ({"add_special_tokens": False}, "`add_special_tokens` is not an argument"),
    ({"top_k": 0}, "`top_k` must be a whole number of at least 1, or None for all labels. Got `top_k=0`"),
    ({"top_k": -1}, "Got `top_k=-1`"),
    ({"top_k": True}, "Got `top_k=True`"),
    ({"top_k": "2"}, "Got `top_k='2'`"),
    ({"function_to_apply": "foo"}, "`function_to_apply` must be one of 'default', 'softmax', 'sigmoid', 'none'"),
    ({"function_to_apply": 3}, "Got `function_to_apply=3`"),
    ({"on_error": "ignore"}, "`on_error` must be one of 'raise', 'skip'. Got `on_error='ignore'`"),
    ({"truncation": "first"}, "`truncation` must be one of True, False, 'longest_first'"),
    ({"truncation": 1}, "Got `truncation=1`"),
    ({"padding": "left"}, "`padding` must be one of"),
    ({"split_special_tokens": "no"}, "`split_special_tokens` must be one of True, False"),
    ({"max_length": 4}, "`max_length` must be a whole number between 5 and 64"),
    ({"max_length": 65}, "this model can read (`config.max_input_length`). Got `max_length=65`"),
    ({"max_length": 9.0}, "Got `max_length=9.0`"),
    ({"top_k": ""}, "Got `top_k=''`"),
    ({"top_k": 2.0}, "Got `top_k=2.0`"),
    ({"top_k": -(10**5000)}, "Got `top_k=a number too long to show`"),  # of which Python makes no string
    ({"max_length": 10**5000}, "Got `max_length=a number too long to show`"),
    ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1. Got `batch_size=0`"),
    ({"batch_size": "2"}, "Got `batch_size='2'`"),
    ({"batch_size": 2.5}, "Got `batch_size=2.5`"),
    ({"batch_size": True}, "Got `batch_size=True`"),
    ({"num_workers": -1}, "`num_workers` must be a whole number of at least 0. Got `num_workers=-1`"),
    ({"num_workers": "1"}, "Got `num_workers='1'`"),
]


@mark.parametrize(("arguments", "sentence"), ARGUMENT_ERRORS)
def test_argument_errors(classifier, arguments, sentence):
    """Never put down to a row: `on_error="skip"` changes nothing."""
    with raises(ValueError, match=re.escape(sentence)):
        classifier(TEXTS[0], **{"on_error": "skip"} | arguments)
    with raises(ValueError, match=re.escape(sentence)):
        GamlTextClassificationPipeline(model=classifier.model, tokenizer=classifier.tokenizer, **arguments)


def test_a_tokenizer_without_its_files(model):
    assert BertTokenizer()("film movie")["input_ids"] == [2, 1, 1, 3]  # [UNK] for every word
    with raises(ValueError, match=r"the model knows 63 tokens \(`vocab_size`\). Got one with 5"):
        GamlTextClassificationPipeline(model=model, tokenizer=BertTokenizer())
    with raises(ValueError, match="`tokenizer` must be the tokenizer of the model. Got None"):
        GamlTextClassificationPipeline(model=model)


def test_a_tokenizer_with_more_tokens_than_the_model(model, tokenizer):
    tokenizer.add_tokens(["zzz"])
    with raises(ValueError, match=r"the model knows 63 tokens \(`vocab_size`\). Got one with 64"):
        GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)


def test_a_tokenizer_that_learns_a_token_later(classifier):
    """The model's own check would cost the batch, naming a row of the batch, and on a GPU the process."""
    classifier.tokenizer.add_tokens(["zzz"])
    with raises(
        ValueError, match=r"`inputs\[1\]`: the tokenizer made `input_ids` up to 63, and the model knows 0 to 62"
    ):
        classifier(["good", "a zzz film", "fine"])
    answers = classifier(["good", "a zzz film", "fine"], on_error="skip", batch_size=3)
    assert "Is it the tokenizer that the model was trained with?" in answers[1]["error"]
    assert [answers[0]["score"], answers[2]["score"]] == scores(classifier(["good", "fine"]))


def test_pairs_for_a_model_with_one_segment(bert_kwargs, tokenizer):
    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, type_vocab_size=1)).eval()
    answers = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)([PAIR, "fine"], on_error="skip")
    assert "made `token_type_ids` up to 1, and the model knows 0 to 0. " in answers[0]["error"]
    assert answers[1]["label"] is not None


def test_a_tokenizer_that_allows_no_text(model, tokenizer):
    tokenizer.model_max_length = 4
    with raises(ValueError, match="must allow at least 5 tokens.*Got `model_max_length=4`"):
        GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)


def test_a_tokenizer_that_pads_on_the_left(model, tokenizer):
    tokenizer.padding_side = "left"
    with raises(ValueError, match="must pad on the right .* Got `padding_side='left'`"):
        GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)


def test_a_model_without_exits(bert_kwargs, tokenizer):
    model = BertForSequenceClassification(BertConfig(**bert_kwargs))
    with raises(ValueError, match="`model` must be one with exits.* Got a BertForSequenceClassification"):
        GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)


class Unregistered(GamlBertForSequenceClassification):
    """As the model's own class is where a checkpoint's code is imported by hand."""


def test_a_model_that_upstream_does_not_know_is_no_error(bert_kwargs, tokenizer):
    parts = {"model": Unregistered(GamlBertConfig(**bert_kwargs)), "tokenizer": tokenizer}
    for pipeline_class, said in (
        (TextClassificationPipeline, "The model 'Unregistered' is not supported"),
        (GamlTextClassificationPipeline, ""),
    ):
        with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
            pipeline_class(**parts)
        assert log.out.startswith(said)
        assert bool(log.out) == bool(said)


def test_a_config_that_asks_for_tuples(classifier):
    expected = classifier(TEXTS[0])
    classifier.model.config.return_dict = False
    assert isinstance(classifier.model(torch.tensor([[2, 9, 3]])), tuple)
    assert classifier(TEXTS[0]) == expected


def test_a_model_in_training_mode(classifier):
    classifier.model.train()
    with raises(ValueError, match="training mode"):
        classifier(TEXTS[0], on_error="skip")


# Bad rows

BAD_ROWS = [
    ("", ValueError, "`text` must hold more than blanks. Got '' (str)"),
    (" \t\n", ValueError, r"Got ' \t\n' (str)"),
    ("\u200b\x00", ValueError, "`text` must hold something the tokenizer can read. Got '\\u200b\\x00'"),
    ({"text": "good", "text_pair": "\u200b"}, ValueError, "`text_pair` must hold something the tokenizer can read"),
    ({"text_pair": "good", "text": "\u200b"}, ValueError, "`text` must hold something the tokenizer can read"),
    ("good \ud800", ValueError, r"`text` must be valid Unicode. Got the lone surrogate '\ud800' at character 5"),
    (None, TypeError, 'a row must be a `str` or a dict {"text": ..., "text_pair": ...}. Got None (NoneType)'),
    (float("nan"), TypeError, "Got nan (float)"),
    (7, TypeError, "Got 7 (int)"),
    (b"good", TypeError, "Got b'good' (bytes)"),
    (("good", "bad"), TypeError, "Got ('good', 'bad') (tuple)"),
    (["good", "bad"], TypeError, "Got ['good', 'bad'] (list)"),
    (np.array(["good"]), TypeError, "(ndarray)"),
    ({"text": 10**5000}, TypeError, "`text` must be a `str`. Got a number too long to show (int)"),
    ({"role": "user", "content": "good"}, ValueError, "Got the keys ['role', 'content']"),  # upstream: a chat
    ([{"role": "user", "content": "good"}], TypeError, "(list)"),
    ({"x" * 1_000_000: "good"}, ValueError, "Got the keys ['xxxxxxxxxxxx...xxxxxxxxxxxxx']"),
    (
        {"sentence": "good"},
        ValueError,
        "must have the key `text` and, for a pair, `text_pair`. Got the keys ['sentence']",
    ),
    ({"text": "good", "text2": "bad"}, ValueError, "Got the keys ['text', 'text2']"),
    ({}, ValueError, "Got the keys []"),
    ({"text": None}, TypeError, "`text` must be a `str`. Got None (NoneType)"),
    ({"text": "good", "text_pair": None}, TypeError, "`text_pair` must be a `str`. Got None (NoneType)"),
    ({"text": "good", "text_pair": " "}, ValueError, "`text_pair` must hold more than blanks"),
    ({"text": ["good"]}, TypeError, "`text` must be a `str`. Got ['good'] (list)"),
]


@mark.parametrize(("row", "error_class", "sentence"), BAD_ROWS)
def test_a_bad_row_is_named(classifier, row, error_class, sentence):
    rows = ["good", "bad", row, "fine"]
    for inputs in (rows, (text for text in rows)):
        with raises(error_class) as error:
            list(classifier(inputs, batch_size=2))
        assert str(error.value).startswith("`inputs[2]`: ")
        assert sentence in str(error.value)


@mark.parametrize(("row", "error_class", "sentence"), BAD_ROWS)
def test_a_skipped_row_costs_no_other(classifier, row, error_class, sentence):
    rows = [row, *TEXTS[:2], row, row, PAIR, row]
    good = classifier([*TEXTS[:2], PAIR], patience=1)
    for inputs, batch_size in ((rows, 1), (rows, 3), ((text for text in rows), 8)):
        answers = list(classifier(inputs, batch_size=batch_size, on_error="skip", patience=1))
        bad = [answers.pop(number) for number in (6, 4, 3, 0)]
        for number, answer in zip((6, 4, 3, 0), bad, strict=True):
            error = answer.pop("error")
            assert error.startswith(f"`inputs[{number}]`: ")
            assert sentence in error
            assert answer == {"label": None, "score": None, "exit_layer": None, "truncated": None}
        assert exits(answers) == exits(good)
        assert [answer["score"] for answer in answers] == scores(good)


@mark.parametrize(
    ("columns", "good", "bad", "sentence"),
    [
        (["review"], "good", PAIR, "of single texts, with no `text_pair` (review). Got 2 of 1 texts."),
        (["one", "two"], PAIR, "good", 'of pairs, {"text": ..., "text_pair": ...} (one and two). Got 1 of 2 texts.'),
    ],
    ids=["texts", "pairs"],
)
def test_a_row_has_as_many_texts_as_in_the_training(classifier, columns, good, bad, sentence):
    classifier.model.config.text_columns = columns
    expected = classifier(good)
    with raises(ValueError, match=f"`inputs.1.`: a row must be as in the training, {re.escape(sentence)}"):
        classifier([good, bad])
    answers = classifier([good, bad], on_error="skip")
    assert sentence in answers[1]["error"]
    assert exits(answers[:1]) == exits(expected if isinstance(expected, list) else [expected])
    classifier.model.config.text_columns = None  # not told: both
    assert len(classifier([good, bad])) == 2


def test_a_skipped_row_keeps_the_shape_of_the_answers(classifier):
    assert classifier("", on_error="skip")[0]["label"] is None
    assert classifier({"text": ""}, on_error="skip")["error"].startswith("`inputs`: `text` must hold more than blanks")
    for batch_size in (1, 2):
        answers = classifier(["", "good"], on_error="skip", top_k=2, batch_size=batch_size)
        assert [len(answer) for answer in answers] == [1, 2]
        assert answers[0][0]["error"].startswith("`inputs[0]`: ")


def test_messages_of_a_chat_are_rows_like_any_other(classifier):
    """The stock pipeline makes one chat of them, and one answer or none."""
    message = {"role": "user", "content": "good"}
    rows = [message, "good", [message]]
    sources = (rows, (row for row in rows), KeyDataset([{"row": row} for row in rows], "row"))
    for inputs in sources:
        answers = list(classifier(inputs, on_error="skip"))
        assert ["error" in answer for answer in answers] == [True, False, True]


@mark.parametrize(
    "inputs",
    [
        None,
        7,
        b"good",
        bytearray(b"good"),
        memoryview(b"good"),
        {"good", "bad"},
        HubDataset.from_dict({"text": ["good"]}),
    ],
    ids=type,
)
@mark.parametrize("on_error", ["raise", "skip"])
def test_inputs_that_are_no_rows(classifier, inputs, on_error):
    with raises(TypeError) as error:
        classifier(inputs, on_error=on_error)
    assert "`inputs` must be a `str`, a dict, a list" in str(error.value)
    assert type(inputs).__name__ in str(error.value)


def test_logits_that_are_not_finite(classifier):
    """Only rows with the word "awful" meet the broken weight."""
    token = classifier.tokenizer.convert_tokens_to_ids("awful")
    expected = classifier(["good", "fine"])
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            classifier.model.bert.embeddings.word_embeddings.weight[token, 0] = broken
        with raises(ValueError, match=r"`inputs\[1\]`: the model answered with NaN or infinite logits"):
            classifier(["good", "awful film", "fine"])
        for batch_size in (1, 3):
            answers = classifier(["good", "awful film", "fine"], on_error="skip", batch_size=batch_size)
            assert "Its weights are broken, or too large for torch.float32" in answers[1]["error"]
            assert answers[1]["score"] is None
            assert [answers[0]["score"], answers[2]["score"]] == scores(expected)


# Long texts and control tokens


def test_truncated_is_told_to_the_token(classifier):
    """62 words and two special tokens are the 64 that the model reads."""
    answers = classifier(["good " * 62, "good " * 63, "bad " * 25_000], batch_size=2)
    assert [answer["truncated"] for answer in answers] == [False, True, True]
    assert answers[1]["score"] == approx(answers[0]["score"], abs=1e-5)
    assert classifier({"text": "good " * 30, "text_pair": "bad " * 31})["truncated"] is False
    assert classifier({"text": "good " * 30, "text_pair": "bad " * 32})["truncated"] is True
    assert classifier("good bad " * 9, max_length=12)[0] == {
        **classifier("good bad " * 5)[0],
        "truncated": True,
    }


def test_a_tokenizer_that_cuts_on_the_left_reads_the_end(model, tokenizer):
    tokenizer.truncation_side = "left"
    text = "the plot is dull . " * 120 + "best scene i saw"
    found = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer).preprocess(text)
    assert found["input_ids"][0].tolist() == tokenizer(text, truncation=True)["input_ids"]
    assert tokenizer.decode(found["input_ids"][0]).endswith("best scene i [UNK] [SEP]")
    assert found["about"]["truncated"]


LENGTHS = [
    (30, 400),
    (400, 30),
    (200, 200),
    (199, 200),
    (200, 199),
    (500, 501),
    (501, 500),
    (64, 900),
    (70, 71),
    (1, 900),
]


@mark.parametrize(("max_length", "split"), [(5, True), (6, True), (63, False), (64, True)])
def test_a_long_pair_is_cut_as_the_tokenizer_cuts_it(classifier, tokenizer, max_length, split):
    """Words of one token and of many, and none that ends where the text is cut before."""
    tokenizer.split_special_tokens = split
    words = random.Random(0).choices([*WORDS, "dulls", "goodlyest", "x" * 120, "a.b,c!", "[SEP]", "e\u0301"], k=901)
    for first, second in LENGTHS:
        row = {"text": " ".join(words[:first]), "text_pair": " ".join(words[::-1][:second])}
        encoding = classifier.preprocess(row, max_length=max_length)
        expected = tokenizer(**row, truncation=True, max_length=max_length, return_tensors="pt")
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert encoding[name].equal(expected[name]), (first, second)
        assert encoding["about"]["truncated"]


@mark.parametrize("word", ["good ", "dulls ", "!", "x" * 120 + " ", "y" * 2000 + " ", "e\u0301 ", "[SEP] "])
def test_a_text_is_read_no_further_than_needed(classifier, tokenizer, word, monkeypatch):
    """A tokenizer takes seconds for two million characters, and other requests of a server wait for it."""
    text, read = "fine plot " + word * (10**6 // len(word)), []
    rows = [{"text": text}, {"text": text, "text_pair": "bad " * 10**5}, {"text": "bad", "text_pair": text}]
    # An even number of tokens beside the special ones: none falls to the longer text.
    expected = [
        tokenizer(**{name: part[: 60 * len(word)] for name, part in row.items()}, truncation=True, max_length=21)
        for row in rows
    ]
    stock = type(tokenizer)._encode_plus

    def watched(self, text, *args, **kwargs):
        read.append(len(text))
        return stock(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", watched)
    for row, right in zip(rows, expected, strict=True):
        read.clear()
        encoding = classifier.preprocess(row, max_length=21)
        assert encoding["input_ids"][0].tolist() == right["input_ids"]
        assert encoding["about"]["truncated"]
        assert 0 < max(read) < (10**5 if len(word) < 1000 else 10**6)
    with raises(ValueError, match="the text has more than 21 tokens, and at most 21 are read"):
        classifier(text, max_length=21, truncation=False)


def test_the_memory_of_a_long_pair(classifier):
    """The tokenizer alone would make 10^10 pieces of these, one after the other."""
    row = {"text": "good " * 100_000, "text_pair": "bad " * 100_000}
    assert classifier(row, max_length=5)["truncated"]
    assert classifier([row, "fine"], batch_size=2)[0]["truncated"]


@mark.parametrize(("tokenizer_limit", "limit"), [(10**30, 64), (20, 20)])
def test_the_longest_input_is_the_tokenizers_or_the_models(model, tokenizer, tokenizer_limit, limit):
    whole = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)("good " * 40)[0]
    tokenizer.model_max_length = tokenizer_limit
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)
    answers = classifier(["good " * (limit - 2), "good " * (limit - 1)])
    assert [answer["truncated"] for answer in answers] == [False, True]
    with raises(ValueError, match=f"`inputs`: the text has {limit + 1} tokens, and at most {limit} are read"):
        classifier("good " * (limit - 1), truncation=False)
    # The tokenizer's is a default: a call may read more, up to what the model can.
    assert classifier("good " * 40, max_length=42)[0] == {**whole, "truncated": False}
    with raises(ValueError, match="the text has 42 tokens, and at most 41 are read.*or give `max_length`, up to 64"):
        classifier("good " * 40, truncation=False, max_length=41)
    assert classifier("good " * (limit - 2), truncation="do_not_truncate") == [answers[0]]


def test_a_text_that_cannot_be_cut_as_asked_is_a_bad_row(classifier):
    rows = [{"text": "good", "text_pair": "bad " * 70}, "fine"]
    answers = classifier(rows, truncation="only_first", on_error="skip", batch_size=2)
    assert "the tokenizer cannot encode the text: Truncation error" in answers[0]["error"]
    assert answers[1]["score"] == approx(classifier("fine")[0]["score"], abs=1e-6)


def test_control_tokens_in_a_text_are_what_the_tokenizer_says(classifier):
    text = "good [SEP] [MASK] film [CLS]"
    stock = TextClassificationPipeline(model=classifier.model, tokenizer=classifier.tokenizer, device="cpu")
    assert without_exits(classifier(text)) == stock(text)  # which knows no other setting
    as_text = classifier(text, split_special_tokens=True)
    classifier.tokenizer.split_special_tokens = True
    assert classifier(text) == as_text
    assert without_exits(as_text) == stock(text)
    ids = classifier.preprocess(text)["input_ids"][0].tolist()
    cls, sep, mask = classifier.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[MASK]"])
    assert (ids[0], ids[-1]) == (cls, sep)
    assert {cls, sep, mask}.isdisjoint(ids[1:-1])
    as_control = classifier(text, split_special_tokens=False)
    assert as_control[0]["score"] != approx(as_text[0]["score"], abs=1e-6)
    classifier.tokenizer.split_special_tokens = False
    assert classifier(text) == as_control


def test_special_tokens_of_ones_own_are_read_as_in_training(model, tokenizer):
    """The tokenizer's plain call is what a training saw."""
    tokenizer.add_tokens(["<price>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    row = {"text": "good <price> film", "text_pair": "<price> [SEP]"}
    inputs = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer).preprocess(row)
    assert inputs["input_ids"].equal(tokenizer(**row, return_tensors="pt")["input_ids"])
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<price>")).sum() == 2


@mark.parametrize("token", ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[SEP] [PAD] [PAD]"])
def test_a_control_token_changes_no_mask_and_no_segment(classifier, token):
    """The same tokens as for a word in brackets that the vocabulary does not hold."""
    classifier.tokenizer.split_special_tokens = True
    rows = [f"good {token} film", {"text": f"{token} good", "text_pair": f"dull {token}"}]
    plain = [
        {"text": row} if isinstance(row, str) else row
        for row in (
            rows[0].replace(token, token.lower().replace("]", "q]")),
            {key: text.replace(token, token.lower().replace("]", "q]")) for key, text in rows[1].items()},
        )
    ]
    for row, same in zip(rows, plain, strict=True):
        encoding, expected = classifier.preprocess(row), classifier.preprocess(same)
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert encoding[name].equal(expected[name])
        assert encoding["attention_mask"].all()
    assert classifier(rows, batch_size=2) == classifier(plain, batch_size=2)


@mark.parametrize(
    "text", ["a" * 100_000, "a\u0300" * 50_000, "good\n" * 20_000, "\U0010ffff" * 1000, "\u202e\ufeffgood"]
)
def test_odd_and_huge_texts_have_an_answer(classifier, text):
    (answer,) = classifier(text)
    assert 0 < answer["score"] <= 1
    assert answer["truncated"] == (len(classifier.tokenizer(text, verbose=False)["input_ids"]) > 64)


def test_strings_of_numpy(classifier):
    expected = classifier(["good", "a dull film"])
    assert classifier([np.str_("good"), np.str_("a dull film")]) == expected
    assert classifier(np.str_("good")) == classifier(np.array("good")) == classifier("good")


def test_a_slow_tokenizer_tells_truncation_too(model, tokenizer, tmp_path):
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64)
    assert not slow.is_fast
    texts = ["good " * 62, "good " * 63, "a dull film"]
    answers = GamlTextClassificationPipeline(model=model, tokenizer=slow)(texts)
    assert answers == GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)(texts)


# Sharing and loading


def test_a_worker_does_not_inherit_a_lock_that_a_thread_holds(classifier):
    with pipeline_gaml._tokenizer_lock:
        worker = multiprocessing.get_context("fork").Process(target=classifier.preprocess, args=("good",), daemon=True)
        worker.start()
        worker.join(30)
    assert worker.exitcode == 0


def test_a_pipeline_can_be_pickled(model, tokenizer):
    classifier = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, patience=1, max_length=9)
    copy = pickle.loads(pickle.dumps(classifier))
    assert copy(TEXTS[:4]) == classifier(TEXTS[:4])
    assert copy(TEXTS[:4], budgeted_exit=2) == classifier(TEXTS[:4], budgeted_exit=2)


def test_a_saved_folder_names_this_pipeline(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    loaded = pipeline("text-classification", model=str(tmp_path), trust_remote_code=True, device="cpu", patience=1)
    assert type(loaded).__name__ == "GamlTextClassificationPipeline"
    assert type(loaded) is not GamlTextClassificationPipeline  # the copy in the folder
    answers, expected = loaded(TEXTS, batch_size=3), classifier(TEXTS, batch_size=3, patience=1)
    assert exits(answers) == exits(expected)
    assert [answer["score"] for answer in answers] == scores(expected)
    with raises(ValueError, match="Did you mean `patience`"):
        pipeline("text-classification", model=str(tmp_path), trust_remote_code=True, patiense=1)
