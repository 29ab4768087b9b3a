"""`run_glue_gaml.py` from the command line's words to the folder it leaves, on a tiny BERT."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import snapshot_download
from pytest import approx, fixture, mark, raises
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer, BertConfig, BertModel, pipeline

import gaml_score
import run_glue_gaml
from conftest import Margin
from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.evaluation.glue import GLUE_TASKS
from gaml_hf.hub import check_checkpoint, save_checkpoint
from gaml_hf.models import exiting_gaml
from gaml_hf.models.handler import EndpointHandler
from gaml_hf.runtime.ort import export_onnx
from gaml_hf.runtime.scoring import ClassifierLoader, score_file
from gaml_hf.training import script


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
    assert "validation: 40 rows, cut to 64 tokens" in printed
    assert "wanted: 1.00x to 4.00x layers (policy chosen on rows set aside, where it gave " in printed
    told = (out / "README.md").read_text() + (out / "run.json").read_text()
    assert '"None"' not in told
    assert "| None |" not in told
    assert "missed" not in printed + told
    assert "- A text is cut to 64 tokens\n" in told
    assert "| `max_seq_length` | 64 |" in told

    check_checkpoint(out)
    assert {"depth_score.png", "speed_score.png", "README.md", "run.json"} <= {path.name for path in out.iterdir()}
    saved = GamlBertForSequenceClassification.from_pretrained(out)
    assert saved.config.exit_strategy == "entropy"
    assert saved.config.exit_threshold == run["chosen"]["parameter"]

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


def test_class_weights(common, tmp_path, caplog):
    """Three rows of one class to one of the other; those of the other are set to weigh three times as much."""
    rows = sorted(sentences(120, seed=1), key=lambda row: row["label"])
    rows = [row for row in rows if row["label"] == "positive"][:15] + rows[:45]
    files = {"train": write_csv(tmp_path / "unequal.csv", rows)}
    words = [*common, *with_files(files, "train"), "--do_train", "--num_train_epochs", "1", "--holdout_fraction", "0"]
    words += ["--exit_strategy", "none", "--class_weights"]
    run = run_glue_gaml.main([*words, "balanced"])
    assert run["config"]["class_weights"] == approx([60 / (2 * 45), 60 / (2 * 15)])
    saved = GamlBertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.config.class_weights == run["config"]["class_weights"]
    assert "Weights of the classes: {'negative': 0.666" in caplog.text
    assert "class_weights" in (tmp_path / "out" / "README.md").read_text()

    given = run_glue_gaml.main([*words, "0.5", "2", "--overwrite_output_dir"])
    assert given["config"]["class_weights"] == [0.5, 2.0]
    weights = GamlBertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert max((weights[name] - weight).abs().max() for name, weight in saved.state_dict().items()) > 1e-5
    with raises(Exception, match="`class_weights` must hold one finite number from 0 for each of the 2 classes"):
        run_glue_gaml.main([*words, "1", "2", "3", "--overwrite_output_dir"])


def test_balanced_class_weights():
    """Those of scikit-learn, where each class has rows."""
    labels = [0, 0, 0, 0, 1, 2, 2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert script.balanced_class_weights(labels, ["a", "b", "c"]) == approx(expected)
    with raises(ValueError, match="needs a row of each class among the training rows. 'd' has none"):
        script.balanced_class_weights(labels, ["a", "b", "c", "d"])


@fixture
def decided(folder, files):
    """Words that score `folder`, whose texts differ in class and in exit."""
    model = GamlBertForSequenceClassification.from_pretrained(folder)
    model.config.id2label = dict(enumerate(["negative", "positive", "neutral"]))
    model.config.label2id = {label: k for k, label in model.config.id2label.items()}
    model.config.exit_strategy, model.config.exit_threshold = "entropy", 0.3
    model.save_pretrained(folder)
    words = f"--model_name_or_path {folder} --do_eval --use_cpu True --report_to none --latency_rows 0"
    return [*words.split(), *with_files(files, "validation"), "--dataloader_pin_memory", "False"]


@mark.parametrize("words", [["--bf16"], ["--pad_to_max_length", "True"]], ids=str)
def test_scores_and_speeds_are_those_of_the_checkpoint(decided, tmp_path, words):
    """Whoever loads it has neither the training's autocast nor its padding."""
    runs = [run_glue_gaml.main([*decided, *more, "--output_dir", str(tmp_path / "o")]) for more in ([], words)]
    plain, other = (run["evaluation"]["validation"] for run in runs)
    assert 1 < plain["policy"]["flops_speed_up"] < 4
    assert other["policy"] == approx(plain["policy"])
    assert other["exits"] == plain["exits"]


def test_rows_are_drawn_by_data_seed_where_it_is_0_too():
    rows = Dataset.from_dict({"row": list(range(50))})

    def held_out(**seeds):
        arguments = script.GamlTrainingArguments("out", use_cpu=True, dataloader_pin_memory=False, **seeds)
        return script.set_aside(rows, None, script.GamlArguments(), arguments)[1]["row"][:]

    assert held_out(data_seed=0, seed=1) == held_out(data_seed=0, seed=2) == held_out(seed=0)
    assert held_out(seed=1) != held_out(seed=2)


def test_an_encoder_that_was_a_regressor(common, backbone, files):
    """A cross-encoder, say: its head of one number is not taken over, and the classes are the data's."""
    path = Path(backbone, "config.json")
    regressor = {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    path.write_text(json.dumps(json.loads(path.read_text()) | regressor))
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "1", "--exit_strategy", "none"]
    config = run_glue_gaml.main(words)["config"]
    assert config["id2label"] == {0: "negative", 1: "positive"}
    assert config["problem_type"] is None


def test_what_changes_nothing_is_told(caplog):
    def told(*words: str, **fields) -> str:
        caplog.clear()
        (arguments,) = script.parse_arguments([*words], (script.GamlArguments,))
        arguments.warn_of_unused(GamlBertConfig(**fields))
        return caplog.text

    assert "`ga_granularity` is not used" in told("--ga_granularity", "tensor")
    assert told("--ga_granularity", "tensor", "--alpha", "0.5", ga_mode="soft") == ""
    unused = ("--alpha", "0.5", "--kd_temperature", "2")
    assert "`alpha` and `kd_temperature` are not used: no exit teaches another" in told(*unused, distillation="none")
    assert told(*unused) == ""


