"""
The exits of an encoder (Zhu et al., 2021). Start reading at `ExitsMixin.forward`.

An exit reads the states of a layer's tokens, pooled to one vector and scaled. The paper's reads [CLS] as it is (Sec.
6.4). In the shallow layers of a pre-trained encoder that state hardly differs from text to text, and an exit on it
learns the most frequent class; the mean over the tokens differs (docs/choices.md).
"""

import os
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertPooler
from transformers.utils import ModelOutput, cached_file, logging
from transformers.utils.output_capturing import capture_outputs

from .checksums_gaml import verify_weights, weight_files, write_checksum
from .configuration_gaml import GamlConfigMixin
from .engine_gaml import LAYER_FUNCTIONS, EncoderHooks, Layout, PrepackedLinear, bfloat16_cost, prepacking_gain
from .exiting_gaml import ExitPolicy, policy_from_config, shown

# Not used here: a save copies only the files that this one imports. Inference Endpoints look for the handler, and the
# config names the pipeline.
from .handler import EndpointHandler  # noqa: F401
from .losses_gaml import cross_entropy_loss, distillation_loss, distillation_pairs, exit_weights, total_loss
from .pipeline_gaml import GamlTextClassificationPipeline  # noqa: F401


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
            Logits of every exit; returned in training, with `labels`, and with `output_exit_logits=True`.
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


class EmbeddingParts(NamedTuple):
    """
    The parts of embeddings of BERT's kind: words, positions and token types are added, normalized, and projected to
    the layers' size. `first_position` is the row of `position` that the first token has. `distance_bias`
    `(num_heads, 2 * max_input_length - 1)` is what attention adds to its scores by distance, from the farthest key
    before a query to the farthest behind it.
    """

    word: nn.Embedding
    position: nn.Embedding
    norm: nn.LayerNorm
    token_type: nn.Embedding | None = None
    first_position: int = 0
    projection: nn.Linear | None = None
    distance_bias: Tensor | None = None


