"""Table 8: trainings on images that are drawn here, and what the table says of them."""

import json
from pathlib import Path

import numpy as np
from pytest import fixture, mark, raises

from benchmarks import reports, reproduce
from benchmarks.images import IMAGE_SYSTEMS
from benchmarks.runs import decode_array, encode_array
from gaml_hf import GamlResNetConfig
from test_images import draw


@fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """CIFAR-10 with 6 training and 2 test images a class."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 6), ("test", 2)):
        for k in range(10):
            (folder / "cifar10" / split / f"class{k}").mkdir(parents=True)
            for i in range(count):
                draw(10 * i + k).save(folder / "cifar10" / split / f"class{k}" / f"{i}.png")
    return folder


def words(folder: Path, ledger: Path, *more: str) -> list[str]:
    common = f"table8 --tasks cifar10 --data {folder} --ledger {ledger} --epochs 1 --seeds 0 --depths 8 14"
    return [*common.split(), "--batch_sizes", "16", *more]


def test_a_table_from_the_command_line(folder, tmp_path, capsys):
    reproduce.main(words(folder, tmp_path, "--dry-run"))
    assert "table8: 8 runs, 8 to do" in capsys.readouterr().out
    reproduce.main(words(folder, tmp_path, "--systems", "plain", "dbt", "gaml-soft"))
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    kinds = {(r["run"]["system"], r["run"]["depth"]): r for r in results}
    assert kinds.keys() == {("plain", 8), ("plain", 14), ("dbt", 14), ("gaml-soft", 14)}
    exits = kinds["gaml-soft", 14]
    assert exits["rows"] == {"train": 54, "held_out": 6, "validation": 20}
    assert decode_array(exits["logits"]["validation"]).shape == (20, 6, 10)
    assert kinds["plain", 14]["exit_layers"] == [6]
    assert kinds["plain", 14]["multiply_adds"]["network"] == exits["multiply_adds"]["network"][-1:]
    assert len(exits["milliseconds"]["to_exit"]) == 6
    text = (tmp_path / "reports" / "table8.md").read_text()
    assert "| Shallow-Deep | patience | not run |" in text
    assert "| GAML (GA-soft) | patience | " in text
    assert "92.6 at 1.30x" in text
    assert "4 runs" in text


def test_the_systems_are_valid():
    for fields in IMAGE_SYSTEMS.values():
        GamlResNetConfig.cifar(8, **fields)
    assert {system for _, system in reports.IMAGE_SYSTEMS} | {"plain"} == IMAGE_SYSTEMS.keys()


def test_the_table_by_hand():
    """Two images; patience 1 sends one out at exit 2 of 4 and the other at the end."""

    def logits(classes: list[list[int]]) -> dict:
        return encode_array(np.eye(2, dtype=np.float32)[np.array(classes)] * 4)

    rows = [[0, 0, 1, 1], [0, 1, 0, 1]]
    result = {
        "run": {"task": "cifar10", "system": "multi-exit", "depth": 56, "seed": 0, "learning_rate": 0.1}
        | {"batch_size": 128, "alpha": 0.2},
        "full_depth": 4,
        "layers": 4,
        "exit_layers": [1, 2, 3, 4],
        "static_speed_up": 1.0,
        "logits": {"held_out": logits(rows), "validation": logits(rows)},
        "labels": {"held_out": [0, 1], "validation": [0, 1]},
        "scores": {"validation": {"4": {"accuracy": 0.5}}},
        "multiply_adds": {"network": [30, 50, 70, 90], "exits": [2, 4, 6, 8]},
        "milliseconds": {"full_depth": 3.0, "to_exit": [1.0, 2.0, 3.0, 4.0]},
        "head_parameters": 50,
        "network_parameters": 100,
    }
    line = next(x for x in reports.table8([result]).splitlines() if x.startswith("| PABEE | patience"))
    # Layers: 4 / mean(2, 4). Multiply-adds: 90 / mean(50 + 4, 90 + 8). Milliseconds: mean(2, 4).
    assert line == (
        f"| PABEE | patience | 100.00 (n=1) | {90 / 76:.2f}x | {4 / 3:.2f}x | 3.00 | 50.00 (n=1) | 91.8 at 1.26x |  |"
    )
    assert "0.50 times the network's 100; all of them together add 8.9% of its" in reports.table8([result])


@mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "cola"], "table8 takes `--tasks` out of cifar10, cifar100. Got cola."),
        (["--systems", "deebert"], "table8 takes `--systems` out of plain, multi-exit"),
    ],
)
def test_of_texts(folder, tmp_path, capsys, more, message):
    with raises(SystemExit):
        reproduce.main(words(folder, tmp_path, *more))
    assert message in capsys.readouterr().err


def test_no_grid_and_no_folder(folder, tmp_path):
    with raises(ValueError, match=r"give one value of `learning_rate`. Got \[0.1, 0.2\]"):
        reproduce.main(words(folder, tmp_path, "--learning_rates", "0.1", "0.2"))
    (tmp_path / "cifar100").symlink_to(folder / "cifar10")
    with raises(ValueError, match="`cifar100` has 100 classes. Got 10"):
        reproduce.main(words(tmp_path, tmp_path / "runs", "--tasks", "cifar100", "--systems", "ml"))
