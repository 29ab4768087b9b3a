"""
Tables and figures of the experiments, made from the JSONs of `runs.py` alone.

A dynamic result is what the protocol asks for (Zhu et al., 2021, Sec. 6.4): the policy's parameter is chosen on the
rows set aside so that the speed-up in layers lies in [1.8, 2.1], then applied to the validation set once.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import optimize, stats

from benchmarks.runs import SECOND_STAGE, decode_array, main_metric, scorer
from gaml_hf.evaluation import choose, layer_speed_up, plots, replay, sweep
from gaml_hf.evaluation.glue import get_task


TARGET = (1.8, 2.1)
FASTER = (2.35, 2.65)  # about 2.5x
ALPHAS = (0.1, 0.3, 0.5, 0.8)  # Table 3

# Name in the paper, system of `runs.py`, policy. "half" is a model of half the layers.
SYSTEMS: list[tuple[str, str, str]] = [
    ("BERT", "bert", "none"),
    ("BERT, half the layers", "bert-half", "none"),
    ("DistilBERT-style", "distilbert", "none"),
    ("BERT-PKD", "pkd", "none"),
    ("LayerDrop", "layer_drop", "none"),
    ("BERT-of-Theseus", "theseus", "none"),
    ("Head pruning", "head_pruning", "none"),
    ("DeeBERT (two stages)", "deebert", "entropy"),
    ("Shallow-Deep", "multi-exit", "max_prob"),
    ("PABEE", "multi-exit", "patience"),
    ("FastBERT (two stages)", "fastbert", "patience"),
    ("FastBERT, one stage", "fastbert-joint", "patience"),
    ("FastBERT-GA", "fastbert-ga", "patience"),
    ("ML-BERT", "ml", "patience"),
    ("GAML-BERT (GA-hard)", "gaml-hard", "patience"),
    ("GAML-BERT (GA-soft)", "gaml-soft", "patience"),
]

# The paper's own numbers, BERT-base; development set.
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2")
PAPER_TABLE_2 = {
    name: dict(zip(TASKS, scores, strict=True))
    for name, scores in {
        "BERT": (54.7, 83.5, 88.2, 86.8, 88.7, 67.1, 91.5),
        "BERT, half the layers": (36.4, 77.1, 83.9, 80.2, 84.8, 60.3, 88.6),
        "DistilBERT-style": (46.5, 79.8, 85.3, 82.2, 86.4, 63.1, 89.3),
        "BERT-PKD": (47.4, 80.6, 85.5, 82.5, 86.8, 63.4, 89.7),
        "LayerDrop": (43.2, 80.1, 85.2, 81.7, 86.2, 62.8, 89.1),
        "BERT-of-Theseus": (44.5, 80.7, 85.4, 82.4, 86.5, 63.6, 89.6),
        "DeeBERT (two stages)": (43.4, 81.2, 85.8, 82.5, 87.3, 63.9, 90.0),
        "Shallow-Deep": (44.5, 81.1, 85.7, 82.6, 87.2, 64.1, 90.1),
        "PABEE": (45.2, 81.5, 86.2, 83.1, 87.5, 64.5, 90.5),
        "FastBERT (two stages)": (48.6, 82.1, 86.7, 83.6, 88.1, 64.9, 90.8),
        "FastBERT-GA": (50.4, 82.6, 87.5, 84.7, 88.5, 66.2, 91.4),
        "ML-BERT": (49.2, 82.7, 87.3, 84.2, 88.6, 65.7, 91.3),
        "GAML-BERT (GA-hard)": (50.5, 83.1, 87.6, 84.9, 88.9, 66.3, 91.5),
        "GAML-BERT (GA-soft)": (51.1, 83.2, 88.1, 85.1, 89.1, 66.8, 91.9),
    }.items()
}
# By task, pair of exits, exit, system.
PAPER_TABLE_1 = {
    "sst2": {
        (1, 12): {1: (56.4, 61.5, 74.6, None, 75.8), 12: (91.5, 91.6, None, 91.3, 91.5)},
        (6, 12): {6: (88.6, 88.9, 89.3, None, 89.6), 12: (91.5, 91.8, None, 92.0, 92.2)},
    },
    "cola": {
        (1, 12): {1: (0.0, 0.0, 0.0, None, 0.0), 12: (54.7, 55.0, None, 55.1, 55.3)},
        (6, 12): {6: (36.4, 39.9, 46.5, None, 47.6), 12: (54.7, 55.4, None, 55.9, 56.7)},
    },
}
PAIR_SYSTEMS = ("bert", "pair-joint", "pair-deep-teaches", "pair-shallow-teaches", "pair-mutual")
PAPER_TABLE_3 = {"ml": (48.8, 49.2, 48.6, 48.4), "gaml-soft": (50.9, 51.1, 50.9, 50.8)}
PAPER_TABLE_4 = {
    "bert": {"cola": 2300, "sst2": 4100},
    "multi-exit": {"cola": 2100, "sst2": 3800},
    "fastbert": {"cola": 2000, "sst2": 3300},
    "gaml-soft": {"cola": 1800, "sst2": 2900},
}
PAPER_TABLE_5 = {
    ("multi-exit", "entropy"): {"mnli": 81.2, "mrpc": 85.8, "sst2": 90.0},
    ("gaml-soft", "entropy"): {"mnli": 83.0, "mrpc": 87.6, "sst2": 91.3},
    ("multi-exit", "max_prob"): {"mnli": 81.1, "mrpc": 85.7, "sst2": 90.1},
    ("gaml-soft", "max_prob"): {"mnli": 82.8, "mrpc": 87.8, "sst2": 91.4},
}

# Images. Names of systems in Table 8 and below it; accuracy and speed-up in the paper.
IMAGE_TARGET = (1.2, 1.4)
IMAGE_SYSTEMS = [
    ("Shallow-Deep", "shallow-deep"),
    ("PABEE", "multi-exit"),
    ("DBT", "dbt"),
    ("ML", "ml"),
    ("GAML (GA-hard)", "gaml-hard"),
    ("GAML (GA-soft)", "gaml-soft"),
]
PAPER_TABLE_8 = {
    "ResNet-56": ("91.8", "68.6"),  # CIFAR-10, CIFAR-100
    "PABEE": {"cifar10": "91.8 at 1.26x", "cifar100": "69.1 at 1.22x"},
    "DBT": {"cifar10": "92.1 at 1.28x", "cifar100": "69.3 at 1.25x"},
    "GAML (GA-soft)": {"cifar10": "92.6 at 1.30x", "cifar100": "69.7 at 1.27x"},
}
# Plain networks of ordinary training: the README of github.com/chenyaofo/CIFAR-pretrained-models.
PUBLIC_RESNETS = {
    "cifar10": {20: 91.65, 32: 92.81, 44: 93.24, 56: 93.69},
    "cifar100": {20: 66.61, 32: 68.74, 44: 69.49, 56: 70.79},
}


# --------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Measured:
    """A score of one run on the validation set, times 100, and what it would be with each row left out."""

    score: float
    without: np.ndarray  # (num_rows,)
    labels: np.ndarray  # (num_rows,)


def left_out(
    predictions: np.ndarray, labels: np.ndarray, score: Callable[[np.ndarray, np.ndarray], float]
) -> np.ndarray:
    """
    A score with each row left out in turn. What a row takes with it is its prediction and its label, so that rows
    which have both in common leave the same score behind.

    Args:
        predictions, labels (`np.ndarray` of shape `(num_rows,)`): classes.
        score (`Callable`): `(predictions, labels) -> float`.

    Returns:
        `np.ndarray` of shape `(num_rows,)`.
    """
    without = np.empty(len(labels))
    for pair in set(zip(predictions.tolist(), labels.tolist(), strict=True)):
        alike = (predictions == pair[0]) & (labels == pair[1])
        rest = np.arange(len(labels)) != alike.argmax()
        without[alike] = score(predictions[rest], labels[rest])
    return without


@dataclass(frozen=True)
class Answer(Measured):
    """What a trained model answered under one policy, and how fast."""

    speed_up: float
    parameter: float | None
    exit_layer: np.ndarray | None = None  # (num_rows,)

    @property
    def in_target(self) -> bool:
        return TARGET[0] <= self.speed_up <= TARGET[1]


def answer(result: dict[str, Any], exit_strategy: str, target: tuple[float, float] = TARGET) -> Answer:
    """
    One model under one policy, its parameter chosen on the rows set aside.

    Args:
        result (`dict`): a JSON of `runs.perform`.
        exit_strategy (`str`): `"none"` for all layers of the model, else a dynamic policy.
        target (`tuple[float, float]`): the speed-ups in layers that the parameter is chosen for.
    """
    logits = {name: decode_array(values) for name, values in result["logits"].items()}
    labels = {name: np.array(values) for name, values in result["labels"].items()}
    task = result["run"]["task"]
    score, compared = scorer(task)
    config = SimpleNamespace(
        num_hidden_layers=result["full_depth"], exit_layers=result["exit_layers"], exit_strategy="none"
    )
    parameter = None
    if exit_strategy != "none":
        points = sweep(logits["held_out"], labels["held_out"], config, exit_strategy, score, compared)
        logger = logging.getLogger("gaml_hf.evaluation.choice")
        logger.disabled = True  # where nothing lies in the target, the table tells
        try:
            point = choose(points, target)
        finally:
            logger.disabled = False
        vars(config).update(point.config_fields())
        parameter = point.parameter
    predictions, exit_layer = replay(logits["validation"], config)
    if len(result["exit_layers"]) == 1:  # one answer, always of the whole model, whatever was taken out of it
        speed_up = result["static_speed_up"]
    else:
        speed_up = layer_speed_up(exit_layer, result["full_depth"])

    def main(predictions: np.ndarray, labels: np.ndarray) -> float:
        return 100 * score(predictions, labels)[main_metric(task)]

    return Answer(
        score=main(predictions, labels["validation"]),
        without=left_out(predictions, labels["validation"], main),
        labels=labels["validation"],
        speed_up=speed_up,
        parameter=parameter,
        exit_layer=exit_layer,
    )


def at_speed(result: dict[str, Any], exit_strategy: str = "entropy", speed_up: float = 1.9) -> Measured:
    """
    The validation curve of a policy read at one speed-up, between its points.

    A comparison of systems at equal speed, not what the protocol reports: a parameter chosen on the rows set aside may
    come out anywhere in the target, or beside it, and where one exit is far better than the one before, that decides.
    A row left out moves both points that the speed-up lies between, in score and in speed.
    """
    task = result["run"]["task"]
    metric = get_task(task).main_metric
    config = SimpleNamespace(num_hidden_layers=result["full_depth"], exit_layers=result["exit_layers"])
    logits, labels = decode_array(result["logits"]["validation"]), np.array(result["labels"]["validation"])
    score = scorer(task)[0]
    points = sweep(logits, labels, config, exit_strategy, score, metric)
    points.sort(key=lambda point: (point.speed_up, point.score))
    place = int(np.searchsorted([point.speed_up for point in points], speed_up))
    between = points[max(place - 1, 0) : place + 1]  # at an end of the curve, that end alone
    speeds, scores = [], []  # at either point, of all rows and then with each left out
    for point in between:
        vars(config).update(point.config_fields())
        predictions, exit_layer = replay(logits, config)
        layers = (exit_layer.sum() - exit_layer) / (len(exit_layer) - 1)  # the mean, with each row left out
        speeds.append(np.append(point.speed_up, result["full_depth"] / layers))
        without = left_out(predictions, labels, lambda *rows: score(*rows)[metric])
        scores.append(100 * np.append(point.score, without))
    values = scores[0]
    if len(between) == 2:
        apart = speeds[1] - speeds[0]  # 0 without the one row that makes the difference: the points are then the same
        share = np.divide(speed_up - speeds[0], apart, out=np.zeros_like(apart), where=apart != 0)
        values = values + share * (scores[1] - values)
    return Measured(float(values[0]), values[1:], labels)


def score_at(result: dict[str, Any], exit_strategy: str = "entropy", speed_up: float = 1.9) -> float:
    """[`at_speed`]'s score."""
    return at_speed(result, exit_strategy, speed_up).score


