"""
The exit engine: runs encoder layers for the rows that are still there, without padding, and [CLS] first.

A batch of texts is kept as one list of tokens, `(num_tokens, hidden_size)`: first the [CLS] of every row, then the
other tokens row by row. Linear layers, activations and LayerNorm run on this list, so padding costs them nothing.
Attention alone looks at rows, and puts its tokens on a grid `(num_rows, length)` for that.

An exit may read [CLS] and nothing else (`exit_pooling="cls"`). Then, where rows may leave, [CLS] goes first
([`run_cls`]): keys and values of all tokens, but query, attention and feed-forward of [CLS] alone. After the decision
[`run_rest`] completes the layer for the rows that stay. A row that leaves has saved about 10/12 of its last layer.

Encoder families differ in how a layer is called and what its attention adds. These functions ask the model for it, in
the words of [`EncoderHooks`], whose answers are BERT's.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rows(NamedTuple):
    """
    Where the tokens of each row are; on the device of the tokens.

    Attributes:
        grid (`torch.LongTensor` of shape `(num_rows, length)`): number of the token at each place; 0 where none is.
        place (`torch.LongTensor` of shape `(num_tokens,)`): place of each token in the flattened grid.
        mask (`torch.BoolTensor` of shape `(num_rows, 1, 1, length)`, *optional*): where the grid holds a token; `None`
            where it holds one everywhere.
        shared: what layers share at this length, see [`EncoderHooks`].
    """

    grid: Tensor
    place: Tensor
    mask: Tensor | None
    shared: Any = None

    @property
    def in_order(self) -> bool:
        """Whether the list of tokens is the grid: a single row."""
        return len(self.grid) == 1 and self.mask is None


class Layout:
    """
    Which tokens the rows of a batch have, on the host: to know it there costs no wait for a GPU later.

    Args:
        mask (`torch.BoolTensor` of shape `(num_rows, length)`, on the CPU): where there is a token; [CLS] of every row
            is in the first column. Columns that no row needs are cut off.
        device (`torch.device`): of the tokens.
        share (`Callable`, *optional*): from a length, what layers share at it; called once per length.
    """

    def __init__(self, mask: Tensor, device: torch.device, share: Callable[[int], Any] = lambda length: None):
        self.share = share
        self.length = int(mask.any(dim=0).nonzero()[-1]) + 1  # of the longest row
        self.mask, self.device = mask[:, : self.length].contiguous(), device
        num_rows = len(mask)
        rest = self.mask.clone()
        rest[:, 0] = False
        place = torch.cat([torch.arange(num_rows) * self.length, rest.flatten().nonzero().squeeze(1)])
        self.grid = torch.zeros(num_rows * self.length, dtype=torch.int64)
        self.grid[place] = torch.arange(len(place))
        self.grid = self.grid.view(num_rows, self.length)
        is_full = len(place) == self.mask.numel()
        self.rows = Rows(
            grid=self.to_device(self.grid),
            place=self.to_device(place),
            mask=None if is_full else self.to_device(self.mask)[:, None, None, :],
            shared=share(self.length),
        )

    def to_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)

    def pack(self, hidden_states: Tensor) -> Tensor:
        """`(num_rows, sequence_length, hidden_size)` to the list of tokens, `(num_tokens, hidden_size)`."""
        return hidden_states[:, : self.length].flatten(0, 1).index_select(0, self.rows.place)

    def unpack(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        The list of tokens on the grid, `(num_rows, length, hidden_size)`, and where the grid holds one,
        `(num_rows, length)`, or `None` where it does everywhere.
        """
        rows = self.rows
        if not rows.in_order:
            tokens = tokens.index_select(0, rows.grid.flatten())
        return tokens.view(*self.grid.shape, -1), None if rows.mask is None else rows.mask[:, 0, 0]

    def keep(self, kept: Tensor) -> tuple["Layout", Tensor]:
        """
        The layout once only some rows are left.

        Args:
            kept (`torch.LongTensor` of shape `(num_kept,)`, on the CPU): their numbers, rising.

        Returns:
            `tuple`: the new layout, and the old number of each of its tokens, on their device.
        """
        shared = self.rows.shared
        smaller = Layout(self.mask[kept], self.device, lambda n: shared if n == self.length else self.share(n))
        rest = smaller.mask[:, 1:]
        smaller.share = self.share
        return smaller, self.to_device(torch.cat([kept, self.grid[kept, 1 : smaller.length][rest]]))


