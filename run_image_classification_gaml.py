#!/usr/bin/env python
"""
Train, evaluate and use an image classifier with exits on a folder of images by class, or on a dataset of the Hub.

    python run_image_classification_gaml.py --resnet_depth 56 --train_dir cifar10/train --validation_dir cifar10/test \
        --do_train --do_eval --output_dir out/cifar10

    python run_image_classification_gaml.py recipe.json --alpha 0.3  # JSON or YAML; the command line overrides it

The shape is that of `run_image_classification.py` in the Transformers examples; `--help` lists every argument. The
steps are those of `run_glue_gaml.py`: part of the training images is set aside; the model trains on the rest, and the
checkpoint that is best on that part is kept; the exit policy is chosen there for the wanted speed-up; the validation
images are scored once, with the model as it will be used.
"""

import logging
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import load_dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, default_data_collator

from gaml_hf import GamlAutoConfig, GamlAutoModelForImageClassification, GamlResNetConfig
from gaml_hf import GamlResNetForImageClassification as GamlResNet
from gaml_hf.data.files import encode_labels
from gaml_hf.data.images import ImageRows, ImageSource, cifar_processor, image_columns
from gaml_hf.evaluation import accuracy, image_flops_speed_up
from gaml_hf.training import script


logger = logging.getLogger(__name__)

SPLITS = {"train": "train_dir", "validation": "validation_dir", "test": "test_dir"}


@dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A ResNet's checkpoint, plain or with exits: a local folder or a name on the Hub."},
    )
    resnet_depth: int | None = field(
        default=None,
        metadata={"help": "Instead: a ResNet of 6n + 2 layers for images of 32x32 (20, 32, 44, 56), from scratch."},
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not that of the model."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for files that are not public."})

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.resnet_depth is None):
            raise ValueError("Give exactly one of `model_name_or_path` and `resnet_depth`.")

    def source(self) -> dict:
        """What `from_pretrained` is told."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass
class DataTrainingArguments:
    """What the model reads."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images: a folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Validation images, likewise."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Images to predict: a folder of images, at any depth."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training images that is scored where there are no validation images."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images, with `dataset_name`. Defaults to the only one."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the classes. Defaults to the only one of classes, or to label."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images at most."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict this many images at most."})

    def __post_init__(self):
        if self.dataset_name is None and not self.folders():
            raise ValueError("Give `dataset_name`, or `train_dir` and `validation_dir`.")
        if self.dataset_name is not None and self.folders():
            raise ValueError(
                f"`dataset_name` takes the place of `{next(iter(self.folders().values()))[0]}`. Got both."
            )
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"`train_val_split` must lie between 0 and 1. Got {self.train_val_split}.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")

    def folders(self) -> dict[str, tuple[str, str]]:
        """Of each split that has a folder, the argument and the folder."""
        return {split: (name, path) for split, name in SPLITS.items() if (path := getattr(self, name)) is not None}


@dataclass
class GamlArguments(script.GamlArguments):
    """As for texts; an exit pools in one way, and more layers are needed."""

    config_class: ClassVar[type[GamlResNetConfig]] = GamlResNetConfig
    usual_speed_up: ClassVar[tuple[float, float]] = (1.2, 1.4)  # Table 8: 1.22 to 1.30

    exit_pooling: str | None = field(default=None, metadata={"help": "What an exit reads; mixed is all there is."})
    exit_pooler: str | None = field(default=None, metadata={"help": "none is all there is."})
    exit_warm_start: bool | None = field(
        default=None, metadata={"help": "false is all there is: a new network tells exits nothing.", **script.SWITCH}
    )
    target_speed_up: list[float] | None = field(
        default=None,
        metadata={"help": "Range of the speed-up in layers for which the policy is chosen (1.2 to 1.4, as Table 8)."},
    )

    def config_fields(self) -> dict:
        fields = super().config_fields()
        if self.paper_letter and self.exit_pooling is None:
            fields.pop("exit_pooling")  # of texts
        return fields


