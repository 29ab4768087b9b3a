"""DistilBERT with exits."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, DistilBertPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .engine_gaml import LayerParts
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlDistilBertConfig(GamlConfigMixin, DistilBertConfig):
    """Everything that [`~transformers.DistilBertConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_distilbert"
    plain_model_types: ClassVar[tuple[str, ...]] = ("distilbert",)

    @property
    def exit_dropout(self) -> float:
        return self.seq_classif_dropout


class GamlDistilBertForSequenceClassification(ExitsMixin, DistilBertPreTrainedModel):
    """DistilBERT with a classifier at each exit layer; see [`ExitsMixin`]. It knows no token types."""

    config_class = GamlDistilBertConfig
    _no_split_modules = ["Embeddings", "TransformerBlock"]

    def __init__(self, config: GamlDistilBertConfig):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)
        self.add_exits()

    @property
    def encoder_layers(self) -> list[nn.Module]:
        return list(self.distilbert.transformer.layer)

    def _embed(self, *, input_ids, inputs_embeds, position_ids, **others) -> Tensor:
        return self.distilbert.embeddings(input_ids, inputs_embeds, position_ids)

    @staticmethod
    def layer_parts(layer: nn.Module) -> LayerParts:
        attention, ffn = layer.attention, layer.ffn
        return LayerParts(
            query=attention.q_lin,
            key=attention.k_lin,
            value=attention.v_lin,
            attention_output=attention.out_lin,
            attention_norm=layer.sa_layer_norm,
            intermediate=ffn.lin1,
            activation=ffn.activation,
            output=ffn.lin2,
            output_norm=layer.output_layer_norm,
        )

    def embedding_parts(self) -> EmbeddingParts:
        part = self.distilbert.embeddings
        return EmbeddingParts(part.word_embeddings, part.position_embeddings, part.LayerNorm)


__all__ = ["GamlDistilBertConfig", "GamlDistilBertForSequenceClassification"]
