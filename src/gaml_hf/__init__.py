"""GAML-BERT: early exiting for encoder classifiers by gradient-aligned mutual learning (Zhu et al., EMNLP 2021)."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .models.auto import GamlAutoConfig, GamlAutoModelForSequenceClassification, families
from .models.configuration_gaml import PAPER_LETTER
from .models.exiting_gaml import ExitPolicy, policy_from_config
from .models.exits_gaml import GamlSequenceClassifierOutput
from .models.modeling_gaml_bert import GamlBertConfig, GamlBertForSequenceClassification
from .models.pipeline_gaml import GamlTextClassificationPipeline
from .training.alignment import align_, alignment_coefficient, cos_angle
from .training.trainer import GamlTrainer


__version__ = version("gaml_hf")

# The pipeline is not registered: the config names it (`custom_pipelines`); "text-classification" stays everybody's.
for config_class, model_class in families():
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForSequenceClassification.register(config_class, model_class)
    # Makes every save carry the code.
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "PAPER_LETTER",
    "ExitPolicy",
    "GamlAutoConfig",
    "GamlAutoModelForSequenceClassification",
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