def exit_score(result: dict[str, Any], exit_layer: int, metric: str | None = None) -> float:
    """Validation score of one exit, times 100."""
    return 100 * result["scores"]["validation"][str(exit_layer)][metric or scorer(result["run"]["task"])[1]]


def at_exits(result: dict[str, Any], exit_layers: Sequence[int], metric: str | None = None) -> Measured:
    """The mean over some of its exits of the validation score, each as if all rows left there."""
    score, compares = scorer(result["run"]["task"])
    labels = np.array(result["labels"]["validation"])
    predictions = decode_array(result["logits"]["validation"]).argmax(axis=-1)  # (num_rows, num_exits)
    without = [
        left_out(predictions[:, i], labels, lambda *rows: 100 * score(*rows)[metric or compares])
        for i, m in enumerate(result["exit_layers"])
        if m in exit_layers
    ]
    mean = float(np.mean([exit_score(result, m, metric) for m in exit_layers]))
    return Measured(mean, np.mean(without, axis=0), labels)


def mean_over_exits(result: dict[str, Any]) -> float:
    return float(np.mean([exit_score(result, m) for m in result["exit_layers"]]))


# ------------------------------------------------------------------------------------------------------- statistics


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation, and how many."""
    if not values:
        return "not run"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation} (n={len(values)})"


@dataclass(frozen=True)
class Difference:
    """Two systems over the same seeds and rows: mean difference, 95% interval and p value."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}], {p_value(self.p)}"