def test_a_list_of_pairs_that_is_not_json(common, files):
    words = [*common, *with_files(files, "train"), "--do_train", "--distillation", "[[1,2]"]
    with raises(
        ValueError, match=r"`distillation` must be mutual, .* such as .* Got \[\[1,2\], where JSON says: Expecting"
    ):
        run_glue_gaml.main(words)


def test_of_a_command_the_secrets_alone_are_hidden():
    words = "--hub_token hf_1 --token=hf_2 --push_to_hub_token hf_3 --tokenizer_name own --split_special_tokens False"
    shown = script.shown_command(words.split(), "run.py")
    assert shown == (
        "python run.py --hub_token ... --token=... --push_to_hub_token ... --tokenizer_name own "
        "--split_special_tokens False"
    )
    assert script.shown_command(["--train_file", "../shop/train.csv", "data/x.csv", "~/y"], "run.py") == (
        "python run.py --train_file train.csv data/x.csv y"
    )
    with raises(ValueError, match="`--hub_tok` is not an argument of this script. Did you mean `--hub_token`"):
        run_glue_gaml.parse_arguments("--model_name_or_path x --task_name sst2 --output_dir y --hub_tok hf_1".split())


def test_the_help_tells_what_a_new_model_has(capsys):
    with raises(SystemExit):
        run_glue_gaml.parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "in [0, 1]. (default: the model's; of a new one 0.2)" in told  # `GamlBertConfig().alpha`
    assert "Texts train for entropy, images for patience. --patience" in told
    assert "(default: None)" not in told


def test_rows_of_a_file_stay_in_their_order(common, tokenizer, bert_kwargs, tmp_path):
    """Whatever order the training wants: predictions, and lengths for the speed-up in FLOPs, are of their own rows."""
    random = np.random.default_rng(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rows = [
        {"sentence": " ".join(random.choice(words, random.integers(2, 40))), "label": ["no", "yes"][i % 2]}
        for i in range(64)
    ]
    files = {split: write_csv(tmp_path / f"{split}.csv", rows) for split in ("validation", "test")}
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    policy = {"exit_strategy": "patience", "patience": 1}
    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, initializer_range=0.5, **labels, **policy))
    save_checkpoint(model.eval(), tokenizer, tmp_path / "model")
    usual = [*common, "--model_name_or_path", str(tmp_path / "model"), *with_files(files, "validation", "test")]
    usual += ["--do_eval", "--do_predict", "--latency_rows", "0", "--per_device_eval_batch_size", "4"]
    policies, written = [], []
    for strategy in ("random", "group_by_length"):
        run = run_glue_gaml.main([*usual, "--train_sampling_strategy", strategy])
        policies.append(run["evaluation"]["validation"]["policy"])
        with (tmp_path / "out" / "predictions_test.tsv").open(encoding="utf-8") as file:
            lines = csv.DictReader(file, delimiter="\t")
            written.append([(line["prediction"], int(line["exit_layer"])) for line in lines])
    assert policies[1] == policies[0]
    answers = pipeline("text-classification", model=str(tmp_path / "model"), trust_remote_code=True, device="cpu")(
        [row["sentence"] for row in rows]
    )
    expected = [(answer["label"], answer["exit_layer"]) for answer in answers]
    assert written == [expected, expected]
    assert len({answer["exit_layer"] for answer in answers}) > 1
    assert len({answer["label"] for answer in answers}) > 1


READINGS = {
    "by default": ([], True),
    "as control tokens": (["--split_special_tokens", "False"], False),
    "with a token of one's own": (["--tokenizer_name", "own"], False),
}


