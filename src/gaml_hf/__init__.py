"""GAML-BERT: early exiting for encoder classifiers by gradient-aligned mutual learning (Zhu et al., EMNLP 2021)."""

from importlib.metadata import version

from .models.auto import (
    IMAGE_FAMILIES,
    GamlAutoConfig,
    GamlAutoModelForImageClassification,
    GamlAutoModelForSequenceClassification,
    families,
    register_family,
)
from .models.configuration_gaml import PAPER_LETTER
from .models.exiting_gaml import ExitPolicy, policy_from_config
from .models.exits_base_gaml import GamlSequenceClassifierOutput
from .models.image_pipeline_gaml import GamlImageClassificationPipeline
from .models.modeling_gaml_bert import GamlBertConfig, GamlBertForSequenceClassification
from .models.modeling_gaml_resnet import GamlResNetConfig, GamlResNetForImageClassification
from .models.pipeline_gaml import GamlTextClassificationPipeline
from .training.alignment import align_, alignment_coefficient, cos_angle
from .training.trainer import GamlTrainer


__version__ = version("gaml_hf")

# The pipeline is not registered: the config names it (`custom_pipelines`); "text-classification" stays everybody's.
for config_class, model_class in (*families(), *families(IMAGE_FAMILIES)):
    register_family(config_class, model_class)

__all__ = [
    "PAPER_LETTER",
    "ExitPolicy",
    "GamlAutoConfig",
    "GamlAutoModelForImageClassification",
    "GamlAutoModelForSequenceClassification",
    "GamlBertConfig",
    "GamlBertForSequenceClassification",
    "GamlImageClassificationPipeline",
    "GamlResNetConfig",
    "GamlResNetForImageClassification",
    "GamlSequenceClassifierOutput",
    "GamlTextClassificationPipeline",
    "GamlTrainer",
    "align_",
    "alignment_coefficient",
    "cos_angle",
    "policy_from_config",
    "register_family",
]
