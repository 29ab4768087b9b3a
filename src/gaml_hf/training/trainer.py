"""`GamlTrainer`: a Trainer whose step aligns the distillation gradient (Zhu et al., 2021, Sec. 5)."""

import torch
from accelerate.utils import find_batch_size, slice_tensors
from torch import Tensor

from gaml_hf.models.losses_gaml import distillation_pairs, total_loss

from .alignment import align_, parameter_groups
from .exit_trainer import OTHER_LOSSES, ExitTrainer


BUCKET_BYTES = 25 * 2**20  # of one all-reduce, as DistributedDataParallel's default


class GamlTrainer(ExitTrainer):
    """
    Trains a model with exits with gradient alignment, as its config's `ga_mode` says; else it is an [`ExitTrainer`].

    One forward pass gives L^CE and L^KD. The gradient of L^CE takes the stock way (scaler, accumulation, overlap with
    communication); that of L^KD is accumulated beside it. When an optimizer step is due, both hold the whole batch,
    averaged over ranks, and are aligned once: GA is not linear, so aligning micro-batches would give another result.
    Clipping and the optimizer follow as always.

    Each row of a step has the same weight, so that it does not matter how a step is cut into ranks and micro-batches.
    The stock Trainer, and so `ga_mode="none"`, averages the means of the micro-batches, where the rows of a short last
    one weigh more, and over several ranks fills the last one up with rows that were there before.

    Logged beside the loss (which is L of Eq. 2 in every mode), as means over the steps since the last entry, without
    those that a gradient scaler had to skip: `alignment/cos_angle` (Eq. 4, over all parameters),
    `alignment/coefficient` (c of `g_GA = c * g_CE`, mean over groups), `alignment/coefficient_min`,
    `alignment/coefficient_max` and `alignment/conflict` (share of steps with an angle above 90°).

    A `compute_loss` of a subclass may add to what this one returns, and calls it once a batch: L^KD, which it does not
    see, would be counted twice, and is not scaled with it.

    Raises:
        ValueError: at construction, or when training starts, where alignment would not see the plain gradients
            (DeepSpeed, FSDP and other sharding, `nn.DataParallel`, optimizers that step inside the backward pass,
            `torch_compile`, reentrant checkpointing), and where L^CE leaves an exit out that L^KD teaches: no gradient
            is there to align. In the first step, where a `compute_loss` of a subclass leaves the alignment out, or
            asks for it twice. What [`ExitTrainer`] and [`RobustTrainer`] raise besides.
    """

    def _reset(self) -> None:
        super()._reset()
        self._g_kd: list[Tensor] | None = None  # gradient of L^KD, accumulated since the last optimizer step
        self._kd_loss: Tensor | None = None  # of the micro-batch in progress
        self._row_weights: list[Tensor | float] = []  # of the micro-batches of this step that are still to come
        self._alignment_sum: Tensor | float = 0.0  # over the steps since the last log; the last number counts them

    @property
    def aligns(self) -> bool:
        """Whether steps are aligned: `ga_mode` asks for it, and some exit teaches another."""
        return self._will_align and not self.bare_model.last_exit_alone

    @property
    def _will_align(self) -> bool:
        """The same of a step in which all exits learn."""
        config = self.model.config
        return config.ga_mode != "none" and bool(distillation_pairs(config.distillation, config.exit_layers))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and self.aligns):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self._kd_loss is not None:
            raise ValueError(
                f"`{type(self).__name__}.compute_loss` must call that of GamlTrainer once for a batch, or L^KD would "
                f"count twice (`ga_mode={self.model.config.ga_mode!r}`). {OTHER_LOSSES}"
            )
        outputs = model(**self._with_smoothing(inputs))
        if outputs.kd_loss is None:
            raise ValueError("Training needs `labels` in every batch, and this batch has none.")
        weight = self._row_weights.pop(0) if self._row_weights else 1.0
        ce_loss, kd_loss = weight * outputs.ce_loss, weight * outputs.kd_loss
        # Divided and scaled just as `training_step` and `Accelerator.backward` will do with L^CE.
        kd_loss = kd_loss / self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        g_kd = torch.autograd.grad(
            kd_loss if scaler is None else scaler.scale(kd_loss),
            self._parameters(),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        if self._g_kd is None:
            self._g_kd = list(g_kd)
        else:
            torch._foreach_add_(self._g_kd, list(g_kd))
        self._kd_loss = kd_loss.detach()
        return (ce_loss, outputs) if return_outputs else ce_loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._kd_loss is not None:
            loss = total_loss(loss, self._kd_loss, self.model.config.alpha)
            self._kd_loss = None
            self._note_loss(loss)
        if self._g_kd is not None and self.accelerator.sync_gradients:
            self._align_gradients()
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Called by the stock Trainer for the micro-batches of one step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._row_weights = []
        # Called before `on_step_begin`, which tells the model that all exits learn now.
        if batches and self._will_align and self.state.global_step >= self.first_joint_step:
            rows = [find_batch_size(batch) for batch in batches]
            own = self._rows_of_its_own(rows[-1])
            if own < rows[-1]:
                # DistributedDataParallel waits for a backward pass of every rank: a rank without rows keeps one, which
                # weighs nothing.
                batches[-1] = slice_tensors(batches[-1], slice(max(own, 1)))
                rows[-1] = own
            total = sum(rows)
            if self.args.world_size > 1:
                total = torch.full((), float(total), device=device)  # without a copy that waits for the GPU
                torch.distributed.all_reduce(total)
            # Divided by `len(batches)` in `training_step`, and by the number of ranks in their average.
            self._row_weights = [n * len(batches) * self.args.world_size / total for n in rows]
        return batches, num_items

    def _align_gradients(self) -> None:
        """Replace each `.grad`, which holds g_CE, by g_GA."""
        g_kd, self._g_kd = self._g_kd, None
        if self.args.world_size > 1:
            _average_over_ranks(g_kd)
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        # A parameter that L^CE does not reach has no direction to align to.
        used = [
            (name, parameter.grad, kd)
            for name, parameter, kd in zip(names, self._parameters(), g_kd, strict=True)
            if parameter.grad is not None
        ]
        names, g_ce, g_kd = (list(column) for column in zip(*used, strict=True))
        config = self.model.config
        cos_angle, c = align_(
            g_ce, g_kd, parameter_groups(names, config.ga_granularity), alpha=config.alpha, mode=config.ga_mode
        )
        row = torch.stack([cos_angle, c.mean(), c.min(), c.max(), (cos_angle < 0).float(), torch.ones_like(cos_angle)])
        self._alignment_sum = self._alignment_sum + torch.where(row.isfinite().all(), row, 0.0)

    def _parameters(self) -> list[torch.nn.Parameter]:
        # Looked up every time: `model_init` and hyper-parameter search replace the model.
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and isinstance(self._alignment_sum, Tensor):
            *sums, steps = self._alignment_sum.tolist()
            keys = ("cos_angle", "coefficient", "coefficient_min", "coefficient_max", "conflict")
            if steps:
                logs = logs | {f"alignment/{key}": total / steps for key, total in zip(keys, sums, strict=True)}
            self._alignment_sum = 0.0
        super().log(logs, *args, **kwargs)

    def _check_own_loss(self, name: str, reached: list[Tensor]) -> None:
        if self.aligns and self._kd_loss is None:
            raise ValueError(
                f"{name} does not call that of GamlTrainer, so nothing would be aligned "
                f"(`ga_mode={self.model.config.ga_mode!r}`). {OTHER_LOSSES}"
            )
        super()._check_own_loss(name, reached)

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if not self.aligns:
            return
        optim = self.args.optim.value
        refused = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled or bool(self.args.fsdp),
            "a model spread over several devices": self.is_model_parallel
            or getattr(self, "is_distributed_loading_by_transformers", False)
            or getattr(self.model, "tp_size", None) is not None,
            "`parallelism_config`": getattr(self.args, "parallelism_config", None) is not None
            or getattr(self.accelerator, "parallelism_config", None) is not None,
            "`accelerator_config.even_batches=False`, where ranks may make different numbers of steps": (
                self.args.world_size > 1 and not self.args.accelerator_config.even_batches
            ),
            "nn.DataParallel (use torchrun, or show one GPU only)": self.args.n_gpu > 1,
            f"`optim={optim!r}`, which steps inside the backward pass": "lomo" in optim or "layerwise" in optim,
            "`torch_compile` (a compiled graph can be walked back once, not twice)": (
                self.args.torch_compile or hasattr(self.model, "_orig_mod")
            ),
            "reentrant checkpointing (set its `use_reentrant` to `False`)": any(
                # Left out, it is True to torch; transformers sets False where it gets no keywords at all.
                getattr(module, "gradient_checkpointing", False)
                and module._gradient_checkpointing_func.keywords.get("use_reentrant") is not False
                for module in self.model.modules()
            ),
        }
        found = [name for name, present in refused.items() if present]
        if found:
            raise ValueError(
                f"Gradient alignment (`ga_mode={self.model.config.ga_mode!r}`) needs the plain gradients of L^CE and "
                f"L^KD on every rank, and does not work with {', '.join(found)}. Take it out, or train ML-BERT with "
                '`ga_mode="none"`, which is the stock Trainer.'
            )
        if taught := sorted(self._learning_exits() - self._exits_of_ce()):
            config = self.model.config
            raise ValueError(
                f"Gradient alignment (`ga_mode={config.ga_mode!r}`) follows the gradient of L^CE, in which exits "
                f"{taught} have no part (`exit_loss_weights={config.exit_loss_weights!r}`): they would never move. "
                'Take other weights, or train ML-BERT with `ga_mode="none"`, where L^KD alone trains them.'
            )


def _average_over_ranks(tensors: list[Tensor]) -> None:
    """Average `tensors` over all ranks in place, several per message: a message each would be bound by latency."""
    world_size = torch.distributed.get_world_size()
    bucket: list[Tensor] = []
    size = 0
    for position, tensor in enumerate(tensors, start=1):
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES or position == len(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            flat /= world_size  # before the sum, which could overflow
            torch.distributed.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])
            bucket, size = [], 0
