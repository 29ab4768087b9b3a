"""
ModernBERT with exits.

Its layers normalize what they read, not what they write, so every exit reads through the encoder's final norm. It has
no position embeddings: queries and keys are rotated, and two of three layers look at a window around each token.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel, ModernBertPreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.models.modernbert.modeling_modernbert import rotate_half

from .configuration_gaml import GamlConfigMixin
from .engine_gaml import Rows
from .exits_gaml import ExitsMixin


@strict
class GamlModernBertConfig(GamlConfigMixin, ModernBertConfig):
    """Everything that [`~transformers.ModernBertConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_modernbert"
    plain_model_types: ClassVar[tuple[str, ...]] = ("modernbert",)

    def truncated(self, num_hidden_layers: int) -> dict[str, Any]:
        return super().truncated(num_hidden_layers) | {"layer_types": self.layer_types[:num_hidden_layers]}


class GamlModernBertForSequenceClassification(ExitsMixin, ModernBertPreTrainedModel):
    """ModernBERT with a classifier at each exit layer; see [`ExitsMixin`]. It knows no token types."""

    config_class = GamlModernBertConfig
    layer_parts = embedding_parts = None  # no export to ONNX: its layers are not built of BERT's parts

    def __init__(self, config: GamlModernBertConfig):
        super().__init__(config)
        self.model = ModernBertModel(config)
        self.add_exits()

    @property
    def encoder_layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    def _embed(self, *, input_ids, inputs_embeds, position_ids, **others) -> Tensor:
        if position_ids is not None:
            raise ValueError("ModernBERT counts positions itself: `position_ids` must be None.")
        return self.model.embeddings(input_ids, inputs_embeds)

    def _read(self, hidden_states: Tensor) -> Tensor:
        return self.model.final_norm(hidden_states)

    def _layer_inputs(self, hidden_states: Tensor, attention_mask: Tensor | None) -> dict[str, dict[str, Any]]:
        """By type of layer."""
        masks = {
            "full_attention": create_bidirectional_mask,
            "sliding_attention": create_bidirectional_sliding_window_mask,
        }
        position = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        return {
            kind: {
                "attention_mask": masks[kind](
                    config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
                ),
                "position_embeddings": self.model.rotary_emb(hidden_states, position, kind),
            }
            for kind in set(self.config.layer_types)
        }

    def _run_layer(self, layer: nn.Module, hidden_states: Tensor, inputs: dict[str, dict[str, Any]]) -> Tensor:
        return layer(hidden_states, **inputs[layer.attention_type])

    def _shared_by_layers(self, tokens: Tensor, length: int) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """By type of layer: cosine and sine `(1, 1, length, head_size)`, and which places see each other."""
        position = torch.arange(length, device=tokens.device)
        shared = {}
        for kind in set(self.config.layer_types):
            cos, sin = self.model.rotary_emb(tokens, position[None], kind)
            window = self.config.sliding_window
            near = None
            if kind == "sliding_attention" and length > window + 1:
                near = (position[:, None] - position).abs() <= window  # (length, length)
            shared[kind] = cos[:, None], sin[:, None], near
        return shared

    # Queries, keys and values are one product of the normalized tokens. For [CLS] alone a part of it goes unused.

    def _project(self, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer.attn.Wqkv(layer.attn_norm(tokens)).chunk(3, dim=-1)

    def _project_query(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        return self._project(layer, tokens)[0]

    def _project_key_value(self, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._project(layer, tokens)[1:]

    def _rotate(self, layer: nn.Module, heads: Tensor, rows: Rows) -> Tensor:
        cos, sin, _ = rows.shared[layer.attention_type]
        length = heads.shape[2]
        return heads * cos[:, :, :length] + rotate_half(heads) * sin[:, :, :length]

    def _attention_bias(self, layer: nn.Module, query: Tensor, key: Tensor, rows: Rows) -> Tensor | None:
        near = rows.shared[layer.attention_type][2]
        if near is None:
            return rows.mask
        near = near[: query.shape[2]]
        return near if rows.mask is None else near & rows.mask

    def _after_attention(self, layer: nn.Module, context: Tensor, tokens: Tensor) -> Tensor:
        attended = tokens + layer.attn.Wo(context)
        return attended + layer.mlp(layer.mlp_norm(attended))


__all__ = ["GamlModernBertConfig", "GamlModernBertForSequenceClassification"]
