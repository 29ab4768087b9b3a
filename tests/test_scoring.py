"""Many rows: the plain pipeline's answers in the order of the rows, whatever the file, the window and the bad rows."""

import csv
import errno
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, IterableDataset
from pytest import approx, fixture, importorskip, mark, raises
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import gaml_score
from gaml_hf import GamlAutoModelForSequenceClassification, GamlBertForSequenceClassification
from gaml_hf.hub import push_checkpoint
from gaml_hf.runtime import scoring
from gaml_hf.runtime.ort import export_onnx
from gaml_hf.runtime.scoring import ClassifierLoader, score_file, score_rows
from gaml_score import main, make_parser


WORDS = "film movie story plot actor scene good great bad awful dull funny sad fine very too so not never".split()
rng = random.Random(0)
TEXTS = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(23)]
PATIENCE = {"patience": 1}


@fixture
def classifier(load):
    return load()


def one_by_one(classifier, rows, **arguments):
    """What the plain pipeline says of each row alone."""
    answers = [classifier(row, **arguments) for row in rows]
    return [answer[0] if isinstance(answer, list) else answer for answer in answers]


def assert_answers(predictions, answers):
    for number, (prediction, answer) in enumerate(zip(predictions, answers, strict=True)):
        expected = {"row": number, **answer, "score": approx(answer["score"], abs=1e-5), "error": None}
        assert prediction == expected


