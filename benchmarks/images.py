"""
One training of Table 8, and the JSON it leaves behind (Zhu et al., 2021, Appendix D).

As in `runs.py`, a run is decided by an `ImageRun`, whose file tells the logits of every exit. All systems have one
recipe: He et al. (2016) with a cosine schedule, no early stopping, the last weights.
"""

import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments, default_data_collator, set_seed

from benchmarks.runs import EXIT_SYSTEMS, IMAGE_TASKS, ONE_EXIT, Settings, digest, encode_array
from gaml_hf import GamlResNetConfig, GamlResNetForImageClassification, GamlTrainer
from gaml_hf.data.images import ImageRows, ImageSource, cifar_processor
from gaml_hf.evaluation import ExitMetrics, accuracy, image_flops
from gaml_hf.models.exiting_gaml import MaxProb


DEPTHS = (20, 32, 44, 56)  # of plain networks, which are the rivals of the exits

IMAGE_SYSTEMS: dict[str, dict[str, Any]] = {
    "plain": ONE_EXIT,
    **{name: EXIT_SYSTEMS[name] for name in ("multi-exit", "ml", "gaml-hard", "gaml-soft")},
    "shallow-deep": {"exit_loss_weights": "shallow_deep", "distillation": "none", "ga_mode": "none"},
    # Phuong & Lampert (2019): half and half, all exits alike, temperature annealed.
    "dbt": {
        "exit_loss_weights": "uniform",
        "distillation": "last_to_all",
        "alpha": 0.5,
        "kd_temperature_growth": 1.05,
        "ga_mode": "none",
    },
}


