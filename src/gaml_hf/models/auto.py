"""The class with exits for a checkpoint, by the `model_type` in its config. Add a family here."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_gaml import where_from


# Every family of texts: its module, and the class names in it without `Config` and `ForSequenceClassification`.
FAMILIES = {
    "modeling_gaml_albert": "GamlAlbert",
    "modeling_gaml_bert": "GamlBert",
    "modeling_gaml_deberta_v2": "GamlDebertaV2",
    "modeling_gaml_distilbert": "GamlDistilBert",
    "modeling_gaml_electra": "GamlElectra",
    "modeling_gaml_ernie": "GamlErnie",
    "modeling_gaml_modernbert": "GamlModernBert",
    "modeling_gaml_mpnet": "GamlMPNet",
    "modeling_gaml_roberta": "GamlRoberta",
}


# Of images: the same, without `Config` and `ForImageClassification`.
IMAGE_FAMILIES = {"modeling_gaml_resnet": "GamlResNet"}


_REGISTERED: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}  # by `model_type`


def register_family(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """
    Make a family known to the `GamlAuto` classes and to the Auto classes of Transformers, for as long as the process
    runs: one that this package has, or one of your own.

    Args:
        config_class (`type`): a [`GamlConfigMixin`] with a `model_type` of its own.
        model_class (`type`): its model, [`ExitsMixin`].
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    getattr(transformers, config_class.auto_class).register(config_class, model_class, exist_ok=True)
    _REGISTERED[config_class.model_type] = config_class, model_class
    # Makes every save carry the code, under the name by which the config calls it.
    if config_class.__module__.rpartition(".")[2] == f"modeling_{config_class.model_type}":
        config_class.register_for_auto_class()
        model_class.register_for_auto_class(config_class.auto_class)


def families(
    names: Mapping[str, str] = FAMILIES,
) -> list[tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """The configuration and model class of every family of texts, or of `IMAGE_FAMILIES`."""
    found = []
    for name, prefix in names.items():
        module = import_module(f".{name}", __package__)
        config_class = getattr(module, f"{prefix}Config")
        found.append((config_class, getattr(module, config_class.model_class_name())))
    return found


def classes_of(model_type: str | None) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
    """The classes with exits for checkpoints of this `model_type`, plain or ours; `None` where there are none."""
    for config_class, model_class in _REGISTERED.values():
        if model_type in (*config_class.plain_model_types, config_class.model_type):
            return config_class, model_class
    return None


def _plain_types() -> list[str]:
    return sorted(kind for config_class, _ in _REGISTERED.values() for kind in config_class.plain_model_types)


def _classes_for(name: Any, kwargs: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    found, _ = PreTrainedConfig.get_config_dict(name, **where_from(kwargs))
    if not found:
        raise OSError(f"`{name}` has no `config.json`. If a save was killed there, save again.")
    if (classes := classes_of(found.get("model_type"))) is None:
        raise ValueError(
            f"There are exits for checkpoints of type {', '.join(_plain_types())}. `{name}` holds a model of type "
            f"`{found.get('model_type')}`. docs/families.md says how to add one."
        )
    return classes


class GamlAutoConfig:
    """The configuration with exits for any checkpoint, plain or with exits."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> PreTrainedConfig:
        """
        As [`~transformers.PreTrainedConfig.from_pretrained`] of the family that the checkpoint is of.

        Raises:
            ValueError: there is no such family here; names those that there are.
        """
        config_class, _ = _classes_for(pretrained_model_name_or_path, kwargs)
        return config_class.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> PreTrainedConfig:
        """A configuration with exits of this `model_type`, plain (`"roberta"`) or ours."""
        if (classes := classes_of(model_type)) is None:
            raise ValueError(
                f"There are no exits for models of type `{model_type}`, but for {', '.join(_plain_types())}."
            )
        return classes[0](**fields)


class GamlAutoModelForSequenceClassification:
    """
    The model with exits for any checkpoint: a plain one of a family (`roberta-base`), whose exits are then new, or one
    that was saved with exits.
    """

    auto_class = "AutoModelForSequenceClassification"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`] of the family that the checkpoint is of.

        Raises:
            ValueError: there is no such family here, names those that there are; or it is of the other kind, of
                images or of texts.
        """
        config_class, model_class = _classes_for(pretrained_model_name_or_path, kwargs)
        if config_class.auto_class != cls.auto_class:
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds a model for `Gaml{config_class.auto_class}`. Got "
                f"`{cls.__name__}`."
            )
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> PreTrainedModel:
        """A model with random weights."""
        if not hasattr(config, "exit_layers"):
            raise ValueError(f"`config` must be a configuration with exits. Got {type(config).__name__}.")
        if (classes := classes_of(type(config).model_type)) is None:
            raise ValueError(f"{type(config).__name__} is not registered: `register_family` does it.")
        return classes[1](config)


class GamlAutoModelForImageClassification(GamlAutoModelForSequenceClassification):
    """As [`GamlAutoModelForSequenceClassification`], for checkpoints that classify images (`microsoft/resnet-50`)."""

    auto_class = "AutoModelForImageClassification"


__all__ = [
    "GamlAutoConfig",
    "GamlAutoModelForImageClassification",
    "GamlAutoModelForSequenceClassification",
    "register_family",
]
