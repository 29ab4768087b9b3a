"""
Does it answer right, or say what is wrong? Long campaigns on a tiny model, each a number of cases drawn from a seed.

    python benchmarks/reliability.py --campaigns threads fuzz properties --output reliability.json

- `threads`: 16 threads share one pipeline, each call with other settings; the answers must be those of one thread.
- `fuzz`: odd rows, containers and arguments. Each call must give one answer for each row, or raise a `ValueError` or
  `TypeError` of ours; with `on_error="skip"` no row may change another.
- `properties`: `tests/test_properties.py` with many examples.
- `kills`: `benchmarks/kills.py`, processes killed at any moment.

Counts: `tried`; `answered`; `refused` by an error of ours; `wrong`, where an answer was, or an error was not ours, or
none came where one was due; `lost`, where rows or calls came back with nothing. The exit code is 1 where something was
wrong or lost.
"""

import argparse
import decimal
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import BertTokenizer
from transformers.pipelines.pt_utils import KeyDataset

import gaml_hf
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours
from benchmarks.machine import processor_name


WORDS = "film movie story plot actor scene good great bad awful dull funny sad fine very too so not never".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!", "a", "##s", "##ed", *WORDS]
NUM_LAYERS, NUM_LABELS, LONGEST = 4, 3, 64
NUM_THREADS = 16
TIME_LIMIT = 30.0  # seconds in which a call must be done

CODE = str(Path(gaml_hf.__file__).parent)
TESTS = Path(__file__).parents[1] / "tests" / "test_properties.py"