def p_value(p: float) -> str:
    return "p<0.001" if p < 0.0005 else f"p={p:.3f}"


def paired_difference(ours: Sequence[Measured], theirs: Sequence[Measured]) -> Difference | None:
    """
    `ours - theirs`, seed by seed, as it would be with other seeds and other rows of the task.

    Half the interval is `sqrt(h_seeds^2 + h_rows^2)`, of half the interval over seeds alone (a paired t-test) and over
    rows alone (the jackknife of the mean over the seeds; Efron, 1982): the sum of two intervals after Zou and Donner
    (2008). So it is never narrower than either. The p value is 1 minus the level at which the interval reaches 0.

    Args:
        ours, theirs (`Sequence[Measured]`): of one seed each, in the same order.

    Returns:
        [`Difference`]; None for fewer than two seeds, where nothing can be said.

    Raises:
        ValueError: two runs hold their rows in different orders.
    """
    pairs = list(zip(ours, theirs, strict=True))
    for one, other in pairs:
        check_rows(one, other)
        check_rows(ours[0], one)
    differences = np.array([one.score - other.score for one, other in pairs])
    if len(differences) < 2:
        return None
    mean = float(differences.mean())
    without = np.mean([one.without - other.without for one, other in pairs], axis=0)
    errors = np.array([differences.std(ddof=1) / len(differences) ** 0.5, (len(without) - 1) ** 0.5 * without.std()])
    if not errors.any():
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    freedom = np.array([len(differences) - 1, len(without) - 1])

    def half(p: float) -> float:
        return float(np.linalg.norm(stats.t.isf(p / 2, freedom) * errors))

    smallest, p = 1e-12, 1.0
    if half(smallest) <= abs(mean):
        p = smallest
    elif mean:
        p = optimize.brentq(lambda p: half(p) - abs(mean), smallest, 1.0)
    return Difference(mean, mean - half(0.05), mean + half(0.05), p)


