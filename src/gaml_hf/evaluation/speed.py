"""
The speed-up, which has three names for three quantities; none stands in for another:
- in layers (`layer_speed_up`; the paper's and PABEE's): `num_hidden_layers / mean layers run`. Counts layers only.
- in FLOPs (`flops_speed_up`): matrix multiplications of plain BERT over those of the layers and exits that ran.
- in latency (`latency_speed_up`): seconds of plain BERT over seconds with exiting; of one machine and batch size.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from gaml_hf.models.exiting_gaml import ExitPolicy, FullDepth, policy_for_call

from .checks import check_exit_layer


def layer_speed_up(exit_layer: np.ndarray | Tensor | Sequence[int], num_hidden_layers: int) -> float:
    """
    Speed-up in layers, the one the paper and PABEE report: `num_hidden_layers / mean layers run`.

    It says nothing of exits, decisions, padding or kernels: that is for `flops_speed_up` and `latency_speed_up`.

    Args:
        exit_layer (`np.ndarray`, `torch.Tensor` or `list[int]`, of shape `(num_rows,)`):
            The layer at which each row left, in `[1, num_hidden_layers]`.
        num_hidden_layers (`int`): layers of the full model.

    Returns:
        `float`, in `[1, num_hidden_layers]`.
    """
    return float(num_hidden_layers / check_exit_layer(exit_layer, range(1, num_hidden_layers + 1)).mean())


def flops_speed_up(
    model: PreTrainedModel,
    exit_layer: np.ndarray | Tensor | Sequence[int],
    lengths: np.ndarray | Sequence[int],
    *,
    one_exit: bool = False,
) -> float:
    """
    Speed-up in FLOPs: plain BERT's (all layers, the last exit alone) over those of the layers and exits that ran.

    Counted, not estimated: PyTorch counts the matrix multiplications of a layer and an exit at each length (a
    multiply-add is 2 FLOPs), in eager attention, for the fused kernels are undercounted. Each row counts with its own
    length: padding is not in it, and neither is anything that multiplies no matrices (softmax, LayerNorm, decisions).
    A row's last layer counts whole, though the engine runs it for [CLS] alone where it can.

    Args:
        model ([`GamlBertForSequenceClassification`]): any copy of it. It is not run; only its shapes are read.
        exit_layer (`np.ndarray`, `torch.Tensor` or `list[int]`, of shape `(num_rows,)`):
            The layer at which each row left, one of `config.exit_layers`.
        lengths (`np.ndarray` or `list[int]` of shape `(num_rows,)`): tokens of each row, [CLS] and [SEP] included.
        one_exit (`bool`): whether the policy is of fixed depth, `"none"` or `"budgeted"`, for which one exit runs.

    Returns:
        `float`: total over total, as `layer_speed_up`.
    """
    config = model.config
    exit_layer = check_exit_layer(exit_layer, config.exit_layers)
    lengths = np.asarray(lengths)
    if lengths.shape != exit_layer.shape:
        raise ValueError(
            f"`lengths` must hold one number of tokens for each of the {len(exit_layer)} rows of `exit_layer`. "
            f"Got shape {lengths.shape}."
        )
    if lengths.min() < 1 or lengths.max() > config.max_input_length:
        raise ValueError(
            f"`lengths` must lie between 1 and {config.max_input_length} (`config.max_input_length`). "
            f"Got {lengths.min()} to {lengths.max()}."
        )
    distinct, row_length = np.unique(lengths, return_inverse=True)
    costs = np.array(_layer_and_exit_flops(model, distinct.tolist()), dtype=np.float64)  # (num_lengths, 2)
    layer, exit_ = costs[row_length].T
    exits_run = 1 if one_exit else np.searchsorted(config.exit_layers, exit_layer, side="right")
    return float((config.num_hidden_layers * layer + exit_).sum() / (exit_layer * layer + exits_run * exit_).sum())


def image_flops_speed_up(
    model: PreTrainedModel,
    exit_layer: np.ndarray | Tensor | Sequence[int],
    image_size: tuple[int, int],
    *,
    one_exit: bool = False,
) -> float:
    """
    Speed-up in FLOPs of a model on images: the plain network's (all layers, the last exit alone) over those of the
    stem, layers and exits that ran. Counted as in [`flops_speed_up`], convolutions and linear layers alone.

    Args:
        model ([`GamlResNetForImageClassification`]): any copy of it. It is not run; only its shapes are read.
        exit_layer (`np.ndarray`, `torch.Tensor` or `list[int]`, of shape `(num_rows,)`):
            The layer at which each image left, one of `config.exit_layers`.
        image_size (`tuple[int, int]`): height and width of the images, as the model gets them.
        one_exit (`bool`): whether the policy is of fixed depth, `"none"` or `"budgeted"`, for which one exit runs.

    Returns:
        `float`: total over total, as `layer_speed_up`.
    """
    config = model.config
    exit_layer = check_exit_layer(exit_layer, config.exit_layers)
    stem, layers, exits = image_flops(model, image_size)
    to_exit = stem + np.cumsum(layers)  # of the plain network up to each layer
    early = np.array([exits[m] for m in config.exit_layers])
    early = early if one_exit else np.cumsum(early)  # of the exits up to each
    ran = to_exit[exit_layer - 1] + early[np.searchsorted(config.exit_layers, exit_layer)]
    return float(len(exit_layer) * (to_exit[-1] + exits[config.exit_layers[-1]]) / ran.sum())


def image_flops(model: PreTrainedModel, image_size: tuple[int, int]) -> tuple[int, list[int], dict[int, int]]:
    """FLOPs for one image of its stem, of each layer, and of each exit by its layer; a multiply-add is 2."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"), torch.no_grad():  # shapes without numbers: nothing is computed
        shapes = type(model)(config).eval()

        def counted(module, *inputs: Any) -> tuple[Any, int]:
            with FlopCounterMode(display=False) as counter:
                output = module(*inputs)
            return output, counter.get_total_flops()

        maps, stem = counted(shapes.base_model.embedder, torch.empty(1, config.num_channels, *image_size))
        layers, exits = [], {}
        for m, layer in enumerate(shapes.encoder_layers, start=1):
            maps, flops = counted(layer, maps)
            layers.append(flops)
            if m in config.exit_layers:
                exits[m] = counted(shapes._run_exit, m, maps)[1]
    return stem, layers, exits