def tiny_pipeline() -> GamlTextClassificationPipeline:
    """Weights so large that texts differ in class and in exit."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(VOCABULARY), encoding="utf-8")
        tokenizer = BertTokenizer(str(vocabulary), model_max_length=LONGEST, split_special_tokens=True)
    config = GamlBertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        num_labels=NUM_LABELS,
    )
    model = GamlBertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight *= 30 if name.startswith("exit_") else 8
    return GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")


# Threads


def threads(classifier: GamlTextClassificationPipeline, calls: int, seed: int) -> dict[str, int]:
    """`calls` calls by 16 threads; what each must answer was found by one thread before."""
    rng = random.Random(seed)
    cases = [(valid_rows(rng, rng.randint(1, 6)), valid_arguments(rng)) for _ in range(60)]
    for rows, arguments in cases[::4]:
        rows.insert(rng.randint(0, len(rows)), rng.choice([None, "", 7, "bad \ud800"]))
        arguments["on_error"] = rng.choice(["skip", "skip", "raise"])
    expected = [outcome(classifier, *case) for case in cases]
    turns = [random.Random(seed * NUM_THREADS + i) for i in range(NUM_THREADS)]
    counts, lock, start = Counter(), threading.Lock(), threading.Barrier(NUM_THREADS)

    def work(number: int) -> None:
        start.wait()
        for _ in range(number, calls, NUM_THREADS):
            i = turns[number].randrange(len(cases))
            found = outcome(classifier, *cases[i])
            with lock:
                counts["wrong" if found != expected[i] else "answered" if isinstance(found, list) else "refused"] += 1

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(NUM_THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIME_LIMIT + calls)
    return {
        "tried": calls,
        **{name: counts[name] for name in ("answered", "refused", "wrong")},
        "lost": calls - counts.total(),
    }


def outcome(classifier, rows, arguments) -> list | str:
    try:
        return list(classifier(rows, **arguments))
    except (TypeError, ValueError) as error:
        return str(error)


# Valid rows and arguments


def words(rng: random.Random, most: int = 40) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def valid_rows(rng: random.Random, number: int) -> list:
    return [{"text": words(rng), "text_pair": words(rng)} if rng.random() < 0.3 else words(rng) for _ in range(number)]


def valid_arguments(rng: random.Random) -> dict:
    exits = rng.choice(
        [
            {},
            {"exit_strategy": "none"},
            {"patience": rng.choice([1, 2, 3, 10**30])},
            {"budgeted_exit": rng.randint(1, NUM_LAYERS)},
            {"exit_strategy": "entropy", "exit_threshold": rng.choice([0, 0.3, 0.7, 1])},
            {"exit_strategy": "max_prob", "exit_threshold": rng.choice([0.0, 0.6, 0.9, 1.0])},
        ]
    )
    choices = {
        "top_k": [1, 2, None, 99],
        "function_to_apply": ["softmax", "Sigmoid", "NONE", "default", None],
        "max_length": [5, 9, LONGEST, None],
        "truncation": [True, "longest_first", None],
        "padding": [True, False, "max_length", "longest", None],
        "split_special_tokens": [True, False],
        "batch_size": [1, 2, 3, 8, 10**6],
    }
    return exits | {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.3}


# Fuzz


def fuzz(classifier: GamlTextClassificationPipeline, inputs: int, seed: int, show: int = 5) -> dict[str, int | float]:
    """`inputs` calls with odd rows, containers and arguments; prints the first `show` cases that went wrong."""
    counts, slowest = Counter(wrong=0, lost=0), 0.0
    for number in range(inputs):
        rng = random.Random(f"{seed}-{number}")
        began = time.perf_counter()
        verdict, case = attempt(classifier, rng)
        seconds = time.perf_counter() - began
        slowest = max(slowest, seconds)
        if seconds > TIME_LIMIT and verdict in ("answered", "refused"):
            verdict, case = "wrong", f"took {seconds:.0f} s: {case}"
        counts[verdict] += 1
        if verdict in ("wrong", "lost") and counts["wrong"] + counts["lost"] <= show:
            print(f"seed {seed}, input {number}, {verdict}: {case:.2000}", file=sys.stderr)
    return {
        "tried": inputs,
        **{name: counts[name] for name in ("answered", "refused", "wrong", "lost")},
        "slowest_seconds": round(slowest, 2),
    }


def attempt(classifier, rng: random.Random) -> tuple[str, str]:
    """One call, and what became of it."""
    arguments, are_arguments_good = odd_arguments(rng) if rng.random() < 0.25 else (valid_arguments(rng), True)
    rows, goodness = [], []
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
        row, is_good = odd_row(rng)
        rows.append(row)
        goodness.append(is_good)
    if are_arguments_good and rng.random() < 0.2:
        arguments["truncation"] = rng.choice([False, "do_not_truncate", "only_first", "only_second"])
        goodness = [is_good and None for is_good in goodness]  # whether a text is short enough is not decided here
    is_skip = "on_error" not in arguments and rng.random() < 0.6
    sibling, place = "a good film", rng.randint(0, len(rows))
    if is_skip or None not in goodness:
        rows.insert(place, sibling)
        goodness.insert(place, True)
    form = rng.choice(list(FORMS))
    if form == "one":
        rows, goodness, place = [sibling if rng.random() < 0.3 else rows[0]], goodness[:1], -1
        goodness = [True] if rows[0] is sibling else goodness
        if not isinstance(rows[0], (str, dict)):
            form = "list"
    naked = rng.random() < 0.05
    data = rng.choice(NO_ROWS)() if naked else FORMS[form](rows)
    calls = arguments | ({"on_error": "skip"} if is_skip else {})
    case = f"{form} of {short(rows)}, {short(calls)}" if not naked else f"{short(data)}, {short(calls)}"
    try:
        answers = classifier(data, **calls)
        answers = answers if isinstance(answers, (list, dict)) else list(answers)
    except (TypeError, ValueError) as error:
        if not is_ours(error):
            return "wrong", f"{type(error).__name__}, not ours: {error}\n    {case}"
        if are_arguments_good and not naked and (is_skip or all(goodness)):
            return "wrong", f"refused: {error}\n    {case}"
        return "refused", case
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}\n    {case}"
    if naked or not are_arguments_good or (not is_skip and False in goodness):
        return "wrong", f"not refused\n    {case}"
    if form == "one" and (isinstance(rows[0], dict) or "top_k" in calls):  # the answer to a `str` is in a list already
        answers = [answers]
    if not isinstance(answers, list) or len(answers) != len(rows):
        return "lost", f"{short(answers)}\n    {case}"
    for number, (answer, is_good) in enumerate(zip(answers, goodness, strict=True)):
        fault = fault_of(answer, is_good, calls, "`inputs`: " if form == "one" else f"`inputs[{number}]`: ")
        if fault:
            return "wrong", f"row {number}, {fault}: {short(answer)}\n    {case}"
    if place >= 0 and place < len(rows) and rows[place] is sibling:
        alone = classifier([sibling], **arguments)
        if len(alone) != 1 or not is_same(alone[0], answers[place]):
            return "wrong", f"{sibling!r} alone {alone}, beside others {answers[place]}\n    {case}"
    return "answered", case


def fault_of(answer, is_good: bool | None, arguments: dict, name: str) -> str:
    """What is wrong with the answer to one row; an empty string where nothing is."""
    many = "top_k" in arguments
    if isinstance(answer, list) != many or answer == []:
        return "shape"
    parts = answer if many else [answer]
    keys = {"label", "score", "exit_layer", "truncated"}
    if "error" in parts[0]:
        values = {parts[0][key] for key in keys}
        if is_good or len(parts) != 1 or parts[0].keys() != keys | {"error"} or values != {None}:
            return "an error that is none"
        return "" if parts[0]["error"].startswith(name) and is_sentence(parts[0]["error"]) else "error"
    if is_good is False:
        return "an answer to a bad row"
    top_k = arguments.get("top_k", 1) or NUM_LABELS
    if len(parts) != min(top_k, NUM_LABELS) or len({part["label"] for part in parts}) != len(parts):
        return "labels"
    for part in parts:
        if part.keys() != keys or part["label"] not in {f"LABEL_{i}" for i in range(NUM_LABELS)}:
            return "keys"
        if type(part["score"]) is not float or not np.isfinite(part["score"]):
            return "score"
        if part["exit_layer"] not in range(1, NUM_LAYERS + 1) or type(part["truncated"]) is not bool:
            return "exit"
    return ""


def is_same(one, other) -> bool:
    one, other = ([answer] if isinstance(answer, dict) else answer for answer in (one, other))
    return len(one) == len(other) and all(
        a | {"score": 0} == b | {"score": 0} and abs(a["score"] - b["score"]) < 1e-4
        for a, b in zip(one, other, strict=True)
    )


def is_ours(error: Exception) -> bool:
    """Whether our own code raised it, with a sentence that names what is wrong."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_code.co_filename.startswith(CODE) and is_sentence(str(error))


