"""MPNet with exits."""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel, MPNetPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .engine_gaml import LayerParts, Rows, add_mask
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlMPNetConfig(GamlConfigMixin, MPNetConfig):
    """Everything that [`~transformers.MPNetConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_mpnet"
    plain_model_types: ClassVar[tuple[str, ...]] = ("mpnet",)
    has_pooler: ClassVar[bool] = True

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - 2  # positions are counted from behind the padding's, 1


class GamlMPNetForSequenceClassification(ExitsMixin, MPNetPreTrainedModel):
    """MPNet with a classifier at each exit layer; see [`ExitsMixin`]. It knows no token types."""

    config_class = GamlMPNetConfig
    _no_split_modules = ["MPNetEmbeddings", "MPNetLayer"]

    def __init__(self, config: GamlMPNetConfig):
        super().__init__(config)
        self.mpnet = MPNetModel(config, add_pooling_layer=config.exit_pooler == "shared")
        self.add_exits()

    def _embed(self, *, input_ids, inputs_embeds, position_ids, **others) -> Tensor:
        return self.mpnet.embeddings(input_ids, position_ids, inputs_embeds)

    # Attention scores get a bias by relative position, the same in every layer.

    def _layer_inputs(self, hidden_states: Tensor, attention_mask: Tensor | None, **others: Any) -> dict[str, Any]:
        bias = self.mpnet.encoder.compute_position_bias(hidden_states)  # (batch_size, num_heads, length, length)
        return super()._layer_inputs(hidden_states, attention_mask) | {"position_bias": bias}

    def _shared_by_layers(self, tokens: Tensor, length: int) -> Tensor:
        return self.mpnet.encoder.compute_position_bias(tokens.new_empty(1, length, 1))

    def _attention_bias(self, layer: nn.Module, query: Tensor, key: Tensor, rows: Rows) -> Tensor:
        return add_mask(rows.shared[:, :, : query.shape[2]], rows.mask)  # of [CLS] alone, or of all tokens

    @staticmethod
    def layer_parts(layer: nn.Module) -> LayerParts:
        attention = layer.attention
        return LayerParts(
            query=attention.attn.q,
            key=attention.attn.k,
            value=attention.attn.v,
            attention_output=attention.attn.o,
            attention_norm=attention.LayerNorm,
            intermediate=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
        )

    def embedding_parts(self) -> EmbeddingParts:
        part, encoder, longest = self.mpnet.embeddings, self.mpnet.encoder, self.config.max_input_length
        distance = torch.arange(1 - longest, longest, device=self.device)  # of a key behind its query
        bias = encoder.relative_attention_bias(encoder.relative_position_bucket(distance))
        return EmbeddingParts(
            part.word_embeddings, part.position_embeddings, part.LayerNorm, first_position=2, distance_bias=bias.T
        )


__all__ = ["GamlMPNetConfig", "GamlMPNetForSequenceClassification"]
