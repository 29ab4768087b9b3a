"""
The tables and figures of the paper, one command each.

    python benchmarks/reproduce.py table2 --tasks cola mrpc --seeds 0 1 2 --backbone google-bert/bert-base-uncased
    python benchmarks/reproduce.py table2 --tasks cola mrpc --dry-run     # how many runs, and about how long
    python benchmarks/reproduce.py grid --tasks cola --systems gaml-soft  # hyper-parameters, by cross-validation
    python benchmarks/reproduce.py table8 --tasks cifar10 --data images   # images/cifar10/{train,test}/<class>/*.png

Every training leaves one JSON in `--ledger`, and one that is there is not run again: stop whenever you like, and
give the same command to go on. Reports are made from the JSONs, into `--ledger`/reports. Several processes share the
work with `--shard 0/2` and `--shard 1/2`.

`table1` to `table5`, `table8` and `fig3` to `fig5` are the paper's. `exits` compares the paper's exits with ours,
ingredient by ingredient, and with static models that read the same. `ga` compares the readings of gradient alignment
that the paper leaves open. `grid` is the search of Sec. 6.4: its winner for a task and system (or, for lack of one,
for the multi-exit model, or else the values of Table 7, and of Table 6 for `table1`) is what the others train with,
unless options say otherwise. It is for texts: `table8`, of images, has one recipe.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours

from benchmarks import reports
from benchmarks.baselines import BASELINES
from benchmarks.images import DEPTHS, IMAGE_SYSTEMS, ImageRun
from benchmarks.runs import EXIT_SYSTEMS, IMAGE_TASKS, SECOND_STAGE, Run, Settings, encoder_digest, perform
from gaml_hf.evaluation.glue import GLUE_TASKS, get_task


# Sec. 6.4
LEARNING_RATES, BATCH_SIZES = (1e-5, 2e-5, 3e-5, 5e-5), (16, 32, 128)
WARMUPS, GRID_ALPHAS = (0.8, 1.0, 1.2), (0.1, 0.2, 0.3, 0.5, 0.8)

# Table 6, of the pilot experiments of Table 1.
PILOT = {
    "cola": {"learning_rate": 1e-5, "batch_size": 32, "warmup_epochs": 1.0, "alpha": 0.2},
    "sst2": {"learning_rate": 2e-5, "batch_size": 128, "warmup_epochs": 0.8, "alpha": 0.1},
}

# What an exit reads, how fast it learns and where it starts: from the paper's exits to ours, each ingredient alone and
# all together with one of them changed.
LEARNING = {
    "exit_pooling": "mean",
    "exit_learning_rate_multiplier": 10.0,
    "exit_warm_start": True,
}
EXITS = {"paper": {}, "learning": LEARNING}
EXIT_VARIANTS = [
    {},
    *({name: value} for name, value in LEARNING.items()),
    LEARNING | {"exit_pooling": "cls"},
    LEARNING | {"exit_norm": "layer"},
    LEARNING | {"exit_learning_rate_multiplier": 1.0},
    LEARNING | {"exit_warm_start": False},
    LEARNING,
]


def experiment(name: str, options: argparse.Namespace, depth: int) -> list[Run]:
    """The trainings that an experiment needs."""
    runs = []
    for task, seed in itertools.product(options.tasks, options.seeds):

        def run(system: str, task: str = task, seed: int = seed, **fields) -> None:
            base = "bert" if fields.get("layers") else system
            if options.systems is None or system in options.systems or base in options.systems:
                usual = PILOT.get(task, {}) if name == "table1" else {}
                runs.append(replace(recipe(task, system, options, usual=usual), seed=seed, **fields))

        if name == "table1":
            for shallow in (1, depth // 2):
                run("bert", layers=shallow)
                for system in reports.PAIR_SYSTEMS[1:]:
                    run(system, exits=(shallow, depth))
            run("bert", layers=depth)
        elif name == "table2":
            for system in dict.fromkeys(system for _, system, _ in reports.SYSTEMS):
                if system.startswith("bert"):
                    run("bert", layers=depth if system == "bert" else depth // 2)
                else:
                    run(system)
        elif name == "table3":
            for system, alpha in itertools.product(("ml", "gaml-soft"), reports.ALPHAS):
                run(system, alpha=alpha)
        elif name == "table4":
            run("bert", layers=depth)
            for system in ("multi-exit", "fastbert", "fastbert-joint", "ml", "gaml-hard", "gaml-soft"):
                run(system)
        elif name == "table5":
            for system in ("multi-exit", "fastbert-joint", "ml", "gaml-soft"):
                run(system)
        elif name == "fig3":
            run("ml", watch_angle=True)
        elif name == "fig4":
            run("bert", layers=depth)
            for system in ("multi-exit", "ml", "gaml-soft"):
                run(system)
        elif name == "fig5":
            for layers in range(1, depth + 1):
                run("bert", layers=layers)
        elif name == "exits":
            for fields in EXIT_VARIANTS:
                run("multi-exit", **fields)
            for layers in (depth, depth // 2):
                run("bert", layers=layers, **LEARNING)
            run("theseus", **LEARNING)
            run("multi-exit", stop_gradient_between_exits=True, **LEARNING)
            run("multi-exit", mixed_training=0.5, **LEARNING)
            run("fastbert-joint", **LEARNING)
            run("ml", **LEARNING)
            for system, granularity in itertools.product(("gaml-soft", "gaml-hard"), ("layer", "tensor", "global")):
                run(system, ga_granularity=granularity, **LEARNING)
        elif name == "ga":
            run("multi-exit")
            for reduction, clip in itertools.product(("mean", "sum"), (1.0, 0.0)):
                run("ml", kd_reduction=reduction, max_grad_norm=clip)
                for system, granularity in itertools.product(
                    ("gaml-soft", "gaml-hard"), ("global", "layer", "tensor")
                ):
                    run(system, kd_reduction=reduction, max_grad_norm=clip, ga_granularity=granularity)
    return list(dict.fromkeys(runs))


def image_runs(options: argparse.Namespace) -> list[ImageRun]:
    """Table 8: plain networks of several depths, and every system of exits on ResNet-56."""
    given = {
        "learning_rate": options.learning_rates,
        "batch_size": options.batch_sizes,
        "alpha": options.alphas,
        "ga_granularity": options.ga_granularity and [options.ga_granularity],
    }
    if several := [name for name, values in given.items() if values and len(values) > 1]:
        raise ValueError(f"Images have no grid: give one value of `{several[0]}`. Got {given[several[0]]}.")
    fields = {name: values[0] for name, values in given.items() if values}
    return [
        ImageRun(
            task=task,
            system=system,
            depth=depth,
            seed=seed,
            epochs=options.epochs,
            max_train_rows=options.max_train_rows,
            bf16=options.bf16,
            **fields,
        )
        for task, seed, system in itertools.product(options.tasks, options.seeds, IMAGE_SYSTEMS)
        if options.systems is None or system in options.systems
        for depth in (options.depths if system == "plain" else options.depths[-1:])
    ]


def grid(options: argparse.Namespace) -> list[Run]:
    """The search of Sec. 6.4: every combination on every fold."""
    runs = []
    for task, system in itertools.product(options.tasks, options.systems or ["multi-exit", "ml", "gaml-soft"]):
        start = recipe(task, system, options, searched=False)
        distils = EXIT_SYSTEMS.get(system, {}).get("distillation") != "none"
        combinations = itertools.product(
            options.learning_rates or LEARNING_RATES,
            options.batch_sizes or BATCH_SIZES,
            options.warmups or WARMUPS,
            (options.alphas or GRID_ALPHAS) if distils else [start.alpha],
            range(options.folds),
        )
        for rate, batch, warmup, alpha, fold in combinations:
            runs.append(
                replace(
                    start,
                    learning_rate=rate,
                    batch_size=batch,
                    warmup_epochs=warmup,
                    alpha=alpha,
                    fold=fold,
                    folds=options.folds,
                    seed=options.seeds[0],
                )
            )
    return runs


def recipe(
    task_name: str,
    system: str,
    options: argparse.Namespace,
    searched: bool = True,
    usual: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """The hyper-parameters of a task: options, else the grid's winner, else `usual`, else Table 7."""
    task = get_task(task_name)
    chosen = {
        "learning_rate": task.learning_rate,
        "batch_size": task.batch_size,
        "warmup_epochs": task.warmup_epochs,
        "alpha": task.alpha,
    } | usual
    if searched:
        found = winner(task_name, system, options) or winner(task_name, "multi-exit", options)
        chosen |= {key: value for key, value in (found or {}).items() if key != "alpha" or system == found["system"]}
    for key, values in (
        ("learning_rate", options.learning_rates),
        ("batch_size", options.batch_sizes),
        ("warmup_epochs", options.warmups),
        ("alpha", options.alphas),
    ):
        if values and len(values) == 1:
            chosen[key] = values[0]
    chosen.pop("system", None)
    return Run(
        task=task_name,
        system=system,
        backbone=backbone_name(options),
        seed=0,
        epochs=options.epochs,
        max_train_rows=options.max_train_rows,
        bf16=options.bf16,
        ga_granularity=options.ga_granularity or Run.ga_granularity,
        early_stopping_patience=options.early_stopping_patience,
        **EXITS[options.exits],
        **chosen,
    )


