"""
LayerDrop: fine-tune all layers, each left out of a training step at random; at inference, run every other one.

Source: Fan et al., 2020, "Reducing Transformer Depth on Demand with Structured Dropout", Sec. 3.2. The layers at a
depth that 1 / p divides are pruned ("Every Other"): of 12 layers at p = 0.5, those that stay are 1, 3, 5, 7, 9, 11.
They are not trained further. The paper also pre-trains with LayerDrop; BERT was not, so that here it begins with
fine-tuning.

In more than one process, set `ddp_find_unused_parameters=True`: a dropped layer has no gradient.
"""

import torch
from torch import Tensor
from torch.nn import ModuleList
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder

from .context import Context, layers_per_module, load_backbone, make_trainer


class LayerDropEncoder(BertEncoder):
    """Drops each layer with probability `drop_rate` in training; else runs the first of every `ratio` layers alone."""

    def __init__(self, config, ratio: int, drop_rate: float):
        super().__init__(config)
        self.ratio = ratio
        self.drop_rate = drop_rate

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        layers = list(self.layer)
        if self.training:
            kept = (torch.rand(len(layers)) >= self.drop_rate).tolist()
            layers = [layer for layer, keep in zip(layers, kept, strict=True) if keep]
        else:
            layers = layers[:: self.ratio]
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def make(context: Context, *, drop_rate: float | None = None) -> Trainer:
    """
    Args:
        drop_rate (`float`, *optional*): probability with which a layer is dropped, in `[0, 1)`. Defaults to the one
            that the paper derives for a given depth, 1 - layers / all layers: 0.5 for half of them, which it also
            recommends for very small models. Its experiments use 0.2.
    """
    if drop_rate is not None and not 0 <= drop_rate < 1:
        raise ValueError(f"`drop_rate` must lie in [0, 1). Got {drop_rate}.")
    model = load_backbone(context)
    depth = model.config.num_hidden_layers
    ratio = layers_per_module(context, depth)
    encoder = LayerDropEncoder(model.config, ratio, 1 - context.layers / depth if drop_rate is None else drop_rate)
    encoder.layer = model.bert.encoder.layer
    model.bert.encoder = encoder
    return make_trainer(context, model)


def finish(trainer: Trainer) -> PreTrainedModel:
    """The model with a stock encoder of the kept layers alone: it saves and loads as any BERT."""
    model = trainer.model
    kept = ModuleList(model.bert.encoder.layer[:: model.bert.encoder.ratio])
    model.config.num_hidden_layers = len(kept)
    encoder = BertEncoder(model.config)
    encoder.layer = kept
    model.bert.encoder = encoder.train(model.training)
    return model
