"""
What models with exits share, of texts and of images: a classifier at each exit layer, the losses, loading and saving.

`exits_gaml.py` is the part of texts, `modeling_gaml_resnet.py` that of images.
"""

import os
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, cached_file, logging
from transformers.utils.output_capturing import capture_outputs

from .checksums_gaml import verify_weights, weight_files, write_checksum
from .configuration_gaml import GamlConfigMixin, where_from
from .exiting_gaml import ExitPolicy, policy_class, policy_for_call, policy_from_config, shown
from .losses_gaml import cross_entropy_loss, distillation_loss, distillation_pairs, exit_weights, total_loss


logger = logging.get_logger(__name__)

# Chosen or fitted for the exits as they were trained, and for their classes.
FIELDS_OF_THE_EXITS = ("exit_strategy", "budgeted_exit", "patience", "exit_threshold", "exit_temperatures")
FIELDS_OF_THE_EXITS += ("class_weights", "exit_certificate")


@dataclass
class GamlSequenceClassifierOutput(ModelOutput):
    """
    Output of a model with exits.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`): L of Eq. 2, in nats.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Each row's answer: the logits of the exit at which it left. In training mode, those of the last exit.
        exit_layer (`torch.LongTensor` of shape `(batch_size,)`, not in training mode):
            The layer at which each row left, from 1.
        exit_logits (`torch.Tensor` of shape `(batch_size, num_exits, num_labels)`, *optional*):
            Logits of every exit, wherever all of them run: in training, with `labels`, with `output_exit_logits=True`
            or another `output_...=True`, and with a hook on a layer.
        exit_states (`torch.Tensor` of shape `(batch_size, num_exits, hidden_size)`, *optional*):
            What each exit read, before `exit_norm`, without a gradient; returned with `output_exit_states=True`.
        ce_loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`): L^CE of Eq. 1.
        kd_loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`): L^KD of Eq. 3.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
            The embeddings and each layer's output, `(batch_size, sequence_length, hidden_size)`.
        attentions (`tuple(torch.Tensor)`, *optional*, returned with `output_attentions=True`):
            Each layer's attention, `(batch_size, num_heads, sequence_length, sequence_length)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    exit_logits: Tensor | None = None
    exit_states: Tensor | None = None
    ce_loss: Tensor | None = None
    kd_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ExitsBase:
    """
    A classifier at each exit layer of an encoder (Zhu et al., 2021, Sec. 2.2). Its two kinds, [`ExitsMixin`] for texts
    and [`~modeling_gaml_resnet.GamlResNetForImageClassification`] for images, say what goes into the first layer, what
    an exit reads of a layer (`_make_exit_pooler`, `_pool`, `_transform`), and how rows leave (`_exit_early`).
    """

    # Our loss is a mean over the micro-batch. Otherwise the Trainer would neither divide it by the number of
    # micro-batches nor average it over ranks (huggingface/transformers#47688).
    accepts_loss_kwargs = False
    # Heads of plain checkpoints that an exit does not use.
    _keys_to_ignore_on_load_unexpected = [
        r"^(\w+\.)?pooler\.",
        r"^(cls|classifier|pre_classifier|head|decoder|lm_head|predictions|sop_classifier|vocab_\w+)\.",
        r"^(discriminator|generator|lm|mask)_\w+\.",
    ]

    def add_exits(self) -> None:
        """Called at the end of a family's `__init__`, when the encoder is there."""
        config = self.config
        self.dropout = nn.Dropout(config.exit_dropout)
        # Named by layer and not by position: a checkpoint loaded with fewer exits still gives each layer its own.
        self.exit_classifiers = nn.ModuleDict(
            {str(m): nn.Linear(config.exit_size(m), config.num_labels) for m in config.exit_layers}
        )
        poolers = {str(m): pooler for m in config.exit_layers if (pooler := self._make_exit_pooler(m)) is not None}
        if poolers:
            self.exit_poolers = nn.ModuleDict(poolers)
        self.exits_are_new = True  # until a GamlTrainer has begun to train them, or trained ones are loaded
        self.last_exit_alone = False  # whether the others do not learn now; see `mixed_training`
        self.training_progress = 0.0  # share of the steps made, which a GamlTrainer tells
        self.teacher_confidence: Tensor | None = None  # sum over the rows of a step, and their number
        self.new_exit_weights: set[str] = set()  # that `from_pretrained` made, until a GamlTrainer has trained them
        self.post_init()

    def _make_exit_pooler(self, m: int) -> nn.Module | None:
        """A module of exit m's own, between its layer and its linear classifier."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], from safetensors files alone unless the caller asks for
        pickled weights (`use_safetensors=False`). A checksum in a file, see [`save_pretrained`], is verified.

        For a task of other classes, `num_labels=3, ignore_mismatched_sizes=True` keeps the encoder and makes the exits
        new. The exit policy and temperatures that were chosen for the old ones then go, with a warning, but for those
        named in this call.

        Raises:
            ValueError: the checkpoint lacks a layer, or one with exits lacks anything that the config names. It would
                answer at random. Or a weights file is damaged or cut short, or an index names a file outside
                its folder.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        is_folder = name is not None and os.path.isdir(name)
        if is_folder:
            _verify_weights(name, kwargs)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        finally:
            # From the Hub they lie in the cache now. Where they could not be loaded, this tells which file is damaged.
            if name is not None and not is_folder:
                _verify_weights(name, kwargs)
        missing = sorted(info["missing_keys"])
        # A checkpoint with any exit is one of ours, also where a `config` was given that does not say so.
        is_gaml = model.config.comes_with_exits
        is_gaml |= any(key.startswith("exit_") and key not in missing for key in model.state_dict())
        prefix = f"{cls.base_model_prefix}."
        if not is_gaml:  # a plain checkpoint: exits and their poolers are new
            missing = [key for key in missing if key.startswith(prefix) and not key.startswith(f"{prefix}pooler.")]
        if missing:
            raise ValueError(
                f"The checkpoint `{pretrained_model_name_or_path}` lacks {len(missing)} weights that the config "
                f"names, the first of them `{missing[0]}`. Load it with the `num_hidden_layers`, `exit_layers` and "
                "`exit_pooler` it was trained with."
            )
        new = {key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
        new = sorted(key for key in new if key.startswith(("exit_", f"{prefix}pooler.")))
        model.exits_are_new = bool(new)
        model.new_exit_weights.update({key for key, _ in model.named_parameters()} & set(new))
        if is_gaml and new:
            _forget_the_old_exits(model.config, name, kwargs)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], with a SHA-256 of its contents inside each weights file,
        which `from_pretrained` verifies. The disk needs room for a weights file twice while this runs. Files that
        `push_to_hub=True` sends from here have no checksum yet; the method `push_to_hub` sends them with it.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            if (policy := policy_class(self.config.exit_strategy)).__module__ != ExitPolicy.__module__:
                logger.warning(
                    f"`exit_strategy={policy.name!r}` is a class of your own ({policy.__module__}), which does not go "
                    "with this checkpoint: whoever loads it must have registered it before."
                )
            for path in weight_files(save_directory, kwargs.get("variant")):
                write_checksum(path)

    def _answer(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        *,
        smoothing: float,
        exit_policy: ExitPolicy | None,
        output_exit_logits: bool,
        output_exit_states: bool,
        output_hidden_states: bool,
        output_attentions: bool = False,
    ) -> GamlSequenceClassifierOutput:
        """`forward`, once the input of the first layer is there."""
        self._check_exits()
        need_all = labels is not None or output_exit_logits or output_exit_states
        need_all |= output_hidden_states or output_attentions
        if not self.training and not need_all and not self._is_watched():
            logits, exit_layer = self._exit_early(
                hidden_states, attention_mask, policy_for_call(exit_policy, self.config)
            )
            return GamlSequenceClassifierOutput(logits=logits, exit_layer=exit_layer)

        # Of a family whose stock model records them, they are taken from there.
        seen = [] if output_hidden_states and not type(self)._can_record_outputs else None
        exit_logits, exit_states = self._run_all_exits(hidden_states, attention_mask, seen=seen)
        if self.training:
            logits, exit_layer = exit_logits[:, -1], None
            if labels is None and not output_exit_logits and not torch.compiler.is_compiling():
                logger.warning_once(
                    "In training mode and without `labels`, a loss made of `logits` trains the last exit alone (so do "
                    "`label_smoothing_factor` and `compute_loss_func` of a stock Trainer; GamlTrainer smooths the "
                    "labels of every exit). Give `labels`, or make the loss of `exit_logits` and say so with "
                    "`output_exit_logits=True`."
                )
        else:
            position = policy_for_call(exit_policy, self.config).replay(exit_logits)  # (batch_size,)
            # No `len`, no `arange`: a traced or exported graph would keep the example's number of rows.
            chosen = position[:, None, None].expand(-1, 1, self.config.num_labels)
            logits = exit_logits.gather(1, chosen).squeeze(1)  # (batch_size, num_labels)
            exit_layer = position.new_tensor(self.config.exit_layers).index_select(0, position)
        loss = ce_loss = kd_loss = None
        if labels is not None:
            loss, ce_loss, kd_loss = self._losses(exit_logits, labels, smoothing)
        return GamlSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            exit_layer=exit_layer,
            exit_logits=exit_logits,
            exit_states=torch.stack(exit_states, dim=1).detach() if output_exit_states else None,
            ce_loss=ce_loss,
            kd_loss=kd_loss,
            hidden_states=None if seen is None else tuple(seen),
        )

    def _check_exits(self) -> None:
        """What may have been set in the config since it was made; the policy's fields are looked at elsewhere."""
        self.config.validate_exits()
        if not set(map(str, self.config.exit_layers)) <= self.exit_classifiers.keys():
            raise ValueError(
                f"`exit_layers` must be among those the model was made with, [{', '.join(self.exit_classifiers)}]. "
                f"Got `exit_layers={self.config.exit_layers}`."
            )

    @property
    def exit_modules(self) -> list[str]:
        """
        Names of the modules that the exits are made of, for `LoraConfig(modules_to_save=model.exit_modules)` of PEFT.
        """
        names = [name for name, _ in self.named_modules() if re.fullmatch(r"exit_\w+\.\d+", name)]
        return names + [f"{self.base_model_prefix}.pooler"] * (self.config.exit_pooler == "shared")

    def untrainable_exits(self) -> str | None:
        """
        A sentence where exits are new and frozen, as PEFT leaves them by itself: it knows a classifier by its name,
        and ours by none. They would answer at random, and other ones after each loading.
        """
        try:
            frozen = [key for key in sorted(self.new_exit_weights) if not attrgetter(key)(self).requires_grad]
        except AttributeError:  # sharded, under other names
            return None
        if not frozen:
            return None
        return (
            f"{len(frozen)} weights of exits are new and frozen, the first of them `{frozen[0]}`: they would stay "
            "random. With PEFT, give `LoraConfig` `modules_to_save=model.exit_modules`, which trains and saves the "
            "exits; else set `requires_grad` of their parameters, or start from a checkpoint whose exits are trained."
        )

    def train(self, mode: bool = True):
        if mode and self.config.exit_certificate is not None:
            self.config.exit_certificate = None
            logger.warning(
                "`exit_certificate` was made for the weights as they were before this training. It is dropped; "
                "`gaml_hf.evaluation.certify` makes another."
            )
        if mode and self.config.exit_temperatures is not None:
            self.config.exit_temperatures = None
            logger.warning(
                "`exit_temperatures` were fitted to the weights as they were before this training. They are dropped; "
                "`gaml_hf.evaluation.calibrate` fits others (`--calibrate_exits`)."
            )
        if mode and (sentence := self.untrainable_exits()):  # for stock Trainers; a GamlTrainer refuses
            logger.warning_once(sentence)
        return super().train(mode)

    def truncate(self, exit_layer: int) -> "ExitsBase":
        """
        A smaller model for budgeted use: the layers and exits up to `exit_layer`, copied.

        Args:
            exit_layer (`int`): the exit that becomes the last, one of `config.exit_layers`.

        Returns:
            the same class: of `exit_layer` layers, in evaluation mode, on the same device.
        """
        config = self.config
        if exit_layer not in config.exit_layers:
            raise ValueError(
                f"`exit_layer` must be one of the exits of this model, {config.exit_layers}; the first layer is 1. "
                f"Got `exit_layer={exit_layer}`."
            )
        layers = [m for m in config.exit_layers if m <= exit_layer]
        changes = config.truncated(exit_layer) | {
            "exit_layers": layers,
            "attn_implementation": config._attn_implementation,  # not in `to_dict()`
        }
        if config.exit_temperatures is not None:
            changes["exit_temperatures"] = config.exit_temperatures[: len(layers)]
        if isinstance(config.distillation, list):
            changes["distillation"] = [pair for pair in config.distillation if max(pair) <= exit_layer]
        if config.budgeted_exit is not None and config.budgeted_exit >= exit_layer:
            changes["budgeted_exit"] = None
            changes["exit_strategy"] = "none" if config.exit_strategy == "budgeted" else config.exit_strategy
        smaller = type(self)(type(config).from_dict(config.to_dict(), **changes))
        check_plain_weights(self, "truncate")
        state = self.state_dict()
        smaller.load_state_dict({key: state[key] for key in smaller.state_dict()})
        smaller.exits_are_new = self.exits_are_new
        smaller.new_exit_weights = self.new_exit_weights & state.keys() & smaller.state_dict().keys()
        return smaller.to(device=self.device, dtype=self.dtype).eval()

    def _is_watched(self) -> bool:
        """Whether a layer has a hook that `capture_outputs` did not put there: it fires where the layer runs whole."""
        for layer in self.encoder_layers:
            kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
            hooks = [hook for kind in kinds if kind for hook in kind.values()]
            if any(getattr(hook, "__module__", None) != capture_outputs.__module__ for hook in hooks):
                return True
        return False

    # How an encoder is run, and an exit on it: pool, transform, scale, classify.

    def _layer_inputs(self, hidden_states: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """What each stock layer gets beside the hidden states."""
        return {}

    def _run_layer(self, layer: nn.Module, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        output = layer(hidden_states, **inputs)
        return output[0] if type(output) is tuple else output

    def scale_exit_state(self, state: Tensor) -> Tensor:
        """What `exit_norm` makes of an exit's input, `(batch_size, hidden_size)` to the same."""
        return layer_norm(state) if self.config.exit_norm == "layer" else state

    def _classify(self, m: int, state: Tensor) -> Tensor:
        logits = self.exit_classifiers[str(m)](self.dropout(self.scale_exit_state(state)))
        if self.config.exit_temperatures is not None and not self.training:
            logits = logits / self.config.exit_temperatures[self.config.exit_layers.index(m)]
        return logits

    def _run_exit(self, m: int, pooled: Tensor) -> Tensor:
        """Logits of exit m, `f_m` before its softmax: `(batch_size, hidden_size)` to `(batch_size, num_labels)`."""
        return self._classify(m, self._transform(m, pooled))

    def _run_all_exits(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        exit_layers: list[int] | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Of all exits, or of those after `exit_layers` and no layer above: the logits `(batch_size, num_exits,
        num_labels)`, and the states that were scaled for them, `(batch_size, hidden_size)` each. `seen` is given the
        hidden states of every layer.
        """
        exit_layers = exit_layers or self.config.exit_layers
        inputs = self._layer_inputs(hidden_states, attention_mask)
        exit_logits, exit_states = [], []
        if seen is not None:
            seen.append(hidden_states)
        for m, layer in enumerate(self.encoder_layers[: exit_layers[-1]], start=1):
            hidden_states = self._run_layer(layer, hidden_states, inputs)
            if seen is not None:
                seen.append(hidden_states)
            if m in exit_layers:
                exit_states.append(self._transform(m, self._pool(hidden_states, attention_mask)))
                exit_logits.append(self._classify(m, exit_states[-1]))
                if self.config.stop_gradient_between_exits:  # SWEET: no layer has a gradient from two exits
                    hidden_states = hidden_states.detach()
        return torch.stack(exit_logits, dim=1), exit_states

    def _exit_at_one_layer(
        self, hidden_states: Tensor, attention_mask: Tensor | None, policy: ExitPolicy
    ) -> tuple[Tensor, Tensor]:
        """What `_exit_early` gives, as a graph without decisions, for a policy that takes none."""
        position = policy.fixed_exit(self.config.num_exits)
        if position is None:
            raise ValueError(
                "A traced or exported model would send every row the way its example went, and "
                f"{type(policy).__name__} lets each row go its own. Export with `output_exit_logits=True`, which runs "
                'all exits and replays the policy, or at one depth, with `exit_strategy="none"` or `"budgeted"`.'
            )
        exit_layer = self.config.exit_layers[position]
        logits = self._run_all_exits(hidden_states, attention_mask, [exit_layer])[0][:, 0]
        return logits, torch.full_like(logits[:, 0], exit_layer, dtype=torch.int64)

    def _losses(self, exit_logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """L, L^CE and L^KD of Eqs. 2, 1 and 3. Where nothing distils (PABEE's training), L is L^CE."""
        config, alone = self.config, self.last_exit_alone
        ce_loss = cross_entropy_loss(
            exit_logits,
            labels,
            exit_weights(config.exit_layers, "last" if alone else config.exit_loss_weights, self.training_progress),
            class_weights=config.class_weights,
            label_smoothing=smoothing,
        )
        pairs = [] if alone else distillation_pairs(config.distillation, config.exit_layers)
        if self.training and pairs and config.kd_temperature_growth > 1:
            confidence = (exit_logits[:, -1].detach().float() / config.kd_temperature).softmax(dim=-1).amax(dim=-1)
            told = torch.stack([confidence.sum(), confidence.new_full((), len(confidence))])
            self.teacher_confidence = told if self.teacher_confidence is None else self.teacher_confidence + told
        kd_loss = distillation_loss(
            exit_logits,
            pairs,
            config.exit_layers,
            temperature=config.kd_temperature,
            reduction=config.kd_reduction,
        )
        return (total_loss(ce_loss, kd_loss, config.alpha) if pairs else ce_loss), ce_loss, kd_loss

    @staticmethod
    def _check_range(name: str, values: Tensor, bound: int, meaning: str) -> None:
        wrong = (values < 0) | (values >= bound)
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise ValueError(
                f"`{name}` must lie between 0 and {bound - 1} ({meaning} is {bound}). Row {row} holds "
                f"{int(values[wrong][0])}."
            )


def check_plain_weights(model: nn.Module, what: str) -> None:
    """Before `what` reads them: refuse layers whose weights are not all there is, or no numbers."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"`{what}` reads the weights of the layers, and `{name}` has an adapter beside its own. Merge it into "
                "them first (`merge_and_unload()` of PEFT)."
            )
        if callable(getattr(module, "weight", None)):  # of `torch.ao.quantization`
            raise ValueError(
                f"`{what}` reads the weights of the layers, and those of `{name}` are quantized. Do it before the "
                "quantization."
            )


def layer_norm(state: Tensor) -> Tensor:
    """LayerNorm without parameters: each row on its own, `(batch_size, hidden_size)` to the same."""
    return F.layer_norm(state, state.shape[-1:])


def _forget_the_old_exits(config: GamlConfigMixin, name: str | os.PathLike, kwargs: dict) -> None:
    """Set back what `from_pretrained(name, **kwargs)` took over from exits that it did not take over."""
    stored, _ = type(config).get_config_dict(name, **where_from(kwargs))
    fresh = type(config)()
    gone = []
    for field in FIELDS_OF_THE_EXITS:
        value, default = getattr(config, field), getattr(fresh, field)
        # A `config` does not tell which of its fields were set by hand: those that are not as stored.
        if field not in kwargs and value != default and value == stored.get(field):
            setattr(config, field, default)
            gone.append(f"`{field}={shown(value) if isinstance(value, dict) else repr(value)}`")
    if gone:
        logger.warning(
            f"The exits of `{name}` are new, for {config.num_labels} classes. What was chosen for the old ones is "
            f"gone: {', '.join(gone)}. Choose the policy anew when the exits are trained."
        )
    policy_from_config(config)  # or a policy whose parameter is gone would fail after an epoch of training


def _verify_weights(name: str | os.PathLike, kwargs: dict) -> None:
    """Verify the weights that `from_pretrained(name, **kwargs)` loads from a folder, or has loaded from the cache."""
    subfolder, variant = kwargs.get("subfolder") or "", kwargs.get("variant")
    if os.path.isdir(name):
        folder = Path(name, subfolder)
    else:
        where = {key: kwargs[key] for key in ("cache_dir", "revision") if kwargs.get(key) is not None}
        try:
            folder = Path(cached_file(name, "config.json", subfolder=subfolder, local_files_only=True, **where)).parent
        except (OSError, TypeError):  # not in the cache: nothing was loaded from there
            return
    verify_weights(folder, variant)


__all__ = ["ExitsBase", "GamlSequenceClassifierOutput"]
