"""Rows out of files: every cell as it stands, the columns that are text, and what is wrong, by row."""

import csv
import json
import random
import string

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest import fixture, mark, raises

from gaml_hf.data.files import RowFile, class_names, encode_labels, find_text_columns, read_split


def read(path, columns=None):
    return list(RowFile(path, "train_file", columns))


ODD = [
    "NA",
    "null",
    "None",
    "",
    "  ",
    "007",
    "1e5",
    "true",
    "nan",
    "2012",
    "a;b",
    "a,b",
    "a\tb",
    'say "x"',
    "1\n2",
    "é",
]


@mark.parametrize("delimiter", [",", ";", "\t"])
@mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_file_is_what_was_written(tmp_path, delimiter, encoding):
    rows = [{"id": str(i), "text": text, "label": text[::-1]} for i, text in enumerate(ODD)]
    for suffix in ("csv", *["tsv"] * (delimiter == "\t")):
        with open(tmp_path / f"rows.{suffix}", "w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, ["id", "text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert read(tmp_path / f"rows.{suffix}") == rows
        assert RowFile(tmp_path / f"rows.{suffix}", "x").column_names == ["id", "text", "label"]
        assert read(tmp_path / f"rows.{suffix}", ["label"]) == [{"label": row["label"]} for row in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), min_size=1),
    st.sampled_from([",", ";", "\t"]),
)
def test_any_cells(tmp_path, rows, delimiter):
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["text", "label"], *rows])
    assert [[row["text"], row["label"]] for row in read(tmp_path / "rows.csv")] == rows


