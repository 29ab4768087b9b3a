"""What a stranger's folder may not do: run code from elsewhere, open other files, bring pickles."""

import json
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from pytest import fixture, mark, raises
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainingArguments

import run_glue_gaml
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer
from gaml_hf.hub import check_checkpoint, push_checkpoint, save_checkpoint
from gaml_hf.hub.checking import PICKLES
from gaml_hf.hub.folders import SEAL
from gaml_hf.runtime.scoring import ClassifierLoader


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@fixture
def model(bert_kwargs):
    return GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs))


@fixture
def folder(model, tokenizer, tmp_path) -> Path:
    return save_checkpoint(model, tokenizer, tmp_path / "checkpoint")


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def problems(folder: Path) -> str:
    with raises(ValueError, match="is not a complete checkpoint with exits") as error:
        check_checkpoint(folder)
    return str(error.value)


# Code


REFERENCES = ["you/other--module.Class", "../module.Class", "/elsewhere/module.Class", "a.b.Class", "Class", 3, None]


@mark.parametrize("reference", REFERENCES)
def test_a_class_is_named_in_the_folder_itself(folder, hub_server, reference):
    for change in (
        lambda config: config["auto_map"].update(AutoModel=reference),
        lambda config: config["auto_map"].update(AutoModelForTokenClassification=reference),  # one we do not write
        lambda config: config["custom_pipelines"]["text-classification"].update(impl=reference),
    ):
        kept = (folder / "config.json").read_text()
        edit(folder / "config.json", change)
        told = problems(folder)
        assert "`config.json` takes the class for " in told
        assert f"`{reference}`" in told
        with raises(ValueError, match="takes the class for"):
            push_checkpoint(folder, "me/mine")
        (folder / "config.json").write_text(kept)
    check_checkpoint(folder)
    assert hub_server.requests == []


@mark.parametrize("reference", REFERENCES[:-1])
def test_a_tokenizer_brings_no_code_from_elsewhere(folder, reference):
    for value in (reference, [None, reference], {"AutoTokenizer": [None, reference]}):
        edit(folder / "tokenizer_config.json", lambda config, value=value: config.update(auto_map=value))
        assert "`tokenizer_config.json` takes the class for `AutoTokenizer` " in problems(folder)


def test_a_tokenizer_with_code_is_not_run(folder, tmp_path):
    """By nothing of ours that loads a tokenizer; `trust_remote_code` is asked for nowhere."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    code += "from transformers import BertTokenizer\nclass Mine(BertTokenizer): pass\n"
    (folder / "mine.py").write_text(code)
    change = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    edit(folder / "tokenizer_config.json", lambda config: config.update(change))
    (folder / "train.csv").write_text("sentence,label\ngood,LABEL_1\nbad,LABEL_0\n")
    words = ["--model_name_or_path", str(folder), "--train_file", str(folder / "train.csv"), "--use_cpu", "True"]
    words += ["--output_dir", str(tmp_path / "out"), "--do_train"]
    for load in (
        lambda: ClassifierLoader(str(folder), False, "cpu", None)(),
        lambda: run_glue_gaml.main(words),
        lambda: check_checkpoint(folder),
    ):
        with raises(ValueError, match="trust_remote_code"):
            load()
    assert not (tmp_path / "ran").exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it would have run
    assert (tmp_path / "ran").exists()


# Pickles


def test_pickled_weights_are_not_read(folder, tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "`pytorch_model.bin` is a pickle" in problems(folder)
    GamlBertForSequenceClassification.from_pretrained(folder)  # the safetensors file
    (folder / "model.safetensors").unlink()
    with raises(OSError, match="no file named model.safetensors"):
        GamlBertForSequenceClassification.from_pretrained(folder)
    with raises(pickle.UnpicklingError):  # asked for by the caller; PyTorch unpickles tensors alone
        GamlBertForSequenceClassification.from_pretrained(folder, use_safetensors=False)
    assert not (tmp_path / "ran").exists()


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"input_ids": torch.tensor([2, 5 + row, 3]), "labels": torch.tensor(row % 2)}


def make_trainer(model, folder, **changes) -> GamlTrainer:
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return GamlTrainer(model, TrainingArguments(str(folder), **quiet, **changes), train_dataset=Rows())


def test_no_pickle_in_a_folder_to_share_nor_of_the_training_arguments(model, folder, tmp_path):
    trainer = make_trainer(model, tmp_path / "out", max_steps=1, save_steps=1)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in [*folder.rglob("*"), *(tmp_path / "out").iterdir()]}
    assert not [name for name in names if name.endswith(PICKLES)]
    # In training checkpoints, which stay here, PyTorch's own: optimizer, schedule and random numbers.
    names = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    assert {name for name in names if name.endswith(PICKLES)} == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }


@mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_training_checkpoint_with_code_is_not_run(model, tmp_path, name):
    make_trainer(model, tmp_path / "out", max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / SEAL).unlink()
    torch.save({"state": Evil(tmp_path / "ran")}, checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    with raises((pickle.UnpicklingError, ValueError), match="Weights only load failed|`model.safetensors` is missing"):
        make_trainer(model, tmp_path / "out", max_steps=2).train(resume_from_checkpoint=True)
    assert not (tmp_path / "ran").exists()


# Files


@mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..", "a\\b", 3])
def test_an_index_names_files_of_its_folder(folder, name):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": name}}))
    sentence = "model.safetensors.index.json` must name files of its own folder. Got "
    assert sentence in problems(folder)
    with raises(ValueError, match=sentence):
        GamlBertForSequenceClassification.from_pretrained(folder)


@mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_an_index_that_is_none(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json` is not an index of weights: " in problems(folder)


@mark.parametrize("name", ["../other.safetensors", "other.safetensors"])
def test_a_config_names_no_other_weights(folder, name):
    edit(folder / "config.json", lambda config: config.update(transformers_weights=name))
    with raises(ValueError, match="`transformers_weights` in a config names another weights file"):
        GamlBertForSequenceClassification.from_pretrained(folder)
    assert "`config.json` is not valid: `transformers_weights`" in problems(folder)


def test_a_link_out_of_the_folder_is_not_pushed(folder, hub_server, tmp_path):
    (tmp_path / "secret").write_text("of mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with raises(ValueError, match="- `notes.txt` is a link to a file outside the folder"):
        push_checkpoint(folder, "me/mine")
    (folder / "notes.txt").unlink()
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)  # not followed
    (folder / "card.md").symlink_to(folder / "README.md")  # stays inside
    push_checkpoint(folder, "me/mine")
    assert "card.md" in hub_server.files("me/mine")
    assert not any(name.startswith("more") for name in hub_server.files("me/mine"))


def test_a_save_does_not_write_through_a_link(model, tokenizer, folder, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in ("model.safetensors", "config.json")}
    with torch.no_grad():
        model.exit_classifiers["1"].weight += 1
    save_checkpoint(model, tokenizer, folder)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_snapshot_in_the_cache_is_no_link_out(folder, hub_server, tmp_path):
    push_checkpoint(folder, "me/mine")
    snapshot = Path(snapshot_download("me/mine", cache_dir=tmp_path / "cache"))
    assert (snapshot / "model.safetensors").is_symlink()
    check_checkpoint(snapshot)
    (snapshot / "notes.txt").symlink_to(os.path.abspath(__file__))
    assert "`notes.txt` is a link to a file outside the folder" in problems(snapshot)
