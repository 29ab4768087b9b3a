"""
What early exiting gives in wall-clock time: systems side by side, in one process, in turn.

    python benchmarks/speed.py                                # BERT-base shape, random weights, exits forced
    python benchmarks/speed.py --batch_sizes 1 --lengths 64   # a part of it
    python benchmarks/speed.py --weights                      # int8 with each type of weights, too
    python benchmarks/speed.py --checkpoint out/sst2 --data validation.parquet --text_columns sentence

Every figure is a ratio to Hugging Face's BERT in eager attention, float32 and full depth, of the same round; median
and range over the rounds. The systems take turns, so what slows the machine down slows all of them.

Random weights do not know when to leave. So the exits are forced: all rows at layer k, or row by row as in
`EXIT_SHARES` (mean 6.3 of 12). With `--checkpoint` a trained model decides for itself.

The last column is the share of the ideal: the time of the layers that the rows really needed, at the price that a
token has in a large batch without padding and with the same kernels, over the time taken. It can exceed 100%, since
the last layer of a row runs for [CLS] alone.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.models.engine_gaml import Layout, PrepackedLinear, bfloat16_cost, run_cls, run_layer
from gaml_hf.models.exiting_gaml import Budgeted, ExitPolicy, FullDepth, policy_from_config


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours
from benchmarks.machine import processor_name


# Tokens of a text, [CLS] and [SEP] included: 0%, 5%, ... 100% quantiles of the GLUE validation sets under BERT's
# uncased vocabulary.
QUANTILES = {
    "sst2": [4, 10, 12, 14, 16, 17, 19, 20, 21, 23, 24, 26, 27, 29, 30, 32, 34, 37, 40, 44, 55],
    "mrpc": [26, 32, 37, 40, 42, 44, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63, 64, 67, 70, 74, 86],
}
# Share of rows that leave at each of 12 layers: mean 6.3.
EXIT_SHARES = [0.0, 0.08, 0.13, 0.16, 0.14, 0.12, 0.1, 0.08, 0.06, 0.0, 0.0, 0.13]

Batch = dict[str, Tensor]


class ForcedExits(ExitPolicy):
    """Row i leaves at layer `exits[i]`, whatever the logits; when to split a layer is guessed, as for entropy."""

    name = "forced"

    def __init__(self, exits: Tensor, split: bool | None = None):
        self.exits = exits
        self.split = split  # every layer, no layer, or as the guess has it

    def may_exit(self, exit_logits: Tensor) -> Tensor:
        if self.split is None:
            return super().may_exit(exit_logits)
        return torch.full(exit_logits.shape[:1], self.split)

    def should_exit(self, exit_logits: Tensor) -> Tensor:
        leave = self.exits <= exit_logits.shape[1]
        self.exits = self.exits[~leave]  # the engine keeps the others, in this order
        return leave


class Workload:
    """Batches, and the layer at which each row leaves."""

    def __init__(self, name: str, batches: list[Batch], exits: list[Tensor]):
        self.name, self.batches, self.exits = name, batches, exits

    def policy(self, position: int) -> ExitPolicy:
        exits = self.exits[position]
        same = bool((exits == exits[0]).all())  # a budget is known beforehand
        return Budgeted(int(exits[0])) if same else ForcedExits(exits)


def make_batch(lengths: np.ndarray) -> Batch:
    attention_mask = (torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(1000, 20000, attention_mask.shape) * attention_mask,
        "attention_mask": attention_mask,
    }


def make_workloads(options: argparse.Namespace) -> list[Workload]:
    rng = np.random.default_rng(options.seed)

    def batches(length: str, batch_size: int) -> list[Batch]:
        num_batches = max(1, options.rows // batch_size)
        if length in QUANTILES:
            drawn = rng.random((num_batches, batch_size))
            lengths = np.interp(drawn, np.linspace(0, 1, 21), QUANTILES[length]).astype(int)
        else:
            lengths = np.full((num_batches, batch_size), int(length))
        return [make_batch(row) for row in lengths]

    workloads = []
    for length, batch_size in itertools.product(options.lengths, options.batch_sizes):
        made = batches(length, batch_size)
        for exit_at in options.exits:
            if exit_at == "mixed":
                if batch_size == 1 and length not in QUANTILES:
                    continue
                drawn = [torch.from_numpy(rng.choice(12, size=batch_size, p=EXIT_SHARES) + 1) for _ in made]
                exits = [exits.clamp(max=options.layers) for exits in drawn]
            else:
                if batch_size > 1 and int(exit_at) != options.layers:
                    continue  # all rows at one layer: batch 1 tells as much
                exits = [torch.full((batch_size,), int(exit_at)) for _ in made]
            workloads.append(Workload(f"{length} tokens, batch {batch_size}, exit {exit_at}", made, exits))
    return workloads


# ---------------------------------------------------------------------------------------------------------- systems


def embed(model: GamlBertForSequenceClassification, input_ids: Tensor) -> Tensor:
    others = dict.fromkeys(("inputs_embeds", "token_type_ids", "position_ids", "attention_mask"))
    return model._embed(input_ids=input_ids, **others)


def stock_loop(model: GamlBertForSequenceClassification, workload: Workload) -> None:
    """As the peers do it: one row at a time, through the stock layers, a decision after each."""
    for batch, exits in zip(workload.batches, workload.exits, strict=True):
        for row, last in enumerate(exits.tolist()):
            length = int(batch["attention_mask"][row].sum())
            hidden_states = embed(model, batch["input_ids"][row : row + 1, :length])
            inputs = model._layer_inputs(hidden_states, None)
            for m, layer in enumerate(model.encoder_layers[:last], start=1):
                hidden_states = model._run_layer(layer, hidden_states, inputs)
                model._run_exit(m, model._pool(hidden_states, None)).softmax(dim=-1).amax().item()


def waiting(model: GamlBertForSequenceClassification, workload: Workload) -> None:
    """A batch that waits for its slowest row, padded."""
    for batch, exits in zip(workload.batches, workload.exits, strict=True):
        hidden_states = embed(model, batch["input_ids"])
        inputs = model._layer_inputs(hidden_states, batch["attention_mask"])
        for m, layer in enumerate(model.encoder_layers[: int(exits.max())], start=1):
            hidden_states = model._run_layer(layer, hidden_states, inputs)
            model._run_exit(m, model._pool(hidden_states, batch["attention_mask"])).softmax(dim=-1).amax().item()


def ours(model, workload: Workload) -> None:
    for position, batch in enumerate(workload.batches):
        model(**batch, exit_policy=workload.policy(position))


def always_split(model, workload: Workload) -> None:
    """[CLS] first at every layer, as if any row could leave anywhere."""
    for batch, exits in zip(workload.batches, workload.exits, strict=True):
        model(**batch, exit_policy=ForcedExits(exits, split=True))


def never_split(model, workload: Workload) -> None:
    """Whole layers, as if no exit could be foreseen."""
    for batch, exits in zip(workload.batches, workload.exits, strict=True):
        model(**batch, exit_policy=ForcedExits(exits, split=False))


def ours_by_row(model, workload: Workload) -> None:
    """As the int8 runtime does within a batch; here, so that each row has its own forced exit."""
    for batch, exits in zip(workload.batches, workload.exits, strict=True):
        for row in range(len(exits)):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            model(**one, exit_policy=ForcedExits(exits[row : row + 1]))


def full_depth(model, workload: Workload) -> None:
    for batch in workload.batches:
        model(**batch)


def token_price(model: GamlBertForSequenceClassification, clock: Callable[[], float]) -> float:
    """Seconds of a token in a layer, in a large batch without padding, by this model's kernels."""
    layout = Layout(torch.ones(16, 32, dtype=torch.bool), torch.device("cpu"))
    tokens = layout.pack(torch.randn(16, 32, model.config.hidden_size).to(model.dtype))
    layer = model.encoder_layers[0]
    run_layer(model, layer, tokens, layout.rows)
    started = clock()
    for _ in range(3):
        run_layer(model, layer, tokens, layout.rows)
    return (clock() - started) / 3 / len(tokens)


