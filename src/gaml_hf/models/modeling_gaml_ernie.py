"""ERNIE with exits: BERT, whose embeddings may have one more part, by task. Exits are of task 0, as stock ones are."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ErnieConfig, ErnieModel, ErniePreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlErnieConfig(GamlConfigMixin, ErnieConfig):
    """Everything that [`~transformers.ErnieConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_ernie"
    plain_model_types: ClassVar[tuple[str, ...]] = ("ernie",)
    has_pooler: ClassVar[bool] = True


class GamlErnieForSequenceClassification(ExitsMixin, ErniePreTrainedModel):
    """ERNIE with a classifier at each exit layer; see [`ExitsMixin`]."""

    config_class = GamlErnieConfig
    _no_split_modules = ["ErnieEmbeddings", "ErnieLayer"]

    def __init__(self, config: GamlErnieConfig):
        super().__init__(config)
        self.ernie = ErnieModel(config, add_pooling_layer=config.exit_pooler == "shared")
        self.add_exits()

    def embedding_parts(self) -> EmbeddingParts:
        parts = super().embedding_parts()
        if not self.config.use_task_id:
            return parts
        weight = parts.token_type.weight + self.ernie.embeddings.task_type_embeddings.weight[0]
        return parts._replace(token_type=nn.Embedding.from_pretrained(weight.detach()))


__all__ = ["GamlErnieConfig", "GamlErnieForSequenceClassification"]
