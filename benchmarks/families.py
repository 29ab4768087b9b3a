"""
What leaving at half depth gives for each encoder family, in wall-clock time: ratios to its own stock classifier.

    python benchmarks/families.py                       # base sizes, random weights, one thread
    python benchmarks/families.py --kinds mpnet roberta --batch_sizes 1

The systems of a family take turns in one process, on texts as long as those of SST-2; every figure is the stock full
depth's time over the system's in the same round, median and range over the rounds.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, logging

from gaml_hf import GamlAutoConfig, GamlAutoModelForSequenceClassification
from gaml_hf.models.auto import families
from gaml_hf.models.exiting_gaml import Budgeted


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.speed import (
    QUANTILES,
    Workload,
    full_depth,
    make_batch,
    measure,
    processor,
    ratios,
    spread,
)


STOCK = "stock, full depth"
VOCAB_SIZE = 1000  # embeddings cost next to nothing, however many there are
SAME_ENCODER = ("camembert", "xlm-roberta")  # as roberta

# The base model of each kind, but for the vocabulary; what the library's defaults do not say.
SIZES = {
    "albert": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "deberta-v2": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "electra": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "embedding_size": 768},
    "modernbert": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
}


def systems_of(kind: str) -> dict[str, tuple[Callable, torch.nn.Module]]:
    fields = {"vocab_size": VOCAB_SIZE, **SIZES.get(kind, {})}
    stock = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **fields)).eval()
    model = GamlAutoModelForSequenceClassification.from_config(GamlAutoConfig.for_model(kind, **fields)).eval()
    half = Budgeted(model.config.num_hidden_layers // 2)

    def leave(model, workload) -> None:
        for batch in workload.batches:
            model(**batch, exit_policy=half)

    return {
        STOCK: (full_depth, stock),
        "ours, full depth": (full_depth, model),
        "ours, half depth": (leave, model),
        "ours, half depth, prepacked": (leave, copy.deepcopy(model).prepack()),
    }


def workload(batch_size: int) -> Workload:
    """Texts as long as those of SST-2."""
    drawn = np.random.default_rng(0).random((max(1, 32 // batch_size), batch_size))
    lengths = np.interp(drawn, np.linspace(0, 1, 21), QUANTILES["sst2"]).astype(int)
    batches = [make_batch(row) for row in lengths]
    for batch in batches:
        batch["input_ids"] %= VOCAB_SIZE
    return Workload(f"batch {batch_size}", batches, [])


def main(argv: Sequence[str] | None = None) -> None:
    kinds = sorted(kind for config, _ in families() for kind in config.plain_model_types)
    kinds = [kind for kind in kinds if kind not in SAME_ENCODER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND", help=f"of {kinds}")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the seconds, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    # With one thread, in processor time: what else the machine does would decide it otherwise.
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(processor())
    results = []
    for kind in options.kinds:
        systems = systems_of(kind)
        for batch_size in options.batch_sizes:
            with torch.inference_mode():
                seconds = measure(systems, workload(batch_size), options.rounds, clock)
            layers = systems["ours, full depth"][1].config.num_hidden_layers
            told = "; ".join(f"{name} {spread(ratios(seconds, name, STOCK))}" for name in seconds if name != STOCK)
            print(f"{kind}, {layers} layers, batch {batch_size}: {told}", flush=True)
            results.append({"kind": kind, "layers": layers, "batch_size": batch_size, "seconds": seconds})
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": processor(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