def latency_speed_up(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    exit_policy: ExitPolicy | None = None,
    *,
    batch_size: int = 1,
    repeats: int = 7,
) -> dict[str, float]:
    """
    Speed-up in latency: seconds of plain BERT (all layers, the last exit alone, padded) over seconds with exiting. In
    a batch it also holds what the exit engine saves without any exit, as it computes no padding.

    Both run the same batches on the same weights, in turn, after a warm-up round; a round gives one ratio. It holds
    for this machine, its load, this dtype, these lengths and this batch size only.

    Args:
        model ([`GamlBertForSequenceClassification`]): on the device and in the dtype to measure. Left as it was.
        rows (`list[dict]`): tokenized texts, with `input_ids` and, if the task has them, `token_type_ids`; padding,
            which `attention_mask` tells, is cut off, and other columns are ignored. Batched in this order, padded on
            the right. Or images, with `pixel_values` of one size.
        exit_policy ([`ExitPolicy`], *optional*): defaults to the config's.
        batch_size (`int`, *optional*, defaults to 1): rows that run together; 1 is the paper's setting.
        repeats (`int`, *optional*, defaults to 7): rounds, from 1.

    Returns:
        `dict[str, float]`: `speed_up` (median of the rounds), `speed_up_min`, `speed_up_max`, `full_depth_seconds` and
        `exiting_seconds` (median, for all rows), `batch_size`, `num_rows`, `repeats`.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("the number of `rows`", len(rows))):
        if value < 1:
            raise ValueError(f"{name if ' ' in name else f'`{name}`'} must be at least 1. Got {value}.")
    batches = [_batch(rows[start : start + batch_size], model) for start in range(0, len(rows), batch_size)]
    runs = {
        # All exits, of which there is one: the stock layers, padded, without our engine's savings.
        "full_depth": (_without_early_exits(model), {"exit_policy": FullDepth(), "output_exit_logits": True}),
        "exiting": (model, {"exit_policy": policy_for_call(exit_policy, model.config)}),
    }
    seconds = {name: [] for name in runs}
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    runs["full_depth"][0].eval()
    try:
        with torch.inference_mode():
            for name in runs:
                _seconds(*runs[name], batches)
            for round_ in range(repeats):
                # The order alternates: whichever comes second finds warmer caches and a warmer processor.
                for name in sorted(runs, reverse=round_ % 2 == 1):
                    seconds[name].append(_seconds(*runs[name], batches))
    finally:
        for module in was_training:
            module.training = True
    ratios = np.array(seconds["full_depth"]) / np.array(seconds["exiting"])
    return {
        "speed_up": float(np.median(ratios)),
        "speed_up_min": float(ratios.min()),
        "speed_up_max": float(ratios.max()),
        "full_depth_seconds": float(np.median(seconds["full_depth"])),
        "exiting_seconds": float(np.median(seconds["exiting"])),
        "batch_size": batch_size,
        "num_rows": len(rows),
        "repeats": repeats,
    }


def _layer_and_exit_flops(model: PreTrainedModel, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """FLOPs of one layer and of one exit for one row, at each length; layers are of one shape, and so are exits."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    # Shapes without numbers: nothing is computed. And no gradient, which the counter would follow into the encoder.
    with torch.device("meta"), torch.no_grad():
        shapes = type(model)(config).eval()
        costs = []
        for length in lengths:
            hidden_states = torch.empty(1, length, config.hidden_size)
            inputs = shapes._layer_inputs(hidden_states, None)
            with FlopCounterMode(display=False) as layer:
                hidden_states = shapes._run_layer(shapes.encoder_layers[0], hidden_states, inputs)
            with FlopCounterMode(display=False) as exit_:
                shapes._run_exit(config.exit_layers[0], hidden_states[:, 0])
            costs.append((layer.get_total_flops(), exit_.get_total_flops()))
    return costs