def needed_tokens(workload: Workload) -> int:
    """Tokens times layers that the rows needed."""
    return sum(
        int((batch["attention_mask"].sum(dim=1) * exits).sum())
        for batch, exits in zip(workload.batches, workload.exits, strict=True)
    )


def one_graph(model: BertForSequenceClassification, folder: Path, precision: str, threads: int):
    """Plain BERT as one ONNX graph, as an ONNX Runtime user has it: exported, optimized or quantized by its tools."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "bert.onnx"
    if not path.exists():
        names, axes = ["input_ids", "attention_mask"], {0: "batch_size", 1: "length"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter that needs no further package calls itself old
            torch.onnx.export(
                model,
                tuple(make_batch(np.array([9, 7])).values()),
                str(path),
                input_names=names,
                output_names=["logits"],
                dynamic_axes=dict.fromkeys(names, axes) | {"logits": {0: "batch_size"}},
                opset_version=17,
                dynamo=False,
            )
    if precision == "int8":
        logging.getLogger().setLevel(logging.ERROR)
        quantize_dynamic(path, folder / "int8.onnx", weight_type=QuantType.QInt8)
        path = folder / "int8.onnx"
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    return lambda **batch: session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})


def make_systems(options: argparse.Namespace, folder: Path) -> dict[str, tuple[Callable, object]]:
    """By name: what runs a workload, and its model. The first is what the others are compared with."""
    config = GamlBertConfig(num_hidden_layers=options.layers, exit_pooling=options.exit_pooling)
    model = GamlBertForSequenceClassification(config).eval()
    eager = BertForSequenceClassification(BertConfig(num_hidden_layers=options.layers, attn_implementation="eager"))
    half = BertForSequenceClassification(
        BertConfig(num_hidden_layers=options.layers // 2, attn_implementation="eager")
    )
    systems: dict[str, tuple[Callable, object]] = {
        "HF BERT, eager": (full_depth, eager.eval()),
        "HF BERT, sdpa": (
            full_depth,
            BertForSequenceClassification(BertConfig(num_hidden_layers=options.layers)).eval(),
        ),
        "HF BERT, half the layers": (full_depth, half.eval()),
        "row by row, stock layers": (stock_loop, model),
        "batch waits, stock layers": (waiting, model),
        "ours": (ours, model),
        "ours, prepacked": (ours, copy.deepcopy(model).prepack()),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        systems["ours, bf16 prepacked"] = (ours, copy.deepcopy(model).to(torch.bfloat16).prepack())
    if importlib.util.find_spec("onnxruntime"):
        from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx

        for precision in ("fp32", "int8"):
            graph = one_graph(eager, folder, precision, options.threads)
            systems[f"ONNX Runtime BERT, {precision}"] = (full_depth, graph)
        for precision in ("fp32", "int8"):
            export_onnx(model, folder / precision, precision=precision)
            session = GamlOrtModelForSequenceClassification.from_pretrained(
                folder / precision, num_threads=options.threads
            )
            # A single text has its budget, as with the other systems.
            by_row = precision == "int8" and options.batch_sizes != [1]
            systems[f"ours, ONNX Runtime {precision}"] = (ours_by_row if by_row else ours, session)
        for weight_type in ("int8", "uint8") if options.weights else ():  # whether or not they are exact
            with patch("gaml_hf.runtime.ort.exact_weight_type", return_value=weight_type):
                session = GamlOrtModelForSequenceClassification.from_pretrained(
                    folder / "int8", num_threads=options.threads
                )
            systems[f"{weight_type} weights"] = (ours_by_row if by_row else ours, session)
    if options.split:
        for name in ("ours", "ours, prepacked"):
            systems[f"{name}, no layer split"] = (never_split, systems[name][1])
            systems[f"{name}, every layer split"] = (always_split, systems[name][1])
    if options.compile:
        compiled = copy.deepcopy(model)
        compiled.compile()
        systems["ours, compiled"] = (ours, compiled)
    return {name: system for name, system in systems.items() if not options.systems or name in options.systems}


def processor() -> str:
    """Its name, and what decides which kernels are taken."""
    name = f"{processor_name()}, PyTorch takes it for {torch.backends.cpu.get_cpu_capability()}"
    name += f"; bf16 takes {bfloat16_cost():.2f} of the time of fp32"
    if importlib.util.find_spec("onnxruntime"):
        from gaml_hf.runtime.ort import exact_weight_type

        name += f"; ONNX Runtime's int8 has weights of {exact_weight_type()}"
    return name


# ------------------------------------------------------------------------------------------------------- measuring


def measure(
    systems: dict[str, tuple[Callable, object]], workload: Workload, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each system in each round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for round_ in range(rounds + 1):
        # The order alternates: whoever comes second finds warmer caches.
        for name in sorted(systems, reverse=bool(round_ % 2)):
            run, model = systems[name]
            started = clock()
            run(model, workload)
            if round_:
                seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, base: str) -> list[float]:
    return [theirs / own for theirs, own in zip(seconds[base], seconds[name], strict=True)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def profile(models: dict[str, GamlBertForSequenceClassification], lengths: list[int], rounds: int) -> None:
    """Where the time of a single text goes, in whole layers of the same model and length."""
    for (name, model), length in itertools.product(models.items(), lengths):
        batch = make_batch(np.array([length]))
        layout = Layout(batch["attention_mask"].bool(), torch.device("cpu"))
        tokens = layout.pack(embed(model, batch["input_ids"]))
        layers = model.encoder_layers
        middle = len(layers) // 2

        def run(part: str, model=model, batch=batch, layout=layout, tokens=tokens, layers=layers, middle=middle):
            if part == "embeddings":
                embed(model, batch["input_ids"])
            elif part == "exit and decision":
                (model._run_exit(1, model._pool(tokens[None], None)).softmax(dim=-1).amax() > 0.5).item()
            elif part == "the model":
                model(**batch, exit_policy=Budgeted(middle))
            else:  # all layers in turn: one alone would find its weights in the cache
                for layer in layers:
                    (run_layer if part == "whole layers" else run_cls)(model, layer, tokens, layout.rows)

        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds + 1):
            for part in ("whole layers", "layers for [CLS] alone", "embeddings", "exit and decision", "the model"):
                started = time.perf_counter()
                run(part)
                seconds[part].append(time.perf_counter() - started)
        median = {part: statistics.median(values[1:]) for part, values in seconds.items()}
        layer = median["whole layers"] / len(layers)
        cls = median["layers for [CLS] alone"] / len(layers) / layer
        embeddings, decision = median["embeddings"] / layer, median["exit and decision"] / layer
        parts = middle - 1 + cls + embeddings + decision
        print(
            f"{name}, {length} tokens, in layers: [CLS] alone {cls:.3f}, embeddings {embeddings:.3f}, exit and "
            f"decision {decision:.3f}; the model left at layer {middle} {median['the model'] / layer:.2f}, "
            f"its parts {parts:.2f}"
        )


def draw(results: list[dict], path: Path) -> None:
    """Wall-clock speed-up against speed-up in layers; a line of medians for each system."""
    figure = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    base = next(iter(results[0]["seconds"]))
    for name in results[0]["seconds"]:
        points = sorted(
            (result["layers"] / result["mean_exit"], statistics.median(ratios(result["seconds"], name, base)))
            for result in results
        )
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.4, label=name, ls="-" if "ours" in name else ":")
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        axis.set_major_formatter("{x:g}x")
    axes.axline((1, 1), (2, 2), color="0.6", lw=1, ls="--")
    axes.set_xlabel("Speed-up in layers")
    axes.set_ylabel(f"Wall-clock speed-up over {base}")
    figure.legend(frameon=False, fontsize=7, loc="outside right upper", reverse=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=["32", "64", "128", "sst2"], help="tokens, or sst2 or mrpc")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--exits", nargs="+", default=["3", "6", "9", "12", "mixed"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8, help="rows of a workload, at least one batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="our layers under torch.compile, too")
    parser.add_argument("--cpu_time", action="store_true", help="of this process, for a busy machine and one thread")
    parser.add_argument("--weights", action="store_true", help="int8 with signed and with unsigned weights, too")
    parser.add_argument("--exit_pooling", choices=["cls", "mean"], default="cls", help="what an exit reads")
    parser.add_argument("--split", action="store_true", help="ours with every layer and with no layer split, too")
    parser.add_argument("--profile", action="store_true", help="only tell where the time of a single text goes")
    parser.add_argument("--systems", nargs="+", help="only these; the first named is the base")
    parser.add_argument("--checkpoint", help="a trained GAML-BERT, in place of random weights")
    parser.add_argument("--data", help="with --checkpoint: texts, csv or parquet")
    parser.add_argument("--text_columns", nargs="+", default=["sentence"])
    parser.add_argument("--output", type=Path, help="a JSON with every round")
    parser.add_argument("--figure", type=Path, help="a PNG: wall clock against layers")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()

    print(f"{date.today()}, {processor()}; {options.threads} thread(s); ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {vars(options)}")
    results = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if options.checkpoint:
            systems, workloads = trained(options)
        else:
            systems, workloads = make_systems(options, Path(folder)), make_workloads(options)
        if options.profile:
            models = {name: model for name, (run, model) in systems.items() if run is ours and hasattr(model, "bert")}
            profile(models, [int(length) for length in options.lengths if length.isdigit()], options.rounds)
            return
        for name, (_, model) in systems.items():
            if "prepacked" in name:
                done = any(isinstance(module, PrepackedLinear) for module in model.modules())
                print(f"{name}: {'yes' if done else 'no, that is not faster here'}")
        base, clock = next(iter(systems)), time.process_time if options.cpu_time else time.perf_counter
        prices = {
            name: token_price(model, clock)
            for name, (_, model) in systems.items()
            if isinstance(model, GamlBertForSequenceClassification)
        }
        for workload in workloads:
            tokens = sum(int(batch["attention_mask"].sum()) for batch in workload.batches)
            padded = sum(batch["attention_mask"].numel() for batch in workload.batches)
            mean_exit = torch.cat(workload.exits).double().mean()
            print(
                f"\n{workload.name}: {tokens} tokens, {padded} padded; mean exit {mean_exit:.2f}, "
                f"speed-up in layers {options.layers / mean_exit:.2f}"
            )
            seconds = measure(systems, workload, options.rounds, clock)
            for name in systems:
                share = ""
                if name in prices and name.startswith("ours"):
                    share = (
                        f"{prices[name] * needed_tokens(workload) / statistics.median(seconds[name]):.0%} of the ideal"
                    )
                print(f"  {name:28} {spread(ratios(seconds, name, base)):>24}  {share}", flush=True)
            results.append(
                {
                    "workload": workload.name,
                    "layers": options.layers,
                    "mean_exit": float(mean_exit),
                    "seconds": seconds,
                }
            )
    if options.figure:
        length = results[0]["workload"].partition(",")[0]  # the first one; more would lie over each other
        draw([result for result in results if result["workload"].startswith(length + ",")], options.figure)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"options": vars(options), "results": results}, indent=1, default=str))


def trained(options: argparse.Namespace) -> tuple[dict[str, tuple[Callable, object]], list[Workload]]:
    """A trained model and its own exit policy on real texts; plain BERT with its encoder as the base."""
    from datasets import load_dataset

    model = GamlBertForSequenceClassification.from_pretrained(options.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    options.layers = model.config.num_hidden_layers
    policy = policy_from_config(model.config)
    suffix = Path(options.data).suffix[1:]
    rows = load_dataset(suffix, data_files=options.data, split="train").select(range(max(options.batch_sizes) * 2))
    texts = [list(rows[column]) for column in options.text_columns]
    workloads = []
    for batch_size in options.batch_sizes:
        batches = [
            dict(
                tokenizer(
                    *(column[start : start + batch_size] for column in texts),
                    padding=True,
                    truncation=True,
                    max_length=128,
                    return_tensors="pt",
                )
            )
            for start in range(0, len(rows), batch_size)
        ]
        exits = [model(**batch, exit_policy=policy).exit_layer for batch in batches]
        workload = Workload(f"{Path(options.data).name}, batch {batch_size}, {policy.name}", batches, exits)
        workload.policy = lambda position: policy
        workloads.append(workload)
    fields = {key: value for key, value in model.config.to_dict().items() if key in BertConfig().to_dict()}
    plain = BertForSequenceClassification(BertConfig(**fields | {"model_type": "bert"}, attn_implementation="eager"))
    plain.bert.load_state_dict(model.bert.state_dict(), strict=False)
    systems = {
        "HF BERT, eager": (full_depth, plain.eval()),
        "row by row, stock layers": (stock_loop, model),
        "batch waits, stock layers": (waiting, model),
        "ours, all layers": (
            lambda model, workload: [model(**b, exit_policy=FullDepth()) for b in workload.batches],
            model,
        ),
        "ours": (ours, model),
        "ours, prepacked": (ours, copy.deepcopy(model).prepack()),
    }
    return systems, workloads


if __name__ == "__main__":
    main()
