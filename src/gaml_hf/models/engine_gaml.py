"""
The exit engine: runs encoder layers for the rows that are still there, without padding, and [CLS] first.

A batch of texts is kept as one list of tokens, `(num_tokens, hidden_size)`: first the [CLS] of every row, then the
other tokens row by row. Linear layers, activations and LayerNorm run on this list, so padding costs them nothing.
Attention alone looks at rows, and puts its tokens on a grid `(num_rows, length)` for that.

An exit may read [CLS] and nothing else (`exit_pooling="cls"`). Then, where rows may leave, [CLS] goes first
([`run_cls`]): keys and values of all tokens, but query, attention and feed-forward of [CLS] alone. After the decision
[`run_rest`] completes the layer for the rows that stay. A row that leaves has saved about 10/12 of its last layer.

These functions know a layer by the names of BERT's parts, which RoBERTa and ELECTRA share.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

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
    """

    grid: Tensor
    place: Tensor
    mask: Tensor | None

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
    """

    def __init__(self, mask: Tensor, device: torch.device):
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
        smaller = Layout(self.mask[kept], self.device)
        rest = smaller.mask[:, 1:]
        return smaller, self.to_device(torch.cat([kept, self.grid[kept, 1 : smaller.length][rest]]))


def run_layer(layer: nn.Module, tokens: Tensor, rows: Rows) -> Tensor:
    """One layer for all tokens: `(num_tokens, hidden_size)` to the same."""
    attention = layer.attention.self
    key, value = _keys_and_values(attention, tokens, rows)
    query = _heads(attention.query(tokens), rows, attention)
    context = _attend(query, key, value, rows.mask)
    if not rows.in_order:
        context = context.index_select(0, rows.place)
    return layer.feed_forward_chunk(layer.attention.output(context, tokens))


def run_cls(layer: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """
    One layer for [CLS] alone.

    Returns:
        `tuple`: [CLS] after the layer, `(num_rows, hidden_size)`; keys and values of all tokens,
        `(num_rows, num_heads, length, head_size)` each, for [`run_rest`].
    """
    attention = layer.attention.self
    cls = tokens[: len(rows.grid)]
    key, value = _keys_and_values(attention, tokens, rows)
    query = attention.query(cls).view(len(cls), 1, -1, attention.attention_head_size).transpose(1, 2)
    context = _attend(query, key, value, rows.mask)
    return layer.feed_forward_chunk(layer.attention.output(context, cls)), key, value


def run_rest(layer: nn.Module, rest: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """What [`run_cls`] left: the layer for the other tokens, `(num_tokens - num_rows, hidden_size)` to the same."""
    attention = layer.attention.self
    num_rows = len(rows.grid)
    # At the place of [CLS] stands some token's query, and nobody reads what comes of it.
    query = _heads(attention.query(rest), rows._replace(grid=(rows.grid - num_rows).clamp(min=0)), attention)
    context = _attend(query, key, value, rows.mask)
    if not rows.in_order:
        context = context.index_select(0, rows.place[num_rows:])
    return layer.feed_forward_chunk(layer.attention.output(context, rest))


LAYER_FUNCTIONS = (run_layer, run_cls, run_rest)


def _keys_and_values(attention: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    return _heads(attention.key(tokens), rows, attention), _heads(attention.value(tokens), rows, attention)


def _heads(tokens: Tensor, rows: Rows, attention: nn.Module) -> Tensor:
    """Tokens on the grid, by head: `(num_rows, num_heads, length, head_size)`."""
    if not rows.in_order:
        tokens = tokens.index_select(0, rows.grid.flatten())
    num_rows = len(rows.grid)
    return tokens.view(num_rows, len(tokens) // num_rows, -1, attention.attention_head_size).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`(num_rows * query_length, hidden_size)`."""
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


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
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

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