def is_sentence(message: str) -> bool:
    return len(message) < 600 and re.search(r"`.+`", message) is not None


def short(value) -> str:
    try:
        text = ascii(value)
    except Exception as error:
        text = f"<{type(value).__name__}: {error}>"
    return text if len(text) < 400 else f"{text[:400]}..."


# Odd values

ODD_CHARACTERS = (
    "\x00\x07\x1b\x7f\xa0\xad\u0301\u200b\u200d\u2028\u202e\ufeff\ufffd\uffff\U0001f600\U000e0041\U0010ffff"
)
CONTROL_TOKENS = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "[unused1]", "##s"]


def odd_text(rng: random.Random) -> str:
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(["", " ", "\t\n", "\u3000", "\xa0" * 9])
    if kind == 1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 30)))  # surrogates among them
    if kind == 2:
        return words(rng) + chr(rng.randrange(0xD800, 0xE000)) + words(rng)
    if kind == 3:
        return " ".join(rng.choices([*CONTROL_TOKENS, *WORDS], k=rng.randint(1, 20)))
    if kind == 4:
        return "".join(rng.choices(ODD_CHARACTERS + "ab ", k=rng.randint(1, 20)))
    if kind == 5 and rng.random() < 0.1:
        return rng.choice(["a", "good ", "a\u0301", "\u200b", " ", "[SEP]", "\U0001f600", "\n"]) * rng.choice(
            [10_000, 100_000]
        )
    return words(rng)