def backbone_name(options: argparse.Namespace) -> str:
    return Path(options.backbone).name if Path(options.backbone).is_dir() else options.backbone


def winner(task_name: str, system: str, options: argparse.Namespace) -> dict | None:
    """
    The combination with the best mean over folds of the mean over exits, among those with all folds of a seed
    done: of the same encoder, exits, rows, epochs and whatever else the options say.
    """
    wanted = {"task": task_name, "system": system, "backbone": backbone_name(options)}
    wanted |= {name: EXITS[options.exits].get(name, getattr(Run, name)) for name in LEARNING}
    wanted |= {
        name: getattr(options, name) for name in ("epochs", "max_train_rows", "bf16", "early_stopping_patience")
    }
    wanted |= {"ga_granularity": options.ga_granularity or Run.ga_granularity}
    scores = defaultdict(lambda: defaultdict(dict))  # by seed and fold
    for result in ledger(options.ledger, "*-fold*.json"):
        run = result["run"]
        # A run of a time without these fields has the paper's exits.
        if all(run.get(name, getattr(Run, name, None)) == value for name, value in wanted.items()):
            key = tuple(run[name] for name in ("learning_rate", "batch_size", "warmup_epochs", "alpha", "folds"))
            scores[key][run["seed"]][run["fold"]] = result["exit_mean"]
    complete = {}
    for key, seeds in scores.items():
        if done := [value for folds in seeds.values() if len(folds) == key[-1] for value in folds.values()]:
            complete[key] = statistics.mean(done)
    if not complete:
        return None
    best = max(complete, key=complete.get)
    return dict(zip(("learning_rate", "batch_size", "warmup_epochs", "alpha"), best, strict=False)) | {
        "system": system
    }


