"""The programs in benchmarks/ run; what they measure is not tested here."""

import json
import platform
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from model2vec import StaticModel

from benchmarks import families, frontier, image_speed, speed
from benchmarks.machine import processor_name
from conftest import WORDS
from gaml_hf import GamlAutoConfig, GamlAutoModelForSequenceClassification
from gaml_hf.hub import save_checkpoint


@pytest.mark.skipif(
    shutil.which("lscpu") is None or platform.machine() != "x86_64", reason="lscpu on an x86-64 processor is needed"
)
def test_the_processor_is_the_one_that_lscpu_names():
    printed = subprocess.run(
        [shutil.which("lscpu")], env={"LC_ALL": "C"}, capture_output=True, check=True, text=True
    ).stdout
    assert re.search(r"^\s*Model name:\s*(.*?)\s*$", printed, re.MULTILINE).group(1) == processor_name()


def test_speed(tmp_path, capsys):
    threads = torch.get_num_threads()
    words = "--layers 2 --rows 2 --rounds 1 --lengths sst2 --batch_sizes 1 3 --exits 1 2 mixed --split --weights"
    speed.main([*words.split(), "--output", str(tmp_path / "speed.json"), "--figure", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert [result["workload"] for result in results] == [
        "sst2 tokens, batch 1, exit 1",
        "sst2 tokens, batch 1, exit 2",
        "sst2 tokens, batch 1, exit mixed",
        "sst2 tokens, batch 3, exit 2",
        "sst2 tokens, batch 3, exit mixed",
    ]
    for result in results:
        assert result["workload"] in printed
        assert {len(seconds) for seconds in result["seconds"].values()} == {1}
        assert {"HF BERT, eager", "ours", "ours, prepacked", "ours, every layer split"} <= result["seconds"].keys()
        assert {"int8 weights", "uint8 weights"} <= result["seconds"].keys()


def test_profile(capsys):
    threads = torch.get_num_threads()
    speed.main("--profile --layers 2 --lengths 9 --rounds 1 --systems ours".split())
    torch.set_num_threads(threads)
    assert "ours, 9 tokens, in layers: [CLS] alone " in capsys.readouterr().out


def test_families(monkeypatch, capsys):
    threads = torch.get_num_threads()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    monkeypatch.setattr(families, "SIZES", {"mpnet": sizes})
    families.main("--kinds mpnet --batch_sizes 1 --rounds 1".split())
    torch.set_num_threads(threads)
    assert "mpnet, 2 layers, batch 1: ours, full depth " in capsys.readouterr().out


def test_frontier(tokenizer, tmp_path, capsys):
    threads = torch.get_num_threads()
    texts = [f"the {a} movie was {b}" for a in ("good", "bad", "fine", "sad") for b in ("great", "awful", "dull")] * 3
    rows = [f"{text},{'pos' if 'great' in text else 'neg'}" for text in texts]
    words = ["--text_columns", "text", "--rounds", "1", "--timed_rows", "4"]
    for option in ("train", "choose_on", "data"):
        (tmp_path / f"{option}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        words += [f"--{option}", str(tmp_path / f"{option}.csv")]
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 4, "initializer_range": 0.5}
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    words.append("--models")
    for name, kind in (("deep", {"model_type": "bert"}), ("one", {"model_type": "deberta-v2", "exit_layers": [4]})):
        relative = {"relative_attention": True} if name == "one" else {}
        config = GamlAutoConfig.for_model(**kind, **sizes, **labels, **relative)
        model = GamlAutoModelForSequenceClassification.from_config(config)
        words.append(f"{name}={save_checkpoint(model, tokenizer, tmp_path / name)}")
    # One vector per token: "great" is far from "awful" and "dull".
    vectors = np.zeros((len(WORDS), 2), dtype=np.float32)
    vectors[[WORDS.index("great"), WORDS.index("awful"), WORDS.index("dull")], 0] = 9.0, -9.0, -9.0
    StaticModel(vectors, tokenizer.backend_tokenizer).save_pretrained(tmp_path / "static")
    words += ["--static", f"static={tmp_path / 'static'}"]
    outputs = ["--output", str(tmp_path / "frontier.json"), "--figure", str(tmp_path / "frontier.png")]
    frontier.main([*words, *outputs])
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    torch.set_num_threads(threads)
    systems = {system["name"]: system for system in json.loads((tmp_path / "frontier.json").read_text())["systems"]}
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in systems)
    assert {"deep, PyTorch", "deep, prepacked", "deep, ONNX int8", "one, PyTorch"} <= systems.keys()
    assert not [name for name in systems if name.startswith(("one, ONNX", "one, PyTorch, "))]
    assert any(system["speed_up"] > 1 for system in systems.values())
    assert systems["words and pairs of words"]["score"] == 1.0
    assert systems["static"]["score"] == 1.0
    assert systems["deep, PyTorch"]["score"] == systems["deep, prepacked"]["score"]
    assert systems["deep, PyTorch"]["seconds"].keys() == {"1", "32"}


def test_static_vectors_of_pairs(tokenizer, tmp_path):
    """Which of two words stand in a pair says nothing of whether they are the same; how far apart they are does."""
    vectors = np.zeros((len(WORDS), 2), dtype=np.float32)
    vectors[WORDS.index("good")], vectors[WORDS.index("bad")] = (8, 0), (0, 8)
    StaticModel(vectors, tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    pairs = [(a, b) for a in ("good", "bad") for b in ("good", "bad")]
    same = ["yes" if a == b else "no" for a, b in pairs]
    assert frontier.static_vectors("static", tmp_path, (pairs, same)).answer(pairs[::-1]) == same[::-1]


def test_image_speed(capsys):
    threads = torch.get_num_threads()
    image_speed.main("--exits 1 27 --batch_sizes 2 --rounds 1".split())
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "batch 2: plain ResNet-56: 1.00 (1.00 to 1.00)" in printed
    faster = {line.split(": ")[1]: float(line.split(": ")[2].split()[0]) for line in printed.splitlines()[1:]}
    assert faster["exits, leaving at block 1"] > faster["exits, leaving at block 27"]
