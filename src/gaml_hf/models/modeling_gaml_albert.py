"""
ALBERT with exits.

Its layers share their weights: one layer (or one of each group) runs at every depth. So `truncate` saves time and no
memory, all depths are one group of gradient alignment with `ga_granularity="layer"`, and one compiled or prepacked
layer is all of them.
"""

from typing import ClassVar

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
        groups, depth = self.albert.encoder.albert_layer_groups, self.config.num_hidden_layers
        return [groups[int(i / (depth / len(groups)))].albert_layers[0] for i in range(depth)]

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
