"""
ALBERT with exits.

Its layers share their weights: one layer (or one of each group) runs at every depth. So `truncate` saves time and no
memory, all depths are one group of gradient alignment with `ga_granularity="layer"`, and one compiled or prepacked
layer is all of them.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, AlbertPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .engine_gaml import LayerParts
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlAlbertConfig(GamlConfigMixin, AlbertConfig):
    """Everything that [`~transformers.AlbertConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_albert"
    plain_model_types: ClassVar[tuple[str, ...]] = ("albert",)

    @property
    def exit_dropout(self) -> float:
        return self.classifier_dropout_prob

    @property
    def layer_of_depth(self) -> list[int]:
        group = [int(i / (self.num_hidden_layers / self.num_hidden_groups)) for i in range(self.num_hidden_layers)]
        return [group.index(number) + 1 for number in group]

    def truncated(self, num_hidden_layers: int) -> dict[str, Any]:
        kept = self.layer_of_depth[:num_hidden_layers]
        changes = super().truncated(num_hidden_layers) | {"num_hidden_groups": len(set(kept))}
        if type(self)(**changes).layer_of_depth != kept:  # the groups of a config are of one size
            raise ValueError(
                f"ALBERT with {self.num_hidden_groups} groups cannot be cut to {num_hidden_layers} layers: a config "
                "has groups of one size. Cut it where a group ends, or within the first."
            )
        return changes

    def validate_layers(self):
        if self.inner_group_num != 1:
            raise ValueError(
                "An exit follows a layer, and ALBERT's groups must be of one: `inner_group_num` must be 1. "
                f"Got `inner_group_num={self.inner_group_num}`."
            )


class GamlAlbertForSequenceClassification(ExitsMixin, AlbertPreTrainedModel):
    """ALBERT with a classifier at each exit layer; see [`ExitsMixin`]."""

    config_class = GamlAlbertConfig
    _no_split_modules = ["AlbertEmbeddings", "AlbertLayer"]

    def __init__(self, config: GamlAlbertConfig):
        super().__init__(config)
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.add_exits()

    @property
    def encoder_layers(self) -> list[nn.Module]:
        first = list(dict.fromkeys(self.config.layer_of_depth))  # depth of each group
        groups = self.albert.encoder.albert_layer_groups
        return [groups[first.index(m)].albert_layers[0] for m in self.config.layer_of_depth]

    def _embed(self, **inputs: Tensor | None) -> Tensor:
        return self.albert.encoder.embedding_hidden_mapping_in(super()._embed(**inputs))

    @staticmethod
    def layer_parts(layer: nn.Module) -> LayerParts:
        attention = layer.attention
        return LayerParts(
            query=attention.query,
            key=attention.key,
            value=attention.value,
            attention_output=attention.dense,
            attention_norm=attention.LayerNorm,
            intermediate=layer.ffn,
            activation=layer.activation,
            output=layer.ffn_output,
            output_norm=layer.full_layer_layer_norm,
        )

    def embedding_parts(self) -> EmbeddingParts:
        return super().embedding_parts()._replace(projection=self.albert.encoder.embedding_hidden_mapping_in)


__all__ = ["GamlAlbertConfig", "GamlAlbertForSequenceClassification"]
