"""Images: ResNet with exits, its pipeline, and the folder that it leaves."""

import base64
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytest import approx, fixture, mark, raises
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from conftest import WITHOUT_THE_PACKAGE
from gaml_hf import (
    GamlAutoModelForImageClassification,
    GamlResNetConfig,
    GamlResNetForImageClassification,
    GamlTrainer,
)
from gaml_hf.data.images import ImageRows, ImageSource
from gaml_hf.hub import check_checkpoint, save_checkpoint
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, MaxProb, Patience
from gaml_hf.models.image_pipeline_gaml import GamlImageClassificationPipeline
from gaml_hf.models.losses_gaml import exit_weights
from gaml_hf.models.modeling_gaml_resnet import MixedPooling
from gaml_hf.training.alignment import parameter_groups


NAMES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


@fixture
def model() -> GamlResNetForImageClassification:
    """ResNet-14 for images of 32x32, its batch norms as after a training, its exits in disagreement."""
    model = GamlResNetForImageClassification(GamlResNetConfig.cifar(14, **NAMES)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for classifier in model.exit_classifiers.values():
            classifier.weight.normal_(0, 0.1)
            classifier.weight -= classifier.weight.mean(dim=1, keepdim=True)  # what all images share decides nothing
    return model


@fixture
def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def many(count: int = 24) -> torch.Tensor:
    """Images that differ in colour, so that exits disagree on some of them."""
    return 2 * torch.randn(count, 3, 1, 1) + torch.randn(count, 3, 32, 32)


def draw(color: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise around one of red, green and blue."""
    pixels = np.random.default_rng(color).integers(0, 100, (size[1], size[0], 3))
    pixels[..., color % 3] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def test_resnet_56_is_that_of_the_paper():
    """Counted by hand: He et al. (2016), Sec. 4.2, with 1x1 convolutions as shortcuts."""
    with torch.device("meta"):
        models = {n: GamlResNetForImageClassification(GamlResNetConfig.cifar(56, num_labels=n)) for n in (10, 100)}
    convolutions = [(3, 16, 9), *[(16, 16, 9)] * 18, (16, 32, 9), *[(32, 32, 9)] * 17, (16, 32, 1)]
    convolutions += [(32, 64, 9), *[(64, 64, 9)] * 17, (32, 64, 1)]
    backbone = sum(a * b * k + 2 * b for a, b, k in convolutions)  # and a scale and an offset for each map
    for num_labels, model in models.items():
        assert model.config.num_hidden_layers == model.config.num_exits == 27
        heads = sum(16 * c * num_labels + num_labels + 1 for c in [16] * 9 + [32] * 9 + [64] * 8)
        assert model.head_parameters() == (heads, backbone)
        last = 64 * num_labels + num_labels  # as in a plain ResNet
        assert sum(parameter.numel() for parameter in model.parameters()) == backbone + heads + last
    assert backbone + 650 == approx(0.856e6, rel=1e-3)
    assert models[100].head_parameters()[0] / backbone == approx(1.77, abs=0.01)


@torch.no_grad()
def test_its_layers_are_the_stock_resnet():
    config = ResNetConfig(depths=[2, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=3)
    plain = ResNetForImageClassification(config).eval()
    model = GamlResNetForImageClassification(GamlResNetConfig(**config.to_dict() | {"model_type": "gaml_resnet"}))
    model.resnet.load_state_dict(plain.resnet.state_dict())
    model.exit_classifiers["3"].load_state_dict(plain.classifier[1].state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert_close(model.eval()(x).logits, plain(x).logits)


def test_the_head_is_that_of_shallow_deep():
    pooling, maps = MixedPooling(), torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        pooling.mix.fill_(0.3)
    expected = torch.empty(2, 5, 4, 4)
    for i in range(4):
        for j in range(4):
            window = maps[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2)
            expected[:, :, i, j] = 0.3 * window.amax(-1) + 0.7 * window.mean(-1)
    assert_close(pooling(maps), expected.flatten(1))
    for size in (1, 3, 7, 9, 10, 56):  # any size of maps
        assert pooling(torch.randn(2, 5, size, size + 1)).shape == (2, 80)


@torch.no_grad()
@mark.parametrize("kind", [Patience, MaxProb, Entropy, Budgeted])
def test_a_batch_is_its_rows_one_by_one(model, kind):
    x = many()
    exit_logits = model(x, output_exit_logits=True).exit_logits
    sureness = exit_logits.softmax(dim=-1).amax(dim=-1)[:, :5].flatten().sort().values
    threshold = float(sureness[-20:-18].mean())  # between two rows, for rounding must not decide
    policy = {Patience: Patience(1), MaxProb: MaxProb(threshold), Entropy: Entropy(0.9), Budgeted: Budgeted(3)}[kind]
    output = model(x, exit_policy=policy)
    replayed = model(x, exit_policy=policy, output_exit_logits=True)
    assert output.exit_layer.equal(replayed.exit_layer)
    assert_close(output.logits, replayed.logits, rtol=1e-4, atol=1e-4)
    for row in range(len(x)):
        alone = model(x[row : row + 1], exit_policy=policy)
        assert alone.exit_layer.item() == output.exit_layer[row].item()
        assert_close(alone.logits[0], output.logits[row], rtol=1e-4, atol=1e-4)
    if not isinstance(policy, Budgeted):
        assert len(set(output.exit_layer.tolist())) > 1


@torch.no_grad()
def test_blocks_run_for_the_rows_that_are_there(model):
    """Seen from inside, where a hook on a layer would make all of them run."""
    rows = []
    for layer in model.encoder_layers:
        layer.layer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    exit_layer = model(many(), exit_policy=Patience(1)).exit_layer
    assert rows == [int((exit_layer >= m).sum()) for m in range(1, int(exit_layer.max()) + 1)]
    assert rows[-1] < 24


@torch.no_grad()
def test_truncated_it_answers_as_that_exit(model):
    x = torch.randn(3, 3, 32, 32)
    for exit_layer in (3, 4, 6):
        smaller = model.truncate(exit_layer)
        assert smaller.config.num_hidden_layers == len(smaller.encoder_layers) == exit_layer
        assert_close(smaller(x).logits, model(x, exit_policy=Budgeted(exit_layer)).logits)


@torch.no_grad()
def test_saved_and_loaded_again(model, tmp_path):
    model.config.exit_strategy, model.config.patience = "patience", 1
    model.save_pretrained(tmp_path)
    x = torch.randn(6, 3, 32, 32)
    expected = model(x)
    for auto in (AutoModelForImageClassification, GamlAutoModelForImageClassification):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is GamlResNetForImageClassification
        assert loaded(x).logits.equal(expected.logits)
        assert loaded(x).exit_layer.equal(expected.exit_layer)
    assert not (tmp_path / "engine_gaml.py").exists()  # the engine is of texts


def test_a_plain_checkpoint_starts_it(tmp_path):
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic")
    plain = ResNetModel(config)
    plain.save_pretrained(tmp_path)
    model, info = GamlAutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    state = model.resnet.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(state[key].equal(value) for key, value in plain.state_dict().items())
    assert all(key.startswith("exit_") for key in info["missing_keys"])
    assert (model.config.stem, model.config.num_exits, model.exits_are_new) == ("imagenet", 2, True)


def test_an_angle_for_each_block(model):
    names = [name for name, _ in model.named_parameters()]
    groups = dict(zip(names, parameter_groups(names, "layer"), strict=True))
    blocks = {groups[name] for name in names if name.startswith("resnet.encoder.stages")}
    assert len(blocks) == 6
    assert groups["exit_poolers.2.mix"] == groups["exit_classifiers.2.weight"] == groups["exit_classifiers.2.bias"]
    assert max(groups.values()) + 1 == 1 + 6 + 6  # the stem, blocks, exits


@mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 57}, "`depth` must be 6n + 2, such as 20, 32, 44 or 56. Got `depth=57`."),
        ({"exit_pooling": "cls"}, "exit_pooling"),
        ({"exit_warm_start": True}, "`exit_warm_start` False. Got"),
        ({"exit_pooler": "per_exit"}, '`exit_pooler` must be "none"'),
        ({"exit_layers": [1, 2]}, "`exit_layers` must be rising layer numbers between 1 and 6"),
        ({"stem": "big"}, "stem"),
        ({"kd_temperature_growth": 0.5}, "`kd_temperature_growth` must be a finite number of at least 1"),
    ],
)
def test_a_wrong_configuration(change, message):
    with raises(Exception, match=".") as error:
        GamlResNetConfig.cifar(**{"depth": 14} | change)
    assert message in str(error.value.__cause__ or error.value) + str(error.value)


@mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "`pixel_values` must be given, as a tensor. Got NoneType."),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"must have shape \(batch_size, 3, height, width\)"),
        ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"Got shape \(2, 1, 32, 32\), torch.float32"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "floating-point type"),
        ({"labels": torch.tensor([0])}, r"`labels` must have shape \(2,\)"),
        ({"labels": torch.tensor([0, 3])}, "`labels` must lie between 0 and 2"),
    ],
)
def test_a_wrong_input(model, inputs, message):
    if "labels" in inputs:
        inputs = {"pixel_values": torch.zeros(2, 3, 32, 32), **inputs}
    with raises(ValueError, match=message):
        model(**inputs)


# Training


class Colours(Dataset):
    """Images of three colours, in noise."""

    def __len__(self):
        return 48

    def __getitem__(self, row):
        pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(row))
        pixels[row % 3] += 1.0
        return {"pixel_values": pixels, "labels": row % 3}


def trainer_of(folder, steps=12, **fields) -> GamlTrainer:
    torch.manual_seed(0)
    fields = {"exit_loss_weights": "shallow_deep", "ga_mode": "none"} | fields
    model = GamlResNetForImageClassification(GamlResNetConfig.cifar(14, **NAMES, **fields))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        optim="sgd",
        optim_args="momentum=0.9",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_steps=6,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return GamlTrainer(model, arguments, train_dataset=Colours())


def test_weights_of_the_exits_follow_the_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gaml_hf.models.exits_base_gaml.exit_weights",
        lambda layers, scheme, progress: seen.append(progress) or exit_weights(layers, scheme, progress),
    )
    trainer_of(tmp_path, distillation="none").train()
    assert seen == [step / 12 for step in range(12)]


def stored_temperature(trainer) -> float:
    last = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    return json.loads((last / "config.json").read_text())["kd_temperature"]


def test_the_temperature_rises_where_the_last_exit_is_sure(tmp_path):
    """As a loop over the steps says; a resumed training goes on with it."""
    told = []

    class Told(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            told.append(model.config.kd_temperature)

    growing = {"distillation": "last_to_all", "kd_temperature_growth": 1.25}
    trainer = trainer_of(tmp_path / "whole", **growing)
    sure = []
    trainer.model.register_forward_hook(
        lambda model, args, output: sure.append(
            (output.exit_logits[:, -1] / model.config.kd_temperature).softmax(dim=-1).amax(dim=-1).mean().item() > 0.5
        )
    )
    trainer.add_callback(Told())
    trainer.train()
    expected = [1.0]
    for is_sure in sure:
        expected.append(expected[-1] * (1.25 if is_sure else 1.0))
    assert [*told, stored_temperature(trainer)] == approx(expected)
    assert 1.0 < expected[6] <= expected[-1]
    assert trainer.model.config.kd_temperature == 1.0  # for another training

    second = trainer_of(tmp_path / "whole", **growing)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert stored_temperature(second) == approx(expected[-1])
    for key, value in trainer.model.state_dict().items():
        assert second.model.state_dict()[key].equal(value)


def test_the_temperature_looks_at_all_micro_batches_of_a_step(tmp_path):
    model = trainer_of(tmp_path, distillation="last_to_all", kd_temperature_growth=1.25).model.train()
    sure, images = [], torch.randn(7, 3, 32, 32)
    for rows in (slice(0, 2), slice(2, 7)):
        logits = model(images[rows], labels=torch.zeros(len(images[rows]), dtype=torch.int64)).exit_logits[:, -1]
        sure += logits.softmax(dim=-1).amax(dim=-1).tolist()
    assert model.teacher_confidence.tolist() == approx([sum(sure), 7], rel=1e-5)


def test_one_step_of_alignment_moves_everything(tmp_path):
    trainer = trainer_of(tmp_path, steps=1, ga_mode="soft", exit_loss_weights="linear")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {key for key, value in trainer.model.state_dict().items() if not value.equal(before[key])}
    assert moved == set(before)


# The pipeline, and the folder


@fixture
def folder(model, processor, tmp_path) -> str:
    model.config.exit_strategy, model.config.exit_threshold = "max_prob", 0.5
    return str(save_checkpoint(model, processor, tmp_path / "checkpoint"))


def test_the_pipeline_tells_where_images_leave(model, processor, folder, tmp_path):
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    images = [draw(i, (32 + i, 40)) for i in range(6)]
    images[0].convert("L").save(tmp_path / "grey.png")
    images[0] = str(tmp_path / "grey.png")
    pixels = processor([Image.open(images[0]).convert("RGB"), *images[1:]], return_tensors="pt")["pixel_values"]
    for knobs, policy in (({}, MaxProb(0.5)), ({"patience": 1}, Patience(1)), ({"budgeted_exit": 2}, Budgeted(2))):
        expected = model(pixels, exit_policy=policy)
        for batch_size in (1, 4):
            answers = classifier(images, batch_size=batch_size, top_k=3, **knobs)
            assert [rows[0]["exit_layer"] for rows in answers] == expected.exit_layer.tolist()
            for rows, logits in zip(answers, expected.logits, strict=True):
                p = logits.softmax(dim=-1)
                assert {row["label"]: approx(row["score"], abs=1e-5) for row in rows} == dict(
                    zip(model.config.label2id, p.tolist(), strict=True)
                )
    one = classifier(images[1])
    assert one == classifier([images[1]])[0] == list(classifier(image for image in images[1:2]))[0]


def test_one_bad_image_costs_itself_alone(folder, tmp_path):
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    rows = [draw(0), str(bad), None, draw(1)]
    with raises(ValueError, match=r"`inputs\[1\]`: "):
        classifier(rows)
    with raises(TypeError, match=r"`inputs\[2\]`: an image must be a `PIL.Image`, .* Got None \(NoneType\)"):
        classifier([rows[0], rows[3], None])
    several = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with raises(ValueError, match=r"`inputs\[1\]`: an array or a tensor must be one image, .* Got 4 dimensions"):
        classifier([rows[0], several])
    answers = classifier(rows, on_error="skip", batch_size=3)
    assert [answer[0]["label"] is None for answer in answers] == [False, True, True, False]
    assert answers[0][0]["label"] == classifier(rows[0])[0]["label"]
    assert "`inputs[1]`" in answers[1][0]["error"]


def test_an_array_is_the_image_that_it_holds(folder):
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    image = draw(1, (48, 40))
    rgb = np.asarray(image)
    expected = classifier.preprocess(image)["pixel_values"]
    tensor = torch.tensor(rgb).permute(2, 0, 1)
    same = [rgb, rgb.astype(np.int64), rgb.astype(np.float32), rgb / 255, tensor, tensor / 255, tensor.double()]
    for values in [*same, np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])]:
        assert classifier.preprocess(values)["pixel_values"].equal(expected)
    grey = image.convert("L")
    expected = classifier.preprocess(grey.convert("RGB"))["pixel_values"]
    for values in (np.asarray(grey), np.asarray(grey)[None], np.asarray(grey)[:, :, None] / 255):
        assert classifier.preprocess(values)["pixel_values"].equal(expected)
    assert classifier.preprocess(np.zeros((8, 8)))["pixel_values"].equal(
        classifier.preprocess(Image.new("RGB", (8, 8)))["pixel_values"]
    )


@mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 32, 3), np.uint8), "must have pixels, and 1, 3 or 4 channels, first or last. Got 0 x 32 x 3."),
        (np.zeros((32, 32, 2), np.uint8), "Got 32 x 32 x 2."),
        (
            np.full((32, 32), -1),
            "must hold numbers from 0 to 255, or fractions of that from 0.0 to 1.0. Got -1 to -1.",
        ),
        (np.full((32, 32), 256), "Got 256 to 256."),
        (np.full((32, 32), np.nan), "Got nan to nan."),
        (np.full((32, 32), "x"), "Got <U1."),
        (np.zeros((32, 32), bool), "Got bool."),
    ],
)
def test_an_array_that_is_no_image(folder, values, message):
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    with raises((TypeError, ValueError), match=re.escape(message)):
        classifier(values)


def test_an_exported_graph_takes_no_decisions(model):
    images = torch.randn(2, 3, 32, 32)
    model.config.exit_strategy, model.config.patience = "patience", 1
    with raises(Exception, match="Patience lets each row go its own"):
        torch.export.export(model, (images,))


def test_an_image_of_16_bits_is_not_cut_off(folder, processor, tmp_path):
    deep = Image.fromarray(np.full((32, 32), 30_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    encoded = base64.b64encode((tmp_path / "deep.png").read_bytes()).decode()
    encoded = [encoded, f"data:image/png;base64,{encoded}"]
    for image in (deep, str(tmp_path / "deep.png"), Image.new("F", (32, 32)), *encoded):
        with raises(ValueError, match="an image must have 8 bits a channel. Got mode"):
            classifier(image)
    with raises(ValueError, match="an image must have 8 bits a channel. Got mode 'I;16'"):
        ImageRows(ImageSource(1, lambda number: deep, lambda number: "deep.png"), processor)


def test_a_bad_image_among_images_of_any_size(model, processor, tmp_path):
    processor.do_resize = False
    classifier = GamlImageClassificationPipeline(model=model, image_processor=processor)
    rows = [draw(0, (48, 48)), "no.png", draw(1, (48, 48))]
    shortest_edge = BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    for each in (classifier, GamlImageClassificationPipeline(model=model, image_processor=shortest_edge)):
        with raises(ValueError, match="`on_error='skip'` needs .* images of one size .* Got `batch_size=3`"):
            each(rows, on_error="skip", batch_size=3)
    assert [answer[0]["label"] is None for answer in classifier(rows, on_error="skip")] == [False, True, False]
    assert len(classifier(rows[::2], batch_size=2)) == 2
    # Of which no setting tells that all come out in one size.
    cropped = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    each = GamlImageClassificationPipeline(model=model, image_processor=cropped)
    answers = each(rows, on_error="skip", batch_size=3)
    assert [answer[0]["label"] is None for answer in answers] == [False, True, False]


@mark.parametrize(
    ("knobs", "message"),
    [
        ({"patiense": 2}, "Did you mean `patience`?"),
        ({"exit_threshold": 2.0}, "`exit_threshold` must lie in"),
        ({"patience": 0}, "`patience` must be a whole number of at least 1"),
        ({"top_k": 0}, "`top_k` must be a whole number of at least 1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
        ({"function_to_apply": "max"}, "`function_to_apply` must be one of"),
        ({"on_error": "stop"}, "`on_error` must be one of"),
        ({"budgeted_exit": 7}, "`budgeted_exit` must be one of the exits"),
    ],
)
def test_a_wrong_argument(folder, knobs, message):
    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    with raises(ValueError, match=message):
        classifier(draw(0), **knobs)


STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

folder, again, *images = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder)
for auto in AutoModel, AutoModelForImageClassification:
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
print(json.dumps([[answer[0]["label"], answer[0]["exit_layer"]] for answer in classifier(images)]))
model.save_pretrained(again)
processor.save_pretrained(again)
"""
)


def test_a_stranger_loads_it_and_saves_it_and_loads_it(model, processor, folder, tmp_path):
    images = [draw(i) for i in range(4)]
    names = [str(tmp_path / f"{i}.png") for i in range(4)]
    for name, image in zip(names, images, strict=True):
        image.save(name)
    with torch.no_grad():
        output = model(processor(images, return_tensors="pt")["pixel_values"])
    classes = [model.config.id2label[k] for k in output.logits.argmax(-1).tolist()]
    expected = [list(pair) for pair in zip(classes, output.exit_layer.tolist(), strict=True)]
    for number, (source, target) in enumerate(((folder, folder + "-2"), (folder + "-2", folder + "-3"))):
        run = subprocess.run(
            [sys.executable, "-c", STRANGER, source, target, *names],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / f"modules{number}")},
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_the_folder_is_whole(model, processor, folder, tmp_path):
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageClassification"].endswith(".GamlResNetForImageClassification")
    card = Path(folder, "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    heads, network = model.head_parameters()
    assert f"the early exits have {heads:,} parameters, {heads / network:.2f} times the {network:,}" in card
    assert 'classifier("image.png")' in card
    assert "text" not in card.replace("context", "").lower().split("## citation")[0]
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 32
    broken = copy.deepcopy(processor)
    os.remove(f"{folder}/preprocessor_config.json")
    with raises(ValueError, match="`preprocessor_config.json` is missing"):
        check_checkpoint(folder)
    broken.auto_map = {"AutoImageProcessor": "somebody/else--code.Processor"}
    with raises(ValueError, match="takes the class for `AutoImageProcessor` from another repository"):
        save_checkpoint(model, broken, tmp_path / "other")
