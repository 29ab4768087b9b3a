"""
What ONNX Runtime and int8 change on a trained model: scores, labels and exits, row by row.

    python benchmarks/int8.py --model out/sst2 --rows glue/sst2/validation.parquet --text_columns sentence

Each policy decides on the logits of all exits, computed once for each system; PyTorch in fp32 is what the others are
compared with.
"""

import argparse
import copy
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoTokenizer

from gaml_hf import GamlAutoModelForSequenceClassification
from gaml_hf.data.files import RowFile, encode_labels, read_split
from gaml_hf.evaluation import accuracy, layer_speed_up, replay, score_exits, sweep
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it finds its neighbours
from benchmarks.machine import processor_name


def exit_logits(model, tokenizer, texts: list[tuple[str, ...]]) -> np.ndarray:
    """Logits of every exit, `(num_rows, num_exits, num_labels)`, text by text."""
    rows = []
    for text in texts:
        inputs = tokenizer(*text, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**inputs, output_exit_logits=True).exit_logits)
    return torch.cat(rows).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained checkpoint folder")
    parser.add_argument("--rows", required=True, help="texts and labels: a csv, tsv, json, jsonl or parquet file")
    parser.add_argument("--text_columns", nargs="+", default=["sentence"])
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--target_speed_up", type=float, default=1.9, help="policies are compared near this speed-up")
    options = parser.parse_args()
    torch.set_num_threads(1)

    try:
        rows, names = read_split(RowFile(options.rows, "rows"), "scored", options.text_columns, options.label_column)
    except ValueError as error:
        parser.error(str(error))
    texts = list(zip(*(rows[column] for column in options.text_columns), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = GamlAutoModelForSequenceClassification.from_pretrained(options.model).eval()
    config = model.config
    # By name, or by number as GLUE has them.
    classes = {str(k): k for k in range(config.num_labels)} | config.label2id
    labels = np.array(encode_labels(names, "scored", options.label_column, classes))
    with tempfile.TemporaryDirectory() as folder:
        systems = {"PyTorch fp32": model}
        sizes = {}
        for precision in ("fp32", "int8"):
            path = export_onnx(model, Path(folder) / precision, precision=precision)
            name = f"ONNX Runtime {precision}"
            sizes[name] = sum(file.stat().st_size for file in path.glob("layer_*.onnx")) / 2**20
            systems[name] = GamlOrtModelForSequenceClassification.from_pretrained(path)
        logits = {name: exit_logits(system, tokenizer, texts) for name, system in systems.items()}

    print(f"{date.today()}, {processor_name()}; torch {torch.__version__}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}; {len(labels)} rows; MiB of the layers: {sizes}; ", end="")
    print(f"int8 with weights of type {systems['ONNX Runtime int8'].weight_type}")
    reference = logits["PyTorch fp32"]
    print(f"\naccuracy of each exit {config.exit_layers}, and the largest difference of a logit")
    for name, values in logits.items():
        scores = [f"{s['accuracy']:.4f}" for s in score_exits(values, labels, config.exit_layers, accuracy).values()]
        print(f"{name:20} {' '.join(scores)}   {np.abs(values - reference).max():.1e}")

    policies = {"the config's": config}
    for strategy in ("entropy", "patience"):
        points = sweep(reference, labels, config, strategy, accuracy, "accuracy")
        near = min(points, key=lambda point: abs(point.speed_up - options.target_speed_up))
        changed = copy.copy(config)
        vars(changed).update(near.config_fields())
        policies[f"{strategy} {near.parameter:.4g}"] = changed
    print("\npolicy, system, accuracy, speed-up in layers, rows with another exit, rows with another label")
    for policy, changed in policies.items():
        base_label, base_exit = replay(reference, changed)
        for name, values in logits.items():
            label, exit_layer = replay(values, changed)
            score = accuracy(label, labels)["accuracy"]
            speed_up = layer_speed_up(exit_layer, config.num_hidden_layers)
            print(
                f"{policy:20} {name:20} {score:.4f} {speed_up:.3f} {(exit_layer != base_exit).mean():.2%} "
                f"{(label != base_label).mean():.2%}"
            )


if __name__ == "__main__":
    main()