class LayerParts(NamedTuple):
    """The parts of a layer of BERT's kind: attention, add, norm; feed-forward, add, norm."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    activation: Callable[[Tensor], Tensor]
    output: nn.Linear
    output_norm: nn.LayerNorm


class EncoderHooks:
    """
    What the engine asks of a model about one of its layers, with BERT's answers. A family of BERT's kind says
    `layer_parts`; one of another kind overrides the hooks that differ.
    """

    attention_scale: float | None = None  # of query times key; defaults to 1 / sqrt(head_size)

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return self.config.hidden_size // self.config.num_attention_heads

    @staticmethod
    def layer_parts(layer: nn.Module) -> LayerParts:
        attention = layer.attention
        return LayerParts(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            attention_output=attention.output.dense,
            attention_norm=attention.output.LayerNorm,
            intermediate=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
        )

    def _shared_by_layers(self, tokens: Tensor, length: int) -> Any:
        """What all layers share for rows of `length` places, on the device and in the type of `tokens`."""
        return None

    def _project(self, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `(num_tokens, num_heads * head_size)` each."""
        return self._project_query(layer, tokens), *self._project_key_value(layer, tokens)

    def _project_query(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        return self.layer_parts(layer).query(tokens)

    def _project_key_value(self, layer: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.layer_parts(layer)
        return parts.key(tokens), parts.value(tokens)

    def _rotate(self, layer: nn.Module, heads: Tensor, rows: Rows) -> Tensor:
        """Queries or keys of the first places, `(num_rows, num_heads, num_places, head_size)` to the same."""
        return heads

    def _attention_bias(self, layer: nn.Module, query: Tensor, key: Tensor, rows: Rows) -> Tensor | None:
        """What attention adds to its scores (float), or which of them count (bool); the queries are the first."""
        return rows.mask

    def _after_attention(self, layer: nn.Module, context: Tensor, tokens: Tensor) -> Tensor:
        """What attention found and what went into the layer, `(num_tokens, hidden_size)` each, to what comes out."""
        parts = self.layer_parts(layer)
        attended = parts.attention_norm(parts.attention_output(context) + tokens)
        inner = parts.activation(parts.intermediate(attended))
        return parts.output_norm(parts.output(inner) + attended)


def run_layer(model: EncoderHooks, layer: nn.Module, tokens: Tensor, rows: Rows) -> Tensor:
    """One layer for all tokens: `(num_tokens, hidden_size)` to the same."""
    query, key, value = (_heads(x, rows, model.head_size) for x in model._project(layer, tokens))
    query, key = model._rotate(layer, query, rows), model._rotate(layer, key, rows)
    context = _attend(model, layer, query, key, value, rows)
    if not rows.in_order:
        context = context.index_select(0, rows.place)
    return model._after_attention(layer, context, tokens)


def run_cls(model: EncoderHooks, layer: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """
    One layer for [CLS] alone.

    Returns:
        `tuple`: [CLS] after the layer, `(num_rows, hidden_size)`; keys and values of all tokens,
        `(num_rows, num_heads, length, head_size)` each, for [`run_rest`].
    """
    cls = tokens[: len(rows.grid)]
    key, value = (_heads(x, rows, model.head_size) for x in model._project_key_value(layer, tokens))
    key = model._rotate(layer, key, rows)
    query = model._project_query(layer, cls).view(len(cls), 1, -1, model.head_size).transpose(1, 2)
    context = _attend(model, layer, model._rotate(layer, query, rows), key, value, rows)
    return model._after_attention(layer, context, cls), key, value


def run_rest(model: EncoderHooks, layer: nn.Module, rest: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """What [`run_cls`] left: the layer for the other tokens, `(num_tokens - num_rows, hidden_size)` to the same."""
    num_rows = len(rows.grid)
    # At the place of [CLS] stands some token's query, and nobody reads what comes of it.
    places = (rows.grid - num_rows).clamp(min=0)
    query = model._project_query(layer, rest).index_select(0, places.flatten())
    query = query.view(*places.shape, -1, model.head_size).transpose(1, 2)
    context = _attend(model, layer, model._rotate(layer, query, rows), key, value, rows)
    return model._after_attention(layer, context.index_select(0, rows.place[num_rows:]), rest)


LAYER_FUNCTIONS = (run_layer, run_cls, run_rest)


def _heads(tokens: Tensor, rows: Rows, head_size: int) -> Tensor:
    """Tokens on the grid, by head: `(num_rows, num_heads, length, head_size)`."""
    if not rows.in_order:
        tokens = tokens.index_select(0, rows.grid.flatten())
    num_rows = len(rows.grid)
    return tokens.view(num_rows, len(tokens) // num_rows, -1, head_size).transpose(1, 2)


def _attend(model: EncoderHooks, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """`(num_rows * query_length, hidden_size)`."""
    bias = model._attention_bias(layer, query, key, rows)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=model.attention_scale)
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


def add_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias of attention scores that lets nothing look at places without a token."""
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _best_seconds(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """
    Of each, the fastest of some calls, which take turns. In processor time, where the clock for it is fine enough (on
    Windows it is not): what else the machine does would decide it otherwise.
    """
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter
    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        for _ in range(rounds):
            for i, run in enumerate(runs):
                started = clock()
                run()
                best[i] = min(best[i], clock() - started)
    return best


def prepacking_gain(linears: list[nn.Linear]) -> float:
    """
    How many times as fast [`PrepackedLinear`] is on this processor for 32 tokens, measured in a second or two.

    Args:
        linears (`list` of `torch.nn.Linear`): run in turn, on the CPU, in one type. Too many for the caches: with few
            tokens, most of the gain is in reading the weights.

    Returns:
        `float`: their own time over that of the prepacked ones; below 1 where PyTorch's own kernels are faster.
    """
    packed = [PrepackedLinear(linear) for linear in linears]
    tokens = [linear.weight.new_ones(32, linear.in_features) for linear in linears]  # no random numbers are used up

    def run(layers):
        for layer, x in zip(layers, tokens, strict=True):
            layer(x)

    own, prepacked = _best_seconds([lambda: run(linears), lambda: run(packed)], rounds=10)
    return own / prepacked


def bfloat16_cost() -> float:
    """
    Time of a product in bfloat16 over that in float32 on this CPU, measured in less than a second.

    Below 1 where the processor multiplies bfloat16 itself (on x86, AVX512_BF16 or AMX); elsewhere many times 1.
    """
    products = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        products.append(lambda x=x, weight=weight: F.linear(x, weight))
    bfloat16, float32 = _best_seconds(products, rounds=6)
    return bfloat16 / float32


class _WithoutGradient(torch.autograd.Function):
    """`y`, made of `x` by an operator without a gradient: a backward pass stops here, and does not leave it out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise ValueError("A prepacked model has no gradients: load it anew, or take them before `prepack()`.")


class PrepackedLinear(nn.Module):
    """
    A linear layer for inference on a CPU, whose weights lie in the order that oneDNN's kernels read them.

    PyTorch reorders them in every call, or takes another library's kernels; its compiler does it once, and so does
    this class, with the compiler's operators. The numbers are the same up to rounding. Copies, pickles and
    `state_dict` hold the weights as they were.

    Args:
        linear (`torch.nn.Linear`): on the CPU, in float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self._packed.dtype:
            raise ValueError(
                f"A prepacked model runs in {self._packed.dtype}. Got {x.dtype}: leave `torch.autocast`, or cast the "
                "model first, and call `prepack()` then."
            )
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return _WithoutGradient.apply(x, y) if x.requires_grad and torch.is_grad_enabled() else y

    def train(self, mode: bool = True) -> "PrepackedLinear":
        if mode:
            raise ValueError("A prepacked model cannot be trained: its weights have no gradient. Load it anew.")
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "PrepackedLinear":
        moved = fn(self.bias if self.bias is not None else torch.empty(0, dtype=self._packed.dtype))
        if moved.device.type != "cpu" or moved.dtype != self._packed.dtype:
            raise ValueError(
                f"A prepacked model stays on the CPU, in {self._packed.dtype}. Got {moved.device.type}, "
                f"{moved.dtype}; move or cast the model first, and call `prepack()` then."
            )
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._packed.to_dense()

    def __getstate__(self):  # read by copies and pickles, to which a reordered weight is opaque
        return self.__dict__ | {"_packed": self._packed.to_dense()}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._packed)
