"""A checkpoint folder must work where gaml_hf is not: saved, checked, pushed, loaded by strangers, saved again."""

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from pytest import mark, raises
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TextClassificationPipeline,
    TrainingArguments,
    pipeline,
)

from conftest import WITHOUT_THE_PACKAGE, hub_environment
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline, GamlTrainer, hub
from gaml_hf.evaluation import OperatingPoint
from gaml_hf.hub import check_checkpoint, push_checkpoint, render_card, save_checkpoint
from gaml_hf.hub.checking import PICKLES
from gaml_hf.models.handler import EndpointHandler


TEXTS = [
    "a good film",
    "the plot is dull , the actor awful and the story never so very sad",
    "not bad !",
    "this movie was the worst",
    "they like the best scene in a great movie",
    "fine",
]
CODE = {f"{name}_gaml.py" for name in ("checksums", "engine", "exiting", "exits", "exits_base", "losses", "pipeline")}
CODE |= {"configuration_gaml.py", "modeling_gaml_bert.py"}

# What a stranger runs: no gaml_hf, however it is installed. Prints JSON; argument: where to load from and save to.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

def answers(name, texts, **kwargs):
    kwargs["trust_remote_code"] = True
    config = AutoConfig.from_pretrained(name, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    told = {"labels": config.id2label, "strategy": [config.exit_strategy, config.patience], "models": []}
    for auto in AutoModel, AutoModelForSequenceClassification:
        model = auto.from_pretrained(name, **kwargs)
        out = model(**batch)
        told["models"].append([out.logits.tolist(), out.exit_layer.tolist()])
    pipe = pipeline("text-classification", model=name, **kwargs)
    told["pipeline"] = pipe(texts, batch_size=4)
    told["patient"] = [row["exit_layer"] for row in pipe(texts, patience=2)]
    return told, model, tokenizer, pipe

told = {}
for load in json.loads(sys.argv[1]):
    told[load["key"]], model, tokenizer, pipe = answers(load["name"], load["texts"], **load.get("kwargs", {}))
    if "save_model" in load:
        model.save_pretrained(load["save_model"])
        tokenizer.save_pretrained(load["save_model"])
        pipe.save_pretrained(load["save_pipeline"])
    if "push_model" in load:
        model.push_to_hub(load["push_model"])
        tokenizer.push_to_hub(load["push_model"])
        pipe.push_to_hub(load["push_pipeline"])
for name in "config", "modeling", "pipeline":
    assert not any(module.split(".")[0] == "gaml_hf" for module in sys.modules)
print(json.dumps(told))
"""
)


@pytest.fixture
def model(bert_kwargs):
    config = GamlBertConfig(
        **bert_kwargs,
        exit_pooling="cls",
        initializer_range=0.3,  # far from zero, so that texts differ and exits disagree
        exit_strategy="patience",
        patience=1,
        id2label={0: "dull", 1: "fair", 2: "fine"},
        label2id={"dull": 0, "fair": 1, "fine": 2},
    )
    return GamlBertForSequenceClassification(config).eval()


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> Path:
    return save_checkpoint(model, tokenizer, tmp_path / "checkpoint")


def logits_of(model, tokenizer) -> torch.Tensor:
    return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# Saving


def test_a_saved_folder_is_complete_and_holds_no_pickle(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == CODE | {
        "README.md",
        "config.json",
        "handler.py",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    check_checkpoint(folder)
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_no_local_path_is_written_into_the_folder(model, tokenizer, tmp_path):
    first = save_checkpoint(model, tokenizer, tmp_path / "first")
    loaded = GamlBertForSequenceClassification.from_pretrained(first)
    second = save_checkpoint(loaded, AutoTokenizer.from_pretrained(first), tmp_path / "second")
    for path in second.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_saved_tokenizer_forgets_the_last_call(model, tokenizer, tmp_path):
    tokenizer(TEXTS, truncation=True, max_length=4, padding="max_length")
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))  # as a program without Transformers reads it
    assert len(saved.encode(TEXTS[1])) == len(TEXTS[1].split()) + 2
    assert len(saved.encode("good")) == 3
    assert (saved.get_vocab(), tokenizer.backend_tokenizer.truncation["max_length"]) == (tokenizer.get_vocab(), 4)


@mark.parametrize("split", [True, False])
def test_the_saved_tokenizer_keeps_how_it_reads(model, tokenizer, tmp_path, split):
    """Upstream saves `split_special_tokens` only where it was given to `from_pretrained`."""
    tokenizer.split_special_tokens, tokenizer.model_max_length = split, 9
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.split_special_tokens, loaded.model_max_length) == (split, 9)
    assert loaded("good [SEP]") == tokenizer("good [SEP]")


@mark.parametrize("umask", [0o022, 0o027])
def test_every_file_has_the_mode_of_the_umask(model, tokenizer, tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


@mark.parametrize("new", [False, True], ids=["over an old folder", "new"])
def test_a_failed_save_leaves_what_was_there(model, tokenizer, tmp_path, monkeypatch, new):
    folder = tmp_path / "checkpoint"
    if not new:
        save_checkpoint(model, tokenizer, folder)
    old = {path.name: path.read_bytes() for path in folder.glob("*")}
    expected = logits_of(model, tokenizer)

    def full_disk(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_disk)
    with torch.no_grad():
        model.exit_classifiers["4"].weight.zero_()
    with raises(OSError, match="No space left"):
        save_checkpoint(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == old
    assert [path.name for path in tmp_path.iterdir()] == ([] if new else ["checkpoint"])
    if not new:
        assert_close(logits_of(AutoModel.from_pretrained(folder), tokenizer), expected, rtol=0, atol=0)


def test_broken_weights_are_not_saved(model, tokenizer, folder):
    with torch.no_grad():
        model.exit_classifiers["2"].bias[1] = torch.nan
    with raises(
        ValueError, match=r"was not saved to .*\n- The weights hold NaN or infinity in exit_classifiers.2.bias"
    ):
        save_checkpoint(model, tokenizer, folder)
    check_checkpoint(folder)


def test_saving_over_a_folder_keeps_what_others_put_there(model, tokenizer, folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    (folder / "eval_results.json").write_text("{}")
    (folder / "README.md").write_text("written by hand")
    with torch.no_grad():
        model.exit_classifiers["1"].weight += 1
    save_checkpoint(model, tokenizer, folder)
    assert (folder / "checkpoint-3" / "optimizer.pt").read_bytes() == b"state"
    assert (folder / "eval_results.json").read_text() == "{}"
    assert (folder / "README.md").read_text() == "written by hand"
    saved = load_file(folder / "model.safetensors")["exit_classifiers.1.weight"]
    assert_close(saved, model.exit_classifiers["1"].weight.detach())
    save_checkpoint(model, tokenizer, folder, card={"model_name": "me/mine"})
    assert "# me/mine" in (folder / "README.md").read_text()


def test_the_order_in_which_an_old_folder_is_replaced(model, tokenizer, folder, monkeypatch):
    """The same config: it loads between any two steps. Another: not at all, rather than as a mixture."""
    states = []
    replace = os.replace

    def watched(source, target):
        if Path(target).parent == folder:
            states.append((folder / "config.json").exists())
            if states[-1]:
                states[-1] = AutoModel.from_pretrained(folder).config.patience
        replace(source, target)

    monkeypatch.setattr(hub.saving.os, "replace", watched)
    with torch.no_grad():
        model.exit_classifiers["1"].weight += 1
    save_checkpoint(model, tokenizer, folder)
    assert set(states) == {1}
    states.clear()
    model.config.patience = 3
    save_checkpoint(model, tokenizer, folder)
    assert set(states) == {False}
    assert AutoModel.from_pretrained(folder).config.patience == 3


def test_shards_of_an_older_save_do_not_stay(model, tokenizer, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 1
    (folder / "model.safetensors").unlink()
    check_checkpoint(folder)  # shards are complete too
    save_checkpoint(model, tokenizer, folder)
    assert [path.name for path in folder.glob("model*safetensors*")] == ["model.safetensors"]


# Checking


def lose(name):
    return lambda folder: (folder / name).unlink()


def drop(*keys):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return lambda folder: edit_config(folder, change)


def set_(value, *keys):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return lambda folder: edit_config(folder, change)


def change_weights(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


@mark.parametrize(
    ("spoil", "sentence"),
    [
        (lose("config.json"), "`config.json` is missing."),
        (lambda folder: (folder / "config.json").write_text("{"), "`config.json` is not valid: "),
        (set_("often", "patience"), "`config.json` is not valid: "),
        (drop("auto_map", "AutoModel"), "`auto_map` in `config.json` does not name the class for `AutoModel`."),
        (drop("auto_map"), "`auto_map` in `config.json` does not name the class for `AutoConfig`."),
        (drop("custom_pipelines"), "`custom_pipelines` in `config.json` does not name the class for "),
        (
            set_("you/other--modeling.Model", "auto_map", "AutoModel"),
            "the class for `AutoModel` from another repository, `you/other--modeling.Model`.",
        ),
        (lose("losses_gaml.py"), "`losses_gaml.py` is missing; `exits_base_gaml.py` needs it."),
        (lose("pipeline_gaml.py"), "`pipeline_gaml.py` is missing; "),
        (lose("model.safetensors"), "`model.safetensors` is missing."),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "`model.safetensors` cannot be read: "),
        (
            change_weights(lambda weights: weights.pop("exit_classifiers.3.bias")),
            "The weights lack exit_classifiers.3.bias.",
        ),
        (
            change_weights(lambda weights: weights.update({"exit_classifiers.9.bias": torch.zeros(3)})),
            "The weights hold, though the config describes no such part, exit_classifiers.9.bias.",
        ),
        (
            change_weights(lambda weights: weights.update({"exit_classifiers.4.bias": torch.zeros(2)})),
            "in another shape than the config says exit_classifiers.4.bias (2,) instead of (3,).",
        ),
        (
            change_weights(lambda weights: weights["exit_classifiers.4.bias"].fill_(torch.inf)),
            "The weights hold NaN or infinity in exit_classifiers.4.bias.",
        ),
        (lose("tokenizer_config.json"), "`tokenizer_config.json` is missing."),
        (lose("tokenizer.json"), "The vocabulary is missing: `tokenizer.json` or `vocab.txt`."),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "The tokenizer cannot be loaded: "),
        (lambda folder: (folder / "pytorch_model.bin").touch(), "`pytorch_model.bin` is a pickle"),
        (lambda folder: (folder / "extra.pkl").touch(), "`extra.pkl` is a pickle"),
    ],
)
def test_check_names_what_is_wrong(folder, spoil, sentence):
    spoil(folder)
    with raises(ValueError, match="is not a complete checkpoint with exits:\n- ") as error:
        check_checkpoint(folder)
    assert sentence in str(error.value)


def test_check_lists_everything_at_once(folder):
    lose("losses_gaml.py")(folder)
    lose("tokenizer.json")(folder)
    (folder / "weights.pt").touch()
    with raises(ValueError, match="not a complete") as error:
        check_checkpoint(folder)
    assert str(error.value).count("\n- ") == 3


def test_check_wants_a_tokenizer_that_fits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["wonderful"])
    tokenizer.save_pretrained(folder)
    with raises(ValueError, match=r"The tokenizer has (\d+) tokens, but the model has embeddings for \d+ only"):
        check_checkpoint(folder)


def test_check_passes_over_training_state(folder):
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (folder / name).touch()
    check_checkpoint(folder)


def test_check_of_no_folder(tmp_path):
    with raises(ValueError, match="`folder` must be an existing checkpoint folder. Got `.*nowhere`"):
        check_checkpoint(tmp_path / "nowhere")


# The card

MEASURED = {
    "model_name": "me/gaml-sst2",
    "base_model": "google-bert/bert-base-uncased",
    "dataset": "nyu-mll/glue",
    "task": "sst2",
    "split": "validation",
    "metric_name": "accuracy",
    "exit_scores": {1: 0.51, "2": 0.62, 3: float("nan"), 4: 0.93},  # JSON makes strings of keys
    "points": [
        OperatingPoint("patience", 1, 0.91, 1.95),
        OperatingPoint("patience", 3, 0.77777, float("nan")),
        OperatingPoint("entropy", 0.123456, 0.92, 1.5),
    ],
    "chosen": OperatingPoint("patience", 1, 0.91, 1.95),
    "chosen_on": "rows set aside",
    "flops_speed_up": 1.87,
    "latency_speed_up": 1.71,
    "rows": {"train": 90},
    "baseline": ("plain BERT", 0.925),
    "training_arguments": {"learning_rate": 2e-5, "optim": "a|b", "max_steps": -1, "fp16": None},
    "seed": 7,
    "date": "2026-01-02",
    "hardware": "one CPU",
    "versions": {"torch": "2.13.0"},
    "command": "python run_glue_gaml.py recipe.json",
    "license": "apache-2.0",
    "figures": ["speed_score.png"],
}


def test_card_says_what_was_measured(model):
    text = render_card(model.config, **MEASURED)
    assert re.search(r'pip install torch "transformers>=5\.[0-9.]+"', text)
    for part in (
        "**accuracy 0.9100 at 1.95x** with",
        "1.95 times as many layers as were run on average; in FLOPs it is 1.87x; on the clock",
        "(one CPU), 1.71x. The exit strategy was chosen on rows set aside.",
        "To compare, plain BERT: 0.9250",
        "| rows, train | 90 |",
        "| 1 | 4.00x | 0.5100 |",
        "| 2 | 2.00x | 0.6200 |",
        '| `exit_strategy="entropy", exit_threshold=0.123456` | 1.50x | 0.9200 |',
        "![Score against speed-up](speed_score.png)",
        "| `learning_rate` | 2e-05 |",
        r"| `optim` | a\|b |",
        "| seed | 7 |",
        "| hardware | one CPU |",
        "```bash\npython run_glue_gaml.py recipe.json\n```",
        "`dull`, `fair`, `fine`",
        'Saved with `exit_strategy="patience", patience=1`',
    ):
        assert part in text
    assert text.index("1.50x") < text.index("| 1.95x")  # the curve, slowest first
    for part in ("0.7778", "nan", "None", "max_steps"):
        assert part not in text


PAIR_CALL = 'classifier({"text": "A text to classify.", "text_pair": "The text beside it."})  # label'


def test_card_shows_the_call_that_the_model_takes(model):
    def card(*columns: str, **told) -> str:
        model.config.text_columns = [*columns]
        return render_card(model.config, **told)

    one, two = card("review"), card("premise", "hypothesis")
    assert 'classifier("A text to classify.")  # label' in one
    assert "- Trained on the column `review`\n" in one
    assert PAIR_CALL in two
    assert "- Trained on the column `premise` and the column `hypothesis`, a pair of texts\n" in two
    assert 'classifier("A text' not in two
    told = card("review", label_column="stars")
    assert "- Trained on the column `review`; classes from the column `stars`\n" in told


@mark.parametrize(
    ("target", "missed"), [(None, False), ([1.8, 2.1], False), ([2.0, 2.1], True), ([1.5, 1.9], True)], ids=str
)
def test_card_says_where_the_wanted_speed_up_was_missed(model, target, missed):
    text = render_card(model.config, **MEASURED, chosen_on_speed_up=1.99, target_speed_up=target)
    assert "chosen on rows set aside, where it gave 1.99x." in text
    sentence = "**The wanted speed-up, {:.2f}x to {:.2f}x, was missed.**".format(*target or (0, 0))
    assert (sentence in text) == ("missed" in text) == missed


def test_card_says_how_long_a_text_may_be(model, tokenizer, tmp_path):
    limit = model.config.max_position_embeddings
    tokenizer.model_max_length = 12
    text = (save_checkpoint(model, tokenizer, tmp_path / "short") / "README.md").read_text()
    assert f"- A text is cut to 12 tokens; `max_length` in a call changes that, up to {limit}\n" in text
    assert "At most\n  12 tokens of a text are read.\n" in text
    tokenizer.model_max_length = 10**30
    text = (save_checkpoint(model, tokenizer, tmp_path / "long") / "README.md").read_text()
    assert f"- A text is cut to {limit} tokens\n" in text


def test_card_metadata(model):
    data = ModelCard(render_card(model.config, **MEASURED)).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "text-classification",
        "apache-2.0",
    )
    assert (data.base_model, data.datasets, data.metrics) == (MEASURED["base_model"], ["nyu-mll/glue"], ["accuracy"])
    assert data.tags == ["gaml-bert", "early-exit"]
    results = [(r.dataset_type, r.dataset_config, r.dataset_split, r.metric_value) for r in data.eval_results]
    place = ("nyu-mll/glue", "sst2", "validation")
    assert results == [(*place, 0.91), (*place, 0.93)]
    assert [r.metric_name for r in data.eval_results] == [
        'accuracy at 1.95x (exit_strategy="patience", patience=1)',
        "accuracy, last exit",
    ]


def test_card_takes_a_mean_of_metrics_apart(model):
    scores = {"accuracy": 0.723, "f1": 0.8226}
    chosen = OperatingPoint("patience", 1, 0.7728, 1.95)
    values = MEASURED | {"metric_name": "combined_score", "chosen": chosen, "chosen_scores": scores}
    text = render_card(model.config, **values)
    assert "combined_score is the mean of accuracy (0.7230 here) and f1 (0.8226 here)." in text
    data = ModelCard(text).data
    assert data.metrics == ["accuracy", "f1"]
    results = [(r.metric_type, r.metric_value) for r in data.eval_results]
    assert results == [("accuracy", 0.723), ("f1", 0.8226), ("combined_score", 0.93)]


@mark.parametrize(
    "values",
    [
        {},
        {key: value for key, value in MEASURED.items() if key in ("base_model", "dataset", "license")},
        {key: value for key, value in MEASURED.items() if key != "metric_name"},  # a number of what?
        {
            "metric_name": "accuracy",
            "exit_scores": {1: None},
            "chosen": OperatingPoint("none", None, float("nan"), 1.0),
        },
    ],
)
def test_card_without_scores_shows_none(model, values):
    text = render_card(model.config, **values)
    assert "model-index" not in text
    assert "| accuracy" not in text
    assert "0.91" not in text
    assert "**" not in text
    assert "| 4 | 1.00x |" in text  # arithmetic, not a measurement
    assert "None" not in text
    assert (" license: " in text or "\nlicense: " in text) == ("license" in values)
    assert ModelCard(text).data.library_name == "transformers"


def test_card_names_a_local_base_model_without_its_path(model, tmp_path):
    local = tmp_path / "my-bert"
    local.mkdir()
    text = render_card(model.config, base_model=str(local), dataset=str(tmp_path / "train.csv"))
    assert "fine-tuned from `my-bert` on train.csv" in text
    assert str(tmp_path) not in text
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.datasets is None


def test_card_shows_the_figures_that_lie_in_the_folder(model, tokenizer, folder):
    (folder / "depth_score.png").touch()
    save_checkpoint(model, tokenizer, folder, card={})
    text = (folder / "README.md").read_text()
    assert "(depth_score.png)" in text
    assert "speed_score.png" not in text


def test_card_refuses_a_misspelt_key(model, tokenizer, tmp_path):
    with raises(TypeError, match="exit_score"):
        save_checkpoint(model, tokenizer, tmp_path / "checkpoint", card={"exit_score": {1: 0.5}})
    assert list(tmp_path.iterdir()) == []


# With the package


@mark.parametrize("trust_remote_code", [None, False, True])
def test_with_the_package_auto_classes_need_no_trust(folder, model, tokenizer, trust_remote_code):
    kwargs = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(folder, **kwargs)
        assert type(loaded) is GamlBertForSequenceClassification  # what is registered wins over the folder's code
        assert_close(logits_of(loaded, tokenizer), logits_of(model, tokenizer), rtol=0, atol=0)


def test_with_the_package_the_pipeline_still_needs_trust(folder, model, tokenizer):
    with raises(ValueError, match="set the option `trust_remote_code=True`"):
        pipeline("text-classification", model=str(folder))
    ours = pipeline("text-classification", model=str(folder), trust_remote_code=True)
    assert type(ours).__name__ == "GamlTextClassificationPipeline"
    named = pipeline("text-classification", model=str(folder), pipeline_class=GamlTextClassificationPipeline)
    assert named(TEXTS) == ours(TEXTS)
    # Two traps, told in docs/hub.md: an alias, and a model that is already loaded.
    stock = [
        pipeline("sentiment-analysis", model=str(folder), trust_remote_code=True),
        pipeline("text-classification", model=model, tokenizer=tokenizer, trust_remote_code=True),
    ]
    for classifier in stock:
        assert type(classifier) is TextClassificationPipeline
        assert classifier("a good film")[0].keys() == {"label", "score"}


def test_the_handler_keeps_the_contract_of_inference_endpoints(folder, model, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "handler", raising=False)
    import handler

    monkeypatch.delitem(sys.modules, "handler")
    endpoint = handler.EndpointHandler(path=str(folder))
    ours = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)
    assert endpoint({"inputs": TEXTS}) == ours(TEXTS)
    assert endpoint({"inputs": TEXTS[0]}) == ours(TEXTS[:1])
    pair = {"text": "a good film", "text_pair": "a bad film"}
    assert endpoint({"inputs": pair}) == ours([pair])
    deep = endpoint(
        {"inputs": TEXTS, "parameters": {"exit_strategy": "budgeted", "budgeted_exit": 3, "batch_size": 4}}
    )
    assert [row["exit_layer"] for row in deep] == [3] * len(TEXTS)
    json.dumps(deep)  # plain numbers
    with raises(ValueError, match="`inputs` must be a text or a non-empty list of texts. Got `inputs=None`"):
        endpoint({"text": "a good film"})
    with raises(ValueError, match="`parameters` must be a dictionary"):
        endpoint({"inputs": TEXTS, "parameters": "patience=3"})
    for data in (None, [], "a good film", {"inputs": []}, {"inputs": ""}):
        with raises(ValueError, match=r"must be a"):
            endpoint(data)


@mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"patiense": 3}, "`patiense` is not an argument of this pipeline. Did you mean `patience`?"),
        ({"patience": 0}, "`patience` must be a whole number of at least 1"),
        ({"budgeted_exit": 9}, "`budgeted_exit` must be one of the exits of this model"),
        ({"exit_threshold": 0.3}, "name the strategy you want"),
        ({"exit_strategy": "sometimes"}, "`exit_strategy` must be one of"),
        ({"exit_strategy": "entropy", "exit_threshold": "0.3"}, "`exit_threshold` must be a number in"),
        ({"exit_policy": "patience"}, "`exit_policy` must be an object"),
        ({"top_k": 0}, "`top_k` must be a whole number"),
        ({"on_error": "ignore"}, "`on_error` must be one of"),
        ({"num_workers": 24}, "`num_workers` would start processes"),
    ],
)
def test_the_handler_names_a_bad_parameter(folder, parameters, sentence):
    with raises(ValueError, match=re.escape(sentence)):
        EndpointHandler(str(folder))({"inputs": TEXTS, "parameters": parameters})


@mark.parametrize(
    ("bad", "kind"), [("", ValueError), (5, TypeError), (None, TypeError), ({"txt": "good"}, ValueError)]
)
def test_the_handler_and_a_bad_row(folder, bad, kind):
    endpoint = EndpointHandler(str(folder))
    with raises(kind, match=r"Row 1|row 1|\[1\]"):
        endpoint({"inputs": [TEXTS[0], bad, TEXTS[1]]})
    answers = endpoint({"inputs": [TEXTS[0], bad, TEXTS[1]], "parameters": {"on_error": "skip"}})
    assert [answers[0], answers[2]] == endpoint({"inputs": TEXTS[:2]})
    assert answers[1]["label"] is None
    assert answers[1]["error"]
    json.dumps(answers)


# Pushing


def test_a_push_is_one_commit_without_training_state(folder, hub_server):
    (folder / "eval_results.json").write_text("{}")
    sent = {path.name for path in folder.iterdir()}
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt", "training_args.bin", "runs/events"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    commit = push_checkpoint(folder, "me/mine", private=True)
    files = hub_server.files("me/mine")
    assert files.keys() == sent | {".gitattributes"}  # which the Hub puts into a new repository
    assert {"model.safetensors", "README.md", "handler.py", "eval_results.json", *CODE} <= files.keys()
    for name in sent - {"README.md"}:
        assert (folder / name).read_bytes() == files[name]
    assert hub_server.repo("me/mine").private
    assert commit == f"{hub_server.url}/me/mine/commit/{commit.oid}"
    assert hub_server.history("me/mine") == ["initial commit", "Upload GAML-BERT checkpoint"]
    assert hub_server.repo("me/mine").branches == {"main": commit.oid}


def test_a_push_names_the_repository_in_the_card(folder, hub_server):
    assert "# checkpoint\n" in (folder / "README.md").read_text()  # saved before it had a name
    push_checkpoint(folder, "me/mine")
    card = hub_server.files("me/mine")["README.md"].decode()
    assert "# me/mine\n" in card
    assert card.count('"me/mine"') == 3
    assert '"checkpoint"' not in card
    (folder / "README.md").write_text('# A film judge\n"A film judge"')  # written by hand
    push_checkpoint(folder, "me/mine")
    assert hub_server.files("me/mine")["README.md"] == b'# A film judge\n"A film judge"'


def test_a_push_takes_stale_weights_away(folder, model, hub_server):
    push_checkpoint(folder, "me/mine")
    hub_server.files("me/mine")["notes.md"] = b"kept"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    push_checkpoint(folder, "me/mine")
    files = hub_server.files("me/mine")
    assert "model.safetensors" not in files  # would be loaded in preference to the shards
    assert "model.safetensors.index.json" in files
    assert "notes.md" in files


def test_a_push_to_a_branch(folder, hub_server):
    first = push_checkpoint(folder, "me/mine")
    second = push_checkpoint(folder, "me/mine", revision="dev", commit_message="Try patience 1")
    assert hub_server.repo("me/mine").branches == {"main": first.oid, "dev": second.oid}
    assert hub_server.history("me/mine") == ["initial commit", "Upload GAML-BERT checkpoint", "Try patience 1"]


def test_an_incomplete_folder_is_not_pushed(folder, hub_server):
    lose("losses_gaml.py")(folder)
    with raises(ValueError, match="`losses_gaml.py` is missing"):
        push_checkpoint(folder, "me/mine")
    assert hub_server.requests == []


@mark.parametrize(
    ("token", "status"), [("hf_wrong", 401), ("hf_read", 403), ("hf_other", 403)], ids=["wrong", "read", "another's"]
)
def test_a_push_with_the_wrong_token_is_refused(folder, hub_server, token, status):
    before = push_checkpoint(folder, "me/mine")
    with raises(HfHubHTTPError) as error:
        push_checkpoint(folder, "me/mine", token=token)
    assert error.value.response.status_code == status
    assert hub_server.repo("me/mine").branches == {"main": before.oid}


def test_a_private_repository_shows_itself_to_its_owner_alone(folder, hub_server, tmp_path):
    push_checkpoint(folder, "me/mine", private=True)
    for token in ("hf_wrong", "hf_other", False):
        with raises(HfHubHTTPError) as error:
            snapshot_download("me/mine", cache_dir=tmp_path / str(token), token=token)
        assert error.value.response.status_code == (404 if token == "hf_other" else 401)
    check_checkpoint(snapshot_download("me/mine", cache_dir=tmp_path / "cache", token="hf_read"))


@mark.parametrize("where", ["lfs", "commit"])
def test_an_interrupted_push_leaves_the_last_complete_state(folder, model, tokenizer, hub_server, tmp_path, where):
    expected = logits_of(model, tokenizer)
    push_checkpoint(folder, "me/mine")
    before = hub_server.files("me/mine")
    with torch.no_grad():
        model.exit_classifiers["4"].weight.neg_()
    newer = save_checkpoint(model, tokenizer, tmp_path / "newer")
    hub_server.broken.add(where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's tries
        with raises(Exception, match=r"(?i)error while uploading|disconnect|reset|broken pipe"):
            push_checkpoint(newer, "me/mine")
    assert hub_server.files("me/mine") == before
    loaded = snapshot_download("me/mine", cache_dir=tmp_path / "cache-1")
    check_checkpoint(loaded)
    assert_close(logits_of(AutoModel.from_pretrained(loaded), tokenizer), expected, rtol=0, atol=0)

    hub_server.broken.clear()
    push_checkpoint(newer, "me/mine")  # tried again, it goes through
    loaded = AutoModel.from_pretrained(snapshot_download("me/mine", cache_dir=tmp_path / "cache-2"))
    assert_close(logits_of(loaded, tokenizer), logits_of(model, tokenizer), rtol=0, atol=0)


def test_pushing_the_model_alone(model, tokenizer, hub_server):
    """Not complete, for there is no tokenizer, but code and weights are one commit, and the rest can follow."""
    model.push_to_hub("me/mine", private=True, commit_message="The model")
    code = CODE | {"handler.py"}
    assert hub_server.files("me/mine").keys() == code | {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    tokenizer.push_to_hub("me/mine", commit_message="The tokenizer")
    assert hub_server.history("me/mine") == ["initial commit", "The model", "The tokenizer"]
    assert hub_server.repo("me/mine").private
    assert {"tokenizer.json", "tokenizer_config.json", *code} <= hub_server.files("me/mine").keys()


def test_pushing_the_model_over_a_complete_repository_keeps_the_rest(folder, model, hub_server, tmp_path):
    push_checkpoint(folder, "me/mine")
    before = hub_server.files("me/mine")
    with torch.no_grad():
        model.exit_classifiers["4"].weight.neg_()
    model.push_to_hub("me/mine")
    after = hub_server.files("me/mine")
    assert {name for name in after if after[name] != before.get(name)} == {"model.safetensors"}
    check_checkpoint(snapshot_download("me/mine", cache_dir=tmp_path / "cache"))


# From a training


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """Makes a trainer of four steps on `TEXTS`, with a checkpoint after every second one."""

    def make(**arguments):
        rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)]
        keep = {"per_device_train_batch_size": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path / "out"), **{**keep, **quiet, "learning_rate": 0.0123, **arguments})
        return GamlTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    return make


def check_every_commit(hub_server, repo_id, cache):
    """But the first, which the Hub itself makes."""
    _, *commits = hub_server.repo(repo_id).commits
    for sha in commits:
        check_checkpoint(snapshot_download(repo_id, revision=sha, cache_dir=cache))
        files = hub_server.files(repo_id, sha)
        assert {"handler.py", "README.md", *CODE} <= files.keys()
        assert not any(name.endswith(PICKLES) or "checkpoint-" in name for name in files)
    return commits


def test_a_trainer_pushes_a_complete_repository(trainer, model, tokenizer, hub_server, tmp_path):
    trainer = trainer(hub_model_id="me/mine", hub_private_repo=True)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "out" / "training_args.bin").exists()  # the stock Trainer writes this pickle
    commit = trainer.push_to_hub(license="apache-2.0", base_model="google-bert/bert-base-uncased")
    later = trainer.push_to_hub("Once more", blocking=False, revision="dev").result(timeout=60)
    assert check_every_commit(hub_server, "me/mine", tmp_path / "cache") == [commit.oid, later.oid]
    assert hub_server.history("me/mine")[1:] == ["End of training", "Once more"]
    assert hub_server.repo("me/mine").branches == {"main": commit.oid, "dev": later.oid}
    assert hub_server.repo("me/mine").private
    card = hub_server.files("me/mine")["README.md"].decode()
    for part in ("# me/mine\n", "license: apache-2.0", "fine-tuned from [google-bert", "| `learning_rate` | 0.0123 |"):
        assert part in card
    loaded = AutoModel.from_pretrained(snapshot_download("me/mine", cache_dir=tmp_path / "cache"))
    assert_close(logits_of(loaded, tokenizer), logits_of(model.eval(), tokenizer), rtol=0, atol=0)


def test_every_push_in_the_middle_of_a_training_is_complete(trainer, hub_server, tmp_path):
    pushing = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True, "hub_model_id": "me/mine"}
    trainer = trainer(**pushing)
    trainer.train()
    expected = ["Training in progress, step 2", "Training in progress, step 4"]
    assert hub_server.history("me/mine")[1:] == expected
    commits = check_every_commit(hub_server, "me/mine", tmp_path / "cache")
    weights = [hub_server.files("me/mine", sha)["model.safetensors"] for sha in commits]
    saved = [tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors" for step in (2, 4)]
    assert weights == [path.read_bytes() for path in saved]
    assert list((tmp_path / "out").glob(".saving-*")) == []


def test_a_push_that_fails_does_not_stop_the_training(trainer, hub_server, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = trainer(push_to_hub=True, hub_strategy="every_save", hub_model_id="me/mine")
    hub_server.broken.add("lfs")
    assert trainer.train().global_step == 4
    assert "The push of step 2 failed, and training goes on: " in caplog.text
    assert hub_server.history("me/mine") == ["initial commit"]


@mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_trainer_refuses_to_push_pickles(trainer, hub_server, strategy):
    with raises(ValueError, match=f'`hub_strategy` must be "end" or "every_save".* Got "{strategy}"'):
        trainer(push_to_hub=True, hub_strategy=strategy, hub_model_id="me/mine")


def test_a_trainer_refuses_to_push_adapters(model, trainer, hub_server):
    """Before the first step: at the first save they would be found to be no whole model."""
    model.add_adapter(LoraConfig(target_modules=["query"]))
    with raises(ValueError, match="GamlTrainer pushes whole models, .* Train without `push_to_hub`, merge them"):
        trainer(push_to_hub=True, hub_model_id="me/mine")


def test_a_trainer_without_a_tokenizer_refuses_to_push(trainer, hub_server):
    trainer = trainer()
    trainer.processing_class = None
    with raises(ValueError, match="A push needs the tokenizer"):
        trainer.push_to_hub()
    assert hub_server.requests == []


# Away from the package

UPLOADS = "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"  # see pyproject.toml


def stranger(loads: list[dict], home: Path, **env: str) -> dict:
    """What a fresh interpreter without gaml_hf answers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **env}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-W", UPLOADS, "-c", STRANGER, json.dumps(loads)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_round_trip(folder, model, tokenizer, tmp_path, hub_server):
    """
    Save, push, load without the package from folder and Hub, save and push from there, load again: always the same
    answers.
    """
    out = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert len(set(out.exit_layer.tolist())) > 1  # else equal exits would say nothing
    ours = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)
    expected = {
        "labels": {"0": "dull", "1": "fair", "2": "fine"},
        "strategy": ["patience", 1],
        "pipeline": ours(TEXTS, batch_size=4),
        "patient": [row["exit_layer"] for row in ours(TEXTS, patience=2)],
    }
    assert [row["exit_layer"] for row in expected["pipeline"]] == out.exit_layer.tolist()

    pinned = push_checkpoint(folder, "me/mine").oid
    with torch.no_grad():
        for classifier in model.exit_classifiers.values():
            classifier.weight.neg_()
    push_checkpoint(save_checkpoint(model, tokenizer, tmp_path / "newer"), "me/mine")

    again = {"save_model": str(tmp_path / "again-model"), "save_pipeline": str(tmp_path / "again-pipeline")}
    pushed = {"push_model": "me/again-model", "push_pipeline": "me/again-pipeline"}
    told = stranger(
        [
            {"key": "folder", "name": str(folder), "texts": TEXTS} | again,
            {"key": "hub", "name": "me/mine", "texts": TEXTS, "kwargs": {"revision": pinned}} | pushed,
        ],
        tmp_path / "home-1",
        **hub_environment(hub_server),
    )
    shutil.rmtree(folder)
    for path in again.values():
        check_checkpoint(path)
        assert {file.name for file in Path(path).glob("*.py")} == CODE | {"handler.py"}
    for repo in pushed.values():
        assert CODE | {"handler.py", "model.safetensors", "tokenizer.json"} <= hub_server.files(repo).keys()
        assert not any(name.endswith(PICKLES) for name in hub_server.files(repo))
    del hub_server.repos["model", "me/mine"]  # nothing may hang on it
    told |= stranger(
        [{"key": name, "name": name, "texts": TEXTS} for name in (*again.values(), *pushed.values())],
        tmp_path / "home-2",
        **hub_environment(hub_server),
    )
    assert len(told) == 6
    for answer in told.values():
        for logits, exit_layer in answer.pop("models"):
            assert exit_layer == out.exit_layer.tolist()
            assert_close(torch.tensor(logits), out.logits.detach(), rtol=0, atol=1e-6)
        for row, ours_row in zip(answer.pop("pipeline"), expected["pipeline"], strict=True):
            assert row == ours_row | {"score": pytest.approx(ours_row["score"], abs=1e-6)}
        assert answer == {key: value for key, value in expected.items() if key != "pipeline"}