@mark.parametrize("reading", READINGS)
def test_a_model_is_served_as_it_was_scored(common, files, tokenizer, tmp_path, monkeypatch, reading):
    """The length and the reading of special tokens: of script, pipeline, handler, gaml-score and an ONNX export."""
    words, split = READINGS[reading]
    monkeypatch.chdir(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["plot"]})  # in the vocabulary already
    tokenizer.save_pretrained("own")
    texts = [
        "the film is [MASK] [SEP] good .",
        "the film is good [SEP] [PAD] awful .",
        "bad plot [CLS] good",
        "the film is a story of a scene and the actor is so good .",
    ]
    test = write_csv(tmp_path / "odd.csv", [{"sentence": text} for text in texts])
    words = [*common, *with_files(files, "train"), "--test_file", test, "--do_train", "--do_predict", *words]
    run_glue_gaml.main([*words, "--max_steps", "2", "--patience", "1", "--max_seq_length", "9"])

    out = tmp_path / "out"
    with (out / "predictions_test.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    expected = [(row["prediction"], approx(float(row["score"]), abs=2e-6), int(row["exit_layer"])) for row in rows]

    def served(answers):
        return [(answer["label"], answer["score"], answer["exit_layer"]) for answer in answers]

    classifier = pipeline("text-classification", model=str(out), trust_remote_code=True, device="cpu")
    tokens = classifier.tokenizer
    assert (tokens.model_max_length, tokens.split_special_tokens) == (9, split)
    answers = classifier(texts)
    assert served(answers) == expected
    assert answers[3]["truncated"]
    classifier.save_pretrained("resaved")
    for folder in (out / "checkpoint-2", "resaved"):  # saved by the Trainer; loaded and saved again
        again = AutoTokenizer.from_pretrained(folder)
        assert (again.model_max_length, again.split_special_tokens) == (9, split)
    # A call may override both, and they matter.
    assert served(classifier(texts[3], max_length=64)) != expected[3:]
    assert served(classifier(texts, split_special_tokens=not split))[:3] != expected[:3]

    assert served(EndpointHandler(str(out))({"inputs": texts})) == expected
    export_onnx(GamlBertForSequenceClassification.from_pretrained(out), tmp_path / "onnx", tokenizer=tokens)
    for name, more in (("out", ["--device", "cpu"]), ("onnx", ["--onnx"])):
        command = ["--model", name, "--input", test, "--text_columns", "sentence", "--output", f"{name}.jsonl", *more]
        assert gaml_score.main(command) == 0
        assert served(map(json.loads, Path(f"{name}.jsonl").read_text().splitlines())) == expected

    # A script that is not told otherwise goes on with what the checkpoint says.
    words = [*common, "--model_name_or_path", str(out), *with_files(files, "train"), "--test_file", test]
    run_glue_gaml.main([*words, "--do_predict", "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "predictions_test.tsv").read_text() == (out / "predictions_test.tsv").read_text()


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


@mark.parametrize(
    ("words", "strategy"),
    [
        ("", "entropy"),
        ("--paper_letter", "patience"),
        ("--patience 3", "patience"),
        ("--budgeted_exit 2", "budgeted"),
        ("--exit_threshold 0.1", "entropy"),
        ("--paper_letter --exit_strategy max_prob", "max_prob"),
    ],
)
def test_the_strategy_where_none_is_named(common, words, strategy):
    *_, gaml, _ = run_glue_gaml.parse_arguments([*common, "--task_name", "sst2", *words.split()])
    gaml.settle_strategy("entropy")
    assert gaml.exit_strategy == strategy


@mark.parametrize("words", ["--patience 3 --exit_threshold 0.1", "--paper_letter --exit_threshold 0.1"])
def test_a_parameter_that_no_strategy_reads(common, words):
    *_, gaml, _ = run_glue_gaml.parse_arguments([*common, "--task_name", "sst2", *words.split()])
    with raises(ValueError, match="`exit_threshold` is read with .* alone; name the strategy .*'patience'"):
        gaml.settle_strategy("entropy")


def test_the_letter_of_the_paper(common, files):
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "1", "--paper_letter"]
    config = run_glue_gaml.main([*words, "--kd_reduction", "mean"])["config"]
    assert {name: config[name] for name in PAPER_LETTER} == PAPER_LETTER | {"kd_reduction": "mean"}
    assert config["exit_strategy"] == "patience"


def test_a_switch_named_alone_is_on(common):
    common = [*common, "--task_name", "sst2"]
    for name in ("exit_warm_start", "stop_gradient_between_exits"):
        for words, value in (([], None), ([f"--{name}"], True), ([f"--{name}", "False"], False)):
            assert getattr(run_glue_gaml.parse_arguments([*common, *words])[2], name) is value
    for words, value in (([], None), (["--split_special_tokens"], True), (["--split_special_tokens", "False"], False)):
        assert run_glue_gaml.parse_arguments([*common, *words])[1].split_special_tokens is value


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


def test_resuming_a_finished_run_keeps_its_time_and_loss(common, files, tmp_path):
    out = tmp_path / "out"
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--patience", "1"]
    words += "--early_stopping_patience 0 --num_train_epochs 2 --save_total_limit 5".split()
    first = run_glue_gaml.main(words)
    assert first["train_metrics"]["train_steps"] == first["global_step"] == 18
    assert min(first["train_metrics"][name] for name in ("train_loss", "train_runtime")) > 0
    saved = (out / "train_results.json").read_text()

    again = run_glue_gaml.main([*words, "--do_eval", "--resume_from_checkpoint", "True"])
    assert (out / "train_results.json").read_text() == saved
    on_disk = json.loads((out / "run.json").read_text())
    for run in (again, on_disk):
        assert run["train_metrics"] == first["train_metrics"]
        assert run["log_history"] == first["log_history"]
        assert run["global_step"] == 18
    assert on_disk["evaluation"]

    (out / "run.json").unlink()  # as if killed before it was written: unknown, not 0
    again = run_glue_gaml.main([*words, "--resume_from_checkpoint", "True"])
    assert "train_metrics" not in again
    assert again["log_history"] == first["log_history"][:-1]
    assert "| `learning_rate` | 0.002 |" in (out / "README.md").read_text()

    # Of a part, the figures are those of that part.
    words = [*words, "--resume_from_checkpoint", str(out / "checkpoint-9"), "--output_dir", str(tmp_path / "part")]
    part = run_glue_gaml.main(words)
    assert part["train_metrics"]["train_steps"] == 9
    losses = [entry["loss"] for entry in first["log_history"] if "loss" in entry and entry["step"] > 10]
    assert part["train_metrics"]["train_loss"] == approx(np.mean(losses), rel=0.2)


def test_the_encoder_is_not_written_over(common, files, tmp_path):
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "1"]
    folder = words[words.index("--model_name_or_path") + 1]
    words[words.index("--output_dir") + 1] = folder
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    with raises(ValueError, match="`output_dir` must be another folder than `model_name_or_path`"):
        run_glue_gaml.main(words)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()} == before


@mark.parametrize(("model", "output_dir"), [(None, "."), ("org/name", "org/name")])
def test_a_name_on_the_hub_is_no_folder(tmp_path, monkeypatch, model, output_dir):
    monkeypatch.chdir(tmp_path)
    arguments = script.GamlTrainingArguments(output_dir, do_train=True, use_cpu=True, dataloader_pin_memory=False)
    script.check_output_dir(arguments, script.GamlArguments(), model)


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
        {"premise": ["the film is good .", "it is"] * 18, "hypothesis": ["it is bad .", "in it", "good !", "no"] * 9}
    ).assign(label=[2, 5, 10] * 12)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    words = [*common, "--train_file", str(path), "--validation_file", str(path), "--do_train", "--do_eval"]
    run = run_glue_gaml.main([*words, "--num_train_epochs", "1", "--exit_strategy", "entropy"])
    assert run["config"]["id2label"] == {0: "2", 1: "5", 2: "10"}
    assert run["columns"]["text"] == ["premise", "hypothesis"]
    assert '{"text": "A text to classify.", "text_pair": ' in (tmp_path / "out" / "README.md").read_text()
    assert run["config"]["exit_strategy"] == "entropy"
    assert run["data_arguments"]["text_columns"] is None  # both text columns were found
    # Three weights are right for these rows, though the model as it comes would have two classes.
    words += ["--num_train_epochs", "1", "--exit_strategy", "none", "--overwrite_output_dir", "--class_weights"]
    assert run_glue_gaml.main([*words, "1", "2", "0.5"])["config"]["class_weights"] == [1.0, 2.0, 0.5]


def test_a_speed_up_that_no_policy_reaches_is_told(common, files, tmp_path, capsys):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--do_eval", "--max_steps", "2"]
    run = run_glue_gaml.main([*words, "--exit_strategy", "budgeted", "--target_speed_up", "2.5", "3.5"])
    assert run["chosen"]["speed_up"] in (2, 4)  # of 4 layers
    assert "wanted: 2.50x to 3.50x layers: missed (policy chosen on rows set aside, " in capsys.readouterr().out
    assert "**The wanted speed-up, 2.50x to 3.50x, was missed.**" in (tmp_path / "out" / "README.md").read_text()
    assert run["target_speed_up"] == [2.5, 3.5]


