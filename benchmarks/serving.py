"""
What the server keeps of its latency in a burst: no exits, fixed exits, and exits that follow the traffic, in turn.

    python benchmarks/serving.py --model out/sst2 --data validation.parquet --text_column sentence --slo_ms 200
    python benchmarks/serving.py --model out/sst2 --data rows.csv --rate 60 --burst_rate 600 --json serving.json

Each system is a `gaml-serve` of its own on 127.0.0.1, one after another. Requests of one text each come at a constant
rate, whether the earlier ones are answered or not: a client that waits would slow down with the server, and see no
burst. First `--seconds` at `--rate`, then as many at `--burst_rate`, then at `--rate` again. At most `--max_requests`
are sent, and no more than `--max_open` are open at a time; what is not sent for that, or refused, is counted as late.

Client and server share the machine: leave a core to the client (`--num_threads`).
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from matplotlib.figure import Figure

from gaml_hf.data.files import RowFile


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours
from benchmarks.machine import processor_name


SYSTEMS = {
    "no exits": ["--exit_strategy", "none"],
    "fixed exits": [],
    "adaptive exits": ["--slo_ms", "{slo_ms}"],
}


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """A `gaml-serve` that is ready, by its URL; it drains at the end."""
    words = [sys.executable, "-m", "gaml_serve", "--model", model, "--port", "0", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                raise SystemExit("".join(told))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or a full pipe would stop it
            while httpx.get(f"{found[1]}/health").status_code != 200:
                if process.poll() is not None:
                    raise SystemExit(f"The server ended with {process.returncode}.")
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()


def arrivals(rate: float, burst_rate: float, seconds: float) -> list[tuple[float, bool]]:
    """When each request comes, in seconds from the start, and whether that is in the burst."""
    times: list[tuple[float, bool]] = []
    for part, per_second in enumerate((rate, burst_rate, rate)):
        count = int(per_second * seconds)
        times += [(part * seconds + number / per_second, part == 1) for number in range(count)]
    return times


async def load(url: str, texts: list[str], times: list[tuple[float, bool]], max_open: int) -> list[dict[str, Any]]:
    """One record for each request: `in_burst`, `status`; of an answer `seconds`, `label`, `exit_layer`, `forced`."""
    limits = httpx.Limits(max_connections=max_open)
    records: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client, asyncio.TaskGroup() as group:
        started, num_open = time.perf_counter(), 0

        async def send(record: dict[str, Any], due: float) -> None:
            nonlocal num_open
            try:
                response = await client.post("/predict", json={"inputs": texts[record["row"]]})
                record["seconds"] = time.perf_counter() - started - due  # from when it should have been sent
                record["status"] = response.status_code
                if response.status_code == 200:
                    best = response.json()[0]
                    record |= {"label": best["label"], "exit_layer": best["exit_layer"]}
                    record["cap"] = int(response.headers.get("x-exit-cap", 0)) or None
                    record["forced"] = int(response.headers.get("x-forced-exits", 0))
            except httpx.HTTPError as error:
                record["status"] = type(error).__name__
            finally:
                num_open -= 1

        for number, (due, in_burst) in enumerate(times):
            if (wait := started + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            records.append({"row": number % len(texts), "due": due, "in_burst": in_burst, "status": "not sent"})
            if num_open < max_open:
                num_open += 1
                group.create_task(send(records[-1], due))
    return records


def summary(records: list[dict[str, Any]], labels: list[str] | None, slo: float) -> dict[str, Any]:
    """Of the records of one system: latencies in ms, and shares of all requests."""
    answered = [record for record in records if record["status"] == 200]
    seconds = [record["seconds"] for record in answered]
    percentiles = np.percentile(seconds, [50, 95, 99]) * 1e3 if seconds else [float("nan")] * 3
    told = {name: round(float(value), 1) for name, value in zip(("p50", "p95", "p99"), percentiles, strict=True)}
    told["late"] = 1 - sum(value <= slo for value in seconds) / len(records)
    told["forced"] = sum(record["forced"] for record in answered) / max(len(answered), 1)
    told["mean_exit"] = float(np.mean([record["exit_layer"] for record in answered])) if answered else None
    told["unanswered"] = len(records) - len(answered)
    if labels is not None:
        right = [record["label"] == labels[record["row"]] for record in answered]
        told["accuracy"] = float(np.mean(right)) if right else None
    return told


def read_texts(
    path: Path, text_column: str, label_column: str | None, model: str
) -> tuple[list[str], list[str] | None]:
    """Up to 2,000 texts, and the names of their classes."""
    rows = list(islice(iter(RowFile(path, "data", [name for name in (text_column, label_column) if name])), 2000))
    if label_column is None:
        return [row[text_column] for row in rows], None
    names = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["id2label"]
    return [row[text_column] for row in rows], [
        names.get(str(row[label_column]), str(row[label_column])) for row in rows
    ]


def draw(everything: dict[str, list[dict[str, Any]]], slo: float, path: Path) -> None:
    """Over time: requests a second, the 99th percentile of the latency of each system, and the exit cap."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    rate, latency, cap = figure.subplots(3, sharex=True)
    for name, records in everything.items():
        due = np.array([record["due"] for record in records]).astype(int)
        answered = [
            [r["seconds"] for r, s in zip(records, due, strict=True) if s == t and "seconds" in r] for t in set(due)
        ]
        latency.plot(sorted(set(due)), [np.quantile(x, 0.99) if x else np.nan for x in answered], label=name)
        if any(record.get("cap") for record in records):
            times = [record["due"] for record in records if "exit_layer" in record]
            caps = [record["cap"] or np.nan for record in records if "exit_layer" in record]
            cap.plot(times, caps, ".", markersize=3, label=f"{name}: cap")
            layers = [record["exit_layer"] for record in records if "exit_layer" in record]
            cap.plot(times, layers, ".", markersize=1, color="grey", label="layer at which a row left")
    rate.plot(*np.unique(due, return_counts=True), color="black", drawstyle="steps-post")
    rate.set_ylabel("requests a second")
    latency.axhline(slo, color="black", linestyle=":", label="slo")
    latency.set(yscale="log", ylabel="p99 of a second, s")
    cap.set(xlabel="s", ylabel="layer")
    for axes in (latency, cap):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint or of an export to ONNX")
    add("--data", type=Path, required=True, help="texts: a csv, tsv, json, jsonl or parquet file")
    add("--text_column", default="text")
    add("--label_column", help="classes, by name or number: then accuracy is told too")
    add("--slo_ms", type=float, default=200.0)
    add("--min_exit", type=int, help="of the adaptive exits")
    add("--rate", type=float, default=60.0, help="requests a second before and after the burst")
    add("--burst_rate", type=float, default=600.0)
    add("--seconds", type=float, default=10.0, help="of each of the three parts")
    add("--max_requests", type=int, default=20_000)
    add("--max_open", type=int, default=1000, help="requests without an answer at a time")
    add("--num_threads", type=int, default=1, help="of the server")
    add("--json", type=Path, help="where every request goes")
    add("--figure", type=Path, help="where to draw them over time, as PNG")
    options = parser.parse_args(argv)
    texts, labels = read_texts(options.data, options.text_column, options.label_column, options.model)
    times = arrivals(options.rate, options.burst_rate, options.seconds)[: options.max_requests]
    print(f"{len(times)} requests for each system; {processor_name()}")
    everything = {}
    for name, words in SYSTEMS.items():
        words = [word.format(slo_ms=options.slo_ms) for word in words]
        if "--slo_ms" in words and options.min_exit is not None:
            words += ["--min_exit", str(options.min_exit)]
        more = ["--num_threads", str(options.num_threads), "--max_concurrent_requests", str(options.max_open)]
        with server(options.model, *words, *more) as url:
            records = everything[name] = asyncio.run(load(url, texts, times, options.max_open))
        for part, chosen in (("all", records), ("burst", [record for record in records if record["in_burst"]])):
            if chosen:
                print(f"{name}, {part}: {json.dumps(summary(chosen, labels, options.slo_ms / 1e3))}", flush=True)
    if options.figure is not None:
        draw(everything, options.slo_ms / 1e3, options.figure)
    if options.json is not None:
        options.json.write_text(json.dumps(everything), encoding="utf-8")


if __name__ == "__main__":
    main()
