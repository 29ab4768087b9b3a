"""`run_image_classification_gaml.py` on images that are drawn here, and the reading of images."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from pytest import approx, fixture, mark, raises
from torch.testing import assert_close
from transformers import pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import run_image_classification_gaml as runner
from gaml_hf import GamlResNetConfig, GamlResNetForImageClassification
from gaml_hf.data.images import ImageRows, ImageSource, flip_and_crop
from gaml_hf.evaluation import image_flops, image_flops_speed_up
from gaml_hf.hub import check_checkpoint
from test_images import draw


COLORS = ("blue", "green", "red")


def paint(color: str, seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3))
    pixels[..., {"red": 0, "green": 1, "blue": 2}[color]] += 120
    return Image.fromarray(pixels.astype(np.uint8))


@fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """`train/<class>/*.png`, `test/<class>/*.png`: 16 and 6 of each of three colours."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("test", 6)):
        for color in COLORS:
            (folder / split / color).mkdir(parents=True)
            for i in range(count):
                paint(color, 100 * (split == "test") + i).save(folder / split / color / f"{i:03}.png")
    return folder


@fixture
def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )


@fixture
def common(tmp_path) -> list[str]:
    words = f"--resnet_depth 8 --output_dir {tmp_path / 'out'} --use_cpu True --report_to none --seed 7"
    words += " --per_device_train_batch_size 8 --num_train_epochs 3 --logging_steps 2 --latency_rows 4"
    words += " --disable_tqdm True --dataloader_pin_memory False --learning_rate 0.05 --holdout_fraction 0.25"
    return words.split()


def test_train_evaluate_predict_and_use(common, images, tmp_path, capsys):
    folders = ["--train_dir", str(images / "train"), "--validation_dir", str(images / "test")]
    words = [*common, *folders, "--test_dir", str(images / "test"), "--target_speed_up", "1", "3"]
    run = runner.main([*words, "--do_train", "--do_eval", "--do_predict"])
    out = tmp_path / "out"
    assert run["rows"] == {"train": 36, "holdout": 12}
    assert run["config"]["id2label"] == dict(enumerate(COLORS))
    policy = run["evaluation"]["validation"]["policy"]
    assert policy["exit_strategy"] == "patience"
    assert 1 <= policy["speed_up"] <= 3
    assert policy["latency_num_rows"] == 4
    exits = run["evaluation"]["validation"]["exits"]
    assert max(scores["accuracy"] for scores in exits.values()) > 0.6  # of three colours; a third by chance
    printed = capsys.readouterr().out
    assert "validation: 18 images" in printed
    assert "speed-up: " in printed

    check_checkpoint(out)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "- Size: the early exits have" in card
    # What was saved answers as it was scored, one image at a time.
    lines = (out / "predictions_test.tsv").read_text().splitlines()[1:]
    paths = sorted((images / "test").rglob("*.png"))
    classifier = pipeline("image-classification", model=str(out), trust_remote_code=True)
    for line, path in zip(lines, paths, strict=True):
        _, label, score, exit_layer, image = line.split("\t")
        assert image == str(path)
        answer = classifier(str(path), top_k=1)[0]
        assert (answer["label"], answer["exit_layer"]) == (label, int(exit_layer))
        assert answer["score"] == approx(float(score), abs=1e-4)

    # From the saved one, without training: the same scores.
    again = [*common, "--model_name_or_path", str(out), "--do_eval", "--validation_dir", str(images / "test")]
    del again[0:2]
    again[again.index(str(out))] = str(tmp_path / "second")
    second = runner.main(again)
    assert second["evaluation"]["validation"]["exits"] == {m: approx(scores) for m, scores in exits.items()}


@mark.parametrize("distillation", ["mutual", "last_to_all"])
def test_a_file_of_arguments(common, images, tmp_path, distillation):
    recipe = {"train_dir": str(images / "train"), "distillation": distillation, "patience": 1, "do_train": True}
    recipe |= {"exit_loss_weights": "shallow_deep", "kd_temperature_growth": 1.5, "num_train_epochs": 1}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    run = runner.main([str(path), *common, "--num_train_epochs", "1", "--do_eval", "--ga_mode", "none"])
    assert run["rows"] == {"train": 31, "holdout": 10}  # 48, less 15% to score, less a quarter
    assert run["evaluation"]["validation"]["rows"] == 7
    # Nobody is sure in the first steps, so the temperature may stay; it never falls.
    temperature = run["config"]["kd_temperature"]
    assert any(temperature == approx(1.5**n) for n in range(5))