@dataclass(frozen=True, kw_only=True)
class ImageRun:
    """
    Everything that decides one training.

    Args:
        task (`str`): a key of `IMAGE_TASKS`.
        system (`str`): a key of `IMAGE_SYSTEMS`.
        depth (`int`): of the ResNet; 56 but for the plain ones.
        seed (`int`): of everything that is drawn; the images set aside depend on it too.
        epochs, learning_rate, batch_size, weight_decay: of SGD with momentum 0.9.
        alpha, kd_reduction, ga_granularity: as in [`GamlConfigMixin`]; `"dbt"` has an α of its own.
        holdout_fraction (`float`): the share of the training images set aside, which choose the policy's parameter.
        max_train_rows (`int`, *optional*): use this many training images only.
        bf16 (`bool`): train under bfloat16 autocast.
    """

    task: str
    system: str
    depth: int = 56
    seed: int
    epochs: float
    learning_rate: float = 0.1
    batch_size: int = 128
    weight_decay: float = 1e-4
    alpha: float = 0.2
    kd_reduction: str = "mean"
    ga_granularity: str = "layer"
    holdout_fraction: float = 0.1
    max_train_rows: int | None = None
    bf16: bool = False

    @property
    def name(self) -> str:
        """Of its file: readable, and different for any two runs."""
        return f"{self.task}-{self.system}-resnet{self.depth}-seed{self.seed}-{digest(asdict(self))}"

    def train(self, settings: Settings, folder: str) -> dict[str, Any]:
        """One training, from random weights to the logits."""
        rows = {split: read_split(settings.data, self.task, split) for split in ("train", "test")}
        shuffled = rows["train"].shuffle(seed=self.seed)
        if self.max_train_rows is not None:
            shuffled = shuffled.select(range(min(self.max_train_rows, len(shuffled))))
        cut = round(len(shuffled) * self.holdout_fraction)
        held_out, train_rows = shuffled.select(range(cut)), shuffled.select(range(cut, len(shuffled)))
        set_seed(self.seed)
        own = {"alpha": self.alpha, "kd_reduction": self.kd_reduction, "ga_granularity": self.ga_granularity}
        config = GamlResNetConfig.cifar(
            self.depth,
            num_labels=IMAGE_TASKS[self.task],
            **(own | IMAGE_SYSTEMS[self.system]),
            **({"exit_layers": [(self.depth - 2) // 2]} if self.system == "plain" else {}),
        )
        model = GamlResNetForImageClassification(config).to(memory_format=torch.channels_last)
        steps_per_epoch = -(-len(train_rows) // self.batch_size)
        trainer = GamlTrainer(
            model,
            TrainingArguments(
                folder,
                seed=self.seed,
                optim="sgd",
                optim_args="momentum=0.9",
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                lr_scheduler_type="cosine",
                max_grad_norm=0.0,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=256,
                num_train_epochs=self.epochs,
                bf16=self.bf16,
                use_cpu=not torch.accelerator.is_available(),
                eval_strategy="epoch",
                save_strategy="no",
                logging_steps=0.05,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train_rows.augmented(),
            eval_dataset=held_out,
            data_collator=default_data_collator,
            compute_metrics=ExitMetrics(config, accuracy, "accuracy"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logits, labels = {}, {}
        for name, part in (("held_out", held_out), ("validation", rows["test"])):
            output = trainer.predict(part)
            logits[name], labels[name] = output.predictions[2].astype(np.float32), output.label_ids
        stem, layers, exits = image_flops(model, rows["test"].image_size)
        scores = {
            name: {m: accuracy(values[:, i].argmax(-1), labels[name]) for i, m in enumerate(config.exit_layers)}
            for name, values in logits.items()
        }
        heads, network = model.head_parameters()
        return {
            "full_depth": config.num_hidden_layers,
            "layers": config.num_hidden_layers,
            "exit_layers": config.exit_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "head_parameters": heads,
            "network_parameters": network,
            # Up to each exit: of the network alone, and of the exits that ran before and there.
            "multiply_adds": {
                "network": [(stem + sum(layers[:m])) // 2 for m in exits],
                "exits": [sum(exits[k] for k in exits if k <= m) // 2 for m in exits],
            },
            "milliseconds": milliseconds(model, rows["test"]),
            "static_speed_up": 1.0,
            "rows": {"train": len(train_rows), "held_out": len(held_out), "validation": len(rows["test"])},
            "steps_per_epoch": steps_per_epoch,
            "stopped_at_step": trainer.state.global_step,
            "best_step": trainer.state.global_step,
            "exit_mean": float(np.mean([score["accuracy"] for score in scores["held_out"].values()])),
            "scores": scores,
            "log": trainer.state.log_history,
            "logits": {name: encode_array(values) for name, values in logits.items()},
            "labels": {name: values.tolist() for name, values in labels.items()},
        }


@cache
def read_split(data: str | None, task: str, split: str) -> ImageRows:
    """`<data>/<task>/<split>/<class>/*`, read once for all runs of a process."""
    if data is None:
        raise ValueError(f"`--data` must name the folder that holds `{task}/train/<class>/*.png`. Got none.")
    source = ImageSource.from_folder(Path(data, task, split), "data")
    classes = source.class_names()
    if len(classes) != IMAGE_TASKS[task]:
        raise ValueError(
            f"`{task}` has {IMAGE_TASKS[task]} classes. Got {len(classes)}, in `{Path(data, task, split)}`."
        )
    return ImageRows(source, cifar_processor(), [classes.index(name) for name in source.names])


class LeaveAt(MaxProb):
    """Decides as the rule of Shallow-Deep networks does, as far as time goes, and leaves at one exit."""

    def __init__(self, position: int):
        super().__init__(1.0)
        self.position = position

    def should_exit(self, exit_logits: torch.Tensor) -> torch.Tensor:
        return super().should_exit(exit_logits) | (exit_logits.shape[1] > self.position)


@torch.inference_mode()
def milliseconds(model: GamlResNetForImageClassification, rows: ImageRows, repeats: int = 15) -> dict[str, Any]:
    """
    For one image at a time, the median: of the whole network with its last exit alone, `full_depth`; and with every
    exit and decision on the way to each exit, `to_exit`. What is measured takes turns.
    """
    model.eval()
    exits = model.config.num_exits
    policies = [None, *(LeaveAt(i) for i in range(exits if exits > 1 else 0))]
    times = np.empty((repeats + 2, len(policies)))
    for number in range(len(times)):
        pixels = rows[number % len(rows)]["pixel_values"][None].to(model.device)
        pixels = pixels.to(memory_format=torch.channels_last)
        for i, policy in enumerate(policies):
            started = time.perf_counter()
            model(pixels, exit_policy=policy)
            if pixels.device.type != "cpu":
                torch.accelerator.synchronize()
            times[number, i] = 1000 * (time.perf_counter() - started)
    full_depth, *to_exit = np.median(times[2:], axis=0).tolist()
    return {"full_depth": full_depth, "to_exit": to_exit or [full_depth]}
