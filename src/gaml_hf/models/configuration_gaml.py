"""The exits' part of a configuration (Zhu et al., 2021), the same for every encoder family."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from transformers.utils import logging

from .exiting_gaml import EXIT_FIELDS, changed_exits, policy_class, policy_from_config


logger = logging.get_logger(__name__)

# The letter of the paper, where our defaults depart from it: fields of a configuration.
PAPER_LETTER = {
    "exit_pooling": "cls",  # Sec. 6.4
    "exit_learning_rate_multiplier": 1.0,
    "exit_warm_start": False,
    "kd_reduction": "sum",  # Eq. 3
    "ga_mode": "soft",  # Eq. 6
    "ga_granularity": "global",  # Eqs. 4-7
}
# What decides the answers of an exit policy, beside the weights and its own parameter.
CERTIFIED_FIELDS = ("exit_layers", "exit_temperatures", "exit_pooling", "exit_pooler", "exit_norm")


@dataclass(kw_only=True, repr=False, eq=False)
class GamlConfigMixin:
    """
    The exits of an encoder: where they are, how they are trained, and when a row leaves. Mixed into the configuration
    of each encoder family, which gives the rest.

    Exits are numbered by their layer, from 1, as in the paper.

    Args:
        exit_layers (`list[int]`, *optional*):
            Layers that carry an exit, rising; the last one must be the last layer. Defaults to all layers.
        exit_pooling (`str`, *optional*, defaults to `"mean"`):
            What an exit reads of its layer: the `"mean"` over the tokens, or the state of [CLS], `"cls"` (our reading
            of Sec. 6.4), which in shallow layers holds next to nothing of the text (docs/choices.md).
        exit_pooler (`str`, *optional*, defaults to `"none"`):
            What stands between that and the linear exit: `"none"` (Sec. 6.4), `"shared"` (the encoder's
            own pooler for all exits, as in PABEE; BERT, RoBERTa, MPNet and ERNIE have one) or `"per_exit"`.
        exit_norm (`str`, *optional*, defaults to `"none"`):
            What scales the input of the linear exit: `"none"` (the paper) or `"layer"` (LayerNorm without parameters).
        exit_learning_rate_multiplier (`float`, *optional*, defaults to 10.0):
            The exits learn at this many times the learning rate of the encoder; above 0, 1 in the paper. Read by
            [`GamlTrainer`].
        exit_warm_start (`bool`, *optional*, defaults to `True`):
            Whether new exits start at a logistic regression on what the layers of the checkpoint already tell, and not
            at random. Read by [`GamlTrainer`].
        exit_loss_weights (`str`, *optional*, defaults to `"linear"`):
            Weights of the exits in L^CE: `"linear"` (Eq. 1), `"uniform"`, `"last"` (plain fine-tuning), or
            `"shallow_deep"`, which begins with little more than the last one (Kaya et al., 2019; its schedule needs a
            [`GamlTrainer`]). Read in training.
        class_weights (`list[float]`, *optional*):
            What a row of each class weighs in L^CE at every exit, one finite number from 0 per class; 1 by default.
            Where they are 1 in the mean over the training rows, as `--class_weights balanced` makes them, L^CE keeps
            its size beside L^KD. Read in training.
        distillation (`str` or `list[list[int]]`, *optional*, defaults to `"mutual"`):
            Which exits learn from which: `"mutual"` (Eq. 3), `"last_to_all"` (FastBERT's direction), `"none"` (Eq. 1
            alone: PABEE, DeeBERT, Shallow-Deep), or a list of `[teacher, student]` layers (Table 1). Read in training.
        kd_reduction (`str`, *optional*, defaults to `"mean"`):
            `"sum"` over the pairs is Eq. 3 to the letter; `"mean"` divides by their number, so that α weighs two
            losses of one size. Read in training.
        kd_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of L^KD, above 0; the loss is multiplied by its square. Read in training.
        kd_temperature_growth (`float`, *optional*, defaults to 1.0):
            From 1. `kd_temperature` is multiplied by this after each step in which the last exit's largest probability
            at it is above 0.5 in the mean (Phuong & Lampert, 2019: 1.05). Read by [`GamlTrainer`].
        alpha (`float`, *optional*, defaults to 0.2):
            α of Eqs. 2, 6 and 7, in `[0, 1]`. Read in training, never at inference.
        ga_mode (`str`, *optional*, defaults to `"none"`):
            Gradient alignment: `"soft"` (Eq. 6), `"hard"` (Eq. 7) or `"none"` (ML-BERT, Eq. 2). Read by
            [`GamlTrainer`] alone: a stock `Trainer` minimises Eq. 2.
        ga_granularity (`str`, *optional*, defaults to `"layer"`):
            What shares one angle: `"global"` (all of Θ, the letter of the paper, with which shallow exits may never
            learn: docs/experiments.md), `"layer"` or `"tensor"`. Read with `ga_mode`.
        stop_gradient_between_exits (`bool`, *optional*, defaults to `False`):
            Whether a layer learns from the next exit above it alone (SWEET: Rotem et al., 2023). Read in training.
        mixed_training (`float`, *optional*, defaults to 0.0):
            Share of the training steps, in `[0, 1)`, in which the last exit learns alone, before all do (Kubaty et
            al., 2025). Read by [`GamlTrainer`].
        exit_strategy (`str`, *optional*, defaults to `"none"`):
            When a row leaves: `"none"` (all layers), `"budgeted"`, `"patience"`, `"entropy"` or `"max_prob"`. Read at
            inference, like the three below.
        budgeted_exit (`int`, *optional*):
            The layer at which every row leaves when `exit_strategy="budgeted"`; one of `exit_layers`.
        patience (`int`, *optional*):
            Agreeing comparisons after which a row leaves when `exit_strategy="patience"`, from 1. From one below the
            number of exits on, every row runs to the last.
        exit_threshold (`float`, *optional*):
            For `"entropy"`: leave below this normalised entropy. For `"max_prob"`: leave above this probability. In
            `[0, 1]`.
        exit_temperatures (`list[float]`, *optional*):
            Calibration: at inference the logits of each exit are divided by its temperature, above 0. One per exit.
        exit_certificate (`dict`, *optional*):
            What leaving early may cost, as `gaml_hf.evaluation.certify` found it. It is dropped, with a warning, where
            this config does not have the policy, the parameter, the temperatures and the exits that were certified,
            and once the model is trained on; it is not saved where they were changed later.
        text_columns (`list[str]`, *optional*):
            What the columns of the training texts are called: one, or two for a model of pairs. Where they are told,
            the pipeline takes rows of as many texts and no others, and `gaml-score` reads these columns by default.
    """

    # Of a family's class, beside its `model_type`: `model_type` of the plain checkpoints that it starts from.
    plain_model_types: ClassVar[tuple[str, ...]] = ()
    has_pooler: ClassVar[bool] = False  # whether its encoder has a pooler as BERT's, for `exit_pooler="shared"`
    # Of a kind of models: its Auto class, whose ending the model's name has; its pipeline, with task and input.
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_class: ClassVar[str] = "pipeline_gaml.GamlTextClassificationPipeline"
    pipeline_task: ClassVar[str] = "text-classification"
    pipeline_type: ClassVar[str] = "text"

    exit_layers: list[int] | None = None
    exit_pooling: Literal["cls", "mean"] = "mean"
    exit_pooler: Literal["none", "shared", "per_exit"] = "none"
    exit_norm: Literal["none", "layer"] = "none"
    exit_learning_rate_multiplier: float | int = 10.0
    exit_warm_start: bool = True
    exit_loss_weights: Literal["linear", "uniform", "last", "shallow_deep"] = "linear"
    class_weights: list[float | int] | None = None
    distillation: Literal["mutual", "last_to_all", "none"] | list[list[int]] = "mutual"
    kd_reduction: Literal["sum", "mean"] = "mean"
    kd_temperature: float | int = 1.0
    kd_temperature_growth: float | int = 1.0
    alpha: float | int = 0.2
    ga_mode: Literal["none", "soft", "hard"] = "none"
    ga_granularity: Literal["global", "layer", "tensor"] = "layer"
    stop_gradient_between_exits: bool = False
    mixed_training: float | int = 0.0
    exit_strategy: str = "none"
    budgeted_exit: int | None = None
    patience: int | None = None
    exit_threshold: float | int | None = None
    exit_temperatures: list[float | int] | None = None
    exit_certificate: dict[str, Any] | None = None
    text_columns: list[str] | None = None

    # So that a Trainer's predictions are the logits alone, as `compute_metrics` of the usual examples expects them.
    # Whoever wants the exits asks with `ignore_keys`, see `ExitMetrics`.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["ce_loss", "kd_loss", "exit_layer", "exit_logits"]

    def __post_init__(self, **kwargs):
        refuse_misspelt(kwargs, self)
        if self.id2label is not None:
            _check_class_numbers(self.id2label)
        if self.exit_layers is None:
            self.exit_layers = list(range(1, self.num_hidden_layers + 1))
        if self.exit_certificate is not None and not self.certificate_holds:
            logger.warning(
                "`exit_certificate` was made for another exit policy, other temperatures or other exits than this "
                "config has. It is dropped; `gaml_hf.evaluation.certify` makes another."
            )
            self.exit_certificate = None
        # A repository is used through these names, whether this package wrote it or a copy loaded from a Hub.
        # Both are set afresh: a dict shared with another config, or a "repo--" prefix, must not survive a second save.
        module = f"modeling_{self.model_type}"
        model_class = f"{module}.{self.model_class_name()}"
        kwargs["auto_map"] = {
            "AutoConfig": f"{module}.{self._family()}",
            "AutoModel": model_class,
            self.auto_class: model_class,
        }
        kwargs["custom_pipelines"] = {
            self.pipeline_task: {
                "impl": self.pipeline_class,
                "pt": [self.auto_class],
                "default": {},
                "type": self.pipeline_type,
            }
        }
        super().__post_init__(**kwargs)

    @classmethod
    def _family(cls) -> str:
        """Name of the family's configuration, also for a subclass of it."""
        return next(c.__name__ for c in cls.__mro__ if "plain_model_types" in vars(c))

    @classmethod
    def model_class_name(cls) -> str:
        """Name of the family's model class, `GamlBertForSequenceClassification` say."""
        return cls._family().removesuffix("Config") + cls.auto_class.removeprefix("AutoModel")

    @property
    def num_exits(self) -> int:
        """M, the number of exits."""
        return len(self.exit_layers)

    @property
    def certificate_holds(self) -> bool:
        """Whether there is a certificate, of the policy, the parameter, the temperatures and the exits as they are."""
        found = self.exit_certificate
        if found is None or found.get("exit_strategy") != self.exit_strategy:
            return False
        name = policy_class(self.exit_strategy).parameter
        parameter = None if name is None else getattr(self, name)
        exits = {field: getattr(self, field) for field in CERTIFIED_FIELDS}
        return (found.get("parameter"), found.get("exits")) == (parameter, exits)

    @property
    def comes_with_exits(self) -> bool:
        """Whether the checkpoint that this was read from was saved with exits."""
        return self.model_class_name() in (self.architectures or [])

    def exit_size(self, m: int) -> int:
        """How many numbers the linear classifier of exit m reads."""
        return self.hidden_size

    @property
    def layer_of_depth(self) -> list[int]:
        """For each depth, from 1, the first at which its layer runs: another one where layers share their weights."""
        return list(range(1, self.num_hidden_layers + 1))

    @property
    def shares_layers(self) -> bool:
        """Whether one layer runs at several depths."""
        return len(set(self.layer_of_depth)) < self.num_hidden_layers

    @property
    def max_input_length(self) -> int:
        """The most tokens that the encoder can read."""
        return self.max_position_embeddings

    @property
    def num_token_types(self) -> int:
        """How many values `token_type_ids` may have; 1 where the encoder knows none, and ignores zeros."""
        return max(1, getattr(self, "type_vocab_size", 1))

    @property
    def exit_dropout(self) -> float:
        """Dropout before an exit's linear layer: that of the family's own classifier."""
        dropout = getattr(self, "classifier_dropout", None)
        return self.hidden_dropout_prob if dropout is None else dropout

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:  # the parent would take its defaults: other labels, other exits, and no word of it
            raise OSError(
                f"`{pretrained_model_name_or_path}` has no `config.json`. If a save was killed there, save again."
            )
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in (*cls.plain_model_types, cls.model_type):
            raise ValueError(
                f"{cls._family()} is for checkpoints of type {', '.join(cls.plain_model_types)} or {cls.model_type}. "
                f"`{pretrained_model_name_or_path}` holds a model of type `{model_type}`; "
                f"`Gaml{cls.auto_class}` finds the class for it, where there is one."
            )
        if model_type != cls.model_type:
            gone = {"model_type"}  # or the config would go on calling itself "bert"
            # Its head is not taken over, and what it was for is no matter: regression, say, with its one label.
            gone.add("problem_type")
            if config_dict.get("num_labels", len(config_dict.get("id2label") or (0, 1))) < 2:
                gone |= {"num_labels", "id2label", "label2id"}
            config_dict = {key: value for key, value in config_dict.items() if key not in gone}
        elif "exit_pooling" not in config_dict:  # of a time when every exit read [CLS], as it is
            config_dict = {**config_dict, "exit_pooling": "cls"}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # An attention that a caller names is their choice. One that a file names could be code of another repository.
        for key in ("attn_implementation", "_attn_implementation"):
            value = config_dict.get(key)
            if value is not None and not (isinstance(value, str) and re.fullmatch(r"\w+", value)):
                raise ValueError(
                    f"`{key}` in a config must be a plain name such as 'sdpa', not foreign code. Got {value!r}. "
                    "Take it out of `config.json`; whoever wants it can give it to `from_pretrained`."
                )
        if config_dict.get("transformers_weights") is not None:
            raise ValueError(
                "`transformers_weights` in a config names another weights file. Those of a saved model are in "
                f"`model.safetensors`. Got {config_dict['transformers_weights']!r}. Take it out of `config.json`."
            )
        # The parent sets overrides after the validators have run; ours go through them.
        refuse_misspelt(kwargs, cls)
        kwargs = {cls.attribute_map.get(key, key): value for key, value in kwargs.items()}
        if given := {name: kwargs[name] for name in EXIT_FIELDS if kwargs.get(name) is not None}:
            stored = {name: config_dict.get(name, getattr(cls, name)) for name in EXIT_FIELDS}
            changed = changed_exits(stored, given)
            kwargs |= {name: changed[name] for name in ("exit_strategy", "exit_threshold")}
        known = {field.name for field in fields(cls)} & kwargs.keys() - {"dtype"}
        if cls.model_class_name() in (config_dict.get("architectures") or ()):  # its exits are trained
            for name in known & {"exit_pooling", "exit_norm"}:
                if kwargs[name] != (stored := config_dict.get(name, getattr(cls, name))):
                    logger.warning(
                        f"The exits of this checkpoint learned with `{name}={stored!r}`. Train them anew before you "
                        f"trust their answers: they now read something else. Got `{name}={kwargs[name]!r}`."
                    )
        return super().from_dict(
            {**config_dict, **{key: kwargs[key] for key in known}},
            **{key: value for key, value in kwargs.items() if key not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if not self.certificate_holds:  # changed since it was made: a saved config promises nothing that is not so
            output["exit_certificate"] = None
        return output

    def truncated(self, num_hidden_layers: int) -> dict[str, Any]:
        """What changes where only the first layers are kept, beside the exits."""
        return {"num_hidden_layers": num_hidden_layers}

    def validate_exits(self):
        layers = self.exit_layers
        if layers != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] != self.num_hidden_layers:
            raise ValueError(
                f"`exit_layers` must be rising layer numbers between 1 and {self.num_hidden_layers} "
                f"(`num_hidden_layers`), the last of them {self.num_hidden_layers}. Got `exit_layers={layers}`."
            )
        if self.exit_pooler == "shared" and not self.has_pooler:
            raise ValueError(
                '`exit_pooler` must be "none" or "per_exit": the encoder has no pooler to share. '
                f"Got `exit_pooler={self.exit_pooler!r}`."
            )
        temperatures = self.exit_temperatures
        if temperatures is not None and (
            len(temperatures) != len(layers) or not all(0 < t < float("inf") for t in temperatures)
        ):
            raise ValueError(
                f"`exit_temperatures` must hold one finite number above 0 for each of the {len(layers)} exits. "
                f"Got `exit_temperatures={temperatures}`."
            )

    def validate_exit_policy(self):
        policy_from_config(self)

    def validate_training(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1]. Got `alpha={self.alpha}`.")
        if not 0 < self.kd_temperature < float("inf"):
            raise ValueError(
                f"`kd_temperature` must be a finite number above 0. Got `kd_temperature={self.kd_temperature}`."
            )
        if not 1 <= self.kd_temperature_growth < float("inf"):
            raise ValueError(
                "`kd_temperature_growth` must be a finite number of at least 1. "
                f"Got `kd_temperature_growth={self.kd_temperature_growth}`."
            )
        if not 0 < self.exit_learning_rate_multiplier < float("inf"):
            raise ValueError(
                "`exit_learning_rate_multiplier` must be a finite number above 0. "
                f"Got `exit_learning_rate_multiplier={self.exit_learning_rate_multiplier}`."
            )
        if not 0 <= self.mixed_training < 1:
            raise ValueError(
                "`mixed_training` must be a share of the steps, in [0, 1). "
                f"Got `mixed_training={self.mixed_training}`."
            )
        if isinstance(self.distillation, list):
            for pair in self.distillation:
                if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(self.exit_layers):
                    raise ValueError(
                        f"`distillation` must hold pairs [teacher, student] of two different exits out of "
                        f"{self.exit_layers}. Got the pair {pair}."
                    )

    def validate_class_weights(self):
        weights = self.class_weights
        if weights is not None and (
            len(weights) != self.num_labels or not all(0 <= w < float("inf") for w in weights) or not any(weights)
        ):
            raise ValueError(
                f"`class_weights` must hold one finite number from 0 for each of the {self.num_labels} classes, not "
                f"all of them 0, or be None. Got `class_weights={weights}`."
            )

    def validate_text_columns(self):
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise ValueError(
                f"`text_columns` must name one column, or two for pairs. Got `text_columns={self.text_columns}`."
            )

    def validate_task(self):
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                "Exits need one class per text: `problem_type` must be None or 'single_label_classification' "
                f"(regression and multi-label tasks are outside the paper). Got `problem_type={self.problem_type!r}`."
            )
        if self.num_labels < 2:
            raise ValueError(
                "`num_labels` must be at least 2: with one label every exit is certain of it, and regression (STS-B) "
                f"is outside the paper. Got `num_labels={self.num_labels}`."
            )
        names = list(self.id2label.values())
        if len(set(names)) != len(names):
            raise ValueError(f"`id2label` must name each class differently. Got {self.id2label}.")
        if sorted(self.id2label) != list(range(self.num_labels)) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"`id2label` must name the classes 0 to {self.num_labels - 1} (`num_labels` is {self.num_labels}), "
                f"each with a `str`. Got {self.id2label}."
            )
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            raise ValueError("Exits are for encoders: `is_decoder` and `add_cross_attention` must be False.")


def refuse_misspelt(kwargs: dict[str, Any], config: Any) -> None:
    """
    Raise where a keyword nobody knows is nearly one of the config's own: `patiense=2` must not be ignored.

    Raises:
        ValueError: names the keyword and the field that was probably meant.
    """
    names = {field.name for field in fields(config)}
    own = [field.name for field in fields(GamlConfigMixin)]
    for key in kwargs:
        if key not in names and (match := difflib.get_close_matches(key, own, n=1, cutoff=0.8)):
            raise ValueError(f"`{key}` is not a field of {config._family()}. Did you mean `{match[0]}`?")


def where_from(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of a `from_pretrained` says where the checkpoint's files are found."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_class_numbers(id2label: Any) -> None:
    """Before the parent makes numbers of the keys: in JSON they are strings."""
    try:
        _ = {int(number): name for number, name in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f'`id2label` must be a dict from class numbers to names, {{0: "no", 1: "yes"}}. Got {id2label}.'
        ) from None


__all__ = ["CERTIFIED_FIELDS", "PAPER_LETTER", "GamlConfigMixin"]