def test_a_share_of_the_images_is_of_several_classes(common, images):
    """In a folder they lie class by class."""
    words = [*common, "--train_dir", str(images / "train"), "--validation_dir", str(images / "test"), "--do_train"]
    words += "--do_eval --num_train_epochs 1 --patience 1 --max_train_samples 24 --max_eval_samples 6".split()
    run = runner.main(words)
    assert sum(run["rows"].values()) == 24
    classes = run["evaluation"]["validation"]["classes"]
    assert sum(classes.values()) == 6
    assert max(classes.values()) < 6


def test_a_policy_by_what_it_may_cost(common, images, tmp_path, capsys):
    words = [*common, "--train_dir", str(images / "train"), "--validation_dir", str(images / "test"), "--do_train"]
    words += "--do_eval --num_train_epochs 1 --exit_strategy max_prob --holdout_fraction 0.5 --max_loss 0.3".split()
    run = runner.main(words)
    assert run["rows"] == {"train": 24, "holdout": 12, "promise": 12}
    promise = "at most 0.3 of the rows get another answer than the last exit's, with confidence 0.9"
    assert f"promised: {promise} (12 rows set aside, " in capsys.readouterr().out
    assert promise in (tmp_path / "out" / "README.md").read_text()
    assert runner.GamlArguments().target_speed_up == [1.2, 1.4]
    with raises(ValueError, match="both choose the exit policy"):
        runner.GamlArguments(max_loss=0.3, target_speed_up=[1.2, 1.4])


def test_a_policy_chosen_after_the_training(common, images, tmp_path):
    train = ["--train_dir", str(images / "train"), "--do_train", "--num_train_epochs", "1", "--patience", "1"]
    runner.main([*common, *train])
    words = [*common[2:], "--model_name_or_path", str(tmp_path / "out"), "--train_dir", str(images / "train")]
    words += ["--validation_dir", str(images / "test"), "--do_eval", "--output_dir", str(tmp_path / "chosen")]
    run = runner.main([*words, "--exit_strategy", "entropy", "--target_speed_up", "1", "4"])
    assert run["rows"] == {"train": 0, "holdout": 12}
    assert run["chosen"]["exit_strategy"] == run["config"]["exit_strategy"] == "entropy"
    assert (
        json.loads((tmp_path / "chosen" / "config.json").read_text())["exit_threshold"] == run["chosen"]["parameter"]
    )


def test_a_folder_that_is_a_file(common, tmp_path):
    (tmp_path / "rows.csv").write_text("image,label")
    with raises(ValueError, match="`train_dir` must be a folder of images. Got `.*rows.csv`, which is none"):
        runner.main([*common, "--train_dir", str(tmp_path / "rows.csv"), "--do_train"])


def test_a_dataset(common, images, tmp_path, monkeypatch):
    features = Features({"img": ImageFeature(), "what": ClassLabel(names=["red", "green", "blue"])})

    def table(split: str) -> Dataset:
        paths = sorted((images / split).rglob("*.png"))
        return Dataset.from_dict(
            {"img": [str(path) for path in paths], "what": [path.parent.name for path in paths]}, features=features
        )

    splits = DatasetDict({"train": table("train"), "test": table("test")})
    monkeypatch.setattr(runner, "load_dataset", lambda *_, **__: DatasetDict(splits))
    words = [*common, "--dataset_name", "cifar", "--do_train", "--do_eval", "--num_train_epochs", "1"]
    run = runner.main([*words, "--patience", "1"])
    assert run["config"]["id2label"] == {0: "red", 1: "green", 2: "blue"}  # in the order of the data
    assert run["evaluation"]["validation"]["rows"] == 18
    with raises(ValueError, match=r"`label_column_name` must be one of \['img', 'what'\].* Got 'label'"):
        runner.main([*words, "--label_column_name", "label", "--overwrite_output_dir"])
    with raises(ValueError, match="`image_column_name` must be a column of images. Got 'what'"):
        runner.main([*words, "--image_column_name", "what", "--overwrite_output_dir"])


