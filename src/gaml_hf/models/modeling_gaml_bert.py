"""GAML-BERT: BERT with exits (Zhu et al., 2021). What all encoders share is in `exits_gaml.py`: read that first."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, BertModel, BertPreTrainedModel

from .configuration_gaml import GamlConfigMixin
from .exits_gaml import ExitsMixin


@strict
class GamlBertConfig(GamlConfigMixin, BertConfig):
    """Everything that [`~transformers.BertConfig`] holds, and the exits: see [`GamlConfigMixin`]."""

    model_type = "gaml_bert"
    plain_model_types: ClassVar[tuple[str, ...]] = ("bert",)
    has_pooler: ClassVar[bool] = True


class GamlBertForSequenceClassification(ExitsMixin, BertPreTrainedModel):
    """BERT with a classifier at each exit layer; see [`ExitsMixin`], whose defaults are BERT's."""

    config_class = GamlBertConfig
    _no_split_modules = ["BertEmbeddings", "BertLayer"]

    def __init__(self, config: GamlBertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=config.exit_pooler == "shared")
        self.add_exits()


__all__ = ["GamlBertConfig", "GamlBertForSequenceClassification"]
