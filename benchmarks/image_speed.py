"""
What exits on images gain by the clock, beside plain ResNets of less depth: ResNet-56 with an exit after each block.

    python benchmarks/image_speed.py --exits 9 15 21 --batch_sizes 1 32

Random weights, images of 32x32 that are noise, one thread, channels last; every image leaves at the exit named, after
the rule of Shallow-Deep networks has looked at each exit on the way. Systems take turns; each figure is how many times
less processor time than the plain ResNet-56 took in the same round: the median of the rounds and their range.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.images import DEPTHS, LeaveAt
from benchmarks.speed import processor, spread
from gaml_hf import GamlResNetConfig, GamlResNetForImageClassification


def make(depth: int, **fields) -> GamlResNetForImageClassification:
    config = GamlResNetConfig.cifar(depth, num_labels=10, **fields)
    return GamlResNetForImageClassification(config).eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def measure(systems: dict[str, Callable], pixels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 2):
        for name, run in systems.items():
            started = time.process_time()
            run(pixels)
            if number >= 2:
                seconds[name].append(time.process_time() - started)
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exits", type=int, nargs="+", default=[9, 15, 21], help="of 27 blocks")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    systems: dict[str, Callable] = {}
    for depth in sorted(DEPTHS, reverse=True):
        systems[f"plain ResNet-{depth}"] = make(depth, exit_layers=[(depth - 2) // 2])
    exits = make(56)
    for m in options.exits:
        systems[f"exits, leaving at block {m}"] = partial(exits, exit_policy=LeaveAt(m - 1))
    print(processor())
    for batch_size in options.batch_sizes:
        pixels = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        seconds = measure(systems, pixels, options.rounds)
        base = seconds["plain ResNet-56"]
        for name, taken in seconds.items():
            ratios = [theirs / own for theirs, own in zip(base, taken, strict=True)]
            print(f"batch {batch_size}: {name}: {spread(ratios)}", flush=True)


if __name__ == "__main__":
    main()
