"""
BERT-of-Theseus: modules of a fine-tuned BERT are replaced, more and more often, by one layer each.

Source: Xu et al., 2020, "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing", Sec. 3. A module of the
predecessor is a pair of layers (or more, for a smaller model), its successor one layer. In each training pass, each
module is replaced with probability p, by a draw of its own; p grows linearly to 1 (the paper's curriculum) and stays
there, which is the fine-tuning of the successors. No other loss than cross-entropy. The one classifier is an exit
like ours, and reads what ours read.

Read in the authors' code, where the paper is less exact: successors start from the predecessor's first layers; they
alone are trained, so that embeddings, pooler and classifier stay the predecessor's; the predecessor runs with dropout;
evaluation during training runs the successors. Their p grows by a fixed amount per step (0.0006 from 0.1 or 0.3); here
it reaches 1 at a share of the training steps, which means the same for a short training.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from gaml_hf import GamlBertForSequenceClassification, GamlTrainer

from .context import Context, layers_per_module, make_trainer


class TheseusBert(GamlBertForSequenceClassification):
    """Successors in the encoder, one exit at their end, and the modules that they replace in training passes."""

    _auto_class = None  # its file does not travel with a checkpoint
    predecessor: ModuleList  # one module of several layers for each successor
    replacing_rate = 0.0

    def _run_layer(self, layer: Module, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        if not self.training:
            return super()._run_layer(layer, hidden_states, inputs)
        # So that every successor has a gradient in every step, of zero where it does not run: else the backward pass
        # fails when nothing is replaced, for all else is frozen.
        hidden_states = hidden_states + 0 * sum(p.sum() for p in layer.parameters())
        if torch.rand(()) < self.replacing_rate:
            return super()._run_layer(layer, hidden_states, inputs)
        for replaced in self.predecessor[self.encoder_layers.index(layer)]:
            hidden_states = super()._run_layer(replaced, hidden_states, inputs)
        return hidden_states


class ReplacingSchedule(TrainerCallback):
    """p(t) = min(1, base + (1 - base) * t / T), with T a share of the training's steps."""

    def __init__(self, base_rate: float, replacing_share: float):
        self.base_rate = base_rate
        self.replacing_share = replacing_share

    def on_step_begin(self, args, state, control, model: TheseusBert, **kwargs):
        progress = state.global_step / (self.replacing_share * state.max_steps)
        model.replacing_rate = min(1.0, self.base_rate + (1 - self.base_rate) * progress)


def make(context: Context, *, base_rate: float = 0.3, replacing_share: float = 0.5) -> Trainer:
    """
    Args:
        base_rate (`float`, *optional*, defaults to 0.3): p at the first step, in `[0, 1]`.
        replacing_share (`float`, *optional*, defaults to 0.5): share of the steps after which p is 1, in `(0, 1]`.
            Ours.
    """
    if not 0 <= base_rate <= 1 or not 0 < replacing_share <= 1:
        raise ValueError(
            "`base_rate` must lie in [0, 1] and `replacing_share` in (0, 1]. Got "
            f"`base_rate={base_rate}`, `replacing_share={replacing_share}`."
        )
    teacher = context.plain()
    depth = teacher.config.num_hidden_layers
    ratio = layers_per_module(context, depth)
    set_seed(context.arguments.seed)
    config = type(teacher.config).from_dict(
        teacher.config.to_dict(), num_hidden_layers=context.layers, exit_layers=[context.layers]
    )
    model = TheseusBert(config)
    # What is the predecessor's goes by its name; its one exit is the successors' exit, and they start from its first
    # layers.
    state = {
        f"{name.partition('.')[0]}.{context.layers}.{name.split('.', 2)[2]}"
        if name.startswith("exit_")
        else name: value
        for name, value in teacher.state_dict().items()
    }
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.requires_grad_(False)
    model.bert.encoder.layer.requires_grad_(True)
    layers = copy.deepcopy(teacher.bert.encoder.layer).requires_grad_(False)
    model.predecessor = ModuleList(ModuleList(layers[i : i + ratio]) for i in range(0, depth, ratio))
    model.exits_are_new = False
    trainer = make_trainer(context, model, GamlTrainer)
    trainer.add_callback(ReplacingSchedule(base_rate, replacing_share))
    return trainer


def finish(trainer: Trainer) -> PreTrainedModel:
    model = trainer.model.requires_grad_(True)
    del model.predecessor
    return model