@dataclass
class ImageTrainingArguments(script.GamlTrainingArguments):
    """Defaults of He et al. (2016) and Table 8, but for the schedule: SGD at 0.1, momentum 0.9, batches of 128."""

    learning_rate: float = field(default=0.1, metadata={"help": "The first learning rate."})
    optim: str = field(default="sgd", metadata={"help": "The optimizer."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Of the optimizer."})
    weight_decay: float = field(default=1e-4, metadata={"help": "But for biases and norms."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Where gradients are clipped; 0 clips nothing."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    num_train_epochs: float = field(default=100.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images scored at once."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after this many evaluations without a better one; 0 never stops."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Keep the numbers of one place together, which most processors like better."}
    )


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, GamlArguments, ImageTrainingArguments]:
    return script.parse_arguments(argv, (ModelArguments, DataTrainingArguments, GamlArguments, ImageTrainingArguments))


def main(argv: list[str] | None = None) -> dict:
    started = time.time()
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, gaml_args, training_args = parse_arguments(argv)
    script.set_up(training_args)
    old_checkpoints, resume = script.what_to_resume(training_args)
    if training_args.do_train:
        gaml_args.settle_strategy("patience")  # Table 8
    gaml_args.check_policy()
    script.check_output_dir(training_args, gaml_args, model_args.model_name_or_path)
    make_config(model_args, gaml_args, class_weights=None)  # before any image is read; the classes are not known yet

    sources = open_splits(data_args, model_args, gaml_args, training_args)
    model, processor = load_model(model_args, gaml_args, known_classes(sources))
    if training_args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    rows = read_images(sources, model.config, processor)
    if training_args.do_eval and "validation" not in rows:
        part = rows["train"].shuffle(seed=script.seed_of_rows(training_args))
        count = max(1, round(len(part) * data_args.train_val_split))
        rows["validation"], rows["train"] = part.select(range(count)), part.select(range(count, len(part)))
    train_rows, holdout_rows, promise_rows = script.set_aside(
        rows.get("train"), data_args.max_train_samples, gaml_args, training_args
    )
    trainer = script.make_trainer(
        model,
        processor,
        default_data_collator,
        train_rows if train_rows is None else train_rows.augmented(),
        holdout_rows,
        accuracy,
        "accuracy",
        gaml_args,
        training_args,
    )
    run = script.describe(argv, "run_image_classification_gaml.py", model_args, data_args, training_args)
    run["rows"] = script.count_rows(train_rows, holdout_rows, promise_rows, training_args.do_train)
    run["parameters"] = dict(zip(("early exits", "network"), model.head_parameters(), strict=True))
    logger.info("The early exits have %d parameters, the network has %d.", *run["parameters"].values())

    if training_args.do_train:
        run |= script.train(trainer, resume, old_checkpoints)
    script.leave_autocast(trainer)
    is_chosen = holdout_rows is not None and gaml_args.chooses
    if is_chosen:
        run |= script.choose_policy(trainer, holdout_rows, promise_rows, accuracy, "accuracy", gaml_args)
    run["config"] = model.config.to_dict()
    tables = []
    if training_args.do_eval:
        part = rows["validation"]
        if data_args.max_eval_samples is not None:  # of a folder, the first images are all of one class
            part = part.shuffle(seed=script.seed_of_rows(training_args))
        part = script.first(part, data_args.max_eval_samples)
        run["evaluation"] = script.evaluate_splits(
            trainer,
            {"validation": ("eval", part)},
            lambda part: evaluate(trainer, part, gaml_args),
            "accuracy",
            draws=not script.is_own_folder(training_args, model_args.model_name_or_path),
        )
        tables = [script.score_table(f"validation: {len(part)} images", run["evaluation"]["validation"], run)]
    run["seconds"] = time.time() - started
    if training_args.do_predict:
        part = script.first(rows["test"], data_args.max_predict_samples)
        logits, exit_layer = trainer.predict(part, metric_key_prefix="predict").predictions[:2]
        if trainer.is_world_process_zero():
            label_names = [model.config.id2label[k] for k in range(model.config.num_labels)]
            path = Path(training_args.output_dir, "predictions_test.tsv")
            script.write_predictions(path, logits, exit_layer, label_names, part.names())
    if trainer.is_world_process_zero():
        card = script.card_values(run, "accuracy") | {
            "base_model": model_args.model_name_or_path,
            "dataset": data_args.dataset_name or data_args.train_dir,
            "label_column": data_args.label_column_name,
        }
        script.leave(trainer, processor, run, card, is_chosen)
        print("\n".join(tables))
        print(f"Everything is in {training_args.output_dir.rstrip(os.sep)}{os.sep}")
    return run


def open_splits(
    data_args: DataTrainingArguments,
    model_args: ModelArguments,
    gaml_args: GamlArguments,
    training_args: ImageTrainingArguments,
) -> dict[str, ImageSource]:
    """The splits that are needed, with the names of their classes and no image read."""
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    if data_args.dataset_name is None:
        found = data_args.folders()
    else:
        found = load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
        if "validation" not in found and "test" in found and not training_args.do_predict:
            found["validation"] = found["test"]  # as CIFAR and MNIST have it
            if training_args.do_eval:
                logger.warning("There is no validation split: what is called validation here is the test split.")
    wanted["train"] |= gaml_args.chooses and "train" in found
    if "validation" not in found and "train" in found and wanted["validation"]:
        wanted |= {"validation": False, "train": True}  # taken out of the training images
    needed = [split for split in wanted if wanted[split]]
    if missing := [split for split in needed if split not in found]:
        name = SPLITS[missing[0]]
        raise ValueError(f"The data must have the splits {needed}, `{name}` for one. Got {sorted(found)}.")
    sources = {}
    for split in needed:
        if data_args.dataset_name is None:
            argument, path = found[split]
            sources[split] = ImageSource.from_folder(path, argument, needs_classes=split != "test")
            continue
        columns = image_columns(found[split], data_args.image_column_name, data_args.label_column_name)
        images, classes = columns[0], None if split == "test" else columns[1]
        sources[split] = ImageSource.from_table(found[split], split, images, classes)
    return sources


def known_classes(sources: dict[str, ImageSource]) -> list[str] | None:
    """The classes of the first split that has any."""
    for split, source in sources.items():
        if source.names is None:
            continue
        if len(names := source.class_names()) < 2 and split == "train":  # a trained model has its own classes
            raise ValueError(f"The {split} images must be of at least two classes. Got {names}.")
        return names
    return None


def make_config(model_args: ModelArguments, gaml_args: GamlArguments, **changes: Any) -> GamlResNetConfig:
    """The config of the model to be, and what is wrong with it in one sentence."""
    fields = gaml_args.config_fields() | changes
    try:
        if model_args.resnet_depth is not None:
            return GamlResNetConfig.cifar(model_args.resnet_depth, **fields)
        return GamlAutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.source(), **fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def load_model(
    model_args: ModelArguments, gaml_args: GamlArguments, label_names: list[str] | None
) -> tuple[GamlResNet, Any]:
    """A model for these classes, and its image processor. One that was trained for them keeps their order."""
    name, source, labels = model_args.model_name_or_path, model_args.source(), {}
    found = None if name is None else GamlAutoConfig.from_pretrained(name, **source)
    if found is not None and found.comes_with_exits:
        own = [found.id2label[k] for k in range(found.num_labels)]
        if not set(label_names or own) <= set(own):
            raise ValueError(
                f"The model `{name}` was trained for the classes {own}. The data has {label_names}. For other "
                "classes, start from a plain checkpoint or from `resnet_depth`."
            )
    elif label_names is None:
        raise ValueError("The model has no classes yet: give images with classes. Got images to predict alone.")
    else:
        labels["id2label"] = dict(enumerate(label_names))
        labels["label2id"] = {label: i for i, label in enumerate(label_names)}
    config = make_config(model_args, gaml_args, **labels)
    processor_name = model_args.image_processor_name or name
    if processor_name is None:
        processor = cifar_processor()
    else:
        processor = AutoImageProcessor.from_pretrained(processor_name, trust_remote_code=False, **source)
    if name is None:
        return GamlResNet(config), processor
    return GamlAutoModelForImageClassification.from_pretrained(name, config=config, **source), processor


def read_images(sources: dict[str, ImageSource], config: GamlResNetConfig, processor: Any) -> dict[str, ImageRows]:
    """Every image, read once: those of the classes that the model knows."""
    rows = {}
    for split, source in sources.items():
        labels = None
        if source.names is not None:
            labels = encode_labels(source.names, split, "label", config.label2id)
            told = ", ".join(f"{name!r} {count}" for name, count in Counter(source.names).items())
            logger.info("%s: %d images; classes: %s", split, source.count, told)
        rows[split] = ImageRows(source, processor, labels)
    return rows


def evaluate(trainer: script.GamlTrainer, part: ImageRows, gaml_args: GamlArguments) -> dict:
    return script.evaluate(
        trainer,
        part,
        accuracy,
        "accuracy",
        gaml_args.latency_rows,
        flops=lambda exit_layer, **how: image_flops_speed_up(trainer.model, exit_layer, part.image_size, **how),
        rows_of=lambda part, numbers: part.__getitems__(numbers),
    )


def command() -> str | None:
    return script.command(main)


if __name__ == "__main__":
    sys.exit(command())