class ExitsMixin(EncoderHooks):
    """
    A linear classifier at each exit layer of an encoder (Zhu et al., 2021, Secs. 2.2, 6.4). Mixed into a family's own
    `PreTrainedModel`, whose class makes the stock encoder under the family's own name, then calls [`add_exits`].

    `from_pretrained` starts from any checkpoint of the family, whose encoder it keeps and whose exits are then new, or
    from a checkpoint with exits, which must hold every exit that the config names.

    Args:
        config ([`GamlConfigMixin`]): the model, its exits and their policy.
    """

    # Our loss is a mean over the micro-batch. Otherwise the Trainer would neither divide it by the number of
    # micro-batches nor average it over ranks (huggingface/transformers#47688).
    accepts_loss_kwargs = False
    _layer_functions = LAYER_FUNCTIONS  # of the exit engine; see `compile`
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
            {str(m): nn.Linear(config.hidden_size, config.num_labels) for m in config.exit_layers}
        )
        if config.exit_pooler == "per_exit":
            self.exit_poolers = nn.ModuleDict({str(m): BertPooler(config) for m in config.exit_layers})
        self.exits_are_new = True  # until a GamlTrainer has begun to train them, or trained ones are loaded
        self.last_exit_alone = False  # whether the others do not learn now; see `mixed_training`
        self.new_exit_weights: set[str] = set()  # that `from_pretrained` made, until a GamlTrainer has trained them
        self.post_init()

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

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], with a SHA-256 of its contents inside each weights file,
        which `from_pretrained` verifies. The disk needs room for a weights file twice while this runs. Files that
        `push_to_hub=True` sends from here have no checksum yet; the method `push_to_hub` sends them with it.
        """
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            for path in weight_files(save_directory, kwargs.get("variant")):
                write_checksum(path)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        # Not `label_smoothing`: a Trainer takes each argument with "label" in its name for a column of labels.
        smoothing: float = 0.0,
        exit_policy: ExitPolicy | None = None,
        output_exit_logits: bool = False,
        output_exit_states: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> GamlSequenceClassifierOutput:
        """
        In evaluation mode, rows leave as the exit policy decides, and layers run only for the rows still there.
        Training, a loss, `output_*` and a hook on a layer need every layer: then all run, and the policy's decisions
        are replayed.

        Traced or exported (`torch.jit.trace`, `torch.onnx.export`, `torch.export`), the graph holds for any number of
        rows and tokens. It is of one depth where the policy is (`"none"`, `"budgeted"`); the others need
        `output_exit_logits=True`. It keeps none of the checks below.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids, [CLS] first.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens and 0 for padding, which must be on the right. Defaults to no padding.
            token_type_ids, position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                As the encoder's. Where it knows no token types they must be 0.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): classes, in `[0, num_labels - 1]`.
            smoothing (`float`): label smoothing of L^CE at every exit, in `[0, 1]`.
            exit_policy ([`ExitPolicy`], *optional*): decides for this call. Defaults to the config's.
            output_exit_logits (`bool`): return the logits of all exits.
            output_exit_states (`bool`): return what each exit read.
            output_hidden_states, output_attentions (`bool`, *optional*): return these of all layers.

        Returns:
            [`GamlSequenceClassifierOutput`] or, with `return_dict=False`, a tuple of its fields that are there.

        Raises:
            ValueError: an input has the wrong shape, is too long, or holds ids or labels out of range (on the CPU: a
                check on a GPU would stall it).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        self._check_inputs(input_ids, inputs_embeds, attention_mask, token_type_ids, labels, output_attentions)
        hidden_states = self._embed(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
        )  # (batch_size, sequence_length, hidden_size)

        need_all = labels is not None or output_exit_logits or output_exit_states
        need_all |= output_hidden_states or output_attentions
        if not self.training and not need_all and not self._is_watched():
            logits, exit_layer = self._exit_early(
                hidden_states, attention_mask, exit_policy or policy_from_config(self.config)
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
            position = (exit_policy or policy_from_config(self.config)).replay(exit_logits)  # (batch_size,)
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
        if mode and (sentence := self.untrainable_exits()):  # for stock Trainers; a GamlTrainer refuses
            logger.warning_once(sentence)
        return super().train(mode)

    def truncate(self, exit_layer: int) -> "ExitsMixin":
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
        state = self.state_dict()
        smaller.load_state_dict({key: state[key] for key in smaller.state_dict()})
        return smaller.to(device=self.device, dtype=self.dtype).eval()

    def _is_watched(self) -> bool:
        """Whether a layer has a hook that `capture_outputs` did not put there: it fires where the layer runs whole."""
        for layer in self.encoder_layers:
            kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
            hooks = [hook for kind in kinds if kind for hook in kind.values()]
            if any(getattr(hook, "__module__", None) != capture_outputs.__module__ for hook in hooks):
                return True
        return False

    # What a family says of its encoder as a whole: how it embeds, its layers in order, and what the stock layers are
    # called with where rows stay on their padded grid. The answers here are BERT's; `EncoderHooks` has what the engine
    # asks of a layer.

    @property
    def encoder_layers(self) -> list[nn.Module]:
        """The layers in their order; one may be there more than once."""
        return list(self.base_model.encoder.layer)

    def _embed(self, *, attention_mask: Tensor | None, **inputs: Tensor | None) -> Tensor:
        return self.base_model.embeddings(**inputs)

    def embedding_parts(self) -> EmbeddingParts:
        part = self.base_model.embeddings
        return EmbeddingParts(
            part.word_embeddings, part.position_embeddings, part.LayerNorm, part.token_type_embeddings
        )

    def _layer_inputs(self, hidden_states: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """What each stock layer gets beside the hidden states."""
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        return {"attention_mask": mask}

    def _run_layer(self, layer: nn.Module, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        output = layer(hidden_states, **inputs)
        return output[0] if type(output) is tuple else output

    def _read(self, hidden_states: Tensor) -> Tensor:
        """What an exit sees of a layer's output, `(..., hidden_size)` to the same; a final norm, say."""
        return hidden_states

    # An exit: pool the tokens, transform (`exit_pooler`), scale (`exit_norm`), classify.

    def _pool(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`(batch_size, sequence_length, hidden_size)` to `(batch_size, hidden_size)`."""
        if self.config.exit_pooling == "cls":
            return self._read(hidden_states[:, 0])
        return mean_over_tokens(self._read(hidden_states), attention_mask)

    def _transform(self, m: int, pooled: Tensor) -> Tensor:
        if self.config.exit_pooler == "shared":
            return self.base_model.pooler(pooled[:, None])
        if self.config.exit_pooler == "per_exit":
            return self.exit_poolers[str(m)](pooled[:, None])
        return pooled

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

    def _exit_early(
        self, hidden_states: Tensor, attention_mask: Tensor | None, policy: ExitPolicy
    ) -> tuple[Tensor, Tensor]:
        """Dynamic exiting (Sec. 2.2.2) for a whole batch: rows that leave are dropped, so no row waits for another."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return self._exit_at_one_layer(hidden_states, attention_mask, policy)
        run_layer, run_cls, run_rest = self._layer_functions
        last = self.config.num_hidden_layers
        batch_size, length, _ = hidden_states.shape
        mask = (
            torch.ones(batch_size, length, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        )
        layout = Layout(mask, hidden_states.device, lambda places: self._shared_by_layers(hidden_states, places))
        tokens = layout.pack(hidden_states)  # (num_tokens, hidden_size), [CLS] of each row first
        rows = list(range(batch_size))  # numbers in the batch of the rows still there
        left: list[tuple[list[int], Tensor, int]] = []  # rows, their logits, and the layer at which they left
        history = hidden_states.new_empty(batch_size, 0, self.config.num_labels)  # (rows, num_exits_run, num_labels)
        reads_cls = self.config.exit_pooling == "cls"
        cls_first = reads_cls and bool(policy.may_exit(history).any())
        for m, layer in enumerate(self.encoder_layers, start=1):
            if m not in self.config.exit_layers:
                tokens = run_layer(self, layer, tokens, layout.rows)
                continue
            if cls_first or (reads_cls and m == last):
                pooled, key, value = run_cls(self, layer, tokens, layout.rows)
            else:
                tokens = run_layer(self, layer, tokens, layout.rows)
                pooled = tokens[: len(rows)]
            if reads_cls:
                answer = self._run_exit(m, self._read(pooled))  # (rows, num_labels)
            else:
                answer = self._run_exit(m, mean_over_tokens(*layout.unpack(self._read(tokens))))
            if m == last:
                break
            history = torch.cat([history.to(answer.dtype), answer[:, None]], dim=1)
            # On a GPU, the one wait of this exit. Lists, since a tensor of a few numbers costs more than it saves.
            leave, may_exit = torch.stack([policy(history), policy.may_exit(history)]).tolist()
            if all(leave):
                break
            if any(leave):
                gone = [i for i, leaves in enumerate(leave) if leaves]
                kept = [i for i, leaves in enumerate(leave) if not leaves]
                left.append(([rows[i] for i in gone], answer[layout.to_device(torch.tensor(gone))], m))
                rows, may_exit = [rows[i] for i in kept], [may_exit[i] for i in kept]
                kept = torch.tensor(kept)
                layout, numbers = layout.keep(kept)
                kept = layout.to_device(kept)
                history = history[kept]
                if cls_first:
                    pooled, key, value = pooled[kept], key[kept, :, : layout.length], value[kept, :, : layout.length]
                tokens = tokens.index_select(0, numbers)
            if cls_first and layout.length == 1:
                tokens = pooled
            elif cls_first:
                tokens = torch.cat([pooled, run_rest(self, layer, tokens[len(rows) :], key, value, layout.rows)])
            cls_first = reads_cls and any(may_exit)
        left.append((rows, answer, m))
        order = layout.to_device(torch.tensor([row for numbers, _, _ in left for row in numbers]))
        exit_layer = layout.to_device(torch.tensor([m for numbers, _, m in left for _ in numbers]))
        logits = torch.cat([answer for _, answer, _ in left])
        # From the order in which rows left to that of the batch.
        return logits.index_copy(0, order, logits), exit_layer.index_copy(0, order, exit_layer)

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

    def prepack(self) -> "ExitsMixin":
        """
        Make inference on a CPU faster where it can: reorder the encoder's weights for oneDNN's kernels, for good.

        Whether that is faster depends on processor and size. So the first three layers' are timed both ways, with 32
        tokens and the threads that torch has, and where PyTorch's own kernels are as fast the model stays as it is.
        The log tells: information where the weights were reordered, a warning where they were not.

        The answers are the same up to rounding. The weights are replaced, not doubled; the model can still be saved,
        but no longer trained, cast or moved. Call it last, in evaluation mode, in float32 or bfloat16; a warning tells
        where this processor takes longer in bfloat16 than in float32.

        Returns:
            itself.

        Raises:
            ValueError: the model is in training mode, not on the CPU, or in a type that oneDNN does not know here.
        """
        has_onednn = torch.backends.mkldnn.is_available()
        dtypes = [torch.float32]
        if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.append(torch.bfloat16)
        if self.training or self.device.type != "cpu" or self.dtype not in dtypes:
            raise ValueError(
                f"`prepack` needs a model in evaluation mode, on the CPU, in one of {dtypes}. Got "
                f"{'training' if self.training else 'evaluation'} mode, {self.device.type}, {self.dtype}."
            )
        if self.dtype == torch.bfloat16 and (cost := bfloat16_cost()) > 1:
            logger.warning(f"bfloat16 takes {cost:.1f} times as long as float32 on this processor: use float32.")
        # Three layers: one alone would find more of its weights in the caches than it does in the model.
        first = dict.fromkeys(module for layer in self.encoder_layers[:3] for module in layer.modules())
        linears = [module for module in first if isinstance(module, nn.Linear)]
        if not linears:  # they are prepacked
            return self
        if not has_onednn:
            logger.warning("Not prepacked: this build of PyTorch has no oneDNN. The model is as it was.")
            return self
        gain = prepacking_gain(linears)
        if gain <= 1:
            logger.warning(f"Not prepacked: that is {gain:.2f} times as fast here. The model is as it was.")
            return self
        logger.info(f"Prepacked: linear layers are {gain:.2f} times as fast.")
        for module in dict.fromkeys(module for layer in self.encoder_layers for module in layer.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PrepackedLinear(child))
        return self

    def compile(self, *args, **kwargs) -> None:
        """
        Compile what runs one layer while rows leave, by `torch.compile` with these arguments.

        Whole, the loop over the exits would break at each decision. One compiled layer serves all layers, and by
        default (`dynamic=True`) all batch sizes and lengths. For training, `torch.compile(model)` does as ever.
        """
        kwargs = {"dynamic": True} | kwargs
        self._layer_functions = tuple(torch.compile(function, *args, **kwargs) for function in LAYER_FUNCTIONS)

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_layer_functions", None)  # compiled code cannot be pickled
        return state

    def _losses(self, exit_logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """L, L^CE and L^KD of Eqs. 2, 1 and 3. Where nothing distils (PABEE's training), L is L^CE."""
        config, alone = self.config, self.last_exit_alone
        ce_loss = cross_entropy_loss(
            exit_logits,
            labels,
            exit_weights(config.exit_layers, "last" if alone else config.exit_loss_weights),
            class_weights=config.class_weights,
            label_smoothing=smoothing,
        )
        pairs = [] if alone else distillation_pairs(config.distillation, config.exit_layers)
        kd_loss = distillation_loss(
            exit_logits,
            pairs,
            config.exit_layers,
            temperature=config.kd_temperature,
            reduction=config.kd_reduction,
        )
        return (total_loss(ce_loss, kd_loss, config.alpha) if pairs else ce_loss), ce_loss, kd_loss

    def _check_inputs(
        self, input_ids, inputs_embeds, attention_mask, token_type_ids, labels, output_attentions
    ) -> None:
        """One clear error for what would otherwise fail deep inside, or quietly give a wrong answer."""
        if torch.jit.is_tracing():  # a trace keeps no check, and warns of each
            return
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs, name, dim = (
            (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
        )
        if inputs.dim() != dim or inputs.shape[0] == 0 or inputs.shape[1] == 0:
            raise ValueError(
                f"`{name}` must have {dim} dimensions, at least one row and at least one token. "
                f"Got shape {tuple(inputs.shape)}."
            )
        batch_size, length = inputs.shape[:2]
        if length > self.config.max_input_length:
            raise ValueError(
                f"`{name}` must be at most {self.config.max_input_length} tokens long, what the model can read. "
                f"Got {length}; tokenize with `truncation=True`."
            )
        for other_name, other in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if other is not None and other.shape != (batch_size, length):
                raise ValueError(
                    f"`{other_name}` must have shape {(batch_size, length)}, as `{name}`. Got {tuple(other.shape)}."
                )
        if labels is not None and (labels.shape != (batch_size,) or labels.dtype != torch.int64):
            raise ValueError(
                f"`labels` must have shape {(batch_size,)} and type torch.int64: one class for each row of `{name}`. "
                f"Got shape {tuple(labels.shape)}, {labels.dtype}."
            )
        if output_attentions and "attentions" not in (type(self)._can_record_outputs or {}):
            raise ValueError(f"{type(self).__name__} cannot return attentions. Got `output_attentions=True`.")
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                '`output_attentions=True` needs the model loaded with `attn_implementation="eager"`. '
                f"Got `attn_implementation={self.config._attn_implementation!r}`."
            )
        # The values themselves: free on the CPU; on a GPU a look would stall it, in a compiled graph break it.
        if inputs.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if input_ids is not None:
            self._check_range("input_ids", input_ids, self.config.vocab_size, "`vocab_size` of the model")
        if token_type_ids is not None:
            self._check_range(
                "token_type_ids", token_type_ids, self.config.num_token_types, "the number of token types of the model"
            )
        if labels is not None:
            self._check_range("labels", labels, self.config.num_labels, "`num_labels` of the model")
        if attention_mask is not None and not attention_mask[:, 0].all():
            row = int((attention_mask[:, 0] == 0).nonzero()[0])
            raise ValueError(
                f"`attention_mask` must be 1 at the first position of every row: an exit reads [CLS] there. Row {row} "
                'starts with padding; pad on the right (`padding_side="right"`).'
            )

    @staticmethod
    def _check_range(name: str, values: Tensor, bound: int, meaning: str) -> None:
        wrong = (values < 0) | (values >= bound)
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise ValueError(
                f"`{name}` must lie between 0 and {bound - 1} ({meaning} is {bound}). Row {row} holds "
                f"{int(values[wrong][0])}."
            )


def mean_over_tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """
    Mean of each row's tokens, summed in float32 at least. What padding holds, NaN too, does not matter.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Not 0 where there is a token, of which each row has one at least. `None`: everywhere.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, in the type of `hidden_states`.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.mean(dim=1, dtype=wide).to(hidden_states.dtype)
    mask = mask.bool()
    total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(dim=1, dtype=wide)
    return (total / mask.sum(dim=1, keepdim=True)).to(hidden_states.dtype)


def layer_norm(state: Tensor) -> Tensor:
    """LayerNorm without parameters: each row on its own, `(batch_size, hidden_size)` to the same."""
    return F.layer_norm(state, state.shape[-1:])


def _forget_the_old_exits(config: GamlConfigMixin, name: str | os.PathLike, kwargs: dict) -> None:
    """Set back what `from_pretrained(name, **kwargs)` took over from exits that it did not take over."""
    where = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    stored, _ = type(config).get_config_dict(name, **{key: kwargs[key] for key in where if key in kwargs})
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


__all__ = ["EmbeddingParts", "ExitsMixin", "GamlSequenceClassifierOutput"]
