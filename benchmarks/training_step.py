"""
What a training step costs: plain fine-tuning, ML-BERT (`ga_mode="none"`) and GAML-BERT, at each granularity.

    python benchmarks/training_step.py --layers 12 --hidden_size 768 --batch_size 32 --length 128

The kinds take turns, round by round, so that what slows the machine down slows all of them; a ratio compares steps of
one round. A step is forward, backward, alignment, clipping and optimizer (AdamW), without loading data.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import accelerate
import torch
import transformers
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours
from benchmarks.machine import processor_name


class RandomTexts(Dataset):
    def __init__(self, num_rows: int, length: int, vocab_size: int):
        self.input_ids = torch.randint(vocab_size, (num_rows, length))

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, row):
        return {"input_ids": self.input_ids[row], "labels": row % 2}


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds = []

    @staticmethod
    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.started)


def trainers(options: argparse.Namespace, folder: str) -> dict[str, Trainer]:
    """One trainer for each kind of step, plain fine-tuning first."""
    sizes = {
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden_size,
        "num_attention_heads": options.hidden_size // 32 if options.hidden_size < 768 else options.hidden_size // 64,
        "intermediate_size": 4 * options.hidden_size,
    }
    kinds = {
        "plain fine-tuning": (Trainer, BertForSequenceClassification(BertConfig(**sizes))),
        "ML-BERT": (GamlTrainer, GamlBertForSequenceClassification(GamlBertConfig(**sizes, ga_mode="none"))),
    }
    for granularity in ("global", "layer", "tensor"):
        config = GamlBertConfig(**sizes, ga_mode="soft", ga_granularity=granularity)
        kinds[f"GAML-BERT, soft, {granularity}"] = (GamlTrainer, GamlBertForSequenceClassification(config))
    steps = options.steps + 1  # the first one of a round only warms up
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        bf16=options.bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    texts = RandomTexts(steps * options.batch_size, options.length, BertConfig().vocab_size)
    return {name: cls(model, arguments, train_dataset=texts) for name, (cls, model) in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens in each text")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each kind in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = trainers(options, folder)
        for _ in range(options.rounds):
            for name, trainer in kinds.items():
                stopwatch = Stopwatch()
                trainer.add_callback(stopwatch)
                trainer.train()
                trainer.remove_callback(stopwatch)
                seconds.setdefault(name, []).append(statistics.median(stopwatch.seconds[1:]))

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{processor_name()}, {options.threads} thread(s)"
    )
    print(f"\n{date.today()}, {device}; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}; {vars(options)}")
    plain = seconds["plain fine-tuning"]
    print(f"{'':28} {'ms per step: median (range)':>30} {'plain steps: median (range)':>32}")
    for name, times in seconds.items():
        ratios = [t / p for t, p in zip(times, plain, strict=True)]
        milliseconds = [1000 * t for t in times]
        print(f"{name:28} {spread(milliseconds, 1):>30} {spread(ratios, 2):>32}")


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