def _without_early_exits(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, as plain BERT: the last exit alone, so that full depth pays for no exit and no decision."""
    config = copy.deepcopy(model.config)
    if config.exit_temperatures is not None:
        config.exit_temperatures = config.exit_temperatures[-1:]
    config.exit_layers = config.exit_layers[-1:]
    plain = copy.copy(model)  # shares every module
    vars(plain).pop("forward", None)  # accelerate's, with autocast in it, is bound to the original
    plain.config = config
    return plain


def _seconds(model: PreTrainedModel, options: Mapping[str, Any], batches: list[dict[str, Tensor]]) -> float:
    """Wall-clock time of all batches. A GPU is waited for: its kernels are still queued when `forward` returns."""
    wait = torch.accelerator.synchronize if model.device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    for batch in batches:
        model(**batch, **options)
    wait()
    return time.perf_counter() - start


def _without_padding(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Ids of the tokens of a text, and their types, where its `attention_mask` is not 0."""
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    return {
        name: [value for value, kept in zip(row[name], mask, strict=True) if kept]
        for name in ("input_ids", "token_type_ids")
        if name in row
    }


def _batch(rows: Sequence[Mapping[str, Any]], model: PreTrainedModel) -> dict[str, Tensor]:
    """One batch, of texts padded on the right, on the model's device; images in its type."""
    device = model.device
    if "pixel_values" in rows[0]:
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]).to(device, model.dtype)}
    pad_token_id = model.config.pad_token_id
    rows = [_without_padding(row) for row in rows]
    input_ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    }
    if "token_type_ids" in rows[0]:
        token_type_ids = [torch.as_tensor(row["token_type_ids"]) for row in rows]
        batch["token_type_ids"] = pad_sequence(token_type_ids, batch_first=True)
    return {name: tensor.to(device) for name, tensor in batch.items()}