def ledger(folder: Path, pattern: str = "*.json") -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]


def check_encoder(options: argparse.Namespace, names: set[str], known: list[dict]) -> None:
    """Runs of two encoders that share a name are not mixed."""
    of_name = [result for result in known if result["name"] in names and "encoder" in result]
    if not of_name:
        return
    here = encoder_digest(options.backbone)
    if others := [result["name"] for result in of_name if result["encoder"] != here]:
        parser().error(
            f"`--backbone` must be the encoder of the runs in `--ledger`, or have another name. Got "
            f"`{options.backbone}`, whose weights ({here}) are not those of {others[0]}"
            f"{f' and {len(others) - 1} more' if others[1:] else ''}."
        )


def seconds_of(run: Run, known: list[dict]) -> float | None:
    """About how long a run takes, by the runs of the same task on record; None without one."""
    for same in (("task", "system", "bf16"), ("task", "bf16"), ("task",)):
        rates = [
            result["seconds"] / (result["rows"]["train"] * result["stopped_at_step"] / result["steps_per_epoch"])
            for result in known
            if all(result["run"][key] == getattr(run, key) for key in same)
        ]
        if rates:
            rows = statistics.median(result["rows"]["train"] for result in known if result["run"]["task"] == run.task)
            return statistics.mean(rates) * rows * run.epochs * (2 if run.system in SECOND_STAGE else 1)
    return None


