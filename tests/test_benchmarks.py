"""The programs in benchmarks/ run; what they measure is not tested here."""

import json

import torch

from benchmarks import speed


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