def test_a_policy_by_what_it_may_cost(common, files, tmp_path, capsys):
    """The promise is made on rows that neither trained nor chose the checkpoint, and told wherever results are."""
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--do_eval", "--max_steps", "2"]
    words += "--exit_strategy entropy --holdout_fraction 0.5 --max_loss 0.4 --calibrate_exits".split()
    run = run_glue_gaml.main([*words, "--risk", "accuracy_loss"])
    found, rows = run["certificate"], run["rows"]
    assert found["num_rows"] == rows["promise"] == rows["holdout"] == 40
    assert sum(rows.values()) == 160
    assert (found["max_loss"], found["confidence"], found["risk"]) == (0.4, 0.9, "accuracy_loss")
    assert found["exits"]["exit_temperatures"] == run["config"]["exit_temperatures"] is not None
    assert "chosen" not in run
    policy = run["evaluation"]["validation"]["policy"]
    assert (policy["exit_strategy"], policy["parameter"]) == (found["exit_strategy"], found["parameter"])
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["exit_certificate"] == found
    assert json.loads((out / "run.json").read_text())["certificate"] == found
    promise = "at most 0.4 of the rows get a wrong answer where the last exit's is right, with confidence 0.9"
    assert promise in (out / "README.md").read_text()
    line = f"promised: {promise} ({found['num_rows']} rows set aside, {found['num_lost']} lost); here "
    assert line + f"{policy['observed_risk']:.4f}" in capsys.readouterr().out
    # Read back: who scores the checkpoint is told what was promised.
    again = [*common, *with_files(files, "validation"), "--do_eval", "--model_name_or_path", str(out)]
    again[again.index("--output_dir") + 1] = str(tmp_path / "again")
    assert run_glue_gaml.main(again)["evaluation"]["validation"]["policy"]["observed_risk"] == policy["observed_risk"]
    assert line in capsys.readouterr().out


def test_a_later_run_keeps_what_is_known_of_the_training(common, files, tmp_path, caplog):
    out, notes = tmp_path / "out", "# My notes\n"
    out.mkdir()
    (out / "README.md").write_text(notes)
    run_glue_gaml.main([*common, *with_files(files, "train"), "--do_train", "--max_steps", "2"])
    assert (out / "README.old.md").read_text() == notes
    first, card = json.loads((out / "run.json").read_text()), (out / "README.md").read_text()
    assert "fine-tuned from" in card
    # Other columns than those of the training are no texts, and rows of one class are no error.
    rows = [{"sentence": "a good film", "comment": "no text of these", "label": "positive"}] * 3
    path = write_csv(tmp_path / "later.csv", rows)
    again = [*common, "--validation_file", path, "--test_file", path, "--do_eval", "--do_predict"]
    run = run_glue_gaml.main([*again, "--model_name_or_path", str(out)])
    assert run["columns"]["text"] == run["config"]["text_columns"] == ["sentence"]
    with raises(ValueError, match="must name 1: the model was trained on sentence. Got sentence comment"):
        run_glue_gaml.main([*again, "--model_name_or_path", str(out), "--text_columns", "sentence", "comment"])
    assert (out / "README.md").read_text() == card
    second = json.loads((out / "run.json").read_text())
    assert second.pop("later")["evaluation"]["validation"]["rows"] == 3
    assert second == first
    assert not (out / "depth_score.png").exists()  # which the card would show, and it tells of other rows
    # Policy and temperatures are chosen elsewhere: here they would take the place of what the card tells.
    words = [*common, *with_files(files, "train", "validation"), "--do_eval", "--model_name_or_path", str(out)]
    words += ["--exit_strategy", "max_prob"]
    with raises(ValueError, match="another folder than `model_name_or_path`, whose exit policy and model card this"):
        run_glue_gaml.main(words)
    caplog.clear()
    elsewhere = tmp_path / "elsewhere"
    chosen = run_glue_gaml.main([*words, "--output_dir", str(elsewhere), "--target_speed_up", "1", "2"])
    card = (elsewhere / "README.md").read_text()
    assert "fine-tuned from" not in card  # by this run, it was not
    assert "| rows, train |" not in card
    assert f"| rows, holdout | {chosen['rows']['holdout']} |" in card
    assert "chosen on rows of the file named for training" in card
    assert "give rows that had no part in it" in caplog.text


@mark.parametrize(
    ("words", "sentence"),
    [
        (["nofile.json"], "The file of arguments cannot be read: .*nofile.json"),
        (["broken.json"], "The file of arguments cannot be read"),
        (["list.json"], "`list.json` must hold names and values of arguments. Got a list."),
        (["typo.json"], "`--do_trian` is not an argument of this script. Did you mean `--do_train`?"),
        (
            ["--lerning_rate", "1"],
            "`--lerning_rate` is not an argument .* Did you mean `--learning_rate`?",
        ),
        (["--save_strategy", "no"], "load_best_model_at_end"),
        (["--model_name_or_path", "./nope"], "nope"),
        (["--model_name_or_path", "no/where"], "connect to|no/where"),
    ],
)
def test_slips_of_the_command_line_are_told_in_a_sentence(common, files, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("list", "[1]"), ("typo", '{"do_trian": true}')):
        Path(f"{name}.json").write_text(text)
    argv = [*words, *common, *with_files(files, "train"), "--do_train"]
    if "--model_name_or_path" in words:
        argv = [*common, *with_files(files, "train"), "--do_train", *words]
    monkeypatch.setattr(sys, "argv", ["run_glue_gaml.py", *argv])
    assert re.search(sentence, run_glue_gaml.command())


def test_a_class_may_have_any_name(tmp_path):
    script.write_predictions(tmp_path / "p.tsv", np.eye(2), np.array([1, 2]), ["good\tvery", "bad\nno"])
    read = pd.read_csv(tmp_path / "p.tsv", sep="\t")
    assert read["prediction"].tolist() == ["good\tvery", "bad\nno"]
    assert read["exit_layer"].tolist() == [1, 2]


def test_another_model_is_not_resumed(common, files):
    argv = [*common, *with_files(files, "train"), "--do_train", "--num_train_epochs", "1"]
    run_glue_gaml.main(argv)
    message = r"must go on with the model of `.*checkpoint-\d+`, with `exit_layers` \[1, 2, 3, 4\]. Got \[1, 4\]"
    with raises(ValueError, match=message):
        run_glue_gaml.main([*argv, "--resume_from_checkpoint", "True", "--exit_layers", "1", "4"])