def shard(word: str) -> tuple[int, int]:
    """`"1/2"` as `(1, 2)`."""
    index, slash, count = word.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"must be such as 0/2 or 1/2. Got {word}.")
    return int(index), int(count)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*reports.REPORTS, "grid"])
    parser.add_argument("--tasks", nargs="+", choices=[*GLUE_TASKS, *IMAGE_TASKS], help="all by default")
    systems = dict.fromkeys([*EXIT_SYSTEMS, *BASELINES, *IMAGE_SYSTEMS])
    parser.add_argument("--systems", nargs="+", choices=list(systems), help="only these")
    parser.add_argument(
        "--depths", nargs="+", type=int, default=list(DEPTHS), help="of plain ResNets; exits are on the last"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--backbone", default="google-bert/bert-base-uncased", help="an encoder: a folder or a Hub name"
    )
    parser.add_argument("--data", help="a folder with a folder for each task; else nyu-mll/glue")
    parser.add_argument("--ledger", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, default=20, help="at most; early stopping ends a run sooner")
    parser.add_argument(
        "--early_stopping_patience",
        type=int,
        default=Run.early_stopping_patience,
        help="epochs without a better mean over exits that end a run (default: %(default)s)",
    )
    parser.add_argument(
        "--exits",
        choices=list(EXITS),
        default="paper",
        help="a linear layer on [CLS], from scratch; or the mean over tokens, a warm start and ten times the rate",
    )
    parser.add_argument("--learning_rates", nargs="+", type=float, help="one value, or a grid's")
    parser.add_argument("--batch_sizes", nargs="+", type=int)
    parser.add_argument("--warmups", nargs="+", type=float, help="in epochs")
    parser.add_argument("--alphas", nargs="+", type=float)
    parser.add_argument(
        "--ga_granularity",
        choices=["global", "layer", "tensor"],
        help="global by default, of images layer; but for `ga`: all",
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--max_train_rows", type=int)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--shard", type=shard, default=(0, 1), help="i/n: every n-th run, from the i-th, from 0")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="count the runs and estimate the time")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    of_images = options.experiment == "table8"
    kinds = (IMAGE_TASKS, IMAGE_SYSTEMS) if of_images else (GLUE_TASKS, [*EXIT_SYSTEMS, *BASELINES])
    options.tasks = options.tasks or list(kinds[0])
    for name, known in zip(("tasks", "systems"), kinds, strict=True):
        if wrong := set(getattr(options, name) or ()) - set(known):
            parser().error(f"{options.experiment} takes `--{name}` out of {', '.join(known)}. Got {sorted(wrong)[0]}.")
    if options.exits != "paper" and options.experiment in ("exits", "table8"):
        parser().error(f"{options.experiment} has exits of its own: leave out `--exits`. Got {options.exits}.")
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(options.ledger, options.backbone, options.data)
    if of_images:
        runs = image_runs(options)
    elif options.experiment == "grid":
        runs = grid(options)
    else:
        try:
            encoder = AutoConfig.from_pretrained(options.backbone)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            parser().error(f"`--backbone` must be an encoder's folder, or its name on the Hub. {reason}")
        runs = experiment(options.experiment, options, encoder.num_hidden_layers)
        if encoder.model_type != "bert" and (of_bert := {run.system for run in runs} & BASELINES.keys()):
            print(f"Made of BERT's layers, and left out for {encoder.model_type}: {', '.join(sorted(of_bert))}")
            runs = [run for run in runs if run.system not in of_bert]
    if not runs:
        parser().error(f"{options.experiment} has no run of `--systems {' '.join(options.systems)}`.")
    missing = dict.fromkeys(run for run in runs if not settings.path(run).exists())  # a grid has thousands
    index, count = options.shard
    mine = [run for run in runs[index::count] if run in missing]  # the same share, however far the others are
    known = ledger(options.ledger)

    def time_left(of: list[Run]) -> str:
        guesses = [seconds_of(run, known) for run in of]
        unknown = guesses.count(None)
        hours = sum(guess for guess in guesses if guess is not None) / 3600
        return f"about {hours:.1f} h" + (f" and {unknown} runs of unknown length" if unknown else "")

    print(f"{options.experiment}: {len(runs)} runs, {len(missing)} to do, {time_left(missing)}", flush=True)
    if options.dry_run:
        return
    if not options.report:
        if not of_images:
            check_encoder(options, {run.name for run in runs}, known)
        for position, run in enumerate(mine, start=1):
            started = time.time()
            result = perform(run, settings)
            known.append(result)
            print(
                f"[{position}/{len(mine)}] {run.name}: mean over exits {result['exit_mean']:.4f}, best at step "
                f"{result['best_step']} of {result['stopped_at_step']}, {time.time() - started:.0f} s; "
                f"left: {time_left(mine[position:])}",
                flush=True,
            )
    done = [json.loads(settings.path(run).read_text(encoding="utf-8")) for run in runs if settings.path(run).exists()]
    if options.experiment == "grid":
        for task, system in dict.fromkeys((run.task, run.system) for run in runs):
            print(f"{task}, {system}: {winner(task, system, options)}")
    elif done:
        print(reports.write(options.experiment, done, options.ledger / "reports"))
    else:
        print("Nothing to report yet.")


if __name__ == "__main__":
    main()
