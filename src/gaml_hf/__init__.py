"""GAML-BERT: early exiting for BERT classifiers by gradient-aligned mutual learning (Zhu et al., EMNLP 2021)."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .models.configuration_gaml_bert import GamlBertConfig
from .models.exiting_gaml import ExitPolicy, policy_from_config
from .models.modeling_gaml_bert import GamlBertForSequenceClassification, GamlSequenceClassifierOutput
from .models.pipeline_gaml import GamlTextClassificationPipeline
from .training.alignment import align_, alignment_coefficient, cos_angle
from .training.trainer import GamlTrainer


__version__ = version("gaml_hf")

# The pipeline is not registered: the config names it (`custom_pipelines`); "text-classification" stays everybody's.
AutoConfig.register("gaml_bert", GamlBertConfig)
AutoModel.register(GamlBertConfig, GamlBertForSequenceClassification)
AutoModelForSequenceClassification.register(GamlBertConfig, GamlBertForSequenceClassification)
# Makes every save carry the code.
GamlBertConfig.register_for_auto_class()
GamlBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "ExitPolicy",
    "GamlBertConfig",
    "GamlBertForSequenceClassification",
    "GamlSequenceClassifierOutput",
    "GamlTextClassificationPipeline",
    "GamlTrainer",
    "align_",
    "alignment_coefficient",
    "cos_angle",
    "policy_from_config",
]
