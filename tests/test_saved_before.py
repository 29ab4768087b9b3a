"""A checkpoint that version 0.1.0 saved, before the package had rooms, loads and answers as it did then."""

import json
from pathlib import Path

import torch
from pytest import fixture
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gaml_hf import GamlBertForSequenceClassification
from gaml_hf.hub import check_checkpoint, save_checkpoint


FOLDER = Path(__file__).with_name("checkpoints") / "gaml_bert_0.1.0"  # config, weights and tokenizer, without the code


@fixture
def answers() -> dict:
    """What it answered when it was saved: texts, logits of every exit, and the layer at which each text left."""
    return json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))


def check(model, tokenizer, answers) -> None:
    batch = tokenizer(answers["texts"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch)
        exit_logits = model(**batch, output_exit_logits=True).exit_logits
    assert_close(exit_logits, torch.tensor(answers["exit_logits"]), rtol=1e-5, atol=1e-5)
    assert output.exit_layer.tolist() == answers["exit_layer"]


def test_it_loads_and_answers_as_it_did(answers):
    assert len(set(answers["exit_layer"])) > 1
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
    assert type(model) is GamlBertForSequenceClassification
    assert model.config.id2label == {0: "bad", 1: "good", 2: "fine"}
    check(model, AutoTokenizer.from_pretrained(FOLDER), answers)


def test_saved_again_it_is_complete(answers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    folder = save_checkpoint(GamlBertForSequenceClassification.from_pretrained(FOLDER), tokenizer, tmp_path / "again")
    check_checkpoint(folder)
    check(AutoModelForSequenceClassification.from_pretrained(folder), tokenizer, answers)
