"""
ResNet with exits, for images (Zhu et al., 2021, Appendix D).

An exit after each block, which is "every two convolutional layers" of Table 8. Its head is that of Shallow-Deep
networks (Kaya et al., 2019): a learned mix of max- and average-pooling to 4x4, then a linear layer.
"""

from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel, ResNetPreTrainedModel
from transformers import initialization as init
from transformers.models.resnet.modeling_resnet import ResNetConvLayer
from transformers.utils.output_capturing import capture_outputs

from .configuration_gaml import GamlConfigMixin
from .exiting_gaml import ExitPolicy
from .exits_base_gaml import ExitsBase, GamlSequenceClassifierOutput

# Not used here: a save copies only the files that this one imports, and the config names the pipeline.
from .image_pipeline_gaml import GamlImageClassificationPipeline  # noqa: F401


GRID = 4  # an exit pools its maps to so many places in height and width


@strict
class GamlResNetConfig(GamlConfigMixin, ResNetConfig):
    """
    Everything that [`~transformers.ResNetConfig`] holds, and the exits: see [`GamlConfigMixin`]. A layer is a block;
    the stem counts as none.

    Args:
        stem (`str`, *optional*, defaults to `"imagenet"`):
            What comes before the first block: `"imagenet"`, a 7x7 convolution of stride 2 and max-pooling, as in every
            plain checkpoint; or `"cifar"`, a 3x3 convolution, for images of 32x32 (He et al., 2016, Sec. 4.2).
        exit_pooling (`str`, *optional*, defaults to `"mixed"`):
            What an exit reads of a block's maps: a learned mix of max- and average-pooling to 4x4. There is no other.
        last_exit_pooling (`str`, *optional*, defaults to `"average"`):
            What the last exit reads: the `"average"` of each map, which makes it the classifier of a plain ResNet, or
            `"mixed"` as the others do. A model that `truncate` made has that.
        exit_learning_rate_multiplier (`float`, *optional*, defaults to 1.0):
            As in [`GamlConfigMixin`]; here the encoder starts at random too.
        exit_warm_start (`bool`, *optional*, defaults to `False`):
            Must be `False`: a network that starts at random tells nothing yet.
    """

    model_type = "gaml_resnet"
    plain_model_types: ClassVar[tuple[str, ...]] = ("resnet",)
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline_class: ClassVar[str] = "image_pipeline_gaml.GamlImageClassificationPipeline"
    pipeline_task: ClassVar[str] = "image-classification"
    pipeline_type: ClassVar[str] = "image"

    stem: Literal["cifar", "imagenet"] = "imagenet"
    exit_pooling: Literal["mixed"] = "mixed"
    last_exit_pooling: Literal["average", "mixed"] = "average"
    exit_learning_rate_multiplier: float | int = 1.0
    exit_warm_start: bool = False

    @classmethod
    def cifar(cls, depth: int, **fields: Any) -> "GamlResNetConfig":
        """
        ResNet-20, 32, 44, 56 or 110 for images of 32x32, of `(depth - 2) / 6` blocks with 16, 32 and 64 maps each.

        Args:
            depth (`int`): 6n + 2, the number of layers with weights.
            fields: of the configuration.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"`depth` must be 6n + 2, such as 20, 32, 44 or 56. Got `depth={depth}`.")
        n = (depth - 2) // 6
        shape = {"stem": "cifar", "layer_type": "basic", "embedding_size": 16}
        return cls(**shape, hidden_sizes=[16, 32, 64], depths=[n, n, n], **fields)

    def __post_init__(self, **kwargs):
        self.depths = list(self.depths)
        for name in ("stage_names", "out_features", "out_indices"):  # of a backbone; made anew of the depths
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return sum(self.depths)

    @property
    def layer_channels(self) -> list[int]:
        """How many maps each block gives."""
        pairs = zip(self.hidden_sizes, self.depths, strict=True)
        return [channels for channels, depth in pairs for _ in range(depth)]

    @property
    def exit_dropout(self) -> float:
        return 0.0

    def exit_grid(self, m: int) -> int:
        """To how many places in height and width exit m pools its maps."""
        return 1 if m == self.num_hidden_layers and self.last_exit_pooling == "average" else GRID

    def exit_size(self, m: int) -> int:
        return self.layer_channels[m - 1] * self.exit_grid(m) ** 2

    def truncated(self, num_hidden_layers: int) -> dict[str, Any]:
        depths, left = [], num_hidden_layers
        for depth in self.depths:
            if left > 0:
                depths.append(min(depth, left))
            left -= depth
        cut = num_hidden_layers < self.num_hidden_layers
        pooling = "mixed" if cut else self.last_exit_pooling  # the exit that is the last now has a head of the others
        return {
            "depths": depths,
            "hidden_sizes": self.hidden_sizes[: len(depths)],
            "last_exit_pooling": pooling,
        }

    def validate_images(self):
        if len(self.depths) != len(self.hidden_sizes) or min(self.depths, default=0) < 1:
            raise ValueError(
                "`depths` must hold a number of blocks, from 1, for each of `hidden_sizes`. "
                f"Got `depths={self.depths}`, `hidden_sizes={self.hidden_sizes}`."
            )
        if self.exit_pooler != "none" or self.exit_warm_start:
            raise ValueError(
                'Exits on images have a pooling of their own and start at random: `exit_pooler` must be "none" and '
                f"`exit_warm_start` False. Got `exit_pooler={self.exit_pooler!r}`, "
                f"`exit_warm_start={self.exit_warm_start}`."
            )


class MixedPooling(nn.Module):
    """
    `a * maxpool(x) + (1 - a) * avgpool(x)` with one learned, unbounded `a`, that starts in [0, 1] (Kaya et al., 2019,
    Sec. 4), to 4x4 places whatever the size of the maps.
    """

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(()))

    def forward(self, maps: Tensor) -> Tensor:
        """`(batch_size, channels, height, width)` to `(batch_size, channels * 16)`."""
        height, width = maps.shape[-2:]
        if height % GRID or width % GRID:  # places of several sizes, which overlap; they exist for any size
            most, mean = F.adaptive_max_pool2d(maps, GRID), F.adaptive_avg_pool2d(maps, GRID)
        else:  # the same numbers, by faster kernels
            window = (height // GRID, width // GRID)
            most, mean = F.max_pool2d(maps, window), F.avg_pool2d(maps, window)
        return torch.lerp(mean, most, self.mix.to(mean.dtype)).flatten(1)


class GamlResNetForImageClassification(ExitsBase, ResNetPreTrainedModel):
    """ResNet with a classifier after each exit layer, a layer being a block; see [`ExitsBase`]."""

    config_class = GamlResNetConfig
    _no_split_modules = ["ResNetBasicLayer", "ResNetBottleNeckLayer"]

    def __init__(self, config: GamlResNetConfig):
        super().__init__(config)
        self.resnet = ResNetModel(config)
        if config.stem == "cifar":
            self.resnet.embedder = ResNetConvLayer(
                config.num_channels, config.embedding_size, activation=config.hidden_act
            )
        self.add_exits()

    def _make_exit_pooler(self, m: int) -> nn.Module | None:
        return MixedPooling() if self.config.exit_grid(m) == GRID else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MixedPooling):
            init.uniform_(module.mix)

    @capture_outputs
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        smoothing: float = 0.0,
        exit_policy: ExitPolicy | None = None,
        output_exit_logits: bool = False,
        output_hidden_states: bool | None = None,
    ) -> GamlSequenceClassifierOutput:
        """
        In evaluation mode, rows leave as the exit policy decides, and blocks run only for the rows still there.
        Training, a loss, `output_*` and a hook on a block need every block: then all run, and the policy's decisions
        are replayed.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images as the image processor makes them.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): classes, in `[0, num_labels - 1]`.
            smoothing (`float`): label smoothing of L^CE at every exit, in `[0, 1]`.
            exit_policy ([`ExitPolicy`], *optional*): decides for this call. Defaults to the config's.
            output_exit_logits (`bool`): return the logits of all exits.
            output_hidden_states (`bool`, *optional*): return the maps of the stem and of every block.

        Returns:
            [`GamlSequenceClassifierOutput`] or, with `return_dict=False`, a tuple of its fields that are there.

        Raises:
            ValueError: an input has the wrong shape or type, or a label is out of range (on the CPU: a check on a GPU
                would stall it).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not torch.jit.is_tracing():  # a trace keeps no check, and warns of each
            self._check_inputs(pixel_values, labels)
        return self._answer(
            self.resnet.embedder(pixel_values),
            None,
            labels,
            smoothing=smoothing,
            exit_policy=exit_policy,
            output_exit_logits=output_exit_logits,
            output_exit_states=False,
            output_hidden_states=output_hidden_states,
        )

    @property
    def encoder_layers(self) -> list[nn.Module]:
        return [layer for stage in self.resnet.encoder.stages for layer in stage.layers]

    def _pool(self, hidden_states: Tensor, attention_mask: None) -> Tensor:
        return hidden_states

    def _transform(self, m: int, pooled: Tensor) -> Tensor:
        return pooled.mean(dim=(2, 3)) if self.config.exit_grid(m) == 1 else self.exit_poolers[str(m)](pooled)

    def head_parameters(self) -> tuple[int, int]:
        """How many parameters the exits have that a plain network has not, and how many it has."""
        last = f".{self.config.num_hidden_layers}."
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        heads = sum(size for name, size in sizes.items() if name.startswith("exit_") and last not in name)
        return heads, sum(size for name, size in sizes.items() if name.startswith("resnet."))

    def _exit_early(self, hidden_states: Tensor, attention_mask: None, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
        """Dynamic exiting for a whole batch: the maps of rows that leave are dropped between blocks."""
        is_graph = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if is_graph or policy.fixed_exit(self.config.num_exits) is not None:
            return self._exit_at_one_layer(hidden_states, attention_mask, policy)
        last = self.config.num_hidden_layers
        exits = set(self.config.exit_layers)
        rows = torch.arange(len(hidden_states))  # numbers in the batch of the rows still there
        left: list[tuple[Tensor, Tensor, int]] = []  # rows, their logits, and the layer at which they left
        history = hidden_states.new_empty(len(rows), 0, self.config.num_labels)  # (rows, num_exits_run, num_labels)
        for m, layer in enumerate(self.encoder_layers, start=1):
            hidden_states = layer(hidden_states)
            if m not in exits:
                continue
            answer = self._run_exit(m, hidden_states)  # (rows, num_labels)
            if m == last:
                break
            history = torch.cat([history.to(answer.dtype), answer[:, None]], dim=1)
            leave = policy(history).cpu()  # on a GPU, the one wait of this exit
            if not leave.any():
                continue
            if leave.all():
                break
            gone, kept = leave.nonzero().squeeze(1), (~leave).nonzero().squeeze(1)
            left.append((rows[gone], answer.index_select(0, gone.to(answer.device)), m))
            rows, kept = rows[kept], kept.to(answer.device)
            history, hidden_states = history.index_select(0, kept), hidden_states.index_select(0, kept)
        left.append((rows, answer, m))
        order = torch.cat([numbers for numbers, _, _ in left])
        exit_layer = torch.cat([torch.full_like(numbers, m) for numbers, _, m in left])
        logits = torch.cat([answer for _, answer, _ in left])
        order, exit_layer = order.to(logits.device), exit_layer.to(logits.device)
        # From the order in which rows left to that of the batch.
        return logits.index_copy(0, order, logits), exit_layer.index_copy(0, order, exit_layer)

    def _check_inputs(self, pixel_values: Tensor | None, labels: Tensor | None) -> None:
        channels = self.config.num_channels
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"`pixel_values` must be given, as a tensor. Got {type(pixel_values).__name__}.")
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or 0 in shape or shape[1] != channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, {channels}, height, width) (`num_channels` is "
                f"{channels}), at least one row, and a floating-point type, as the image processor makes them. "
                f"Got shape {shape}, {pixel_values.dtype}."
            )
        if labels is None:
            return
        if labels.shape != shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"`labels` must have shape {shape[:1]} and type torch.int64: one class for each image. "
                f"Got shape {tuple(labels.shape)}, {labels.dtype}."
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range("labels", labels, self.config.num_labels, "`num_labels` of the model")


__all__ = ["GamlResNetConfig", "GamlResNetForImageClassification"]