@mark.parametrize("words", [["--seed", "8"], ["--holdout_fraction", "0.2"], ["--max_train_samples", "150"]], ids=str)
def test_other_rows_are_not_resumed(common, files, words):
    """Or rows that have trained would choose checkpoint and policy."""
    argv = [*common, *with_files(files, "train"), "--do_train", "--num_train_epochs", "1"]
    run_glue_gaml.main(argv)
    with raises(ValueError, match="`resume_from_checkpoint` must go on with the rows of .*`seed`"):
        run_glue_gaml.main([*argv, *words, "--resume_from_checkpoint", "True"])
    run_glue_gaml.main([*argv, "--resume_from_checkpoint", "True"])


def test_no_row_is_left_out_of_scores_and_predictions(common, files, tmp_path):
    """`dataloader_drop_last` is for steps."""
    words = [*common, *with_files(files, "train", "validation", "test"), "--do_train", "--do_eval", "--do_predict"]
    words += "--max_steps 2 --dataloader_drop_last True --per_device_eval_batch_size 16".split()
    run = run_glue_gaml.main(words)
    assert run["evaluation"]["validation"]["rows"] == sum(run["evaluation"]["validation"]["classes"].values()) == 40
    assert len((tmp_path / "out" / "predictions_test.tsv").read_text().splitlines()) == 1 + 12


def test_a_speed_up_that_chooses_nothing_is_told(common, files, caplog):
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "1", "--target_speed_up", "2", "3"]
    run_glue_gaml.main([*words, "--exit_threshold", "0.5"])
    assert "`target_speed_up` is not used: of `exit_strategy='entropy'` there is no parameter to choose" in caplog.text
    caplog.clear()
    words = [*common, *with_files(files, "validation"), "--do_eval", "--target_speed_up", "2", "3"]
    model = words[words.index("--output_dir") + 1]
    run_glue_gaml.main([*words, "--model_name_or_path", model])
    assert "`target_speed_up` is not used: the model keeps its exit policy. To choose another, give" in caplog.text


def test_temperatures_need_a_threshold_that_is_chosen_with_them(common, files):
    with raises(ValueError, match="`calibrate_exits` changes the probabilities that a threshold was chosen for"):
        run_glue_gaml.main([*common, *with_files(files, "validation"), "--do_eval", "--calibrate_exits"])
    words = [*common, *with_files(files, "train"), "--do_train", "--calibrate_exits", "--exit_threshold", "0.5"]
    with raises(ValueError, match="`calibrate_exits` needs training rows set aside"):
        run_glue_gaml.main([*words, "--holdout_fraction", "0"])


def test_a_class_whose_rows_are_all_set_aside(common, tmp_path, caplog):
    rows = [*sentences(30, seed=1), {"sentence": "the film is so so .", "label": "neutral", "grade": 1}]
    order = Dataset.from_dict({"row": range(31)})
    seed = next(seed for seed in range(1000) if 30 in order.shuffle(seed=seed)["row"][:3])  # a tenth is set aside
    words = [*common, "--train_file", write_csv(tmp_path / "rare.csv", rows), "--do_train", "--max_steps", "1"]
    run_glue_gaml.main([*words, "--seed", str(seed)])
    assert "No row to train on is of 'neutral'" in caplog.text


def test_a_best_checkpoint_by_what_is_no_score(common, files):
    """Before the first step: after the first epoch it would be lost."""
    argv = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "2", "--metric_for_best_model"]
    with raises(ValueError, match="`metric_for_best_model` must be one of accuracy, .*loss.* Got 'eval_f1'"):
        run_glue_gaml.main([*argv, "eval_f1"])
    assert run_glue_gaml.main([*argv, "eval_accuracy"])["global_step"] == 2


def test_a_training_without_evaluation(common, files):
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "2", "--eval_strategy", "no"]
    assert run_glue_gaml.main([*words, "--load_best_model_at_end", "False"])["global_step"] == 2


def test_a_promise_of_a_checkpoint_that_was_there_before(common, files, tmp_path, caplog):
    """Its training file may have trained it, which no row tells."""
    words = [*common, *with_files(files, "train"), "--do_train", "--max_steps", "2"]
    run_glue_gaml.main(words)
    assert "holds only if these rows had no part" not in caplog.text
    words = [
        *common,
        *with_files(files, "train", "validation"),
        "--do_eval",
        "--model_name_or_path",
        str(tmp_path / "out"),
        "--output_dir",
        str(tmp_path / "promised"),
    ]
    run_glue_gaml.main([*words, *"--exit_strategy entropy --holdout_fraction 0.5 --max_loss 0.4".split()])
    assert "holds only if these rows had no part in making this checkpoint" in caplog.text


def test_a_strategy_of_ones_own_with_a_parameter(common, files, monkeypatch):
    monkeypatch.setitem(exiting_gaml.EXIT_POLICIES, "margin", Margin)
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--do_eval", "--max_steps", "2"]
    for more in ((), ("--max_loss", "0.4")):
        with raises(ValueError, match="`exit_threshold` must be given with `exit_strategy='margin'`"):
            run_glue_gaml.main([*words, "--exit_strategy", "margin", *more])
    evaluation = run_glue_gaml.main([*words, "--exit_strategy", "margin", "--exit_threshold", "0.1"])["evaluation"]
    assert evaluation["validation"]["policy"]["exit_strategy"] == "margin"
    assert evaluation["validation"]["curves"].keys() == {"budgeted", "patience", "entropy", "max_prob"}


def test_a_promise_that_no_row_could_support(common, files):
    words = [*common, *with_files(files, "train"), "--do_train", "--max_loss", "0.01"]
    message = (
        "`max_loss=0.01` at `confidence=0.9` needs at least 230 rows, .* `holdout_fraction=0.1` sets 16 of 160 aside"
    )
    with raises(ValueError, match=message):
        run_glue_gaml.main(words)


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


def test_a_class_that_is_not_of_the_task(common, files, tmp_path):
    rows = [{"sentence": "good", "label": "positive"}, {"sentence": "bad", "label": "no"}]
    words = [*common, "--task_name", "sst2", "--train_file", write_csv(tmp_path / "sst2.csv", rows)]
    with raises(ValueError, match=r"Row 1 of the train split, .* must be one of \['negative', 'positive', '0', '1'\]"):
        run_glue_gaml.main([*words, "--test_file", files["test"], "--do_train", "--do_predict"])
    assert not list((tmp_path / "out").glob("checkpoint-*"))  # before it was trained


