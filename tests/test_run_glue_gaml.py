"""`run_glue_gaml.py` from the command line's words to the folder it leaves, on a tiny BERT."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import snapshot_download
from pytest import approx, fixture, mark, raises
from transformers import BertConfig, BertModel, pipeline

import run_glue_gaml
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.glue import GLUE_TASKS
from gaml_hf.hub import check_checkpoint


GOOD, BAD = ["good", "great", "fine", "best", "funny"], ["bad", "awful", "dull", "sad", "worst"]


def sentences(count: int, seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(random.integers(2))
        noun, word = random.choice(["film", "story", "plot", "actor"]), random.choice([BAD, GOOD][label])
        rows.append({"sentence": f"the {noun} is {word} .", "label": ["negative", "positive"][label], "grade": 1})
    return rows


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@fixture
def backbone(tmp_path, bert_kwargs, tokenizer) -> str:
    folder = tmp_path / "backbone"
    BertModel(BertConfig(**bert_kwargs)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@fixture
def files(tmp_path) -> dict[str, str]:
    return {
        "train": write_csv(tmp_path / "train.csv", sentences(160, seed=1)),
        "validation": write_csv(tmp_path / "validation.csv", sentences(40, seed=2)),
        "test": write_csv(tmp_path / "test.csv", [{"sentence": row["sentence"]} for row in sentences(12, seed=3)]),
    }


@fixture
def common(backbone, tmp_path) -> list[str]:
    words = f"--model_name_or_path {backbone} --output_dir {tmp_path / 'out'} --use_cpu True --report_to none"
    words += " --learning_rate 2e-3 --per_device_train_batch_size 16 --num_train_epochs 4 --logging_steps 2"
    words += " --latency_rows 4 --disable_tqdm True --seed 7 --dataloader_pin_memory False"
    return words.split()


def with_files(files: dict[str, str], *splits: str) -> list[str]:
    return [word for split in splits for word in (f"--{split}_file", files[split])]


def test_train_evaluate_predict_and_use(common, files, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*common, *with_files(files, "train", "validation", "test"), "--holdout_fraction", "0.25"]
    words += ["--num_train_epochs", "12", "--ga_mode", "hard"]
    run = run_glue_gaml.main([*words, "--do_train", "--do_eval", "--do_predict", "--target_speed_up", "1", "4"])

    assert run["rows"] == {"train": 120, "holdout": 40}
    evaluation = run["evaluation"]["validation"]
    assert evaluation["exits"][4]["accuracy"] > 0.9  # the labels can be read off one word
    assert evaluation["exit_mean"] == approx(
        np.mean([scores["combined_score"] for scores in evaluation["exits"].values()])
    )
    assert any("alignment/cos_angle" in entry for entry in run["log_history"])
    # What a person reads, and what a program reads, are the same numbers.
    printed = capsys.readouterr().out
    assert "mean over exits" in printed
    assert f"{evaluation['policy']['accuracy']:.4f}" in printed
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_exit_4"] == evaluation["exits"][4]["combined_score"]
    assert results["eval_speed_up"] == evaluation["policy"]["speed_up"]

    check_checkpoint(out)
    assert {"depth_score.png", "speed_score.png", "README.md", "run.json"} <= {path.name for path in out.iterdir()}
    saved = GamlBertForSequenceClassification.from_pretrained(out)
    assert saved.config.exit_strategy == "patience"
    assert saved.config.patience == run["chosen"]["parameter"]

    # The predictions are those of the pipeline on the same texts.
    with (out / "predictions_test.tsv").open(encoding="utf-8") as file:
        predictions = list(csv.DictReader(file, delimiter="\t"))
    texts = [row["sentence"] for row in sentences(12, seed=3)]
    answers = pipeline("text-classification", model=str(out), trust_remote_code=True, device="cpu")(texts)
    assert [(row["prediction"], int(row["exit_layer"])) for row in predictions] == [
        (answer["label"], answer["exit_layer"]) for answer in answers
    ]

    # Evaluated alone, from the folder: the same scores, with the policy that was saved.
    again = run_glue_gaml.main(
        [*common, "--model_name_or_path", str(out), *with_files(files, "validation"), "--do_eval"]
        + ["--output_dir", str(tmp_path / "again")]
    )
    assert again["evaluation"]["validation"]["exits"] == evaluation["exits"]
    assert again["evaluation"]["validation"]["policy"]["speed_up"] == evaluation["policy"]["speed_up"]


def test_recipe_file_and_command_line_override(common, files, tmp_path):
    recipe = {
        "model_name_or_path": common[1],
        "train_file": files["train"],
        "validation_file": files["validation"],
        "output_dir": str(tmp_path / "recipe-out"),
        "distillation": [[4, 1], [4, 2]],
        "exit_layers": [1, 2, 4],
        "ga_mode": "hard",
        "alpha": 0.3,
        "target_speed_up": [1.5, 2.5],
        "do_train": True,
        "warmup_epochs": 1.5,
    }
    for name, text in (("recipe.json", json.dumps(recipe)), ("recipe.yaml", json.dumps(recipe, indent=1))):
        path = tmp_path / name
        path.write_text(text)
        model, data, gaml, training = run_glue_gaml.parse_arguments([str(path), "--alpha", "0.5"])
        assert gaml.config_fields() == {
            "exit_layers": [1, 2, 4],
            "distillation": [[4, 1], [4, 2]],
            "ga_mode": "hard",
            "alpha": 0.5,
        }
        assert gaml.target_speed_up == [1.5, 2.5]
        assert (training.do_train, training.do_eval, training.warmup_epochs) == (True, False, 1.5)
        assert data.train_file == files["train"]


def test_plain_bert_and_warmup_epochs(common, files):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--do_eval", "--num_train_epochs", "1"]
    words += "--exit_loss_weights last --distillation none --ga_mode none --exit_strategy none".split()
    words += "--metric_for_best_model exit_4 --warmup_epochs 1.5 --gradient_accumulation_steps 2".split()
    run = run_glue_gaml.main(words)
    # 144 of 160 rows are trained on: 9 batches of 16, 5 optimizer steps in an epoch; 1.5 epochs are 8 steps (7.5).
    assert run["training_arguments"]["warmup_steps"] == 8
    assert run["evaluation"]["validation"]["policy"]["speed_up"] == 1
    assert not any("alignment/cos_angle" in entry for entry in run["log_history"])


def test_resume_continues_bit_for_bit(common, files, tmp_path):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--save_total_limit", "5"]
    words += ["--early_stopping_patience", "0", "--load_best_model_at_end", "False"]
    run_glue_gaml.main(words)
    whole = GamlBertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    with raises(ValueError, match="already holds a training run"):
        run_glue_gaml.main(words)
    checkpoint = str(tmp_path / "out" / f"checkpoint-{steps[1]}")
    run_glue_gaml.main([*words, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", checkpoint])
    resumed = GamlBertForSequenceClassification.from_pretrained(tmp_path / "resumed").state_dict()
    assert all((whole[key] == resumed[key]).all() for key in whole)
    os.truncate(tmp_path / "out" / f"checkpoint-{steps[-1]}" / "model.safetensors", 1000)  # passed over
    (tmp_path / "out" / "model.safetensors").unlink()
    run_glue_gaml.main([*words, "--resume_from_checkpoint", "True"])
    resumed = GamlBertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all((whole[key] == resumed[key]).all() for key in whole)


def test_a_run_started_anew_forgets_the_checkpoints_of_the_old_one(common, files, tmp_path):
    """Or a resume after a kill could go on with them."""
    words = [*common, *with_files(files, "train"), "--do_train", "--overwrite_output_dir", "--max_steps", "2"]
    (tmp_path / "out" / "checkpoint-999").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").touch()
    with raises(ValueError, match="must be one of"):  # nothing is lost by a wrong argument
        run_glue_gaml.main([*words, "--label_column", "nowhere"])
    assert (tmp_path / "out" / "checkpoint-999").exists()
    run_glue_gaml.main(words)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "out" / "notes.txt").exists()


@mark.parametrize("suffix", ["json", "parquet"])
def test_other_formats_pairs_and_many_classes(common, tmp_path, suffix):
    rows = pd.DataFrame(
        {"premise": ["the film is good ."] * 30, "hypothesis": ["it is bad .", "we are in it .", "good !"] * 10}
    ).assign(label=[2, 5, 9] * 10)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    words = [*common, "--train_file", str(path), "--validation_file", str(path), "--do_train", "--do_eval"]
    run = run_glue_gaml.main([*words, "--num_train_epochs", "1", "--exit_strategy", "entropy"])
    assert run["config"]["id2label"] == {0: "2", 1: "5", 2: "9"}
    assert run["config"]["exit_strategy"] == "entropy"
    assert run["data_arguments"]["text_columns"] is None  # both text columns were found


def test_glue_task_from_a_local_folder(common, glue_folder):
    words = [*common, "--dataset_name", str(glue_folder / "mrpc"), "--task_name", "MRPC", "--do_eval", "--do_predict"]
    words += "--max_eval_samples 20 --max_train_samples 40 --max_predict_samples 10 --exit_strategy budgeted".split()
    run = run_glue_gaml.main([*words, "--target_speed_up", "1.9", "2.1"])
    assert run["chosen"]["parameter"] == 2  # of 4 layers
    assert run["evaluation"]["validation"]["policy"]["speed_up"] == 2
    assert run["config"]["id2label"] == {0: "not_equivalent", 1: "equivalent"}
    submission = (Path(run["training_arguments"]["output_dir"]) / "MRPC.tsv").read_text().splitlines()
    assert submission[0] == "index\tprediction"
    assert len(submission) == 11
    assert {line.split("\t")[1] for line in submission[1:]} <= {"0", "1"}


TWO_TEXTS = ["the film is good .", "a sad plot"]

# What the GLUE server takes (hub_models/README.md): file, number of rows, the answers for the classes in their order.
SUBMISSIONS = {
    "cola": {"CoLA.tsv": (1063, "0 1")},
    "mnli": {
        "MNLI-m.tsv": (9796, "entailment neutral contradiction"),
        "MNLI-mm.tsv": (9847, "entailment neutral contradiction"),
    },
    "mrpc": {"MRPC.tsv": (1725, "0 1")},
    "qnli": {"QNLI.tsv": (5463, "entailment not_entailment")},
    "qqp": {"QQP.tsv": (390965, "0 1")},
    "rte": {"RTE.tsv": (3000, "entailment not_entailment")},
    "sst2": {"SST-2.tsv": (1821, "0 1")},
}


@mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_submission_files(task, common, backbone, tokenizer, tmp_path, glue_like, caplog):
    # A model whose classes are in another order: the file must go by name.
    names = list(task.label_names)[::-1]
    config = GamlBertConfig.from_pretrained(
        backbone, id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)}
    )
    model = GamlBertForSequenceClassification(config).eval()
    last = model.exit_classifiers[str(config.num_hidden_layers)]
    with torch.no_grad():  # two texts, logits of opposite sign: two answers
        last.weight.normal_()
        texts = tokenizer(*[TWO_TEXTS] * len(task.text_columns), padding=True, return_tensors="pt")
        last.bias -= model(**texts).logits.mean(dim=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = glue_like(task, test_rows=40)
    words = f"--model_name_or_path {tmp_path / 'model'} --dataset_name {folder} --task_name {task.name} --do_predict"
    run_glue_gaml.main([*common, *words.split()])

    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.tsv") if not path.name.startswith("pred")} == SUBMISSIONS[
        task.name
    ].keys()
    for (name, (rows_wanted, answers)), split in zip(SUBMISSIONS[task.name].items(), task.test_splits, strict=True):
        assert (out / name).read_bytes().startswith(b"index\tprediction\n0\t")
        submitted = pd.read_csv(out / name, sep="\t", dtype=str)
        predicted = pd.read_csv(out / f"predictions_{split}.tsv", sep="\t", dtype=str)
        assert list(submitted) == ["index", "prediction"]
        assert list(submitted["index"]) == [str(row) for row in range(40)]
        answer = dict(zip(task.label_names, answers.split(), strict=True))
        assert list(submitted["prediction"]) == [answer[label] for label in predicted["prediction"]]
        assert submitted["prediction"].nunique() == 2
        assert f"{name} has 40 rows, and the GLUE server takes {rows_wanted}: predict the whole" in caplog.text


def test_a_submission_of_all_rows_has_no_warning(tmp_path, caplog):
    run_glue_gaml.write_submission(tmp_path / "RTE.tsv", ["entailment"] * 3000, 3000)
    assert caplog.text == ""


def test_classes_that_are_numbers_are_submitted(common, files, tmp_path):
    # As in a csv made of SST-2, where nothing says that 1 is "positive".
    rows = [row | {"label": int(row["label"] == "positive")} for row in sentences(40, seed=5)]
    words = [*common, "--task_name", "sst2", "--train_file", write_csv(tmp_path / "sst2.csv", rows)]
    words += ["--test_file", files["test"], "--do_train", "--do_predict", "--num_train_epochs", "1"]
    run_glue_gaml.main([*words, "--patience", "2"])
    submitted = (tmp_path / "out" / "SST-2.tsv").read_text().splitlines()
    assert len(submitted) == 13
    assert {line.split("\t")[1] for line in submitted[1:]} <= {"0", "1"}


def test_a_class_that_the_server_does_not_know(common, files, tmp_path):
    rows = [{"sentence": "good", "label": "yes"}, {"sentence": "bad", "label": "no"}]
    words = [*common, "--task_name", "sst2", "--train_file", write_csv(tmp_path / "sst2.csv", rows)]
    with raises(ValueError, match=r"classes of sst2 must be called negative, positive, or by .* Got 'no'"):
        run_glue_gaml.main([*words, "--test_file", files["test"], "--do_train", "--do_predict"])
    assert not list((tmp_path / "out").glob("checkpoint-*"))  # before it was trained


BROKEN_ROWS = [
    ([{"sentence": "good", "label": "a"}, {"sentence": "", "label": "b"}], "Row 1 of the train split, column 'sent"),
    (
        [{"sentence": "good", "label": "a"}, {"sentence": " ", "label": "b"}, {"sentence": "\u3000", "label": "b"}],
        r"Row 1 of the train split, column 'sentence', must hold more than blanks.* In all, 2 rows.*blank: 1, 2",
    ),
    (
        [{"sentence": "good", "label": 0.5}, {"sentence": "bad", "label": 1.0}],
        r"Row 0 of the train split, column 'label', must be a name or a whole number .*regression.* Got 0\.5",
    ),
    (
        [{"sentence": "good", "label": "a"}, {"sentence": "bad", "label": ""}],
        "Row 1 of the train split, column 'label', has no label",
    ),
    (
        [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": None}, {"sentence": "bad", "label": 0}],
        "Row 1 of the train split, column 'label', has no label",  # such a column is read as 1.0, NaN, 0.0
    ),
    (
        [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": -100}],
        r"Row 1 of the train split, column 'label', must not be negative.* take such rows out\. Got -100",
    ),
    (
        [{"sentence": "good", "label": -100}, {"sentence": "bad", "label": -100}],
        "Row 0 of the train split, column 'label', must not be negative",
    ),
    ([{"sentence": "good", "label": None}] * 2, "Row 0 of the train split, column 'label', has no label. Got None"),
    ([{"sentence": "good", "label": "a"}, {"sentence": "bad", "label": "a"}], "at least two classes"),
    ([{"sentence": "good", "grade": 1}], "`label_column` must be one of"),
    ([{"one": "x", "two": "y", "three": "z", "label": "a"}], "`text_columns` must name one or two columns"),
    ([{"number": 1, "label": "a"}], "`text_columns` must name one or two columns"),
]


@mark.parametrize(("rows", "sentence"), BROKEN_ROWS, ids=[sentence for _, sentence in BROKEN_ROWS])
def test_broken_rows_are_found_before_training(common, files, tmp_path, rows, sentence):
    train = write_csv(tmp_path / "broken.csv", rows)
    with raises(ValueError, match=sentence):
        run_glue_gaml.main([*common, "--train_file", train, "--do_train"])


def test_unknown_label_in_the_validation_rows(common, files, tmp_path):
    rows = [*sentences(3, seed=4), {"sentence": "the film is so so .", "label": "neutral", "grade": 1}]
    words = [*common, "--train_file", files["train"], "--validation_file", write_csv(tmp_path / "new.csv", rows)]
    with raises(ValueError, match=r"Row 3 of the validation split, column 'label', must be one of .* Got 'neutral'"):
        run_glue_gaml.main([*words, "--do_train", "--do_eval"])


def test_a_lone_surrogate_is_found(common, tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"sentence": "good", "label": 0}, {"sentence": "bad \ud800", "label": 1}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with raises(ValueError, match="`train_file` could not be read, .*surrogate.* in row 1"):
        run_glue_gaml.main([*common, "--train_file", str(path), "--do_train"])


def test_a_parquet_file_that_is_not_utf_8(common, tmp_path):
    texts = pa.array([b"good", b"bad \xed\xa0\x80"]).view(pa.string())  # U+D800, a lone surrogate
    pq.write_table(pa.table({"sentence": texts, "label": [0, 1]}), tmp_path / "rows.parquet")
    with raises(ValueError, match="Row 1 of the train split, column 'sentence', must be text, in valid Unicode.*bad"):
        run_glue_gaml.main([*common, "--train_file", str(tmp_path / "rows.parquet"), "--do_train"])


def test_labels_that_are_lists(common, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"sentence": "good", "label": [0, 1]}\n{"sentence": "bad", "label": [1]}')
    with raises(ValueError, match=r"Row 0 of the train split, column 'label', must be a name .* Got \[0, 1\]"):
        run_glue_gaml.main([*common, "--train_file", str(path), "--do_train"])


def test_blank_texts_are_used_where_wanted(common, tmp_path, caplog):
    rows = pd.DataFrame({"one": ["good"] * 4, "two": ["bad", "", "bad", "  "], "label": [0, 1, 0, 1]})
    rows.to_parquet(tmp_path / "rows.parquet")
    words = [*common, "--validation_file", str(tmp_path / "rows.parquet"), "--do_eval", "--exit_strategy", "none"]
    run = run_glue_gaml.main([*words, "--allow_blank_texts"])
    assert run["evaluation"]["validation"]["rows"] == 4
    assert "2 rows of the validation split, column 'two', are blank: 1, 3." in caplog.text


def test_a_training_that_diverges_keeps_what_was_good(common, files, tmp_path):
    out = tmp_path / "out"
    words = [*common, *with_files(files, "train"), "--do_train", "--patience", "2", "--num_train_epochs", "1"]
    run_glue_gaml.main(words)
    before = (out / "model.safetensors").read_bytes()
    broken = [*words, "--overwrite_output_dir", "--learning_rate", "1e38", "--max_grad_norm", "0", "--optim", "sgd"]
    with raises(FloatingPointError, match="Training stopped at step .* not finite"):
        run_glue_gaml.main(broken)
    assert (out / "model.safetensors").read_bytes() == before


@mark.parametrize(
    ("words", "sentence"),
    [
        ("--task_name stsb", "`task_name` must be one of"),
        ("", "Give `task_name`, `dataset_name`"),
        ("--train_file nowhere.csv", "`train_file` must be a file"),
        ("--train_file rows.txt", "`train_file` must end in"),
        ("--task_name sst2 --max_train_samples 0", "`max_train_samples` must be at least 1"),
        ("--task_name sst2 --target_speed_up 2 1", "`target_speed_up` must be a range"),
        ("--task_name sst2 --holdout_fraction 1.5", "`holdout_fraction` must lie in"),
    ],
)
def test_wrong_arguments(common, words, sentence):
    with raises(ValueError, match=sentence):
        run_glue_gaml.main([*common, *words.split()])


def test_a_policy_cannot_be_chosen_without_rows(common, files):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--holdout_fraction", "0"]
    with raises(ValueError, match="needs its parameter, or training rows set aside"):
        run_glue_gaml.main(words)


@mark.parametrize("option", ["--bf16", "--bf16_full_eval"])
def test_a_word_where_bf16_will_crawl(common, files, monkeypatch, caplog, option):
    for cost, told in ((93.25, True), (0.4, False)):
        caplog.clear()
        monkeypatch.setattr("run_glue_gaml.bfloat16_cost", lambda cost=cost: cost)
        with raises(ValueError, match="must have the splits"):  # it is told before any work
            run_glue_gaml.main([*common, option, *with_files(files, "validation"), "--do_train"])
        assert ("products take 93.2 times as long as in float32 on this processor" in caplog.text) == told


def test_missing_splits(common, files):
    with raises(ValueError, match=r"must have the splits \['test', 'train'\]"):
        run_glue_gaml.main([*common, *with_files(files, "train", "validation"), "--do_train", "--do_predict"])


def test_a_model_trained_for_other_classes(common, files, tmp_path):
    words = [*common, *with_files(files, "train"), "--do_train", "--num_train_epochs", "1", "--patience", "2"]
    run_glue_gaml.main(words)
    other = write_csv(tmp_path / "other.csv", [{"sentence": "good", "label": "x"}, {"sentence": "bad", "label": "y"}])
    with raises(ValueError, match=r"was trained for the classes \['negative', 'positive'\]"):
        run_glue_gaml.main(
            [*common, "--model_name_or_path", str(tmp_path / "out"), "--validation_file", other, "--do_eval"]
        )


def test_push_to_hub(common, files, tmp_path, hub_server):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--do_eval", "--num_train_epochs", "2"]
    words += "--push_to_hub --hub_model_id me/films --hub_private_repo True --hub_strategy every_save".split()
    run_glue_gaml.main([*words, "--hub_always_push", "True", "--hub_token", "hf_write"])
    assert hub_server.history("me/films")[1:] == [
        "Training in progress, epoch 1",
        "Training in progress, epoch 2",
        "Upload GAML-BERT checkpoint",
    ]
    assert hub_server.repo("me/films").private
    check_checkpoint(snapshot_download("me/films", cache_dir=tmp_path / "cache"))
    pushed = hub_server.files("me/films")
    assert {"README.md", "handler.py", "depth_score.png", "speed_score.png"} <= pushed.keys()
    assert not {"training_args.bin", "run.json"} & pushed.keys()
    card = pushed["README.md"].decode()
    for part in ("# me/films\n", "on train.csv", "| rows, train | 144 |", "--hub_token ...", "every time: "):
        assert part in card
    for private in ("hf_write", str(tmp_path)):
        assert not any(private.encode() in content for content in pushed.values())
        assert private not in json.dumps(json.loads((tmp_path / "out" / "run.json").read_text())["command"])


def test_the_command_shown_in_public():
    words = (
        "recipe.json --token=hf_a --hub_token hf_b --train_file=/home/me/train.csv --output_dir /my/out --alpha 0.3"
    )
    assert run_glue_gaml.shown_command(words.split()) == (
        "python run_glue_gaml.py recipe.json --token=... --hub_token ... --train_file=train.csv --output_dir out "
        "--alpha 0.3"
    )


# The recipes of the paper

RECIPES = Path(__file__).parents[1] / "hub_models"


def test_there_is_a_recipe_for_each_task():
    folders = {path.parent.name for path in RECIPES.glob("*/recipe.json")}
    assert folders == {f"gaml-bert-{name}" for name in GLUE_TASKS} | {"gaml-bert-demo"}


@mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_a_recipe_is_table_7(task):
    path = RECIPES / f"gaml-bert-{task.name}" / "recipe.json"
    model, data, gaml, training = run_glue_gaml.parse_arguments([str(path)])
    assert model.model_name_or_path == "google-bert/bert-base-uncased"
    assert (data.task_name, data.dataset_name, data.train_file) == (task.name, None, None)  # so nyu-mll/glue
    assert (training.learning_rate, training.warmup_epochs) == (task.learning_rate, task.warmup_epochs)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert (batch, gaml.alpha) == (task.batch_size, task.alpha)
    # Sec. 6.4: early stopping, selection by the mean over exits, the range of the speed-up; Sec. 6.5: patience.
    assert (training.early_stopping_patience, training.metric_for_best_model) == (5, "exit_mean")
    assert (gaml.exit_strategy, gaml.patience, gaml.target_speed_up) == ("patience", None, [1.8, 2.1])
    assert (gaml.ga_mode, gaml.distillation) == ("soft", "mutual")
    assert training.do_train
    assert training.do_eval
    rate = f"{task.learning_rate:.0e}".replace("e-0", "e-")
    row = f"(gaml-bert-{task.name}/) | {rate} | {task.warmup_epochs} | {task.batch_size} | {task.alpha} |"
    assert row in (RECIPES / "README.md").read_text()
    assert f"run_glue_gaml.py hub_models/gaml-bert-{task.name}/recipe.json" in (path.parent / "README.md").read_text()


@mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_a_recipe_trains(task, backbone, tmp_path, glue_like):
    recipe = RECIPES / f"gaml-bert-{task.name}" / "recipe.json"
    words = f"--model_name_or_path {backbone} --dataset_name {glue_like(task)} --output_dir {tmp_path / 'out'}"
    words += " --max_steps 1 --use_cpu True --report_to none --disable_tqdm True --dataloader_pin_memory False"
    run = run_glue_gaml.main([str(recipe), *words.split(), "--latency_rows", "0"])
    assert run["global_step"] == 1
    assert run["config"]["alpha"] == task.alpha
    assert list(run["evaluation"]) == list(task.validation_splits)
    assert {name for name in task.submission_files if (tmp_path / "out" / name).exists()} == set(task.submission_files)
    check_checkpoint(tmp_path / "out")


@fixture
def glue_like(tmp_path):
    """Makes a folder with a task's splits, columns and classes, of few rows, its files named as on the Hub."""

    def make(task, test_rows: int = 8) -> Path:
        features = Features({"label": ClassLabel(names=list(task.label_names))})
        features |= {column: Value("string") for column in task.text_columns}
        for split in ("train", *task.validation_splits, *task.test_splits):
            count = 40 if split == "train" else test_rows if split in task.test_splits else 8
            labels = [-1 if split in task.test_splits else row % task.num_labels for row in range(count)]
            columns = dict.fromkeys(task.text_columns, TWO_TEXTS * (count // 2))
            rows = Dataset.from_dict({"label": labels, **columns}, features=Features(features))
            (tmp_path / task.name / "data").mkdir(parents=True, exist_ok=True)
            rows.to_parquet(tmp_path / task.name / "data" / f"{split}-00000-of-00001.parquet")
        return tmp_path / task.name

    return make