@mark.parametrize(
    ("words", "message"),
    [
        ("--do_train", "Give `dataset_name`, or `train_dir` and `validation_dir`."),
        (
            "--do_train --train_dir nowhere",
            "`train_dir` must be a folder of images. Got `nowhere`, which is not there.",
        ),
        ("--do_train --validation_dir {images}/test", "The data must have the splits ['train'], `train_dir` for one."),
        ("--do_train --train_dir {images}", "`train_dir` must hold a folder for each class and the images in it."),
        ("--do_train --train_dir {images}/train/red", "with the image `000.png`"),
        ("--do_train --train_dir {images}/train --dataset_name x", "`dataset_name` takes the place of `train_dir`"),
        ("--do_train --train_dir {images}/train --resnet_depth 9", "`depth` must be 6n + 2"),
        ("--do_train --train_dir {images}/train --alpha 2", "`alpha` must lie in [0, 1]. Got `alpha=2.0`."),
        ("--do_train --train_dir {images}/train --exit_pooling cls", "exit_pooling"),
        ("--do_train --train_dir {images}/train --model_name_or_path x", "Give exactly one of `model_name_or_path`"),
        ("--do_train --train_dir {images}/train --train_val_split 1", "`train_val_split` must lie between 0 and 1"),
        ("--do_predict --test_dir {images}/test", "The model has no classes yet"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(common, images, words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *common, *words.format(images=images).split()])
    monkeypatch.setattr(runner, "__name__", "__main__")  # as the command runs it
    assert message in (runner.command() or "")


def test_an_image_that_cannot_be_read_is_told_before_the_first_step(common, images, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(images / "train", folder)
    (folder / "red" / "005.png").write_bytes(b"no image")
    with raises(ValueError, match=r"`.*red/005.png` must be an image. It cannot be read"):
        runner.main([*common, "--train_dir", str(folder), "--do_train", "--patience", "1"])


# Rows


def test_rows_are_what_the_image_processor_makes(images, processor, tmp_path):
    folder = tmp_path / "rows"
    (folder / "a").mkdir(parents=True)
    drawn = [draw(0), draw(1, (40, 50)), draw(2).convert("L"), draw(3).convert("P"), draw(4).convert("RGBA")]
    for i, image in enumerate(drawn):
        image.save(folder / "a" / f"{i}.png")
    rows = ImageRows(ImageSource.from_folder(folder, "train_dir"), processor, [0, 1, 2, 3, 4])
    expected = processor([image.convert("RGB") for image in drawn], return_tensors="pt")["pixel_values"]
    assert_close(torch.stack([row["pixel_values"] for row in rows.__getitems__(range(5))]), expected)
    part = rows.select([3, 1])
    assert [part[i]["labels"] for i in range(2)] == part["labels"] == [3, 1]
    assert_close(part[0]["pixel_values"], expected[3])
    assert sorted(rows.shuffle(seed=1)["labels"]) == [0, 1, 2, 3, 4]
    rows._kept = None  # as if they were too many
    assert_close(rows[1]["pixel_values"], expected[1])


def test_a_class_may_be_a_link(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        draw(0).save(tmp_path / "set" / name / "0.png")
    (tmp_path / "elsewhere").mkdir()
    draw(1).save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "a" / "above").symlink_to(tmp_path, target_is_directory=True)  # which leads back here
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    draw(0).save(tmp_path / "set" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "set" / "b" / "._0.png").write_bytes(b"what macOS leaves beside a file")
    source = ImageSource.from_folder(tmp_path / "set", "train_dir")
    assert source.names == ["a", "b", "c"]


def test_flip_and_crop_by_a_plain_loop():
    images = torch.randint(0, 256, (64, 3, 16, 24), dtype=torch.uint8)
    out = flip_and_crop(images)
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    seen = set()
    for image, cut in zip(images, out, strict=True):
        frame = torch.zeros(3, 20, 30, dtype=torch.uint8)
        frame[:, 2:18, 3:27] = image
        for top in range(5):
            for left in range(7):
                window = frame[:, top : top + 16, left : left + 24]
                for flips in (False, True):
                    if torch.equal(window.flip(-1) if flips else window, cut):
                        seen.add((top, left, flips))
                        break
    assert len(seen) > 30
    assert {flips for *_, flips in seen} == {False, True}


def test_multiply_adds_of_resnet_56():
    """By hand: 9 numbers of the 3x3 windows times maps in and out, at each place; 125.75 million in all."""
    model = GamlResNetForImageClassification(GamlResNetConfig.cifar(56, num_labels=10))
    stem, layers, exits = image_flops(model, (32, 32))
    by_hand = [2 * 9 * 16 * 16 * 1024] * 9
    by_hand += [(9 * 16 * 32 + 16 * 32 + 9 * 32 * 32) * 256] + [2 * 9 * 32 * 32 * 256] * 8
    by_hand += [(9 * 32 * 64 + 32 * 64 + 9 * 64 * 64) * 64] + [2 * 9 * 64 * 64 * 64] * 8
    assert stem == 2 * 9 * 3 * 16 * 1024
    assert layers == [2 * n for n in by_hand]
    assert exits == {m: 2 * 10 * 16 * [16, 32, 64][(m - 1) // 9] for m in range(1, 27)} | {27: 2 * 10 * 64}
    assert (stem + sum(layers) + exits[27]) / 2 == approx(125.75e6, rel=1e-4)
    # Half of the images leave at exit 18.
    total = stem + sum(layers) + exits[27]
    early = stem + sum(layers[:18]) + sum(exits[m] for m in range(1, 19))
    full = stem + sum(layers) + sum(exits.values())
    assert image_flops_speed_up(model, [18, 27], (32, 32)) == approx(2 * total / (early + full))
    assert image_flops_speed_up(model, [27], (32, 32), one_exit=True) == approx(1)