BROKEN_ROWS = [
    ([{"sentence": "good", "label": "a"}, {"sentence": "", "label": "b"}], "Row 1 of the train split, column 'sent"),
    (
        [{"sentence": "good", "label": "a"}, {"sentence": " ", "label": "b"}, {"sentence": "\u3000", "label": "b"}],
        r"Row 1 of the train split, column 'sentence', must hold more than blanks.* In all, 2 such rows: 1, 2\. Take",
    ),
    (
        [{"sentence": "good", "label": 0.5}, {"sentence": "bad", "label": 1.0}],
        r"Row 0 of the train split, column 'label', must be a name or a whole number .*regression.* Got '0\.5'",
    ),
    (
        [{"sentence": "good", "label": "a"}, {"sentence": "bad", "label": ""}],
        "Row 1 of the train split, column 'label', has no label",
    ),
    (
        [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": None}, {"sentence": "bad", "label": 0}],
        "Row 1 of the train split, column 'label', has no label",
    ),
    (
        [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": -100}],
        r"Row 1 of the train split, column 'label', must not be negative.* take such rows out\. Got '-100'",
    ),
    (
        [{"sentence": "good", "label": -100}, {"sentence": "bad", "label": -100}],
        "Row 0 of the train split, column 'label', must not be negative",
    ),
    (
        [{"sentence": "good", "label": None}] * 2,
        "Row 0 of the train split, column 'label', has no label. Got ''. In all, 2 such rows: 0, 1.",
    ),
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
    with raises(ValueError, match="Row 1 of the train split, column 'sentence', must be text, in valid Unicode"):
        run_glue_gaml.main([*common, "--train_file", str(path), "--do_train"])


def test_a_parquet_file_that_is_not_utf_8(common, tmp_path):
    texts = pa.array([b"good", b"bad \xed\xa0\x80"]).view(pa.string())  # U+D800, a lone surrogate
    pq.write_table(pa.table({"sentence": texts, "label": [0, 1]}), tmp_path / "rows.parquet")
    with raises(ValueError, match="Row 1 of the train split, column 'sentence', must be text, in valid Unicode.*bad"):
        run_glue_gaml.main([*common, "--train_file", str(tmp_path / "rows.parquet"), "--do_train"])


def test_labels_that_are_lists(common, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"sentence": "good", "label": [0, 1]}\n{"sentence": "bad", "label": [1]}')
    with raises(
        ValueError, match=r"Row 0 of the train split, column 'label', must be one class .*multi-label.* Got \[0, 1\]"
    ):
        run_glue_gaml.main([*common, "--train_file", str(path), "--do_train"])


@mark.parametrize("suffix", ["csv", "parquet"])
def test_blank_texts_are_used_where_wanted(common, tmp_path, caplog, suffix):
    rows = pd.DataFrame({"one": ["good"] * 4, "two": ["bad", "", None, "  "], "label": [0, 1, 0, 1]})
    path = str(tmp_path / f"rows.{suffix}")
    rows.to_csv(path, index=False) if suffix == "csv" else rows.to_parquet(path)
    words = [
        *common,
        "--validation_file",
        path,
        "--do_eval",
        "--exit_strategy",
        "none",
        "--text_columns",
        "one",
        "two",
    ]
    with raises(
        ValueError, match="Row 1 of .* column 'two', must hold more .* In all, 3 such rows: 1, 2, 3. Take them"
    ):
        run_glue_gaml.main(words)
    run = run_glue_gaml.main([*words, "--allow_blank_texts"])
    assert run["evaluation"]["validation"]["rows"] == 4
    assert "3 rows of the validation split, column 'two', are blank: 1, 2, 3." in caplog.text


def test_a_training_that_diverges_keeps_what_was_good(common, files, tmp_path):
    out = tmp_path / "out"
    words = [*common, *with_files(files, "train"), "--do_train", "--patience", "2", "--num_train_epochs", "1"]
    run_glue_gaml.main(words)
    before = (out / "model.safetensors").read_bytes()
    broken = [*words, "--overwrite_output_dir", "--learning_rate", "1e37", "--max_grad_norm", "0", "--optim", "sgd"]
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
        ("--task_name mrpc --positive_label equivalent", "`positive_label` is for data of your own"),
        ("--task_name sst2 --text_columns a b c", "`text_columns` must name one or two columns"),
        ("--task_name sst2 --ga_mode foo", r"^Field 'ga_mode' expected one of \('none', 'soft', 'hard'\), got foo$"),
        ("--task_name sst2 --exit_layers 9", r"^`exit_layers` must be rising layer numbers between 1 and 4 "),
        ("--task_name sst2 --alpha 2", r"^`alpha` must lie in \[0, 1\]. Got `alpha=2.0`.$"),
        ("--task_name sst2 --max_train_samples 0", "`max_train_samples` must be at least 1"),
        ("--task_name sst2 --target_speed_up 2 1", "`target_speed_up` must be a range"),
        ("--task_name sst2 --prediction_loss_only", "`prediction_loss_only` must be false: exits are scored by"),
        ("--task_name sst2 --max_loss 0.01 --target_speed_up 2 3", "both choose the exit policy. Give one of them"),
        ("--task_name sst2 --max_loss 1", "`max_loss` must be a number above 0 and below 1. Got `max_loss=1.0`"),
        ("--task_name sst2 --max_loss 0.1 --confidence 90", "`confidence` must be a number above 0 and below 1"),
        ("--task_name sst2 --max_loss 0.1 --risk f1", "`risk` must be one of"),
        ("--task_name sst2 --max_loss 0.1 --patience 2 --do_train", "`max_loss` chooses the parameter .*='patience'`"),
        ("--task_name sst2 --max_loss 0.1", "give an `exit_strategy` such as entropy, .* Got `exit_strategy=None`"),
        ("--task_name sst2 --class_weights equal", "`class_weights` must be `balanced` or one number .* Got equal"),
        ("--task_name sst2 --holdout_fraction 1.5", "`holdout_fraction` must lie in"),
        ("--task_name sst2 --eval_do_concat_batches False", "`eval_do_concat_batches` must be true"),
        ("--task_name sst2 --label_names grade", r"`label_names` is labels here, .* Got \['grade'\]"),
    ],
)
def test_wrong_arguments(common, words, sentence):
    with raises(ValueError, match=sentence):
        run_glue_gaml.main([*common, *words.split()])


def test_what_is_wrong_is_told_in_a_sentence(common, files, monkeypatch):
    """Where the sentence is ours; of anything else the traceback is shown."""
    words = [*common, *with_files(files, "train"), "--do_train"]
    monkeypatch.setattr(sys, "argv", ["run_glue_gaml.py", *words, "--alpha", "2"])
    with monkeypatch.context() as patch:
        patch.setitem(vars(run_glue_gaml), "__name__", "__main__")  # what it is on the command line
        assert run_glue_gaml.command() == "run_glue_gaml.py: error: `alpha` must lie in [0, 1]. Got `alpha=2.0`."
    monkeypatch.setattr(sys, "argv", ["run_glue_gaml.py", *words, "--label_column", "none"])
    assert run_glue_gaml.command().startswith("run_glue_gaml.py: error: `label_column` must be one of ['sentence', ")
    monkeypatch.setattr(run_glue_gaml, "load_model", lambda *_: int("no sentence of ours"))
    monkeypatch.setattr(sys, "argv", ["run_glue_gaml.py", *words])
    with raises(ValueError, match="invalid literal"):
        run_glue_gaml.command()


@mark.parametrize("length", [4, 65])
def test_a_length_that_the_model_cannot_read(common, files, length):
    with raises(ValueError, match=f"`max_seq_length` must lie between 5 and 64, .* Got {length}"):
        run_glue_gaml.main([*common, *with_files(files, "train"), "--do_train", "--max_seq_length", str(length)])


def test_a_policy_cannot_be_chosen_without_rows(common, files):
    words = [*common, *with_files(files, "train", "validation"), "--do_train", "--holdout_fraction", "0"]
    with raises(ValueError, match="needs its parameter, or training rows set aside"):
        run_glue_gaml.main(words)


@mark.parametrize("option", ["--bf16", "--bf16_full_eval"])
def test_a_word_where_bf16_will_crawl(common, files, monkeypatch, caplog, option):
    for cost, told in ((93.25, True), (0.4, False)):
        caplog.clear()
        monkeypatch.setattr("gaml_hf.training.script.bfloat16_cost", lambda cost=cost: cost)
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
    assert script.shown_command(words.split(), "run_glue_gaml.py") == (
        "python run_glue_gaml.py recipe.json --token=... --hub_token ... --train_file=train.csv --output_dir out "
        "--alpha 0.3"
    )


# Classes

PAIRS = [("the film is good .", "it is fine"), ("a sad plot", "no plot"), ("an awful film", "it is dull"), ("x", "y")]


def constant_model(backbone, folder, tokenizer, answer: str, names: list[str]) -> str:
    """A checkpoint that answers one class to everything."""
    id2label = dict(enumerate(names))
    label2id = {name: k for k, name in id2label.items()}
    model = GamlBertForSequenceClassification(
        GamlBertConfig.from_pretrained(backbone, id2label=id2label, label2id=label2id)
    )
    with torch.no_grad():
        for exit_ in model.exit_classifiers.values():
            exit_.weight.zero_()
            exit_.bias.copy_(torch.tensor([float(name == answer) for name in names]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@mark.parametrize("written", [["not_equivalent", "equivalent"], ["0", "1"]], ids=str)
@mark.parametrize(
    ("names", "answer"),
    [
        (["not_equivalent", "equivalent"], "equivalent"),
        (["equivalent", "not_equivalent"], "equivalent"),  # a model keeps its own order
        (["0", "1"], "1"),
        (["LABEL_0", "LABEL_1"], "LABEL_1"),
        (["not_equivalent", "equivalent"], "not_equivalent"),
    ],
    ids=str,
)
def test_the_classes_of_a_task_are_those_of_glue(
    common, backbone, tokenizer, tmp_path, names, answer, written, capsys
):
    """F1 counts "equivalent", whatever it is called in the file and wherever it stands in the model."""
    rows = [{"sentence1": a, "sentence2": b, "label": written[i < 3]} for i, (a, b) in enumerate(PAIRS)]
    model = constant_model(backbone, tmp_path / "model", tokenizer, answer, names)
    words = [*common, "--model_name_or_path", model, "--validation_file", write_csv(tmp_path / "dev.csv", rows)]
    run = run_glue_gaml.main([*words, "--task_name", "mrpc", "--do_eval", "--exit_strategy", "none"])
    policy = run["evaluation"]["validation"]["policy"]
    # 3 of 4 are equivalent. Always that: precision 3/4, recall 1, F1 6/7. Never that: F1 0.
    says_equivalent = answer != "not_equivalent"
    assert (policy["accuracy"], policy["f1"]) == approx((0.75, 6 / 7) if says_equivalent else (0.25, 0))
    assert run["config"]["id2label"] == dict(enumerate(names))
    assert sorted(run["classes"]["validation"].values()) == [1, 3]
    assert "; f1 is that of class equivalent" in capsys.readouterr().out


@mark.parametrize("written", [["not_equivalent", "equivalent"], ["0", "1"]], ids=str)
def test_a_model_that_starts_with_a_task_has_its_classes(common, tmp_path, written):
    rows = [{"sentence1": a, "sentence2": b, "label": written[i % 2]} for i, (a, b) in enumerate(PAIRS * 4)]
    words = [*common, "--task_name", "mrpc", "--train_file", write_csv(tmp_path / "train.csv", rows), "--do_train"]
    run = run_glue_gaml.main([*words, "--max_steps", "1", "--patience", "2"])
    assert run["config"]["id2label"] == {0: "not_equivalent", 1: "equivalent"}
    assert run["classes"] == {"train": {"not_equivalent": 8, "equivalent": 8}}


@mark.parametrize("positive", [None, "spam", "ham"])
def test_the_positive_class_of_own_data(common, backbone, tokenizer, tmp_path, positive, capsys):
    rows = [{"sentence": a, "label": "spam" if i < 3 else "ham"} for i, (a, _) in enumerate(PAIRS)]
    model = constant_model(backbone, tmp_path / "model", tokenizer, "spam", ["ham", "spam"])
    path = write_csv(tmp_path / "dev.csv", rows)
    words = [*common, "--model_name_or_path", model, "--validation_file", path, "--do_eval", "--exit_strategy", "none"]
    words += [] if positive is None else ["--positive_label", positive]
    run = run_glue_gaml.main([*words, "--calibrate_exits", "False"])
    policy = run["evaluation"]["validation"]["policy"]
    if positive is None:
        assert policy["macro_f1"] == approx((6 / 7 + 0) / 2)
    else:
        assert policy["f1"] == approx({"spam": 6 / 7, "ham": 0}[positive])
        assert run["positive_label"] == positive
        assert f"; f1 is that of class {positive}" in capsys.readouterr().out
        data_args = run_glue_gaml.DataTrainingArguments(validation_file=path)
        card = run_glue_gaml.card_values(run, data_args, run_glue_gaml.ModelArguments(model), "combined_score")
        assert card["chosen_scores"] == {"accuracy": 0.75, f"f1 of class {positive}": approx(policy["f1"])}


def test_a_positive_class_that_is_none(common, files, tmp_path):
    words = [*common, *with_files(files, "train"), "--do_train", "--positive_label"]
    with raises(ValueError, match=r"`positive_label` must be one of two classes. Got 'good', and \['negative', 'pos"):
        run_glue_gaml.main([*words, "good"])
    rows = [{"sentence": "good", "label": label} for label in "abc"]
    with raises(ValueError, match=r"`positive_label` must be one of two classes. Got 'a', and \['a', 'b', 'c'\]"):
        run_glue_gaml.main([*words, "a", "--train_file", write_csv(tmp_path / "three.csv", rows)])


def test_rows_need_not_hold_every_class_of_a_model(common, backbone, tokenizer, tmp_path):
    model = constant_model(backbone, tmp_path / "model", tokenizer, "b", ["a", "b", "c"])
    path = write_csv(tmp_path / "dev.csv", [{"sentence": "good", "label": label} for label in "abab"])
    words = [*common, "--model_name_or_path", model, "--validation_file", path, "--do_eval", "--exit_strategy", "none"]
    run = run_glue_gaml.main([*words, "--test_file", path, "--do_predict"])
    assert run["evaluation"]["validation"]["classes"] == {"a": 2, "b": 2, "c": 0}
    assert run["evaluation"]["validation"]["policy"]["accuracy"] == 0.5
    # And none at all where there is nothing to score.
    alone = [*common, "--test_file", path, "--do_predict", "--exit_strategy", "none"]
    run_glue_gaml.main([*alone, "--model_name_or_path", model])
    with raises(ValueError, match="has no classes yet: give rows with labels"):
        run_glue_gaml.main([*alone, "--model_name_or_path", backbone])


# Columns and files


def test_columns_and_classes_are_told(common, tmp_path, caplog, capsys):
    """`label_text` beside the text would make a pair, and every score 1."""
    rows = [row | {"label_text": row["label"], "ticket": f"T-{i:04}"} for i, row in enumerate(sentences(40, seed=1))]
    rows[3]["label"] = "Positive "
    path = write_csv(tmp_path / "rows.csv", rows)
    words = [*common, "--train_file", path, "--validation_file", path, "--do_train", "--do_eval", "--max_steps", "1"]
    run = run_glue_gaml.main([*words, "--patience", "2"])
    assert run["columns"] == {"text": ["sentence"], "label": "label"}
    counts = {name: sum(row["label"] == name for row in rows) for name in ("Positive ", "negative", "positive")}
    assert run["classes"] == {"train": counts, "validation": counts}
    told = ", ".join(f"{name!r} {count}" for name, count in counts.items())
    assert f"train: 40 rows; classes: {told}" in caplog.text
    assert "Text is read from column 'sentence'." in caplog.text
    assert "The classes ['Positive ', 'positive'] differ by case or blanks alone" in caplog.text
    assert f"validation: 40 rows, cut to 64 tokens; text: sentence; label: {told}" in capsys.readouterr().out


@mark.parametrize("name", ["rows[1].csv", "star*.csv", "x::y.csv", "s3://rows.csv"])
def test_the_file_that_is_named_is_read(common, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for other in ("rows1.csv", "star1.csv", "y.csv"):  # what a pattern would find
        write_csv(Path(other), sentences(30, seed=1))
    Path(name).parent.mkdir(exist_ok=True)
    for count in (20, 12):  # the second time it is another file of the same name
        write_csv(Path(name), sentences(count, seed=2))
        words = [*common, "--overwrite_output_dir", "--train_file", name, "--validation_file", name, "--do_train"]
        run = run_glue_gaml.main([*words, "--do_eval", "--max_steps", "1", "--patience", "2"])
        assert sum(run["rows"].values()) == count
        assert run["evaluation"]["validation"]["rows"] == count


def test_files_of_several_kinds(common, tmp_path):
    rows = sentences(24, seed=1)
    write_csv(tmp_path / "train.csv", rows)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace(",", ";"))
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    (tmp_path / "test.tsv").write_text("sentence\n" + "".join(row["sentence"] + "\n" for row in rows))
    words = [*common, "--do_train", "--do_eval", "--do_predict", "--max_steps", "1", "--patience", "2"]
    for split, suffix in (("train", "csv"), ("validation", "json"), ("test", "tsv")):
        words += [f"--{split}_file", str(tmp_path / f"{split.replace('validation', 'dev')}.{suffix}")]
    run = run_glue_gaml.main(words)
    assert run["classes"]["train"] == run["classes"]["validation"]
    assert len((tmp_path / "out" / "predictions_test.tsv").read_text().splitlines()) == 25


def test_training_and_scoring_read_the_same_texts(common, backbone, tokenizer, tmp_path, monkeypatch):
    """Among them those that other readers make numbers, truth values or nothing of."""
    texts = ["NA", "null", "None", "007", "1e5", "true", "2012", "-", "nan", 'a "quoted", text', "two\nlines", "good"]
    rows = [{"text": text, "label": ["01", "1"][i % 2], "other": i} for i, text in enumerate(texts)]
    path = write_csv(tmp_path / "rows.csv", rows)
    model = constant_model(backbone, tmp_path / "model", tokenizer, "1", ["01", "1"])
    seen: dict[str, list] = {"script": [], "scoring": []}
    tokenize = type(tokenizer)._encode_plus

    def spy(self, text, *args, **kwargs):
        seen[where].extend(text if isinstance(text, list) else [text])
        return tokenize(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", spy)
    where = "script"
    words = [*common, "--model_name_or_path", model, "--validation_file", path, "--do_eval", "--exit_strategy", "none"]
    run = run_glue_gaml.main([*words, "--text_columns", "text", "--latency_rows", "0"])
    assert run["evaluation"]["validation"]["classes"] == {"01": 6, "1": 6}
    where = "scoring"
    load = ClassifierLoader(model, False, "cpu", None)
    assert score_file(path, tmp_path / "out.jsonl", load, progress=False) == {"rows": 12, "skipped": 0}
    assert seen["script"] == texts
    assert sorted(seen["scoring"]) == sorted(texts)


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
    # Sec. 6.4: early stopping, selection by the mean over exits, the range of the speed-up.
    assert (training.early_stopping_patience, training.metric_for_best_model) == (5, "exit_mean")
    assert (gaml.exit_strategy, gaml.patience, gaml.target_speed_up) == (None, None, [1.8, 2.1])
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