def test_a_column_may_change_its_kind(tmp_path):
    """At any row; an unused one is not even looked at."""
    count = 30_000
    late = ["1"] * (count - 1) + ["x"]
    (tmp_path / "rows.csv").write_text(
        "text,label,id\n" + "".join(f"good {i},{i % 2},{x}\n" for i, x in enumerate(late))
    )
    rows = [{"text": "good", "label": i % 2, "id": int(x) if x == "1" else x} for i, x in enumerate(late)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("rows.csv", "rows.jsonl"):
        texts, labels = read_split(RowFile(tmp_path / name, "train_file"), "train", ["text"], "label")
        assert texts.column_names == ["text"]
        assert len(texts) == count
        assert labels == ["0", "1"] * (count // 2)


def test_long_cells_and_long_lines(tmp_path):
    text = "".join(random.Random(0).choices(string.ascii_letters + ", ", k=1_000_000))
    (tmp_path / "rows.csv").write_text(f'text,label\n"{text}",a\n"{text}",b\n')
    assert [row["text"] for row in read(tmp_path / "rows.csv")] == [text, text]


def test_json(tmp_path):
    rows = [{"text": "good", "label": 1, "other": {"a": [1]}}, {"text": None}, {"label": True, "text": "bad \ud800"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "list.json").write_text("\n" + json.dumps(rows, indent=2))
    for name in ("rows.jsonl", "list.json"):
        assert read(tmp_path / name) == rows
        assert RowFile(tmp_path / name, "x").column_names == ["text", "label", "other"]
        assert read(tmp_path / name, ["label"]) == [{"label": 1}, {}, {"label": True}]


def test_parquet(tmp_path):
    table = pa.table({"text": ["good", None, "bad"], "text.en": [1, 2, 3], "label": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == table.to_pylist()
    assert read(tmp_path / "rows.parquet", ["text"]) == table.select(["text"]).to_pylist()
    assert read(tmp_path / "rows.parquet", ["text.en"]) == table.select(["text.en"]).to_pylist()


# Which columns are text


def as_file(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return RowFile(tmp_path / "rows.jsonl", "train_file")


def as_dataset(tmp_path, rows):
    return Dataset.from_list(rows)


@fixture(params=[as_file, as_dataset])
def source(request, tmp_path):
    def make(**columns):
        rows = zip(*columns.values(), strict=True)
        return request.param(tmp_path, [dict(zip(columns, row, strict=True)) for row in rows])

    return make


def some(count, *words):
    return [" ".join(random.Random(i).choices(words, k=5)) for i in range(count)]


TEXT, OTHER, LABEL = some(60, *"abcdefgh"), some(60, *"klmnopqr"), ["pos", "neg", "pos"] * 20
NOT_TEXT = {
    "label_text": [{"pos": "positive", "neg": "negative"}[label] for label in LABEL],
    "ticket": [f"T-{i:05}" for i in range(60)],
    "uuid": [f"{random.Random(i).getrandbits(128):032x}" for i in range(60)],
    "time": [f"2020-01-01T00:00:{i:02}" for i in range(60)],
    "year": [str(1960 + i) for i in range(60)],
    "price": [f"{i}.{i}" for i in range(60)],
    "number": list(range(60)),
    "source": ["web"] * 60,
    "empty": [""] * 60,
}


@mark.parametrize("name", NOT_TEXT)
@mark.parametrize("first", [True, False])
def test_a_column_beside_the_text(source, caplog, name, first):
    columns = {"text": TEXT, "label": LABEL}
    more = {name: NOT_TEXT[name]}
    assert find_text_columns(source(**(more | columns if first else columns | more)), "label") == ["text"]
    assert "PAIR" not in caplog.text


def test_a_pair_is_told_loudly(source, caplog):
    assert find_text_columns(source(premise=TEXT, hypothesis=OTHER, label=LABEL), "label") == ["premise", "hypothesis"]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "each row is taken to be a PAIR of 'premise' ('" in record.getMessage()
    assert "`--text_columns premise`" in record.getMessage()


CHINESE = [f"服务{a}很{b}" for a in "好差快慢" for b in "好差快慢多少大小"]


@mark.parametrize(
    "text",
    [["good", "bad"] * 30, [f"{word}!" for word in "abcdefghij" * 6], CHINESE, [*TEXT[:59], ""]],
    ids=["words", "short", "without blanks", "one missing"],
)
def test_texts_of_any_kind_are_texts(source, text):
    assert find_text_columns(source(text=text, label=LABEL[: len(text)]), "label") == ["text"]


def test_short_texts_without_blanks_are_no_ids(source):
    columns = {"text": CHINESE, "ticket": [f"T-{i:05}" for i in range(32)], "label": LABEL[:32]}
    assert find_text_columns(source(**columns), "label") == ["text"]


def test_columns_that_cannot_be_told(source):
    three = source(a=TEXT, b=OTHER, c=TEXT[::-1], n=list(range(60)), label=LABEL)
    with raises(
        ValueError, match=r"must name one or two columns out of \['a', 'b', 'c', 'n', 'label'\]: .* 'a' \(text,"
    ):
        find_text_columns(three, "label")
    with raises(ValueError, match="Of strings that are not all numbers: none."):
        find_text_columns(source(n=list(range(60)), label=LABEL), "label")


def test_no_rows_tell_no_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    with raises(ValueError, match="There are no rows to tell the columns of text by"):
        find_text_columns(RowFile(tmp_path / "rows.csv", "train_file"), "label")


# What is wrong with them


def split(source, **arguments):
    return read_split(source, "train", ["text"], "label", **arguments)


@mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"text": ["a", None, "", " "]},
            r"Row 1 .* column 'text', must hold more than blanks. Got None. In all, 3 such",
        ),
        (
            {"label": ["a", None, "b", " "]},
            "Row 1 .* column 'label', has no label. Got None. In all, 2 such rows: 1, 3.",
        ),
        ({"label": [1, -1, 0, 1]}, r"Row 1 .* must not be negative.* Got -1 \(int\)"),
        ({"label": ["1", "2", "-1", "1"]}, "Row 2 .* must not be negative.* Got '-1'"),
        ({"label": [0.5, 1.0, 1.0, 2.0]}, r"Row 0 .*regression.* Got 0.5 \(float\). In all, 4 such rows"),
        ({"label": ["1", "2", "2.5", "1"]}, "Row 2 .*regression.* Got '2.5'."),
        ({"label": [1.0, float("nan"), 1.0, 1.0]}, "Row 1 .* has no label. Got nan"),
        ({"label": [["a", "b"], ["a"], [], ["b"]]}, r"Row 0 .* one class .*multi-label.* Got \['a', 'b'\] \(list\)"),
        ({"text": [1, 2, 3, 4]}, r"Row 0 .* column 'text', must be text, in valid Unicode. Got 1 \(int\). In all, 4"),
        (
            {"labels": [1, 2, 3, 4], "label": None},
            r"`label_column` must be one of \['text', 'labels'\], .* Got 'label'",
        ),
        ({"texts": ["a"] * 4, "text": None}, r"The train split has no column \['text'\]; it has \['label', 'texts'\]"),
    ],
    ids=str,
)
def test_wrong_rows(source, columns, sentence):
    columns = {"text": ["a", "b", "c", "d"], "label": ["a", "b", "a", "b"], **columns}
    with raises(ValueError, match=sentence):
        split(source(**{name: cells for name, cells in columns.items() if cells is not None}))


def test_names_of_classes(source):
    for labels, names in (
        (["1", "01", "1"], ["1", "01", "1"]),
        (["true", "True", "x"], ["true", "True", "x"]),
        ([1, 2, 10], ["1", "2", "10"]),
        ([True, False, True], ["true", "false", "true"]),
        (["-1", "none", "0.5"], ["-1", "none", "0.5"]),  # names, for not all are numbers
    ):
        texts, found = split(source(text=["a", "b", "c"], label=labels))
        assert found == names
        assert texts["text"] == ["a", "b", "c"]


def test_classes_that_the_data_name(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "m"])})
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    for source in (dataset, RowFile(tmp_path / "rows.parquet", "train_file")):
        assert split(source)[1] == ["a", "z"]
    unlabelled = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    with raises(ValueError, match="Row 1 of the train split, column 'label', has no label"):
        split(unlabelled)


def test_order_of_classes(caplog):
    assert class_names(["10", "9", "2", "9"]) == ["2", "9", "10"]
    assert class_names(["1", "01", "2"]) == ["01", "1", "2"]
    assert class_names(["b", "10", "a", "9"]) == ["10", "9", "a", "b"]
    assert caplog.text == ""
    assert class_names(["pos", "pos ", "Pos", "neg"]) == ["Pos", "neg", "pos", "pos "]
    assert "The classes ['Pos', 'pos', 'pos '] differ by case or blanks alone" in caplog.text


def test_a_class_that_is_unknown():
    assert encode_labels(["a", "b", "a"], "train", "label", {"b": 0, "a": 1}) == [1, 0, 1]
    with raises(
        ValueError, match=r"Row 1 of the eval split, column 'x', must be one of \['a'\]. Got 'b'. In all, 2 such"
    ):
        encode_labels(["a", "b", "c"], "eval", "x", {"a": 0})
