"""
DeBERTa-v2 and DeBERTa-v3 with exits.

Attention scores get a bias by relative position, made of queries and keys ("disentangled" attention).
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from .configuration_gaml import GamlConfigMixin
from .engine_gaml import Rows, add_mask
from .exits_gaml import ExitsMixin


@strict
class GamlDebertaV2Config(GamlConfigMixin, DebertaV2Config):
    """Everything that [`~transformers.DebertaV2Config`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_deberta_v2"
    plain_model_types: ClassVar[tuple[str, ...]] = ("deberta-v2",)

    @property
    def num_token_types(self) -> int:
        return self.type_vocab_size or 2  # DeBERTa-v3's tokenizer numbers the texts of a pair, and nothing reads it

    def validate_layers(self):
        if not self.relative_attention or getattr(self, "conv_kernel_size", 0):
            raise ValueError(
                "DeBERTa with exits needs `relative_attention=True`, and no convolution (`conv_kernel_size`, of "
                f"deberta-v2-xlarge). Got `relative_attention={self.relative_attention}`, "
                f"`conv_kernel_size={getattr(self, 'conv_kernel_size', 0)}`."
            )


class RelativePositions(NamedTuple):
    """
    What all layers share at one length.

    Attributes:
        embeddings (`torch.Tensor` of shape `(num_distances, hidden_size)`): of the distances that occur.
        of_query (`torch.LongTensor` of shape `(length, length)`): of query and key, the place in `embeddings`.
        of_key (`torch.LongTensor` of shape `(length, length)`): of key and query, likewise.
    """

    embeddings: Tensor
    of_query: Tensor
    of_key: Tensor


class GamlDebertaV2ForSequenceClassification(ExitsMixin, DebertaV2PreTrainedModel):
    """DeBERTa with a classifier at each exit layer; see [`ExitsMixin`]."""

    config_class = GamlDebertaV2Config
    _no_split_modules = ["DebertaV2Embeddings", "DebertaV2Layer"]
    layer_parts = embedding_parts = None  # no export to ONNX: its attention is not BERT's

    def __init__(self, config: GamlDebertaV2Config):
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.add_exits()

    def _embed(self, *, attention_mask, **inputs: Tensor | None) -> Tensor:
        return self.deberta.embeddings(mask=attention_mask, **inputs)

    def _layer_inputs(self, hidden_states: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        encoder = self.deberta.encoder
        if attention_mask is None:
            attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.int64, device=hidden_states.device)
        return {
            "attention_mask": encoder.get_attention_mask(attention_mask),
            "relative_pos": encoder.get_rel_pos(hidden_states),
            "rel_embeddings": encoder.get_rel_embedding(),
        }

    def _shared_by_layers(self, tokens: Tensor, length: int) -> RelativePositions:
        encoder, attention = self.deberta.encoder, self.encoder_layers[0].attention.self
        span = attention.pos_ebd_size
        any_rows = torch.empty(1, length, 1)
        distance = build_relative_position(  # of query and key, rising with the query's place
            any_rows, any_rows, attention.position_buckets, attention.max_relative_positions
        )[0]  # on the CPU, for `min` and `max`
        of_query, of_key = distance.clamp(-span, span - 1), (-distance).clamp(-span, span - 1)
        low, high = torch.cat([of_query, of_key]).aminmax()
        return RelativePositions(
            embeddings=encoder.get_rel_embedding()[span + low : span + high + 1],
            of_query=(of_query - low).to(tokens.device),
            of_key=(of_key - low).to(tokens.device),
        )

    def _project_query(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        return layer.attention.self.query_proj(tokens)

    def _project_key_value(self, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return layer.attention.self.key_proj(tokens), layer.attention.self.value_proj(tokens)

    @property
    def attention_scale(self) -> float:
        return 1 / math.sqrt(self.head_size * (1 + len(self.config.pos_att_type or [])))

    def _attention_bias(self, layer: nn.Module, query: Tensor, key: Tensor, rows: Rows) -> Tensor:
        attention, positions = layer.attention.self, rows.shared
        length = query.shape[2]

        def heads(x: Tensor) -> Tensor:  # (num_distances, hidden_size) -> (num_heads, head_size, num_distances)
            return x.view(len(x), -1, self.head_size).permute(1, 2, 0)

        def pick(scores: Tensor, place: Tensor) -> Tensor:
            return scores.gather(-1, place.expand(*scores.shape[:2], *place.shape))

        bias = query.new_zeros(())
        if "c2p" in attention.pos_att_type:  # what a query says to the place of a key
            project = attention.key_proj if attention.share_att_key else attention.pos_key_proj
            bias = bias + pick(query @ heads(project(positions.embeddings)), positions.of_query[:length])
        if "p2c" in attention.pos_att_type:  # what a key says to the place of a query
            project = attention.query_proj if attention.share_att_key else attention.pos_query_proj
            scores = pick(key @ heads(project(positions.embeddings)), positions.of_key[:, :length])
            bias = bias + scores.transpose(-1, -2)
        bias = (bias * self.attention_scale).expand(len(query), query.shape[1], length, key.shape[2])
        return add_mask(bias, rows.mask)

    def _after_attention(self, layer: nn.Module, context: Tensor, tokens: Tensor) -> Tensor:
        attended = layer.attention.output(context, tokens)
        return layer.output(layer.intermediate(attended), attended)


__all__ = ["GamlDebertaV2Config", "GamlDebertaV2ForSequenceClassification"]