def text_goodness(text: str) -> bool | None:
    """True: must be answered. False: must be refused. None: its tokenizer decides."""
    if not text.strip() or any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return False
    return True if re.search("[a-z]", text) else None


def odd_row(rng: random.Random) -> tuple[object, bool | None]:
    """A row, and whether it is one: None where that depends on the tokenizer."""
    kind = rng.random()
    if kind < 0.5:
        text = odd_text(rng)
        row = np.str_(text) if rng.random() < 0.1 and text == text.rstrip("\x00") else text
        return row, text_goodness(text)
    if kind < 0.7:
        pair = {"text": odd_text(rng), "text_pair": odd_text(rng)}
        goodness = [text_goodness(text) for text in pair.values()]
        return pair, False if False in goodness else None if None in goodness else True
    if kind < 0.8:
        value = {rng.choice(["text", "text_pair", "Text", "", 3, None, "label"]): odd_value(rng) for _ in range(2)}
        return value, None if isinstance(value.get("text"), str) and value.keys() <= {"text", "text_pair"} else False
    value = odd_value(rng)
    while isinstance(value, (str, dict)):
        value = odd_value(rng)
    return value, False


def odd_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind == 0:
        return rng.choice([None, True, False, Ellipsis, NotImplemented])
    if kind == 1:
        return rng.choice([0, -1, 1, 2**31, -(2**63), 10**30, 10**400, -(10**5000)])
    if kind == 2:
        return rng.choice(
            [0.0, -0.5, 1e-308, 1e308, float("nan"), float("inf"), -float("inf"), 1j, decimal.Decimal("0.5")]
        )
    if kind == 3:
        return rng.choice([b"", b"good", bytearray(b"good"), memoryview(b"good"), b"\xff" * 100_000])
    if kind == 4:
        return rng.choice(
            [np.int64(2), np.float32(0.5), np.array([]), np.array(["good"]), np.zeros((2, 2)), np.bool_(True)]
        )
    if kind == 5:
        return rng.choice(
            [object(), int, len, lambda: None, range(3), Unprintable(), pd.NaT, pd.Series(["good"]), torch.ones(2)]
        )
    if kind in (6, 7):
        return odd_text(rng)
    if kind == 8:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return tuple(odd_value(rng, depth + 1) for _ in range(rng.randrange(4)))
    if kind == 10:
        return rng.choice(
            [{"role": "user", "content": "good"}, [{"role": "user", "content": "good"}], nested(2000), itself()]
        )
    return {
        rng.choice(["text", "role", "content", 1, None]): odd_value(rng, depth + 1) for _ in range(rng.randrange(3))
    }


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words for it")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list:
    value: list = ["good"]
    value.append(value)
    return value


def as_objects(rows: list) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    for number, row in enumerate(rows):
        array[number] = row
    return array


FORMS = {
    "list": list,
    "tuple": tuple,
    "array": as_objects,
    "series": lambda rows: pd.Series(as_objects(rows), dtype=object),
    "generator": lambda rows: (row for row in rows),
    "iterator": iter,
    "dataset": lambda rows: KeyDataset([{"row": row} for row in rows], "row"),
    "one": lambda rows: rows[0],
}
NO_ROWS = [
    *(lambda value=value: value for value in (None, 7, 0.5, float("nan"), b"good", bytearray(b"good"), True, 1j, ...)),
    object,
    Unprintable,
    lambda: {"good", "bad"},
    lambda: {"a": "good"}.values(),
    lambda: memoryview(b"good"),
    lambda: pd.DataFrame({"text": ["good"]}),
    lambda: np.float64(0.5),
    lambda: torch.tensor(3),
    lambda: str,
    lambda: print,
]

