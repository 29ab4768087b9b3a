"""`GamlTrainer`: a Trainer whose step aligns the distillation gradient (Zhu et al., 2021, Sec. 5)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from .alignment import align_, parameter_groups
from .losses_gaml import distillation_pairs, total_loss


BUCKET_BYTES = 25 * 2**20  # of one all-reduce, as DistributedDataParallel's default


class GamlTrainer(Trainer):
    """
    Trains a GAML-BERT with gradient alignment, as its config's `ga_mode` says; else it is the stock Trainer.

    One forward pass gives L^CE and L^KD. The gradient of L^CE takes the stock way (scaler, accumulation, overlap with
    communication); that of L^KD is accumulated beside it. When an optimizer step is due, both hold the whole batch,
    averaged over ranks, and are aligned once: GA is not linear, so aligning micro-batches would give another result.
    Clipping and the optimizer follow as always.

    Logged beside the loss (which is L of Eq. 2 in every mode), as means over the steps since the last entry, without
    those that a gradient scaler had to skip: `alignment/cos_angle` (Eq. 4, over all parameters),
    `alignment/coefficient` (c of `g_GA = c * g_CE`, mean over groups), `alignment/coefficient_min`,
    `alignment/coefficient_max` and `alignment/conflict` (share of steps with an angle above 90°).

    Raises:
        ValueError: at construction, or when training starts, where alignment would not see the plain gradients
            (DeepSpeed, FSDP and other sharding, `nn.DataParallel`, optimizers that step inside the backward pass,
            reentrant checkpointing), or where there is a loss beside L^CE (label smoothing, a custom one).
        FloatingPointError: the loss or the weights are no longer finite. Nothing is saved after that.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._reset()
        self._refuse_unsupported()
        self.add_callback(_TrainingGuard(self))

    def _reset(self) -> None:
        self._g_kd: list[Tensor] | None = None  # gradient of L^KD, accumulated since the last optimizer step
        self._kd_loss: Tensor | None = None  # of the micro-batch in progress
        self._alignment_sum: Tensor | float = 0.0  # over the steps since the last log; the last number counts them
        self._loss_is_finite: Tensor | None = None  # so far, in this training

    @property
    def aligns(self) -> bool:
        """Whether steps are aligned: `ga_mode` asks for it, and some exit teaches another."""
        config = self.model.config
        return config.ga_mode != "none" and bool(distillation_pairs(config.distillation, config.exit_layers))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and self.aligns):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        outputs = model(**inputs)
        if outputs.kd_loss is None:
            raise ValueError("Training needs `labels` in every batch, and this batch has none.")
        # Divided and scaled just as `training_step` and `Accelerator.backward` will do with L^CE.
        kd_loss = outputs.kd_loss / self.current_gradient_accumulation_steps
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
        return (outputs.ce_loss, outputs) if return_outputs else outputs.ce_loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._kd_loss is not None:
            loss = total_loss(loss, self._kd_loss, self.model.config.alpha)
            self._kd_loss = None
        finite = torch.isfinite(loss)
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        if self._g_kd is not None and self.accelerator.sync_gradients:
            self._align_gradients()
        return loss

    def _parameters(self) -> list[torch.nn.Parameter]:
        # Looked up every time: `model_init` and hyper-parameter search replace the model.
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

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

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and isinstance(self._alignment_sum, Tensor):
            *sums, steps = self._alignment_sum.tolist()
            keys = ("cos_angle", "coefficient", "coefficient_min", "coefficient_max", "conflict")
            if steps:
                logs = logs | {f"alignment/{key}": total / steps for key, total in zip(keys, sums, strict=True)}
            self._alignment_sum = 0.0
        super().log(logs, *args, **kwargs)

    def _refuse_unsupported(self) -> None:
        if not self.aligns:
            return
        optim = self.args.optim.value
        refused = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            "a model spread over several devices": self.is_model_parallel
            or getattr(self, "is_distributed_loading_by_transformers", False),
            "nn.DataParallel (use torchrun, or show one GPU only)": self.args.n_gpu > 1,
            f"`optim={optim!r}`, which steps inside the backward pass": "lomo" in optim or "layerwise" in optim,
            "`label_smoothing_factor`": self.args.label_smoothing_factor != 0,
            "`compute_loss_func`": self.compute_loss_func is not None,
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


class _TrainingGuard(TrainerCallback):
    """
    Starts each training afresh, and stops it before a NaN is logged, evaluated or saved.

    The stock Trainer leaves NaN out of the loss it reports and goes on. The weights are looked at as well as the loss:
    a NaN gradient shows in the loss one step later only.
    """

    def __init__(self, trainer: GamlTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        # Not at construction: `model_init` and checkpointing are known only now. And not in `train`, which tries
        # several times where `auto_find_batch_size` is on.
        self.trainer._reset()
        self.trainer._refuse_unsupported()
        if args.push_to_hub and args.should_save:
            # With `hub_strategy="every_save"` the stock Trainer commits weights and config, not the code they need.
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            custom_object_save(model, args.output_dir, config=model.config)

    def on_step_end(self, args, state, control, model: Module | None = None, **kwargs: Any):
        # The stock callback, which comes first, has set these.
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._check(state, model)

    def on_epoch_end(self, args, state, control, model: Module | None = None, **kwargs: Any):
        self._check(state, model)

    def _check(self, state, model: Module) -> None:
        loss_is_finite = self.trainer._loss_is_finite
        if loss_is_finite is None:  # not a step was made
            return
        weights = get_total_norm([p.detach() for p in model.parameters()])  # finite only if every weight is
        if not (loss_is_finite & weights.isfinite()):  # one wait for the GPU
            what = "a weight" if loss_is_finite else "the loss"
            raise FloatingPointError(
                f"Training stopped at step {state.global_step}: {what} is not finite (NaN or infinite). Lower "
                "`learning_rate`, keep `max_grad_norm` on, or look for a broken batch. No such weights were saved: go "
                "on from the last checkpoint."
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
