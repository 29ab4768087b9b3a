"""The examples of docs/examples.md, run as they stand."""

import csv
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from conftest import hub_environment
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.hub import push_checkpoint, save_checkpoint


ROOT = Path(__file__).parents[1]


def write_texts(path: Path, nouns: str) -> None:
    words = [
        ("good", "fine"),
        ("great", "fine"),
        ("best", "fine"),
        ("bad", "poor"),
        ("awful", "poor"),
        ("dull", "poor"),
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"the {noun} is {word} .", label] for noun, (word, label) in product(nouns.split(), words))


def test_the_examples_run(tmp_path, bert_kwargs, tokenizer, hub_server):
    hub_server.tokens["hf_write"] = ("org", "write")
    sizes = bert_kwargs | {"initializer_range": 0.3}
    model = GamlBertForSequenceClassification(GamlBertConfig(**sizes, exit_strategy="patience", patience=1))
    push_checkpoint(save_checkpoint(model.eval(), tokenizer, tmp_path / "checkpoint"), "org/gaml-bert-sst2")
    backbone = tmp_path / "backbone"
    torch.manual_seed(0)
    BertModel(BertConfig(**bert_kwargs)).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    hub_server.add_repo("google-bert/bert-base-uncased", {path.name: path.read_bytes() for path in backbone.iterdir()})

    write_texts(tmp_path / "train.csv", "film story plot actor scene movie")
    write_texts(tmp_path / "dev.csv", "film it")
    shutil.copy(ROOT / "run_glue_gaml.py", tmp_path)
    hub_server.tokens["hf_user"] = ("user", "write")
    environment = os.environ | hub_environment(hub_server, HF_TOKEN="hf_user", HF_HOME=str(tmp_path / "home"))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / "docs" / "examples.md").read_text(), re.M | re.S)
    assert len(blocks) == 7
    told = []
    for language, code in blocks:
        done = subprocess.run(
            [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        told.append(done.stdout)

    predicted, trained, adapted, chosen, own, pushed, loaded = told
    assert re.search(r"^LABEL_[01] \(0\.\d\d\) after layer [234]: a good film$", predicted, re.M)
    assert predicted.count("'exit_layer': 2") >= 2
    assert "must hold more than blanks" in predicted
    assert "mean over exits" in trained
    exits = 4 * 2 * (32 + 1)
    assert f"trainable params: {4 * 2 * 2 * 8 * 32 + exits:,} " in adapted  # A and B of two matrices in each layer
    merged = GamlBertForSequenceClassification.from_pretrained(tmp_path / "out" / "films-lora")
    random = GamlBertForSequenceClassification.from_pretrained(backbone)
    adapters = PeftModel.from_pretrained(random, tmp_path / "out" / "lora").eval()
    batch = tokenizer(["the film is good ."], return_tensors="pt") | {"output_exit_logits": True}
    assert_close(merged(**batch).exit_logits, adapters(**batch).exit_logits)
    threshold = float(re.search(r"OperatingPoint\(exit_strategy='entropy', parameter=([\d.]+)", chosen)[1])
    speed_ups = [float(speed_up) for speed_up in re.findall(r"strategy='margin'.*speed_up=([\d.]+)\)", own)]
    assert len(speed_ups) == 3
    assert speed_ups == sorted(speed_ups, reverse=True)
    assert pushed.split()[-1] == hub_server.repo("user/films").branches["main"]
    assert hub_server.repo("user/films-show", "space").private
    assert loaded.split() == ["entropy", str(threshold)]