# What is a good value of an argument, said once more and otherwise than the pipeline says it.
GOOD = {
    "top_k": lambda v: v is None or (type(v) is int and v > 0),
    "function_to_apply": lambda v: (
        v is None or (isinstance(v, str) and v.lower() in {"softmax", "sigmoid", "none", "default"})
    ),
    "on_error": lambda v: v is None or (isinstance(v, str) and v in {"raise", "skip"}),
    "max_length": lambda v: v is None or (type(v) is int and v in range(5, LONGEST + 1)),
    "padding": lambda v: v is None or type(v) is bool,
    "truncation": lambda v: v is None or type(v) is bool,
    "split_special_tokens": lambda v: v is None or type(v) is bool,
    "batch_size": lambda v: v is None or (type(v) is int and v > 0),
    "num_workers": lambda v: v is None or (type(v) is int and v >= 0),
    "exit_strategy": lambda v: v is None,
    "exit_policy": lambda v: v is None,
    "patience": lambda v: v is None or (type(v) is int and v > 0),
    "budgeted_exit": lambda v: v is None or (type(v) is int and v in range(1, NUM_LAYERS + 1)),
    "exit_threshold": lambda v: v is None,  # without a strategy that reads it
}


def odd_arguments(rng: random.Random) -> tuple[dict, bool]:
    """Arguments of which one is bad: its name or its value."""
    arguments = valid_arguments(rng)
    name = rng.choice(list(GOOD))
    if rng.random() < 0.4:
        letters = list(name)
        letters[rng.randrange(len(letters))] = rng.choice(string.ascii_lowercase)
        name = rng.choice(
            ["".join(letters), name[:-1], name.upper(), rng.choice(["return_tensors", "text", "device", "x" * 9999])]
        )
        if name in GOOD:
            name += "_"
        return arguments | {name: odd_value(rng)}, False
    value = odd_value(rng)
    while GOOD[name](value):
        value = odd_value(rng)
    if name in ("patience", "budgeted_exit", "exit_threshold", "exit_strategy", "exit_policy"):
        arguments = {
            key: value
            for key, value in arguments.items()
            if key not in GOOD or not key.startswith(("exit_", "patience", "budgeted"))
        }
    return arguments | {name: value}, False


# Properties and kills


def properties(examples: int, seed: int) -> dict[str, int]:
    """Each test of `tests/test_properties.py` on `examples` examples."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", str(TESTS)]
    environment = os.environ | {"GAML_HF_EXAMPLES": str(examples)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parents[1])
    found = {outcome: int(number) for number, outcome in re.findall(r"(\d+) (passed|failed|error)", run.stdout)}
    passed, failed = found.get("passed", 0), found.get("failed", 0) + found.get("error", 0)
    if run.returncode:
        print(run.stdout, run.stderr, file=sys.stderr)
    return {
        "tried": passed + failed,
        "answered": passed,
        "refused": 0,
        "wrong": failed,
        "lost": int(run.returncode != 0 and not failed),
        "examples_each": examples,
    }


def kills(trials: int, seed: int) -> dict:
    from benchmarks.kills import campaign  # needed by this campaign alone

    parts = campaign(trials=trials, seed=seed)
    return {"lost": sum(part["lost"] for part in parts.values()), **parts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["threads", "fuzz", "properties", "kills"]
    parser.add_argument("--campaigns", nargs="+", choices=names, default=names)
    parser.add_argument("--inputs", type=int, default=5000, help="calls of `threads`, and of `fuzz`")
    parser.add_argument("--examples", type=int, default=1000, help="for each test of `properties`")
    parser.add_argument("--trials", type=int, default=50, help="of `kills`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="a JSON file for the counts")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = {
        "threads": lambda: threads(tiny_pipeline(), options.inputs, options.seed),
        "fuzz": lambda: fuzz(tiny_pipeline(), options.inputs, options.seed),
        "properties": lambda: properties(options.examples, options.seed),
        "kills": lambda: kills(options.trials, options.seed),
    }
    results = {}
    for name in options.campaigns:
        began = time.perf_counter()
        results[name] = run[name]() | {"seconds": round(time.perf_counter() - began, 1)}
        print(f"{name}: " + ", ".join(f"{count} {value}" for count, value in results[name].items()), flush=True)
    if options.output:
        about = {
            "date": date.today().isoformat(),
            "seed": options.seed,
            "processor": processor_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(options.output).write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    return int(any(result.get("wrong") or result.get("lost") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
