"""A checkpoint folder must work where gaml_hf is not: saved, checked, pushed, loaded by strangers, saved again."""

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
import transformers.modeling_utils
from huggingface_hub import ModelCard, constants
from pytest import mark, raises
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TextClassificationPipeline,
    pipeline,
)

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline, hub
from gaml_hf.evaluation import OperatingPoint
from gaml_hf.hub import check_checkpoint, push_checkpoint, render_card, save_checkpoint


TEXTS = [
    "a good film",
    "the plot is dull , the actor awful and the story never so very sad",
    "not bad !",
    "this movie was the worst",
    "they like the best scene in a great movie",
    "fine",
]
CODE = {f"{name}_gaml.py" for name in ("engine", "exiting", "losses", "pipeline")}
CODE |= {f"{name}_gaml_bert.py" for name in ("configuration", "modeling")}

# What a stranger runs: no gaml_hf, however it is installed. Prints JSON; argument: where to load from and save to.
STRANGER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gaml_hf":
            raise ModuleNotFoundError("No module named 'gaml_hf'", name="gaml_hf")

sys.meta_path.insert(0, Blocked())
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
for name in "config", "modeling", "pipeline":
    assert not any(module.split(".")[0] == "gaml_hf" for module in sys.modules)
print(json.dumps(told))
"""


@pytest.fixture
def model(bert_kwargs):
    config = GamlBertConfig(
        **bert_kwargs,
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
        states.append((folder / "config.json").exists())
        if states[-1]:
            states[-1] = AutoModel.from_pretrained(folder).config.patience
        replace(source, target)

    monkeypatch.setattr(hub.os, "replace", watched)
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
        (lose("losses_gaml.py"), "`losses_gaml.py` is missing; `modeling_gaml_bert.py` needs it."),
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
    with raises(ValueError, match="is not a complete GAML-BERT checkpoint:\n- ") as error:
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
    "flops_speed_up": 1.87,
    "baseline": ("plain BERT", 0.925),
    "training_arguments": {"learning_rate": 2e-5, "optim": "a|b", "max_steps": None},
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
        "**accuracy 0.9100 at 1.95x** in layers (1.87x in FLOPs)",
        "plain BERT: 0.9250",
        "| 1 | 4.00x | 0.5100 |",
        "| 2 | 2.00x | 0.6200 |",
        '| `exit_strategy="entropy", exit_threshold=0.1235` | 1.50x | 0.9200 |',
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
    from handler import EndpointHandler

    monkeypatch.delitem(sys.modules, "handler")
    endpoint = EndpointHandler(path=str(folder))
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
    with raises(ValueError, match="patiense"):
        endpoint({"inputs": TEXTS, "parameters": {"patiense": 3}})


# Away from the package


class FakeHub(BaseHTTPRequestHandler):
    """The few calls of the Hub that a push and a download make. `commits[repo]` is a list of `{path: bytes}`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what, **headers):
        self.answer(404, {"error": what}, {"X-Error-Code": what, **headers})

    def files(self, repo, revision) -> tuple[str, dict] | None:
        commits = self.server.commits.get(repo, [])
        hashes = [hashlib.sha1(f"{repo} {number}".encode()).hexdigest() for number in range(len(commits))]
        if revision in ("main", *self.server.branches) and commits:  # all branches are one here
            revision = hashes[-1]
        return (revision, commits[hashes.index(revision)]) if revision in hashes else None

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in self.server.commits else 200
            self.server.commits.setdefault(repo, [])
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return self.answer(status, {"url": f"{self.server.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        _, _, _, user, name, action, _ = path.split("/", 6)
        repo = f"{user}/{name}"
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "branch":
            self.server.branches.append(path.split("/branch/")[1])
            return self.answer(200, {})
        assert action == "commit", path
        self.server.messages.append(json.loads(body.splitlines()[0])["value"]["summary"])
        commits = self.server.commits[repo]
        files = dict(commits[-1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commits.append(files)
        sha, _ = self.files(repo, "main")
        return self.answer(200, {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def do_GET(self):
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            found = self.files(repo, rest[1] if rest else "main")
            if found is None:
                return (
                    self.answer(200, []) if rest[:1] == ["tree"] and not rest[2:] else self.missing("RevisionNotFound")
                )
            sha, files = found
            if rest[:1] == ["tree"]:
                if rest[2:]:  # a folder; there are none
                    return self.missing("EntryNotFound")
                recursive = "recursive" in parse_qs(url.query)
                return self.answer(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in files.items()
                        if recursive or "/" not in path
                    ],
                )
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": []})
        repo, (_, revision, *path) = "/".join(parts[:2]), parts[2:]
        found = self.files(repo, revision)
        if found is None:
            return self.missing("RevisionNotFound")
        sha, files = found
        content = files.get("/".join(path))
        if content is None:
            return self.missing("EntryNotFound", **{"X-Repo-Commit": sha})
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET


@pytest.fixture
def fake_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.commits, server.private, server.branches, server.messages, server.requests = {}, {}, [], [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_push_is_one_commit_without_training_state(folder, fake_hub):
    (folder / "eval_results.json").write_text("{}")
    sent = {path.name for path in folder.iterdir()}
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt", "training_args.bin", "runs/events"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    url = push_checkpoint(folder, "me/mine", private=True, token="hf_secret")
    (files,) = fake_hub.commits["me/mine"]
    assert files.keys() == sent
    assert {"model.safetensors", "README.md", "handler.py", "eval_results.json", *CODE} <= files.keys()
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    assert fake_hub.private == {"me/mine": True}
    assert url.startswith(f"{fake_hub.url}/me/mine/commit/")
    assert len(url.rsplit("/", 1)[1]) == 40


def test_a_push_takes_stale_weights_away(folder, model, fake_hub):
    push_checkpoint(folder, "me/mine", token="hf_secret")
    fake_hub.commits["me/mine"][-1]["notes.md"] = b"kept"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    push_checkpoint(folder, "me/mine", token="hf_secret")
    files = fake_hub.commits["me/mine"][-1]
    assert "model.safetensors" not in files  # would be loaded in preference to the shards
    assert "model.safetensors.index.json" in files
    assert "notes.md" in files


def test_a_push_to_a_branch(folder, fake_hub):
    push_checkpoint(folder, "me/mine", token="hf_secret")
    push_checkpoint(folder, "me/mine", revision="dev", commit_message="Try patience 1", token="hf_secret")
    assert fake_hub.branches == ["dev"]
    assert [path for path in fake_hub.requests if "/commit/" in path] == [
        "/api/models/me/mine/commit/main",
        "/api/models/me/mine/commit/dev",
    ]
    assert fake_hub.messages == ["Upload GAML-BERT checkpoint", "Try patience 1"]


def test_an_incomplete_folder_is_not_pushed(folder, fake_hub):
    lose("losses_gaml.py")(folder)
    with raises(ValueError, match="`losses_gaml.py` is missing"):
        push_checkpoint(folder, "me/mine", token="hf_secret")
    assert fake_hub.requests == []


def stranger(loads: list[dict], home: Path, **env: str) -> dict:
    """What a fresh interpreter without gaml_hf answers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **env}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", STRANGER, json.dumps(loads)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_round_trip(folder, model, tokenizer, tmp_path, fake_hub):
    """Save, push, load without the package from folder and Hub, save there, load again: always the same answers."""
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

    pinned = push_checkpoint(folder, "me/mine", token="hf_secret").rsplit("/", 1)[1]
    with torch.no_grad():
        for classifier in model.exit_classifiers.values():
            classifier.weight.neg_()
    push_checkpoint(save_checkpoint(model, tokenizer, tmp_path / "newer"), "me/mine", token="hf_secret")

    again = {"save_model": str(tmp_path / "again-model"), "save_pipeline": str(tmp_path / "again-pipeline")}
    told = stranger(
        [
            {"key": "folder", "name": str(folder), "texts": TEXTS} | again,
            {"key": "hub", "name": "me/mine", "texts": TEXTS, "kwargs": {"revision": pinned}},
        ],
        tmp_path / "home-1",
        HF_ENDPOINT=fake_hub.url,
        HF_HUB_OFFLINE="0",
    )
    shutil.rmtree(folder)
    for path in again.values():
        check_checkpoint(path)
        assert {file.name for file in Path(path).glob("*.py")} == CODE
    told |= stranger(
        [
            {"key": "again-model", "name": again["save_model"], "texts": TEXTS},
            {"key": "again-pipeline", "name": again["save_pipeline"], "texts": TEXTS},
        ],
        tmp_path / "home-2",
    )
    assert told.keys() == {"folder", "hub", "again-model", "again-pipeline"}
    for answer in told.values():
        for logits, exit_layer in answer.pop("models"):
            assert exit_layer == out.exit_layer.tolist()
            assert_close(torch.tensor(logits), out.logits.detach(), rtol=0, atol=1e-6)
        for row, ours_row in zip(answer.pop("pipeline"), expected["pipeline"], strict=True):
            assert row == ours_row | {"score": pytest.approx(ours_row["score"], abs=1e-6)}
        assert answer == {key: value for key, value in expected.items() if key != "pipeline"}