def check_rows(ours: Measured, theirs: Measured) -> None:
    """Rows that are not in one order are refused: no row of one has its like."""
    if not np.array_equal(ours.labels, theirs.labels):
        raise ValueError("Two runs hold their validation rows in different orders: no row of one has its like.")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number (Holm, 1979)."""
    adjusted, largest = {}, 0.0
    for position, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[name]))
        adjusted[name] = largest
    return adjusted


# ---------------------------------------------------------------------------------------------------------- reports

Results = list[dict[str, Any]]


def only(results: Results, **fields: Any) -> Results:
    """The results whose run has these fields, by seed."""
    found = [r for r in results if all(r["run"][key] == value for key, value in fields.items())]
    return sorted(found, key=lambda r: r["run"]["seed"])


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def tasks_of(results: Results) -> list[str]:
    return sorted({r["run"]["task"] for r in results})


def conditions(results: Results) -> str:
    """What all runs of a report share, in a paragraph."""
    shared = {}
    for key in results[0]["run"]:
        values = {str(r["run"][key]) for r in results}
        if len(values) == 1 and values != {"None"}:
            shared[key] = values.pop()
    recipes = {
        task: sorted(
            {(r["run"]["learning_rate"], r["run"]["batch_size"], r["run"]["alpha"]) for r in only(results, task=task)}
        )
        for task in tasks_of(results)
    }
    lines = [", ".join(f"{key} {value}" for key, value in shared.items() if key not in ("task", "system"))]
    for task, found in recipes.items():
        lines.append(
            f"{task}: " + "; ".join(f"learning rate {lr:g}, batch {batch}, α {alpha:g}" for lr, batch, alpha in found)
        )
    machine = sorted({(r["hardware"], *r["versions"].values()) for r in results})
    lines.append("; ".join(f"{hw}, torch {torch}, transformers {hf}" for hw, torch, hf in machine))
    lines.append(f"{len(results)} runs, {min(r['date'] for r in results)} to {max(r['date'] for r in results)}")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def table1(results: Results) -> str:
    """Pairwise mutual learning: two exits, with and without distillation between them."""
    blocks = []
    names = ("directly", "together", "shallow learns", "deep learns", "mutual")
    for task in tasks_of(results):
        of_task = only(results, task=task)
        rows = []
        for pair in sorted({tuple(r["exit_layers"]) for r in of_task if len(r["exit_layers"]) == 2}):
            for m in pair:
                row = [f"{pair[0]} and {pair[1]}", m]
                for system in PAIR_SYSTEMS:
                    found = only(of_task, system=system)
                    found = [r for r in found if r["exit_layers"] == ([m] if system == "bert" else list(pair))]
                    row.append(spread([exit_score(r, m, get_task(task).main_metric) for r in found]))
                rows.append(row)
                pair12 = (1, 12) if pair[0] == 1 else (6, 12)
                paper = PAPER_TABLE_1.get(task, {}).get(pair12, {}).get(12 if m == pair[1] else pair12[0])
                if paper:
                    rows.append(
                        [
                            f"paper, {pair12[0]} and 12",
                            12 if m == pair[1] else pair12[0],
                            *("" if x is None else x for x in paper),
                        ]
                    )
        blocks.append(f"### {task}\n\n" + table(["exits", "exit", *names], rows))
    return "\n".join(blocks)


def table2(results: Results, main: str = "gaml-soft") -> str:
    """All systems at a speed-up of about two, and what full depth and the exits give."""
    blocks, compared = [], {}
    answers = answers_of(results)
    for task in tasks_of(results):
        rows = []
        for name, system, policy in SYSTEMS:
            found = answers.get((task, system, policy), {})
            if not found:
                rows.append([name, policy, "not run", "", "", "", PAPER_TABLE_2.get(name, {}).get(task, "")])
                continue
            outside = sum(not a.in_target for a in found.values()) if policy != "none" else 0
            of_system = [r for r in with_halves(results, system) if r["run"]["task"] == task]
            exits = len(of_system[0]["exit_layers"]) > 1
            metric = get_task(task).main_metric
            rows.append(
                [
                    name,
                    policy,
                    spread([a.score for a in found.values()]),
                    f"{np.mean([a.speed_up for a in found.values()]):.2f}x"
                    + (f", {outside} outside" if outside else ""),
                    spread([exit_score(r, r["layers"], metric) for r in of_system]),
                    spread([mean_over_exits(r) for r in of_system]) if exits else "",
                    PAPER_TABLE_2.get(name, {}).get(task, ""),
                ]
            )
            ours = answers.get((task, main, "patience"), {})
            seeds = sorted(ours.keys() & found.keys())
            if system != main and len(seeds) > 1:
                compared[task, name, policy] = [(ours[s], found[s]) for s in seeds]
        header = ["system", "policy", "score", "speed-up", "last exit", "mean over exits", "paper (BERT-base)"]
        blocks.append(f"### {task} ({get_task(task).main_metric} x 100)\n\n" + table(header, rows))
    if compared:
        blocks.append("### GA-soft against each, same seeds\n\n" + difference_table(compared))
    return "\n".join(blocks)


def difference_table(compared: Mapping[tuple[str, str, str], list[tuple[Answer, Answer]]]) -> str:
    """
    The main system less each other, over the seeds in which both came out at the wanted speed: else it is speeds that
    would be compared. p values are adjusted for all rows of the table; `*` where that is below 0.05.
    """
    fair = {
        key: [pair for pair in pairs if all(a.in_target or a.parameter is None for a in pair)]
        for key, pairs in compared.items()
    }
    found = {key: paired_difference(*zip(*pairs, strict=True)) for key, pairs in fair.items() if len(pairs) > 1}
    adjusted, rows = holm({key: difference.p for key, difference in found.items()}), []
    for key, pairs in compared.items():
        task, name, policy = key
        ours, theirs = (np.mean([answer.speed_up for answer in side]) for side in zip(*pairs, strict=True))
        rows.append([name, policy, task, f"{ours:.2f}x and {theirs:.2f}x", len(fair[key])])
        if key in found:
            rows[-1] += [str(found[key]) + " *" * (adjusted[key] < 0.05), p_value(adjusted[key])]
        else:
            rows[-1] += ["not at one speed", ""]
    header = [
        "against",
        "policy",
        "task",
        "speed-ups, all seeds",
        "seeds at one speed",
        "difference [95% interval]",
        "p, Holm",
    ]
    return table(header, rows)


def with_halves(results: Results, system: str) -> Results:
    """`bert` is the full model, `bert-half` the one of half the layers."""
    if system in ("bert", "bert-half"):
        depth = 2 if system == "bert-half" else 1
        return [r for r in only(results, system="bert") if r["layers"] * depth == r["full_depth"]]
    return only(results, system=system)


def answers_of(results: Results) -> dict[tuple[str, str, str], dict[int, Answer]]:
    """By task, system and policy: the answers by seed."""
    answers: dict[tuple[str, str, str], dict[int, Answer]] = {}
    for _, system, policy in SYSTEMS:
        for result in with_halves(results, system):
            run = result["run"]
            answers.setdefault((run["task"], system, policy), {})[run["seed"]] = answer(result, policy)
    return answers


def table3(results: Results) -> str:
    """How much the KD weight α matters."""
    blocks = []
    for task in tasks_of(results):
        rows = []
        for system in ("ml", "gaml-soft"):
            for kind, value in (
                ("mean over exits", mean_over_exits),
                ("last exit", lambda r: exit_score(r, r["layers"])),
                ("entropy at 1.9x", score_at),
            ):
                by_alpha = {
                    a: {r["run"]["seed"]: value(r) for r in only(results, task=task, system=system, alpha=a)}
                    for a in ALPHAS
                }
                # Of the seeds that all α have: else the range would be of seeds too.
                run = [by_seed for by_seed in by_alpha.values() if by_seed]
                seeds = set.intersection(*(set(by_seed) for by_seed in run)) if run else set()
                means = [np.mean([by_seed[seed] for seed in seeds]) for by_seed in run] if seeds else []
                scores = [spread(list(by_seed.values())) for by_seed in by_alpha.values()]
                rows.append([system, kind, *scores, f"{np.ptp(means):.1f}" if means else ""])
            if task == "cola":
                paper = PAPER_TABLE_3[system]
                rows.append([system, "paper (BERT-base, at 2x)", *paper, f"{max(paper) - min(paper):.1f}"])
        blocks.append(
            f"### {task}\n\n" + table(["system", "score", *(f"α {a}" for a in ALPHAS), "range, same seeds"], rows)
        )
    return "\n".join(blocks)


def table4(results: Results) -> str:
    """Training cost in steps."""
    rows = []
    for task in tasks_of(results):
        for system in ("bert", "multi-exit", "fastbert", "fastbert-joint", "ml", "gaml-hard", "gaml-soft"):
            found = [r for r in with_halves(results, system) if r["run"]["task"] == task]
            stages = 2 if system in SECOND_STAGE else 1
            early = sum(r["stopped_at_step"] < stages * r["run"]["epochs"] * r["steps_per_epoch"] for r in found)
            rows.append(
                [
                    task,
                    system,
                    spread([r["stopped_at_step"] for r in found], 0),
                    spread([r["best_step"] for r in found], 0),
                    f"{early} of {len(found)}",
                    PAPER_TABLE_4.get(system, {}).get(task, ""),
                ]
            )
    return table(
        [
            "task",
            "system",
            "steps until it ended",
            "steps to the best checkpoint",
            "stopped early",
            "paper (BERT-base)",
        ],
        rows,
    )


def table5(results: Results) -> str:
    """Other exit policies."""
    rows = []
    for task in tasks_of(results):
        for policy in ("entropy", "max_prob", "patience"):
            curves: dict[str, dict[int, Measured]] = {}
            for system in ("multi-exit", "fastbert-joint", "ml", "gaml-hard", "gaml-soft"):
                of_system = only(results, task=task, system=system)
                found = [answer(r, policy) for r in of_system]
                if not found:
                    continue
                speed = f"{np.mean([a.speed_up for a in found]):.2f}x"
                outside = sum(not a.in_target for a in found)
                curve, less = {}, None
                if policy != "patience":  # which has a few points only, far apart
                    curve = curves[system] = {r["run"]["seed"]: at_speed(r, policy) for r in of_system}
                    base = curves.get("multi-exit", {})
                    seeds = sorted(curve.keys() & base.keys())
                    less = paired_difference([curve[s] for s in seeds], [base[s] for s in seeds])
                rows.append(
                    [
                        task,
                        policy,
                        system,
                        spread([a.score for a in found]),
                        speed + (f", {outside} outside" if outside else ""),
                        spread([measured.score for measured in curve.values()]) if curve else "",
                        less if less and system != "multi-exit" else "",
                        PAPER_TABLE_5.get((system, policy), {}).get(task, ""),
                    ]
                )
    header = [
        "task",
        "policy",
        "system",
        "score",
        "speed-up",
        "curve at 1.9x",
        "less multi-exit's",
        "paper (BERT-base)",
    ]
    return table(header, rows)


def fig3(results: Results, folder: Path) -> str:
    """Angles between the two gradients while ML-BERT is trained (Eq. 4)."""
    lines = []
    for result in results:
        if not result["run"]["watch_angle"]:
            continue
        cosines = [entry["alignment/cos_angle"] for entry in result["log"] if "alignment/cos_angle" in entry]
        name = f"fig3-{result['name']}.png"
        plots.gradient_angles(cosines, folder / name, title=f"ML-BERT on {result['run']['task']}")
        conflict = np.mean(np.array(cosines) < 0)
        lines.append(
            f"{result['name']}: {conflict:.0%} of {len(cosines)} steps above 90° (paper, SST-2: about half).\n\n"
            f"![]({name})\n"
        )
    return "\n".join(lines)


def fig4(results: Results, folder: Path) -> str:
    """Depth-score curves, means over seeds, and plain fine-tuning at full depth."""
    lines = []
    for task in tasks_of(results):
        curves = {}
        for system in ("multi-exit", "fastbert-joint", "ml", "gaml-hard", "gaml-soft"):
            found = only(results, task=task, system=system)
            if found:
                curves[f"{system} (n={len(found)})"] = {
                    m: float(np.mean([exit_score(r, m) for r in found])) for m in found[0]["exit_layers"]
                }
        if not curves:
            continue
        bert = [exit_score(r, r["layers"]) for r in with_halves(results, "bert") if r["run"]["task"] == task]
        name = f"fig4-{task}.png"
        plots.depth_score(
            curves,
            f"{scorer(task)[1]} x 100",
            folder / name,
            float(np.mean(bert)) if bert else None,
            title=f"{task}: score of each exit",
        )
        layers = sorted({m for curve in curves.values() for m in curve})
        rows = [[system, *(f"{curve[m]:.1f}" for m in layers)] for system, curve in curves.items()]
        lines.append(f"### {task}\n\n![]({name})\n\n" + table(["system", *map(str, layers)], rows))
    return "\n".join(lines)


def fig5(results: Results, folder: Path) -> str:
    """Over-thinking: plain BERT fine-tuned with one classifier behind layer i."""
    curves = {}
    for task in tasks_of(results):
        layers = sorted({r["layers"] for r in only(results, task=task, system="bert")})
        curves[task] = {
            m: float(np.mean([exit_score(r, m) for r in only(results, task=task, system="bert") if r["layers"] == m]))
            for m in layers
        }
    curves = {task: curve for task, curve in curves.items() if len(curve) > 1}
    if not curves:
        return "Not run.\n"
    plots.overthinking(curves, "score x 100", folder / "fig5.png")
    layers = sorted({m for curve in curves.values() for m in curve})
    return "![](fig5.png)\n\n" + table(
        ["task", *map(str, layers)],
        [[task, *(f"{curve[m]:.1f}" if m in curve else "" for m in layers)] for task, curve in curves.items()],
    )


def ga(results: Results) -> str:
    """Which reading of gradient alignment does what the paper says."""
    rows = []
    for task in tasks_of(results):
        base = {
            r["run"]["seed"]: r for r in only(results, task=task, system="ml", kd_reduction="mean", max_grad_norm=1.0)
        }
        kinds = itertools.product(
            ("multi-exit", "ml", "gaml-hard", "gaml-soft"), ("global", "layer", "tensor"), ("mean", "sum"), (1.0, 0.0)
        )
        for system, granularity, reduction, clip in kinds:
            found = only(
                results,
                task=task,
                system=system,
                ga_granularity=granularity,
                kd_reduction=reduction,
                max_grad_norm=clip,
            )
            if not found:
                continue
            seeds = [r["run"]["seed"] for r in found if r["run"]["seed"] in base]
            less = [
                paired_difference(
                    [value(r) for r in found if r["run"]["seed"] in base], [value(base[s]) for s in seeds]
                )
                for value in (lambda r: at_exits(r, r["exit_layers"]), at_speed)
            ]
            logged = [entry for r in found for entry in r["log"] if "alignment/coefficient" in entry]
            lowest = [entry["alignment/coefficient_min"] for entry in logged]
            highest = [entry["alignment/coefficient_max"] for entry in logged]
            rows.append(
                [
                    task,
                    system,
                    granularity if system.startswith("gaml") else "",
                    reduction if system != "multi-exit" else "",
                    clip or "none",
                    spread([mean_over_exits(r) for r in found]),
                    spread([exit_score(r, r["layers"]) for r in found]),
                    spread([score_at(r) for r in found]),
                    spread([r["best_step"] for r in found], 0),
                    *("" if difference is None else str(difference) for difference in less),
                    f"{min(lowest):.2f} to {max(highest):.2f}" if logged else "",
                    f"{np.mean([entry['alignment/conflict'] for entry in logged]):.0%}" if logged else "",
                ]
            )
    header = [
        "task",
        "system",
        "granularity",
        "KD",
        "clipping",
        "mean over exits",
        "last exit",
        "entropy at 1.9x",
        "best step",
        "mean over exits, less ML-BERT's",
        "entropy at 1.9x, less ML-BERT's",
        "c",
        "conflict",
    ]
    return table(header, rows)


def exits(results: Results) -> str:
    """What exits read, how fast they learn and where they start; and static models that read the same."""
    blocks = []
    for task in tasks_of(results):
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for result in results:
            run = result["run"]
            if run["task"] != task:
                continue
            system = run["system"]
            if system == "bert":
                system = "plain" if result["layers"] == result["full_depth"] else f"plain, {result['layers']} layers"
            elif system.startswith("gaml"):
                system += f", {run['ga_granularity']}"
            elif run.get("stop_gradient_between_exits"):
                system += ", SWEET"
            elif run.get("mixed_training"):
                system += f", last exit alone for {run['mixed_training']:.0%} of the steps"
            # A run of a time without these fields has the paper's exits.
            kind = (
                run.get("exit_pooling", "cls"),
                {"none": "", "layer": "LayerNorm"}[run.get("exit_norm", "none")],
                f"x{run.get('exit_learning_rate_multiplier', 1.0):g}",
                "yes" if run.get("exit_warm_start") else "no",
            )
            groups.setdefault((system, *kind), []).append(result)
        rows = []
        for name, found in groups.items():
            several = len(found[0]["exit_layers"]) > 1
            metric = get_task(task).main_metric
            scores = [np.mean([exit_score(r, m, metric) for r in found]) for m in found[0]["exit_layers"]]
            chosen = [[answer(r, "entropy", target) for r in found] for target in (TARGET, FASTER)] if several else []
            rows.append(
                [
                    *name,
                    " ".join(f"{score:.1f}" for score in scores) if several else "",
                    spread([exit_score(r, r["exit_layers"][-1], metric) for r in found]),
                    *([spread([score_at(r, speed_up=s) for r in found]) for s in (1.9, 2.5)] if several else ["", ""]),
                    *(
                        f"{spread([a.score for a in answers])} at {np.mean([a.speed_up for a in answers]):.2f}x"
                        for answers in chosen
                    ),
                    *(["", ""] if not several else []),
                ]
            )
        header = ["system", "reads", "norm", "rate", "warm start", "exits, shallow to deep", "last exit"]
        header += ["entropy at 1.9x", "at 2.5x", "threshold chosen aside for 1.8x to 2.1x", "for 2.35x to 2.65x"]
        blocks.append(f"### {task} ({get_task(task).main_metric} x 100)\n\n" + table(header, rows))
        if compared := price_of_leaving(groups):
            header = ["system", "reads", "norm", "rate", "warm start", "at 1.9x, less its last exit"]
            header += [
                "less plain",
                "less plain of half the layers",
                "less multi-exit at 1.9x",
                "last exit, less plain",
            ]
            blocks.append(f"### {task}, same seeds\n\n" + table(header, compared))
    return "\n".join(blocks)


def price_of_leaving(groups: Mapping[tuple, Sequence[dict[str, Any]]]) -> list[list[str]]:
    """
    What leaving early by entropy at 1.9x costs, over the seeds that two systems share: against the model's own last
    exit, plain models of all layers and of half of them, and multi-exit training; and what exits cost the last one
    against the plain model. `groups` are the runs of each system and kind.
    """

    def by_seed(key: tuple, value: Callable[[dict[str, Any]], Measured]) -> dict[int, Measured]:
        return {r["run"]["seed"]: value(r) for r in groups.get(key, ())}

    def last(result: dict[str, Any]) -> Measured:
        return at_exits(result, result["exit_layers"][-1:], get_task(result["run"]["task"]).main_metric)

    def less(one: dict[int, Measured], other: dict[int, Measured]) -> str:
        seeds = sorted(one.keys() & other.keys())
        difference = paired_difference([one[s] for s in seeds], [other[s] for s in seeds])
        return "" if difference is None else str(difference)

    rows = []
    for (system, *kind), found in groups.items():
        if len(found) < 2 or len(found[0]["exit_layers"]) == 1:
            continue
        early, own = by_seed((system, *kind), at_speed), by_seed((system, *kind), last)
        plain = by_seed(("plain", *kind), last)
        half = by_seed((f"plain, {found[0]['full_depth'] // 2} layers", *kind), last)
        joint = {} if system == "multi-exit" else by_seed(("multi-exit", *kind), at_speed)
        rows.append([system, *kind, *(less(early, other) for other in (own, plain, half, joint)), less(own, plain)])
    return rows


def table8(results: Results) -> str:
    """Images: accuracy x 100, and how much less is computed than by ResNet-56 (multiply-adds, exits included)."""
    blocks = []
    for task in tasks_of(results):
        of_task = only(results, task=task)
        position = sorted(PUBLIC_RESNETS).index(task)
        reference = [r for r in of_task if r["run"]["depth"] == 56]
        if not reference:
            reference = of_task
        full = max(r["multiply_adds"]["network"][-1] for r in reference)
        rows = []
        for depth in (20, 32, 44, 56):
            found = only(of_task, system="plain", depth=depth)
            answers = [answer(r, "none") for r in found]
            cost = found[0]["multiply_adds"]["network"][-1] if found else None
            paper = PAPER_TABLE_8["ResNet-56"][position] if depth == 56 else ""
            rows.append(
                [
                    f"ResNet-{depth}, plain",
                    "",
                    spread([a.score for a in answers], 2),
                    f"{full / cost:.2f}x" if found else "",
                    "",
                    f"{np.mean([r['milliseconds']['full_depth'] for r in found]):.2f}" if found else "",
                    "",
                    paper,
                    PUBLIC_RESNETS[task][depth],
                ]
            )
        for name, system in IMAGE_SYSTEMS:
            found = only(of_task, system=system)
            for policy in ("patience", "max_prob"):
                paper = PAPER_TABLE_8.get(name, {}).get(task, "") if policy == "patience" else ""
                if not found:
                    rows.append([name, policy, "not run", "", "", "", "", paper, ""])
                    continue
                answers = [answer(r, policy, IMAGE_TARGET) for r in found]
                layers, macs, times = [], [], []
                for r, a in zip(found, answers, strict=True):
                    place = np.searchsorted(r["exit_layers"], a.exit_layer)
                    ran = np.add(*(np.array(r["multiply_adds"][part])[place] for part in ("network", "exits")))
                    layers.append(a.speed_up)
                    macs.append(r["multiply_adds"]["network"][-1] / ran.mean())
                    times.append(np.array(r["milliseconds"]["to_exit"])[place].mean())
                outside = sum(not IMAGE_TARGET[0] <= a.speed_up <= IMAGE_TARGET[1] for a in answers)
                rows.append(
                    [
                        name,
                        policy,
                        spread([a.score for a in answers], 2),
                        f"{np.mean(macs):.2f}x",
                        f"{np.mean(layers):.2f}x" + (f", {outside} outside" if outside else ""),
                        f"{np.mean(times):.2f}",
                        spread([exit_score(r, r["layers"]) for r in found], 2),
                        paper,
                        "",
                    ]
                )
        header = ["system", "policy", "accuracy", "multiply-adds", "layers", "ms an image", "own full depth", "paper"]
        blocks.append(f"### {task}\n\n" + table([*header, "public ResNet"], rows) + _heads(of_task))
    return "\n".join(blocks)


def _heads(results: Results) -> str:
    """How large the exits are beside the network, in a sentence."""
    found = [r for r in results if len(r["exit_layers"]) > 1]
    if not found:
        return ""
    r = found[0]
    heads, network = r["head_parameters"], r["network_parameters"]
    share = r["multiply_adds"]["exits"][-1] / r["multiply_adds"]["network"][-1]
    return (
        f"\nThe early exits hold {heads:,} parameters, {heads / network:.2f} times the network's {network:,}; all of "
        f"them together add {share:.1%} of its multiply-adds.\n"
    )


REPORTS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (table1, table2, table3, table4, table5, table8, fig3, fig4, fig5, ga, exits)
}


def write(experiment: str, results: Results, folder: Path) -> Path:
    """`folder/<experiment>.md`, and its figures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    make = REPORTS[experiment]
    text = make(results, folder) if experiment.startswith("fig") else make(results)
    path = folder / f"{experiment}.md"
    path.write_text(f"## {experiment}: {make.__doc__}\n\n{text}\n{conditions(results)}", encoding="utf-8")
    return path
