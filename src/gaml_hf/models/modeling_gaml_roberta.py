"""RoBERTa with exits; also XLM-RoBERTa and CamemBERT, which are the same encoder with other vocabularies."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig, RobertaModel, RobertaPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlRobertaConfig(GamlConfigMixin, RobertaConfig):
    """Everything that [`~transformers.RobertaConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_roberta"
    plain_model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")
    has_pooler: ClassVar[bool] = True

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1  # positions are counted from behind the padding's


class GamlRobertaForSequenceClassification(ExitsMixin, RobertaPreTrainedModel):
    """RoBERTa with a classifier at each exit layer; see [`ExitsMixin`]."""

    config_class = GamlRobertaConfig
    _no_split_modules = ["RobertaEmbeddings", "RobertaLayer"]

    def __init__(self, config: GamlRobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=config.exit_pooler == "shared")
        self.add_exits()

    def embedding_parts(self) -> EmbeddingParts:
        return super().embedding_parts()._replace(first_position=self.config.pad_token_id + 1)


__all__ = ["GamlRobertaConfig", "GamlRobertaForSequenceClassification"]
