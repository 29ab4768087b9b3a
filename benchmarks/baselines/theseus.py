"""
BERT-of-Theseus: modules of a fine-tuned BERT are replaced, more and more often, by one layer each.

Source: Xu et al., 2020, "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing", Sec. 3. A module of the
predecessor is a pair of layers (or more, for a smaller model), its successor one layer. In each training pass, each
module is replaced with probability p, by a draw of its own; p grows linearly to 1 (the paper's curriculum) and stays
there, which is the fine-tuning of the successors. No other loss than cross-entropy.

Read in the authors' code, where the paper is less exact: successors start from the predecessor's first layers; they
alone are trained, so that embeddings, pooler and classifier stay the predecessor's; the predecessor runs with dropout;
evaluation during training runs the successors. Their p grows by a fixed amount per step (0.0006 from 0.1 or 0.3); here
it reaches 1 at a share of the training steps, which means the same for a short training.
"""

import copy

import torch
from torch.nn import Module, ModuleList
from transformers import BertForSequenceClassification, PreTrainedModel, Trainer, TrainerCallback, set_seed

from .context import Context, for_trainer, layers_per_module, make_trainer
from .encoder import SamplingEncoder, keep_layers


class TheseusEncoder(SamplingEncoder):
    """Successors in `layer`, and the modules that they replace with probability `replacing_rate`."""

    def __init__(self, config, predecessor: ModuleList, ratio: int):
        super().__init__(config)
        for successor, first in zip(self.layer, predecessor, strict=False):
            successor.load_state_dict(first.state_dict())
        modules = [ModuleList(predecessor[i : i + ratio]) for i in range(0, len(predecessor), ratio)]
        self.predecessor = ModuleList(modules).requires_grad_(False)
        self.replacing_rate = 0.0

    def sampled_layers(self) -> list[Module]:
        replaced = (torch.rand(len(self.layer)) < self.replacing_rate).tolist()
        layers: list[Module] = []
        for successor, module, replace in zip(self.layer, self.predecessor, replaced, strict=True):
            layers += [successor] if replace else module
        return layers

    def kept_layers(self) -> list[Module]:
        return list(self.layer)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.training:
            # So that every successor has a gradient in every step, of zero where it does not run: else the backward
            # pass fails when nothing is replaced, for all else is frozen.
            hidden_states = hidden_states + 0 * sum(p.sum() for p in self.layer.parameters())
        return super().forward(hidden_states, attention_mask, **kwargs)


class ReplacingSchedule(TrainerCallback):
    """p(t) = min(1, base + (1 - base) * t / T), with T a share of the training's steps."""

    def __init__(self, encoder: TheseusEncoder, base_rate: float, replacing_share: float):
        self.encoder = encoder
        self.base_rate = base_rate
        self.replacing_share = replacing_share

    def on_step_begin(self, args, state, control, **kwargs):
        progress = state.global_step / (self.replacing_share * state.max_steps)
        self.encoder.replacing_rate = min(1.0, self.base_rate + (1 - self.base_rate) * progress)


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
    teacher = context.teacher()
    ratio = layers_per_module(context, teacher.config.num_hidden_layers)
    set_seed(context.arguments.seed)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = context.layers
    model = for_trainer(BertForSequenceClassification(config))
    shared = {key: value for key, value in teacher.state_dict().items() if not key.startswith("bert.encoder.")}
    model.load_state_dict(shared, strict=False)
    model.requires_grad_(False)
    model.bert.encoder = TheseusEncoder(config, copy.deepcopy(teacher.bert.encoder.layer), ratio)
    trainer = make_trainer(context, model)
    trainer.add_callback(ReplacingSchedule(model.bert.encoder, base_rate, replacing_share))
    return trainer


def finish(trainer: Trainer) -> PreTrainedModel:
    return keep_layers(trainer.model).requires_grad_(True)
