"""
The exits of an encoder of texts (Zhu et al., 2021). Start reading at `ExitsMixin.forward`, which goes on in
`exits_base_gaml.py`.

An exit reads the states of a layer's tokens, pooled to one vector and scaled. The paper's reads [CLS] as it is (Sec.
6.4). In the shallow layers of a pre-trained encoder that state hardly differs from text to text, and an exit on it
learns the most frequent class; the mean over the tokens differs (docs/choices.md).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertPooler
from transformers.utils import logging
from transformers.utils.output_capturing import capture_outputs

from .engine_gaml import LAYER_FUNCTIONS, EncoderHooks, Layout, PrepackedLinear, bfloat16_cost, prepacking_gain
from .exiting_gaml import ExitPolicy
from .exits_base_gaml import ExitsBase, GamlSequenceClassifierOutput, check_plain_weights

# Not used here: a save copies only the files that this one imports. Inference Endpoints look for the handler, and the
# config names the pipeline.
from .handler import EndpointHandler  # noqa: F401
from .pipeline_gaml import GamlTextClassificationPipeline  # noqa: F401


logger = logging.get_logger(__name__)


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


class ExitsMixin(ExitsBase, EncoderHooks):
    """
    A linear classifier at each exit layer of an encoder (Zhu et al., 2021, Secs. 2.2, 6.4). Mixed into a family's own
    `PreTrainedModel`, whose class makes the stock encoder under the family's own name, then calls [`add_exits`].

    `from_pretrained` starts from any checkpoint of the family, whose encoder it keeps and whose exits are then new, or
    from a checkpoint with exits, which must hold every exit that the config names.

    Args:
        config ([`GamlConfigMixin`]): the model, its exits and their policy.
    """

    _layer_functions = LAYER_FUNCTIONS  # of the exit engine; see `compile`

    def _make_exit_pooler(self, m: int) -> nn.Module | None:
        return BertPooler(self.config) if self.config.exit_pooler == "per_exit" else None

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
        self._check_inputs(
            input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, output_attentions
        )
        hidden_states = self._embed(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
        )  # (batch_size, sequence_length, hidden_size)

        return self._answer(
            hidden_states,
            attention_mask,
            labels,
            smoothing=smoothing,
            exit_policy=exit_policy,
            output_exit_logits=output_exit_logits,
            output_exit_states=output_exit_states,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

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

    def _exit_early(
        self, hidden_states: Tensor, attention_mask: Tensor | None, policy: ExitPolicy
    ) -> tuple[Tensor, Tensor]:
        """Dynamic exiting (Sec. 2.2.2) for a whole batch: rows that leave are dropped, so no row waits for another."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return self._exit_at_one_layer(hidden_states, attention_mask, policy)
        run_layer, run_cls, run_rest = self._layer_functions
        exits = self.config.exit_layers
        if (position := policy.fixed_exit(len(exits))) is not None:  # one is asked, and nothing is decided
            exits = exits[position : position + 1]
        last = exits[-1]
        batch_size, length, _ = hidden_states.shape
        mask = (
            torch.ones(batch_size, length, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        )
        _check_padding(mask)  # of a GPU: here it is at hand
        layout = Layout(mask, hidden_states.device, lambda places: self._shared_by_layers(hidden_states, places))
        tokens = layout.pack(hidden_states)  # (num_tokens, hidden_size), [CLS] of each row first
        rows = list(range(batch_size))  # numbers in the batch of the rows still there
        left: list[tuple[list[int], Tensor, int]] = []  # rows, their logits, and the layer at which they left
        history = hidden_states.new_empty(batch_size, 0, self.config.num_labels)  # (rows, num_exits_run, num_labels)
        reads_cls = self.config.exit_pooling == "cls"
        cls_first = reads_cls and position is None and bool(policy.may_exit(history).any())
        for m, layer in enumerate(self.encoder_layers, start=1):
            if m not in exits:
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
            ValueError: the model is in training mode, compiled, not on the CPU, or in a type that oneDNN does not know
                here.
        """
        if "_layer_functions" in vars(self):
            raise ValueError("A compiled model cannot be prepacked: take one of `compile()` and `prepack()`.")
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
        check_plain_weights(self, "prepack")
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

    def _apply(self, fn, recurse: bool = True):
        for linear in self._prepacked():
            linear._apply(fn)  # refuses a cast or a move before anything is changed
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        for linear in self._prepacked() if mode else ():
            linear.train(mode)  # refuses, before temperatures are dropped
        return super().train(mode)

    def _prepacked(self) -> list[PrepackedLinear]:
        return [module for module in self.modules() if isinstance(module, PrepackedLinear)]

    def compile(self, *args, **kwargs) -> None:
        """
        Compile what runs one layer while rows leave, by `torch.compile` with these arguments.

        Whole, the loop over the exits would break at each decision. One compiled layer serves all layers, and by
        default (`dynamic=True`) all batch sizes and lengths. For training, `torch.compile(model)` does as ever.

        Raises:
            ValueError: the model is prepacked.
        """
        if self._prepacked():
            raise ValueError(
                "A prepacked model cannot be compiled: the compiler does not know the order of its weights."
            )
        kwargs = {"dynamic": True} | kwargs
        self._layer_functions = tuple(torch.compile(function, *args, **kwargs) for function in LAYER_FUNCTIONS)

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_layer_functions", None)  # compiled code cannot be pickled
        return state

    def _check_inputs(
        self, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, output_attentions
    ) -> None:
        """One clear error for what would otherwise fail deep inside, or quietly give a wrong answer."""
        if torch.jit.is_tracing():  # a trace keeps no check, and warns of each
            return
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        inputs, name, dim = (
            (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
        )
        ids = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        for other_name, other in {**ids, name: inputs, "attention_mask": attention_mask, "labels": labels}.items():
            if other is not None and not isinstance(other, Tensor):
                raise ValueError(f"`{other_name}` must be a tensor. Got {type(other).__name__}.")
        for other_name, other in ids.items():
            if other is not None and other.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"`{other_name}` must be of type torch.int64 or torch.int32. Got {other.dtype}.")
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
        if inputs_embeds is not None and inputs.shape[2] != (width := self.get_input_embeddings().embedding_dim):
            raise ValueError(
                f"`inputs_embeds` must have {width} numbers for each token, as the model's embeddings. "
                f"Got {inputs.shape[2]}."
            )
        for other_name, other in {"attention_mask": attention_mask, **ids}.items():
            one_for_all = other_name == "position_ids" and other is not None and other.shape == (1, length)
            if other is not None and other.shape != (batch_size, length) and not one_for_all:
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
        if position_ids is not None:
            bound = self.config.max_position_embeddings
            self._check_range("position_ids", position_ids, bound, "`max_position_embeddings` of the model")
        if labels is not None:
            self._check_range("labels", labels, self.config.num_labels, "`num_labels` of the model")
        if attention_mask is not None:
            _check_padding(attention_mask)


def _check_padding(attention_mask: Tensor) -> None:
    if not attention_mask[:, 0].all():
        row = int((attention_mask[:, 0] == 0).nonzero()[0])
        raise ValueError(
            f"`attention_mask` must be 1 at the first position of every row, where its text begins. Row {row} starts "
            'with padding; pad on the right (`padding_side="right"`).'
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


__all__ = ["EmbeddingParts", "ExitsMixin"]
