"""
Score against time: what to serve for a wanted speed, among encoders with exits, without, smaller ones, and no encoder.

    python benchmarks/frontier.py --models mpnet=out/mpnet mpnet-6=out/mpnet-6 minilm=out/minilm \
        --train train.csv --choose_on more.csv --data validation.csv --text_columns sentence --output frontier.json

Each folder is one that `run_glue_gaml.py` left. A model with exits runs at full depth and at five speeds by entropy,
whose thresholds are chosen on `--choose_on`: rows like those of `--data` that no model was trained on. Each runs in
PyTorch as loaded, prepacked, and in ONNX Runtime in int8 (where its family can be exported). The rivals without an
encoder are logistic regressions trained on `--train`: on counts of words and pairs of words, and, with `--static`, on
the mean of one vector per token, which model2vec distils from a sentence encoder and saves in a folder.

One thread; the systems take turns, row by row at batch 1, then in batches of 32. Every time is a ratio to the first
model in PyTorch at full depth, of the same round. At batch 1, of the median text and of the 95th percentile.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer, logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.speed import processor, spread
from gaml_hf import GamlAutoModelForSequenceClassification
from gaml_hf.data.files import RowFile
from gaml_hf.evaluation import accuracy, choose, sweep
from gaml_hf.models.exiting_gaml import Entropy, FullDepth
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx


SPEEDS = (1.5, 1.9, 2.5, 3.3, 4.0)  # in layers
SLACK = 0.05  # a threshold is wanted that gives this much more or less

Rows = tuple[list[tuple[str, ...]], list[str]]  # the texts of each row, and its class


@dataclass
class System:
    """
    Something that answers texts.

    Attributes:
        name (`str`): what it is.
        answer (`Callable`): from texts of several rows to the class name of each.
        speed_up (`float`): in layers, on the rows that its threshold was chosen on.
        seconds (`dict`): by batch size, of each round the time of each batch.
    """

    name: str
    answer: Callable[[Sequence[tuple[str, ...]]], list[str]]
    speed_up: float = 1.0
    seconds: dict[int, list[list[float]]] = field(default_factory=dict)
    score: float = float("nan")


def read(path: str, columns: list[str], label_column: str, limit: int | None = None) -> Rows:
    texts, labels = [], []
    for row in RowFile(path, "data"):
        texts.append(tuple(row[column] for column in columns))
        labels.append(str(row[label_column]))
        if len(texts) == limit:
            break
    return texts, labels


def encode(tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    columns = (list(column) for column in zip(*texts, strict=True))
    return dict(tokenizer(*columns, padding=True, truncation=True, return_tensors="pt"))


@torch.inference_mode()
def thresholds(model: Any, tokenizer: Any, rows: Rows) -> dict[float, float]:
    """The entropy threshold of each of `SPEEDS` that the model can have."""
    texts, labels = rows
    logits = [
        model(**encode(tokenizer, texts[start : start + 32]), output_exit_logits=True).exit_logits
        for start in range(0, len(texts), 32)
    ]
    numbers = np.array([model.config.label2id[label] for label in labels])
    points = sweep(torch.cat(logits), numbers, model.config, "entropy", accuracy, "accuracy")
    found = {}
    for speed in SPEEDS:
        point = choose(points, (speed - SLACK, speed + SLACK))
        if point.within((speed - 0.2, speed + 0.2)):
            found[point.speed_up] = point.parameter
    return found


def systems_of(name: str, folder: str, choose_on: Rows, exports: Path) -> list[System]:
    """One model in each runtime, at full depth and at each speed."""
    model = GamlAutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runtimes = {"PyTorch": model, "prepacked": copy.deepcopy(model).prepack()}
    if model.layer_parts is not None:
        export_onnx(model, exports / name, precision="int8")
        runtimes["ONNX int8"] = GamlOrtModelForSequenceClassification.from_pretrained(exports / name, num_threads=1)
    policies = {1.0: FullDepth()}
    if model.config.num_exits > 1:
        policies |= {speed: Entropy(value) for speed, value in thresholds(model, tokenizer, choose_on).items()}

    def answerer(run: Any, policy: Any) -> Callable[[Sequence[tuple[str, ...]]], list[str]]:
        def answer(texts: Sequence[tuple[str, ...]]) -> list[str]:
            with torch.inference_mode():
                logits = run(**encode(tokenizer, texts), exit_policy=policy).logits
            return [model.config.id2label[k] for k in logits.argmax(dim=-1).tolist()]

        return answer

    return [
        System(f"{name}, {runtime}" + ("" if speed == 1 else f", {speed:.1f}x"), answerer(run, policy), speed)
        for runtime, run in runtimes.items()
        for speed, policy in policies.items()
    ]


def bag_of_words(rows: Rows) -> System:
    texts, labels = rows
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    model.fit([" ".join(row) for row in texts], labels)
    return System("words and pairs of words", lambda rows: model.predict([" ".join(row) for row in rows]).tolist())


def static_vectors(name: str, folder: str, rows: Rows) -> System:
    from model2vec import StaticModel  # not one of our requirements

    model = StaticModel.from_pretrained(folder)

    def vectors(texts: Sequence[tuple[str, ...]]) -> np.ndarray:
        first, *second = (model.encode(list(column)) for column in zip(*texts, strict=True))
        # Of a pair what Conneau et al. (2017, Sec. 3.1) take: how far apart the two are, and how alike, by dimension.
        return np.concatenate([np.abs(first - second[0]), first * second[0]], axis=1) if second else first

    texts, labels = rows
    regression = LogisticRegression(max_iter=1000).fit(vectors(texts), labels)
    return System(name, lambda rows: regression.predict(vectors(rows)).tolist())


def measure(systems: list[System], rows: Rows, batch_size: int, rounds: int, clock: Callable[[], float]) -> None:
    texts, _ = rows
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    for round_ in range(rounds + 1):
        for system in systems[:: -1 if round_ % 2 else 1]:  # whoever comes second finds warmer caches
            taken = []
            for batch in batches:
                started = clock()
                system.answer(batch)
                taken.append(clock() - started)
            if round_:
                system.seconds.setdefault(batch_size, []).append(taken)


def faster(system: System, base: System, batch_size: int, of: Callable[[list[float]], float]) -> list[float]:
    """How many times faster than the base, in each round."""
    rounds = zip(base.seconds[batch_size], system.seconds[batch_size], strict=True)
    return [of(theirs) / of(own) for theirs, own in rounds]


def table(systems: list[System]) -> str:
    lines = [
        "| system | score | batch 1, median text | batch 1, 95th percentile | batch 32 |",
        "|---|---|---|---|---|",
    ]
    for system in systems:
        cells = [
            spread(faster(system, systems[0], size, of))
            for size, of in ((1, np.median), (1, lambda taken: np.quantile(taken, 0.95)), (32, np.sum))
        ]
        lines.append(f"| {system.name} | {100 * system.score:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(systems: list[System], path: Path) -> None:
    """Score against how many times faster, a line for each model and runtime."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for system in systems:
        name = re.sub(r", [\d.]+x$", "", system.name)
        times_faster = np.median(faster(system, systems[0], 1, np.median))
        lines.setdefault(name, []).append((times_faster, 100 * system.score))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, colours = figure.subplots(), colormaps["tab20"]
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker="osD^v"[number % 5],
            markersize=4,
            linewidth=1,
            color=colours(number),
            label=name,
        )
    axes.set(xscale="log", xlabel=f"times faster than {systems[0].name}, one text at a time", ylabel="score x 100")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="the first is the base")
    parser.add_argument("--train", help="rows that the models were trained on, for the rivals without an encoder")
    parser.add_argument("--static", nargs="+", default=[], metavar="NAME=FOLDER", help="of model2vec")
    parser.add_argument("--choose_on", required=True, help="rows that no model was trained on, to choose thresholds")
    parser.add_argument("--data", required=True, help="rows to score")
    parser.add_argument("--text_columns", nargs="+", required=True)
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--timed_rows", type=int, default=64, help="of --data, evenly spaced (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu_time", action="store_true", help="of this process, for a busy machine")
    parser.add_argument("--output", type=Path, help="where to write scores and seconds, as JSON")
    parser.add_argument("--figure", type=Path, help="where to draw score against speed, as PNG")
    options = parser.parse_args(argv)
    if options.static and not options.train:
        parser.error("`--static` is trained on `--train`, a file of rows with their class. Got none.")
    if options.static and find_spec("model2vec") is None:  # now, and not after all models
        parser.error("`--static` needs one more package: `pip install model2vec`.")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = (options.text_columns, options.label_column)
    data, choose_on = read(options.data, *columns), read(options.choose_on, *columns)
    with tempfile.TemporaryDirectory() as exports:
        systems = []
        for word in options.models:
            name, _, folder = word.partition("=")
            systems += systems_of(name, folder, choose_on, Path(exports))
        if options.train:
            train = read(options.train, *columns)
            for word in options.static:
                name, _, folder = word.partition("=")
                systems.append(static_vectors(name, folder, train))
            systems.append(bag_of_words(train))
        for system in systems:
            batches = (data[0][start : start + 32] for start in range(0, len(data[0]), 32))
            answers = [label for batch in batches for label in system.answer(batch)]
            system.score = accuracy(np.array(answers), np.array(data[1]))["accuracy"]
        spaced = np.linspace(0, len(data[0]) - 1, min(options.timed_rows, len(data[0]))).astype(int)
        timed = ([data[0][i] for i in spaced], [data[1][i] for i in spaced])
        clock = time.process_time if options.cpu_time else time.perf_counter
        for batch_size in (1, 32):
            measure(systems, timed, batch_size, options.rounds, clock)
    print(processor(), flush=True)
    print(table(systems))
    if options.figure:
        draw(systems, options.figure)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = [{"name": s.name, "score": s.score, "speed_up": s.speed_up, "seconds": s.seconds} for s in systems]
        options.output.write_text(json.dumps({"processor": processor(), "systems": found}) + "\n")


if __name__ == "__main__":
    main()
