"""The demo's sentences: what their labels say is worked out again here, from the words alone."""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

from pytest import fixture, mark, raises
from transformers import AutoTokenizer, BertModel

from gaml_hf import GamlBertConfig


DEMO = Path(__file__).resolve().parents[1] / "hub_models" / "gaml-bert-demo"
SIZES = {"train": [300, 60, 60, 80], "validation": [20] * 4, "test": [40] * 4}


def load(name):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo, make_data = load("demo"), load("make_data")


@fixture(scope="module")
def data(tmp_path_factory):
    """The folder that `demo.py` would have made, smaller."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    sizes = [word for split, numbers in SIZES.items() for word in (f"--{split}", *map(str, numbers))]
    make_data.main(["--output", str(folder), *sizes])
    return folder


@fixture(scope="module")
def full():
    """The rows of the demo itself, of its default sizes and seed."""
    return make_data.make_rows(make_data.SEED, make_data.SIZES)


def read(folder, split):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lexicon(rows):
    """What each adjective means, learned from the plain sentences alone."""
    meaning = {}
    for row in rows:
        if row["grade"] == 1:
            assert meaning.setdefault(row["sentence"].split()[-1], row["label"]) == row["label"]
    return meaning


def verdict(sentence, meaning):
    """
    The label, by rules on words: the last adjective of the clause that decides, and an even or odd number of turns.

    What is said to have been said, said "that": each reporter turns it over if nearly nobody reports, or if they deny.
    """
    *reports, clause = sentence.split(" that ")
    turns = 0
    for report in reports:
        turns += bool({"few", "no"} & set(report.split()))
        turns += report.split()[-1] in {"denied", "doubted", "disputed"}
    if " but " in clause:
        clause = clause.split(" but ")[1]
    elif "although" in clause:
        before, after = clause.split("although ")
        # "although A , B" or "B although A", where an opener may stand before "although" as well
        clause = before if " was " in before else after.split(" , ")[1]
    predicate = clause.split(" was ")[1].split()  # an aside stands before "was"
    turns += predicate[0] in {"not", "never", "hardly"}
    positive = meaning[predicate[-1]] == "positive"
    return "positive" if positive ^ (turns % 2 == 1) else "negative"


MEANING = {"delicious": "positive", "polite": "positive", "bland": "negative", "rude": "negative"}


@mark.parametrize(
    ("sentence", "label"),
    [
        ("the soup was delicious", "positive"),
        ("the soup , not the bread , was never bland", "positive"),
        ("the soup , not the bread , was delicious", "positive"),
        ("although the soup was not bland , the waiter was rude", "negative"),
        ("today the soup was delicious although the waiter was rude", "positive"),
        ("the soup was delicious but the waiter was not polite", "negative"),
        ("no guests said that the soup was delicious", "negative"),
        ("no guests who praised the soup denied that the waiter was not polite", "negative"),
        ("few guests denied that all friends doubted that the soup was bland", "positive"),
    ],
)
def test_the_yardstick_of_these_tests_by_hand(sentence, label):
    assert verdict(sentence, MEANING) == label


def test_labels_are_what_the_sentences_say(full):
    rows = [row for split in full.values() for row in split]
    meaning = lexicon(rows)
    assert MEANING.items() <= meaning.items()
    wrong = [row for row in rows if verdict(row["sentence"], meaning) != row["label"]]
    assert wrong == []


def test_no_sentence_twice_and_labels_balanced(full):
    sentences = [row["sentence"] for split in full.values() for row in split]
    assert len(set(sentences)) == len(sentences)
    for split, rows in full.items():
        for grade, number in zip((1, 2, 3, 4), make_data.SIZES[split], strict=True):
            labels = [row["label"] for row in rows if row["grade"] == grade]
            assert (len(labels), labels.count("positive")) == (number, number // 2)


def test_only_the_adjective_hints_at_the_label(full):
    """Else an early exit could be right without reading. The bound is 5 standard deviations of a fair coin."""
    rows = [row for split in full.values() for row in split]
    adjectives = lexicon(rows)
    with_word = {}
    for row in rows:
        for word in {*row["sentence"].split()} - adjectives.keys():
            with_word.setdefault(word, []).append(row["label"] == "positive")
    assert len(with_word) > 100
    for word, positives in with_word.items():
        assert abs(sum(positives) - len(positives) / 2) < 5 * (len(positives) / 4) ** 0.5, word


def test_the_demo_shows_new_sentences_of_known_words(full):
    words = {word for split in full.values() for row in split for word in row["sentence"].split()}
    shown = {row["sentence"] for row in full["train"]} & set(demo.SENTENCES)
    assert shown == set()
    assert {word for sentence in demo.SENTENCES for word in sentence.split()} <= words


def test_one_seed_one_set_of_files(data, tmp_path):
    rows = make_data.make_rows(0, SIZES)
    assert rows == make_data.make_rows(0, SIZES)
    assert rows != make_data.make_rows(1, SIZES)
    for split in SIZES:
        assert read(data, split) == [{key: str(value) for key, value in row.items()} for row in rows[split]]
    sentences = [row["sentence"] for split in rows.values() for row in split]
    make_data.make_backbone(sentences, 0, tmp_path / "again")
    make_data.make_backbone(sentences, 1, tmp_path / "other")
    files = ("model.safetensors", "config.json", "tokenizer.json")
    again, other = ([(tmp_path / run / name).read_bytes() for name in files] for run in ("again", "other"))
    first = [(data / "backbone" / name).read_bytes() for name in files]
    assert first == again
    assert first[0] != other[0]
    assert first[1:] == other[1:]


def test_too_many_sentences(monkeypatch):
    monkeypatch.setattr(make_data.Grammar, "sentence", lambda self, grade, positive: f"the soup was bland {positive}")
    with raises(ValueError, match="Grade 2 has no 2 different sentences left for `test`; ask for fewer"):
        make_data.make_rows(0, {"test": [2, 2, 0, 0]})


def test_every_word_is_a_token(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "backbone")
    for split in SIZES:
        for row in read(data, split):
            ids = tokenizer(row["sentence"])["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *row["sentence"].split(), "[SEP]"]
            assert len(ids) <= tokenizer.model_max_length


def test_backbone_is_a_bert_like_any_other(data):
    recipe = json.loads((DEMO / "recipe.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(data / "backbone")
    model, info = BertModel.from_pretrained(data / "backbone", add_pooling_layer=False, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    known = {field.name for field in dataclasses.fields(GamlBertConfig)}
    config = GamlBertConfig.from_pretrained(data / "backbone", **{k: v for k, v in recipe.items() if k in known})
    assert config.num_exits >= 6
    assert config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert (config.ga_mode, config.distillation) == ("soft", "mutual")  # GAML-BERT, and no lesser method


def grade_table(layers, wrong=0):
    """`demo.show_grades` on one sentence per grade that leaves at these layers, `wrong` of them with a wrong label."""
    rows = [{"sentence": f"s{grade}", "label": "positive", "grade": str(grade)} for grade in (1, 2, 3, 4)]

    def classify(sentences, **_):
        labels = ["negative"] * wrong + ["positive"] * (4 - wrong)
        return [{"label": label, "exit_layer": layer} for label, layer in zip(labels, layers, strict=True)]

    return demo.show_grades(classify, rows)


def test_the_demo_tells_when_depth_does_not_rise(capsys):
    assert grade_table([1, 2, 3, 5]) == []
    assert "4 nesting" in capsys.readouterr().out
    assert grade_table([1, 2, 2, 5]) == ["The mean exit layer must rise with the grade. Got 1.00, 2.00, 2.00, 5.00."]
    assert grade_table([1, 2, 3, 5], wrong=1) == ["The last exit must be right for 90% of the sentences. Got 75.0%."]