@mark.parametrize(("batch_size", "window"), [(1, 4096), (4, 7), (8, 1), (32, 23)])
@mark.parametrize("arguments", [PATIENCE, {"exit_strategy": "entropy", "exit_threshold": 0.3}, {"max_length": 8}])
def test_predictions_are_the_pipelines_in_order(classifier, batch_size, window, arguments):
    rows = [{"text": text, "other": 1} for text in TEXTS]
    answers = one_by_one(classifier, TEXTS, **arguments)
    for source in (rows, iter(rows), Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        predictions = list(score_rows(source, classifier, batch_size=batch_size, window=window, **arguments))
        assert_answers(predictions, answers)
    assert len({answer["exit_layer"] for answer in answers}) > 1 or "max_length" in arguments
    assert any(answer["truncated"] for answer in answers) == ("max_length" in arguments)


def test_pairs(classifier):
    rows = [{"a": a, "b": b} for a, b in itertools.pairwise(TEXTS)]
    pairs = [{"text": row["a"], "text_pair": row["b"]} for row in rows]
    predictions = list(score_rows(rows, classifier, text_columns=["a", "b"], window=9))
    assert_answers(predictions, one_by_one(classifier, pairs))


def test_batches_are_of_rows_of_one_length(classifier, monkeypatch):
    """Padding a window in the order it came would cost more tokens than padding it sorted."""
    shapes, forward = [], classifier._forward

    def spy(inputs, **arguments):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(inputs, **arguments)

    monkeypatch.setattr(classifier, "_forward", spy)
    list(score_rows([{"text": text} for text in TEXTS], classifier, batch_size=4))

    lengths = [len(text.split()) + 2 for text in TEXTS]  # with [CLS] and [SEP]

    def cells(lengths):
        return sum(len(part) * max(part) for part in (lengths[i : i + 4] for i in range(0, len(lengths), 4)))

    padded = sum(rows * length for rows, length in shapes)
    # Rows are sorted by characters: near the order by tokens, and not always in it.
    assert sum(lengths) <= cells(sorted(lengths)) <= padded <= 1.1 * cells(sorted(lengths)) < 0.9 * cells(lengths)


def test_an_endless_source_is_read_one_window_ahead(classifier):
    read = 0

    def rows():
        nonlocal read
        for text in itertools.cycle(TEXTS):
            read += 1
            yield {"text": text}

    predictions = score_rows(rows(), classifier, batch_size=4, window=10)
    assert read == 0
    for number in range(35):
        assert next(predictions)["row"] == number
        assert read == 10 * (number // 10 + 1)


BAD = {2: None, 5: "  ", 9: 7, 22: "bad \ud800"}


def with_bad_rows():
    return [{"text": BAD.get(i, text)} for i, text in enumerate(TEXTS)]


def test_a_bad_row_costs_that_row_alone(classifier):
    good = {i: text for i, text in enumerate(TEXTS) if i not in BAD}
    answers = dict(zip(good, one_by_one(classifier, good.values(), **PATIENCE), strict=True))
    predictions = list(score_rows(with_bad_rows(), classifier, batch_size=4, window=8, **PATIENCE))
    for number, prediction in enumerate(predictions):
        assert prediction["row"] == number
        if number in BAD:
            assert prediction["error"].startswith("`text` must ")
            assert {prediction[name] for name in ("label", "score", "exit_layer", "truncated")} == {None}
        else:
            assert prediction["error"] is None
            assert prediction["label"] == answers[number]["label"]
            assert prediction["exit_layer"] == answers[number]["exit_layer"]


def test_what_is_no_row_at_all_costs_itself_alone(classifier):
    rows = ["good", {"text": "good"}, None, {"other": "good"}, 7, ["good"], {"text": "bad"}]
    for window in (1, 3, 10):
        if window == 1:  # else the first window would have no columns to look at
            rows[0] = {"text": "fine"}
        predictions = list(score_rows(rows, classifier, window=window))
        assert [prediction["row"] for prediction in predictions] == list(range(7))
        assert [prediction["label"] is None for prediction in predictions][1:] == [
            False,
            True,
            True,
            True,
            True,
            False,
        ]
        assert predictions[2]["error"] == "a row must be a dict of columns. Got None."
        assert predictions[3]["error"] == "`text` must be a `str`. Got None (NoneType)."
        rows[0] = "good"
    with raises(ValueError, match="^Row 0: a row must be a dict of columns. Got 'good'."):
        list(score_rows(rows, classifier, on_error="raise"))


@mark.parametrize("rows", [None, 5, "good", b"good", {"text": "good"}], ids=repr)
def test_rows_that_are_no_rows(classifier, rows):
    with raises(TypeError, match="`rows` must be a dataset, or an iterable of dicts, one for each row. Got "):
        score_rows(rows, classifier)


@mark.parametrize("text_columns", [None, [], [None], ["a", "b", "c"], "text", 7, {"text"}], ids=repr)
def test_text_columns_that_are_none(classifier, text_columns):
    with raises(ValueError, match="`text_columns` must be a list of one or two columns. Got "):
        score_rows([{"text": "good"}], classifier, text_columns=text_columns)


def test_raise_names_the_row_of_the_file(classifier):
    predictions = score_rows(with_bad_rows()[3:], classifier, window=2, on_error="raise")
    with raises(ValueError, match=r"^Row 2: `text` must hold more than blanks"):
        list(predictions)


def write(path, texts):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerows([["id", "text"], *enumerate(texts)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return [
            {
                "row": int(row["row"]),
                "label": row["label"] or None,
                "score": float(row["score"]) if row["score"] else None,
                "exit_layer": int(row["exit_layer"]) if row["exit_layer"] else None,
                "truncated": {"True": True, "False": False, "": None}[row["truncated"]],
                "error": row["error"] or None,
            }
            for row in csv.DictReader(file)
        ]


@mark.parametrize(
    ("source", "target"), [(".csv", ".jsonl"), (".json", ".csv"), (".jsonl", ".parquet"), (".parquet", ".csv")]
)
def test_files_in_and_out(load, classifier, tmp_path, source, target):
    texts = ["NA", "null", *TEXTS[:5], "", 'a "quoted", comma\nand line']
    path = write(tmp_path / f"in{source}", texts)
    counts = score_file(path, tmp_path / f"out{target}", load, window=4, progress=False, **PATIENCE)
    assert counts == {"rows": 9, "skipped": 1}
    predictions = read(tmp_path / f"out{target}")
    assert "`text` must hold more than blanks" in predictions[7]["error"]
    good = [i for i in range(9) if i != 7]
    answers = one_by_one(classifier, [texts[i] for i in good], **PATIENCE)
    for i, answer in zip(good, answers, strict=True):
        assert predictions[i] == {"row": i, **answer, "score": approx(answer["score"], abs=1e-5), "error": None}


@mark.parametrize("num_proc", [1, 2])
def test_a_text_of_a_csv_file_is_what_stands_there(load, classifier, tmp_path, num_proc):
    """Read as numbers, every title of a year would be a bad row, and "007" another text."""
    texts = ["2012", "007", "1e5", "True", "-", "NA"]
    (tmp_path / "in.csv").write_text("\n".join(["text", *texts]))
    counts = score_file(tmp_path / "in.csv", tmp_path / "out.jsonl", load, progress=False, num_proc=num_proc)
    assert counts == {"rows": 6, "skipped": 0}
    assert_answers(read(tmp_path / "out.jsonl"), one_by_one(classifier, texts))


def test_several_processes_give_the_same_predictions(load, tmp_path, capfd):
    path = write(tmp_path / "in.parquet", [BAD[2] if i == 2 else text for i, text in enumerate(TEXTS)])
    for num_proc in (1, 2):
        counts = score_file(path, tmp_path / f"{num_proc}.jsonl", load, window=5, num_proc=num_proc, progress=False)
        assert counts == {"rows": 23, "skipped": 1}
    one, two = (read(tmp_path / f"{num_proc}.jsonl") for num_proc in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a == b | {"score": None if b["score"] is None else approx(b["score"], abs=1e-5)}
    assert [row["row"] for row in two] == list(range(23))
    assert "Scoring" not in capfd.readouterr().err  # no bar of datasets either


@mark.parametrize("num_proc", [1, 2])
def test_nothing_to_score(load, tmp_path, num_proc):
    dataset = Dataset.from_dict({"text": []})
    counts = score_file(dataset, tmp_path / "out.parquet", load, num_proc=num_proc, progress=False)
    assert counts == {"rows": 0, "skipped": 0}
    assert read(tmp_path / "out.parquet") == []


@mark.parametrize("target", ["out.csv", "out.jsonl", "out.parquet"])
def test_an_interrupted_run_leaves_the_old_file(classifier, tmp_path, monkeypatch, target):
    (tmp_path / target).write_text("old")
    answer, calls = classifier._forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(classifier, "_forward", interrupted)
    with raises(KeyboardInterrupt):
        score_file(
            Dataset.from_dict({"text": TEXTS}),
            tmp_path / target,
            lambda: classifier,
            batch_size=1,
            window=2,
            progress=False,
        )
    assert (tmp_path / target).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", target]


@mark.parametrize("target", ["out.csv", "out.jsonl", "out.parquet"])
def test_the_next_run_takes_away_what_a_killed_one_left(classifier, tmp_path, monkeypatch, target):
    def scored(forward):
        monkeypatch.setattr(classifier, "_forward", forward)
        score_file(Dataset.from_dict({"text": TEXTS}), tmp_path / target, lambda: classifier, progress=False)

    answer = classifier._forward
    killed = multiprocessing.get_context("fork").Process(
        target=scored, args=(lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL),)
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*"))) == 1
    scored(answer)
    assert list(tmp_path.glob(".*")) == []
    assert len(read(tmp_path / target)) == len(TEXTS)


def test_the_bar_moves_within_a_window(classifier, tmp_path, monkeypatch):
    bars, seen, answer = [], [], classifier._forward

    class Bar(scoring.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    def spy(*args, **kwargs):
        seen.append(bars[0].n)
        return answer(*args, **kwargs)

    monkeypatch.setattr(scoring, "tqdm", Bar)
    monkeypatch.setattr(classifier, "_forward", spy)
    rows = Dataset.from_dict({"text": TEXTS})
    score_file(rows, tmp_path / "out.csv", lambda: classifier, batch_size=8)
    assert seen == [0, 8, 16]
    assert (bars[0].n, bars[0].total) == (23, 23)


def command(folder, source, target, *more):
    return main(["--model", str(folder), "--input", str(source), "--output", str(target), "--device", "cpu", *more])


def test_the_command_line_tells_how_many_rows_were_skipped(folder, classifier, tmp_path, capsys):
    source, target = write(tmp_path / "in.csv", [*TEXTS[:3], ""]), tmp_path / "out.jsonl"
    assert command(folder, source, target, "--patience", "1") == 1
    out, err = capsys.readouterr()
    assert out == f"4 rows, 1 of them skipped; predictions in {target}\n"
    assert "4 rows" in err  # the bar
    assert_answers(read(target)[:3], one_by_one(classifier, TEXTS[:3], patience=1))
    assert command(folder, write(tmp_path / "in.csv", TEXTS[:3]), target, "--no_progress") == 0


@mark.parametrize("where", ["folder", "hub", "export"])
def test_the_command_line_reads_the_columns_of_the_training(where, folder, hub_server, tmp_path, capsys):
    plain, model, more = folder, tmp_path / "pairs", []
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"text_columns": ["title", "text"]}))
    rows = [{"text": text, "title": other} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    pd.DataFrame(rows).to_csv(tmp_path / "in.csv", index=False)
    if where == "hub":
        push_checkpoint(model, "me/pairs")
        model = "me/pairs"
    elif where == "export":
        for source in (model, plain):
            export = tmp_path / f"{source.name}-onnx"
            loaded = GamlAutoModelForSequenceClassification.from_pretrained(source)
            export_onnx(loaded, export, tokenizer=AutoTokenizer.from_pretrained(source))
        model, plain, more = tmp_path / "pairs-onnx", export, ["--onnx"]
    assert command(model, tmp_path / "in.csv", tmp_path / "own.jsonl", "--no_progress", *more) == 0
    named = [tmp_path / "in.csv", tmp_path / "named.jsonl", "--no_progress", "--text_columns", "title", "text"]
    assert command(plain, *named, *more) == 0
    assert read(tmp_path / "own.jsonl") == read(tmp_path / "named.jsonl")
    with raises(SystemExit):
        command(model, tmp_path / "in.csv", tmp_path / "one.jsonl", "--text_columns", "text", *more)
    assert (
        "`--text_columns` must name 2: the model was trained on title and text. Got text." in capsys.readouterr().err
    )
    pd.DataFrame(rows)[["text"]].to_csv(tmp_path / "in.csv", index=False)
    with raises(SystemExit):
        command(model, tmp_path / "in.csv", tmp_path / "none.jsonl", *more)
    assert "`--text_columns` must name columns out of ['text']. Got 'title'." in capsys.readouterr().err


def test_a_column_that_json_has_not_is_told_beside_those_it_has(folder, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"sentence": "good", "idx": 1}\n')
    with raises(SystemExit):
        command(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "must name columns out of ['sentence', 'idx']. Got 'text'." in capsys.readouterr().err


def test_the_command_line_runs_an_export(folder, classifier, tmp_path, capsys):
    export_onnx(classifier.model, tmp_path / "onnx", tokenizer=classifier.tokenizer)
    source, target = write(tmp_path / "in.csv", TEXTS), tmp_path / "out.jsonl"
    more = [
        "--onnx",
        "--num_threads",
        str(torch.get_num_threads()),
        "--exit_strategy",
        "budgeted",
        "--budgeted_exit",
        "2",
    ]
    assert command(tmp_path / "onnx", source, target, *more) == 0
    for prediction, answer in zip(read(target), one_by_one(classifier, TEXTS, budgeted_exit=2), strict=True):
        assert (prediction["label"], prediction["exit_layer"]) == (answer["label"], 2)


def test_the_command_line_prepacks(folder, classifier, tmp_path, monkeypatch):
    packed, prepack = [], GamlBertForSequenceClassification.prepack

    def spy(model):
        packed.append(model)
        return prepack(model)

    monkeypatch.setattr(GamlBertForSequenceClassification, "prepack", spy)
    source, target = write(tmp_path / "in.csv", TEXTS), tmp_path / "out.jsonl"
    assert command(folder, source, target, "--prepack", "--patience", "1") == 0
    assert len(packed) == 1
    assert_answers(read(target), one_by_one(classifier, TEXTS, **PATIENCE))


def test_weights_that_cannot_be_prepacked_are_taken_as_they_are(folder, tmp_path, caplog):
    GamlBertForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    source, target = write(tmp_path / "in.csv", TEXTS[:3]), tmp_path / "out.jsonl"
    assert command(folder, source, target, "--prepack") == 0
    assert "Not prepacked: `prepack` needs a model" in caplog.text
    assert [prediction["error"] for prediction in read(target)] == [None] * 3


def test_every_option_tells_its_default():
    actions = {action.dest: action for action in make_parser()._actions if action.dest != "help"}
    parameters = inspect.signature(score_file).parameters
    for name, action in actions.items():
        assert action.required or "(default: " in action.help, name
        if name in ("batch_size", "window", "num_proc", "on_error"):
            assert action.default == parameters[name].default, name
            assert "(default: %(default)s)" in action.help


def test_the_command_line_scores_with_the_revision_that_is_asked_for(folder, hub_server, tmp_path, capsys):
    source, words = write(tmp_path / "in.csv", TEXTS[:3]), ("--no_progress",)
    first = push_checkpoint(folder, "me/mine").oid
    old = [command("me/mine", source, tmp_path / "old.jsonl", *words), read(tmp_path / "old.jsonl")]
    model = GamlBertForSequenceClassification.from_pretrained(folder)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.label2id = {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(folder)
    push_checkpoint(folder, "me/mine")
    assert command("me/mine", source, tmp_path / "new.jsonl", *words) == 0
    assert {prediction["label"] for prediction in read(tmp_path / "new.jsonl")} <= {"a", "b", "c"}
    again = command("me/mine", source, tmp_path / "again.jsonl", "--revision", first, "--num_proc", "1", *words)
    assert [again, read(tmp_path / "again.jsonl")] == old
    for name, revision, message in (
        (folder, first, f"`--revision` is of a model on the Hub. Got `{first}` for the folder"),
        ("me/mine", "nowhere", "no folder here; and from the Hub: 404 Client Error"),
    ):
        with raises(SystemExit):
            command(name, source, tmp_path / "out.jsonl", "--revision", revision)
        assert message in capsys.readouterr().err


@mark.parametrize("words", ["--input {0}.csv", "--model {0}", "--input in.csv --output {0}.csv"])
def test_whatever_keeps_the_predictions_from_being_written_ends_with_2(folder, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.csv", TEXTS[:3])
    given = {"--model": str(folder), "--input": "in.csv", "--output": "out.csv"}
    long = iter(words.format("x" * 300).split())
    with raises(SystemExit) as left:
        main([word for pair in (given | dict(zip(long, long, strict=True))).items() for word in pair])
    assert left.value.code == 2


WRONG_MODELS = {
    "/no/where": "no folder here; and from the Hub: Repo id must ",
    "out/modle": "no folder here; and from the Hub: ",
    ".": "a folder without `config.json`",
    "in.csv": "which is no folder",
    "out/modle --onnx": "which is not there",
}


def test_a_wrong_model_is_told_before_anything_heavy_is_imported(tmp_path):
    """PyTorch and Transformers take seconds."""
    (tmp_path / "in.csv").write_text("text\ngood\n")
    code = f"""
import contextlib, io, sys, gaml_score
for words in {[name.split() for name in WRONG_MODELS]}:
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(SystemExit):
        gaml_score.main(["--input", "in.csv", "--output", "out.csv", "--model", *words])
    print(told.getvalue().splitlines()[-1])
print(sorted({{"torch", "transformers", "datasets", "gaml_hf"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    *told, imported = done.stdout.splitlines()
    for name, line, reason in zip(WRONG_MODELS, told, WRONG_MODELS.values(), strict=True):
        assert line.startswith("gaml-score: error: `--model` must be a checkpoint folder")
        assert f"Got `{name.split()[0]}`, {reason}" in line
    assert imported == "[]"


@mark.parametrize(
    ("more", "message"),
    [
        (["--output", "out.txt"], "`--output` must end in .csv, .jsonl or .parquet"),
        (["--output", "in.csv"], "`--output` must not be `--input`, whose rows it would replace"),
        (["--input", "in.txt"], "`--input` must end in .csv, .tsv, .json, .jsonl, .parquet"),
        (["--input", "none.csv"], "`--input` must be a file. Got `none.csv`, which is not there."),
        (["--text_columns", "txt"], "`--text_columns` must name columns out of ['id', 'text']. Got 'txt'."),
        (["--text_columns", "a", "b", "c"], "`--text_columns` must be a list of one or two columns"),
        (["--batch_size", "0"], "`--batch_size` must be a whole number of at least 1. Got `--batch_size=0`."),
        (["--window", "0"], "`--window` must be a whole number of at least 1"),
        (["--num_proc", "0"], "`--num_proc` must be a whole number of at least 1"),
        (["--patience", "0"], "`--patience` must be a whole number of at least 1"),
        (["--max_length", "65"], "`--max_length` must be a whole number between 5 and 64"),
        (["--onnx"], "`--model` must be a folder written by `gaml_hf.runtime.ort.export_onnx`"),
        (["--onnx", "--prepack"], "`--prepack` is for a checkpoint"),
        (["--num_threads", "0"], "`--num_threads` must be at least 1. Got `--num_threads 0`."),
        (["--device", "gpu"], "`--device` must be one that PyTorch has here, such as cpu or cuda:0. Got `gpu`: "),
        (["--device", "meta"], "`--device` must be one that PyTorch has here, such as cpu or cuda:0. Got `meta`: "),
        (["--prepack", "--device", "cuda"], "`--device` must be cpu with `--prepack`. Got `--device cuda`."),
        (["--exit_threshold", "0.5"], "name the strategy you want"),
        (["--on_error", "raise"], "Row 1: `text` must hold more than blanks"),
    ],
    ids=str,
)
def test_errors_of_the_command_line(folder, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.csv", ["a good film", " "])
    (tmp_path / "in.txt").touch()
    with raises(SystemExit) as exit_:
        command(folder, "in.csv", "out.csv", *more)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "in.txt", "model"]


@mark.parametrize("num_proc", [1, 2])
@mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_strategy": "entropy", "exit_threshold": 2.0}, "`exit_threshold` must lie in [0, 1]"),
        ({"exit_layers": [1, 9]}, "`exit_layers`"),
        ({"hidden_act": "foo"}, "cannot be loaded: KeyError: 'foo'"),
    ],
)
def test_a_broken_config_is_told_and_the_old_file_stays(folder, tmp_path, capsys, changes, message, num_proc):
    """1 would say that there are predictions, and that some rows have none."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    target = tmp_path / "out.csv"
    target.write_text("old")
    with raises(SystemExit) as exit_:
        command(folder, write(tmp_path / "in.csv", TEXTS[:2]), target, "--num_proc", str(num_proc))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "--exit_threshold" not in error.splitlines()[-1]  # which nobody gave
    assert "Traceback" not in error
    assert target.read_text() == "old"


@mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_process_that_is_killed_is_told_and_the_old_file_stays(folder, tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.csv"
    target.write_text("old")
    monkeypatch.setattr(scoring, "_score_chunk", _die)
    with raises(SystemExit) as exit_:
        command(folder, write(tmp_path / "in.csv", TEXTS), target, "--num_proc", "2")
    assert exit_.value.code == 2
    assert "One of the `num_proc` processes was killed" in capsys.readouterr().err.replace("--num_proc", "num_proc")
    assert target.read_text() == "old"


def _die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_whatever_goes_wrong_nothing_was_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "_score_windows", lambda *args: 1 / 0)
    with raises(SystemExit) as exit_:
        command(folder, write(tmp_path / "in.csv", TEXTS), tmp_path / "out.csv")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("gaml-score: error: division by zero\n")
    assert not (tmp_path / "out.csv").exists()


def test_an_export_without_the_option(classifier, tmp_path, capsys):
    export_onnx(classifier.model, tmp_path / "onnx", tokenizer=classifier.tokenizer)
    with raises(SystemExit):
        command(tmp_path / "onnx", write(tmp_path / "in.csv", TEXTS), tmp_path / "out.csv")
    assert "`--model` is an export to ONNX. Got `" in capsys.readouterr().err


def test_a_plain_checkpoint_is_not_asked(folder, bert_kwargs, tokenizer, tmp_path, monkeypatch, capsys):
    """Its exits would be new, and answer at random."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.csv", ["a good film"])
    BertForSequenceClassification(BertConfig(**bert_kwargs)).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    with raises(SystemExit) as exit_:
        command("plain", "in.csv", "out.csv")
    assert exit_.value.code == 2
    assert "`--model` must be a checkpoint with exits. Got `plain`, a plain one" in capsys.readouterr().err


def test_processes_where_torch_has_had_threads(folder, tmp_path):
    """They are not forked: a child would wait for threads that it does not have."""
    write(tmp_path / "in.csv", ["a good film"] * 4)
    program = tmp_path / "program.py"
    program.write_text(f"""
import torch
from gaml_hf.runtime.scoring import ClassifierLoader, score_file

if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)
    load = ClassifierLoader({str(folder)!r}, False, "cpu", 2)
    print(score_file("in.csv", "out.jsonl", load, num_proc=2, window=2, progress=False))
""")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "{'rows': 4, 'skipped': 0}" in done.stdout, done.stderr


@mark.skipif(os.name == "nt", reason="no such signals there")
@mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_processes_end_with_the_first(folder, tmp_path, number, code):
    """And a signal that can be caught leaves neither a file nor a hidden folder."""
    write(tmp_path / "in.csv", ["a good film"] * 200_000)
    words = f"--model {folder} --input in.csv --output out.csv --num_proc 2 --num_threads 1 --window 64 --no_progress"
    with open(tmp_path / "told", "w") as told:
        first = subprocess.Popen(
            [sys.executable, gaml_score.__file__, *words.split()],
            cwd=tmp_path,
            stderr=told,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell runs behind it
        )
    while not any(path.stat().st_size for path in tmp_path.glob(".saving-*/out.csv")):  # rows are being answered
        assert first.poll() is None, (tmp_path / "told").read_text()
        time.sleep(0.05)
    others = psutil.Process(first.pid).children(recursive=True)
    assert len(others) >= 2
    if number == signal.SIGINT:
        os.killpg(first.pid, number)  # as a terminal does
    else:
        first.send_signal(number)
    assert first.wait(100) == code  # it waits for the windows that run
    _, alive = psutil.wait_procs(others, timeout=30)
    assert alive == []
    assert not (tmp_path / "out.csv").exists()
    assert len(list(tmp_path.glob(".saving-*"))) == (number == signal.SIGKILL)
    assert ("interrupted; nothing was written." in (tmp_path / "told").read_text()) == (number == signal.SIGINT)


@mark.parametrize("num_proc", [1, 2])
def test_no_room_is_told_and_nothing_is_left(folder, tmp_path, num_proc):
    resource = importorskip("resource")
    write(tmp_path / "in.csv", TEXTS * 50)
    words = f"--model {folder} --input in.csv --output out.csv --num_proc {num_proc} --num_threads 1 --no_progress"
    done = subprocess.run(
        [sys.executable, gaml_score.__file__, *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2
    assert "`--output` could not be written, for want of room. Got `out.csv`: " in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "model"]


def test_who_writes_over_the_checkpoint_does_not_change_the_answers(folder):
    """Weights are read as a view of their file: zeros would come through, and a file cut short ends the process."""
    classifier = ClassifierLoader(str(folder), False, "cpu", None)()
    before = classifier.model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        for name, tensor in classifier.model.state_dict().items():
            assert tensor.equal(before[name]), name
        file.truncate(0)
    assert classifier("a good film")[0]["exit_layer"] >= 1


@mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.parquet", b"no parquet", "`source` could not be read"),
        (
            "in.csv",
            "text\ncafé".encode("latin-1"),
            "could not be read, .*in.csv: 'utf-8' codec can't decode byte 0xe9",
        ),
        ("in.csv", b'id,text\n1,"good\n2,bad\n', "could not be read, .*unexpected end of data, .* in quotes"),
        ("in.csv", b'id,text\n1,"good\n2,"bad\n3,fine\n', "could not be read, .*expected after .*end of line 3"),
        ("in.csv", b'id,text\n1,"good\n2",bad,x\n', "could not be read, .*line 3 has 4 cells, the first line 2"),
        ("in.csv", b"text,text\n1,2\n", "could not be read, .*in.csv: the first line names the column 'text' twice"),
        ("in.jsonl", b'7\n{"text": \n', "could not be read, .*line 1 must be an object of cells by column. Got 7"),
        ("in.json", b'{\n"text": {"0": "good"}}', "could not be read, .*line 1 is no JSON: .* an object in each line"),
        (
            "in.json",
            b'{"text": {"0": "good", "1": "bad"}, "id": {"0": 1, "1": 2}}',  # as pandas writes where nothing is said
            "could not be read, .*line 1 is an object of whole columns; one object for each row can be read",
        ),
        ("in.csv", b"\n\n\n", "could not be read, .*in.csv: it holds blank lines alone"),
        ("in.json", bytes(range(256)), "`source` could not be read"),
        ("in.csv", b"", "`source` must hold rows. Got .*in.csv`, which is empty"),
        ("in.jsonl", b"", "`source` must hold rows"),
    ],
    ids=str,
)
@mark.parametrize("num_proc", [1, 2])
def test_a_file_that_cannot_be_read(load, tmp_path, name, content, message, num_proc):
    (tmp_path / name).write_bytes(content)
    with raises(ValueError, match=message):
        score_file(tmp_path / name, tmp_path / "out.csv", load, num_proc=num_proc, progress=False)
    assert not (tmp_path / "out.csv").exists()


@mark.parametrize(
    ("name", "content", "bad", "message"),
    [
        ("in.csv", b"id,text\n1,good\n2,bad,more,x\n3,fine\n", 1, "line 3 has 4 cells, the first line 2"),
        ("in.csv", b"id,text\n1\n2,good\n3,fine\n", 0, "line 2 has 1 cells, the first line 2"),
        (
            "in.csv",
            b'id,text\n1,good\n2,"bad" film\n3,fine\n',
            1,
            "',' expected after '\"', before the end of line 3; ",
        ),
        ("in.jsonl", b'{"text": "good"}\n{"te\n{"text": "fine"}\n', 1, "line 2 is no JSON: Invalid control character"),
        ("in.jsonl", b'"bad"\n{"text": "good"}\n{"text": "fine"}', 0, "line 1 must be an object of cells by column"),
        ("in.json", b'[{"text": "good"}, {"text": "fine"}, "bad"]', 2, "row 2 of its list must be an object"),
    ],
)
def test_a_line_that_is_no_row_costs_itself_alone(load, classifier, tmp_path, name, content, bad, message):
    (tmp_path / name).write_bytes(content)
    counts = score_file(tmp_path / name, tmp_path / "out.jsonl", load, progress=False)
    assert counts == {"rows": 3, "skipped": 1}
    predictions = read(tmp_path / "out.jsonl")
    error = predictions.pop(bad)
    assert error["row"] == bad
    assert error["error"].startswith(message)
    answers = one_by_one(classifier, ["good", "fine"])
    assert [prediction["label"] for prediction in predictions] == [answer["label"] for answer in answers]
    assert [prediction["score"] for prediction in predictions] == approx([answer["score"] for answer in answers])
    with raises(ValueError, match=f"^Row {bad}: {re.escape(message)}"):
        score_file(tmp_path / name, tmp_path / "out.jsonl", load, progress=False, on_error="raise")


def test_a_list_without_rows(load, tmp_path):
    (tmp_path / "in.json").write_text("[]")
    counts = score_file(tmp_path / "in.json", tmp_path / "out.csv", load, progress=False)
    assert counts == {"rows": 0, "skipped": 0}
    assert read(tmp_path / "out.csv") == []


def test_a_target_stays_what_it_was_but_for_its_rows(load, tmp_path, monkeypatch):
    source, real, link = write(tmp_path / "in.csv", TEXTS), tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    score_file(source, link, load, progress=False)
    assert link.is_symlink()
    assert len(read(real)) == len(TEXTS)
    assert real.stat().st_mode & 0o777 == 0o600

    def busy(*paths):
        raise OSError(errno.EBUSY, "Device or resource busy")

    real.write_text("old")
    monkeypatch.setattr(scoring.os, "replace", busy)  # as where the file is a mount
    score_file(source, real, load, progress=False)
    assert len(read(real)) == len(TEXTS)
    assert list(tmp_path.glob(".*")) == []


def test_a_target_that_cannot_be_written_is_told_before_the_first_row(tmp_path, monkeypatch):
    def load():
        raise AssertionError("the model was loaded")

    source = write(tmp_path / "in.csv", TEXTS)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for target in (tmp_path / "none" / "out.csv", tmp_path / "folder.csv", tmp_path / "pipe.csv"):
        with raises(ValueError, match="`target` must be a file in a folder that is there. Got "):
            score_file(source, target, load)
    with raises(ValueError, match="`target` must not be `source`, whose rows it would replace"):
        score_file(str(source), tmp_path / "folder.csv" / ".." / "in.csv", load)
    (tmp_path / "kept.csv").touch()
    monkeypatch.setattr(scoring.os, "access", lambda *_: False)  # to root, every mode is writable
    with raises(ValueError, match="`target` must be a file that may be written over. Got "):
        score_file(source, tmp_path / "kept.csv", load)
    for arguments in ((None, "out.csv"), (source, 7)):
        with raises(TypeError, match="must be the path of a file. Got "):
            score_file(*arguments, load)


def test_a_stream_in_several_processes(load, tmp_path):
    """No more of it is read ahead than two windows for each process."""
    read = []

    def rows():
        for i in range(1000):
            read.append(i)
            yield {"text": " " if i == 0 else "good"}

    stream = IterableDataset.from_generator(rows)
    with raises(ValueError, match="^Row 0: `text` must hold more than blanks"):
        score_file(stream, tmp_path / "out.csv", load, num_proc=2, window=3, on_error="raise", progress=False)
    assert len(read) <= 3 * 2 * 2


@mark.parametrize("num_proc", [1, 2])
def test_a_stream_without_the_column(load, tmp_path, num_proc):
    """Whose columns nobody knows before its first rows."""
    stream = IterableDataset.from_generator(lambda: iter([{"sentence": "good"}] * 3))
    with raises(ValueError, match=r"`text_columns` must .*sentence"):
        score_file(stream, tmp_path / "out.csv", load, num_proc=num_proc, progress=False)
    assert not (tmp_path / "out.csv").exists()


@mark.parametrize("num_proc", [1, 2])
def test_cells_of_any_kind_in_any_row(load, classifier, tmp_path, num_proc):
    """A bad row is that row's error in one process as in two, and other columns are nobody's business."""
    rows = [{"text": "good", "other": 1} if i % 2 else {"text": "bad", "other": "x"} for i in range(9)]
    rows[3], rows[4], rows[6], rows[8] = {"text": 7}, {"other": []}, "good", {"text": "bad \ud800"}
    (tmp_path / "in.json").write_text(json.dumps(rows))
    counts = score_file(
        tmp_path / "in.json", tmp_path / "out.jsonl", load, num_proc=num_proc, window=2, progress=False
    )
    assert counts == {"rows": 9, "skipped": 4}
    predictions = read(tmp_path / "out.jsonl")
    assert predictions[6]["error"] == "row 6 of its list must be an object of cells by column. Got 'good'"
    assert predictions[3]["error"] == "`text` must be a `str`. Got 7 (int)."
    assert "Got None" in predictions[4]["error"]
    assert "Unicode" in predictions[8]["error"]
    assert [predictions[i]["label"] for i in (0, 1)] == [classifier(text)[0]["label"] for text in ("bad", "good")]


@mark.parametrize("num_proc", [1, 2])
@mark.parametrize("name", ["rows[1].csv", "star*.csv", "x::y.csv", "solo[9].csv", "s3://rows.csv", "a b?.csv"])
def test_the_file_that_is_named_is_scored(load, tmp_path, monkeypatch, name, num_proc):
    monkeypatch.chdir(tmp_path)
    for other in ("rows1.csv", "star1.csv", "star2.csv", "y.csv"):  # what a pattern would find
        write(tmp_path / other, TEXTS[:5])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, TEXTS[:2])
    counts = score_file(name, "out.jsonl", load, num_proc=num_proc, progress=False)
    assert counts == {"rows": 2, "skipped": 0}
