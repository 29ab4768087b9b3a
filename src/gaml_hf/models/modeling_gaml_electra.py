"""ELECTRA with exits."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import ElectraConfig, ElectraModel, ElectraPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .exits_gaml import EmbeddingParts, ExitsMixin


@strict
class GamlElectraConfig(GamlConfigMixin, ElectraConfig):
    """Everything that [`~transformers.ElectraConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_electra"
    plain_model_types: ClassVar[tuple[str, ...]] = ("electra",)


class GamlElectraForSequenceClassification(ExitsMixin, ElectraPreTrainedModel):
    """ELECTRA with a classifier at each exit layer; see [`ExitsMixin`]."""

    config_class = GamlElectraConfig
    _no_split_modules = ["ElectraEmbeddings", "ElectraLayer"]

    def __init__(self, config: GamlElectraConfig):
        super().__init__(config)
        self.electra = ElectraModel(config)
        self.add_exits()

    def _embed(self, **inputs: Tensor | None) -> Tensor:
        hidden_states = super()._embed(**inputs)
        project = getattr(self.electra, "embeddings_project", None)  # where the layers are wider
        return hidden_states if project is None else project(hidden_states)

    def embedding_parts(self) -> EmbeddingParts:
        return super().embedding_parts()._replace(projection=getattr(self.electra, "embeddings_project", None))


__all__ = ["GamlElectraConfig", "GamlElectraForSequenceClassification"]
