"""`GamlTrainer`: a Trainer whose step aligns the distillation gradient (Zhu et al., 2021, Sec. 5)."""

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import find_batch_size, slice_tensors
from huggingface_hub import CommitInfo, run_as_future
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import get_total_norm
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy, has_length
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from gaml_hf.data.checks import CheckedCollator, check_dataset
from gaml_hf.hub import TOLD_ARGUMENTS, TOLD_FIELDS, push_checkpoint, save_checkpoint
from gaml_hf.hub.folders import (
    check_named_checkpoint,
    explain_full_disk,
    newest_complete_checkpoint,
    rotate_checkpoints,
    save_tokenizer,
    staging_folder,
    write_seal,
)
from gaml_hf.models.checksums_gaml import verify_weights
from gaml_hf.models.losses_gaml import distillation_pairs, exit_weights, total_loss

from .alignment import align_, parameter_groups
from .exit_start import (
    LEAST_VARIATION,
    NUM_ROWS,
    collect_exit_states,
    input_variation,
    warm_start,
)


logger = logging.get_logger(__name__)

# The way out, where a loss of one's own would not train what the config says.
OTHER_LOSSES = (
    "Class weights go into `class_weights` of the config and label smoothing into `label_smoothing_factor`, for every "
    "exit; for anything else, override `compute_loss`: add to what `super().compute_loss` returns or, with "
    '`ga_mode="none"`, make the loss of `outputs.exit_logits`.'
)
BUCKET_BYTES = 25 * 2**20  # of one all-reduce, as DistributedDataParallel's default
EXIT_PARAMETER = re.compile(r"(^|\.)exit_(classifiers|poolers)\.")  # its name, also where PEFT has wrapped it


class GamlTrainer(Trainer):
    """
    Trains a GAML-BERT with gradient alignment, as its config's `ga_mode` says; else it is the stock Trainer.

    One forward pass gives L^CE and L^KD. The gradient of L^CE takes the stock way (scaler, accumulation, overlap with
    communication); that of L^KD is accumulated beside it. When an optimizer step is due, both hold the whole batch,
    averaged over ranks, and are aligned once: GA is not linear, so aligning micro-batches would give another result.
    Clipping and the optimizer follow as always.

    Each row of a step has the same weight, so that it does not matter how a step is cut into ranks and micro-batches.
    The stock Trainer, and so `ga_mode="none"`, averages the means of the micro-batches, where the rows of a short last
    one weigh more, and over several ranks fills the last one up with rows that were there before.

    Label smoothing (`label_smoothing_factor`) and the config's `class_weights` are part of L^CE at every exit, in
    every mode; with the stock Trainer, label smoothing trains the last exit alone.

    Predictions are the logits, and `compute_metrics` gets them as in any example. One that has `ignore_keys`, as
    [`~gaml_hf.evaluation.ExitMetrics`] has, names what it does not need, and the predictions of `evaluate` and
    `predict` are then a tuple, (logits, exit_layer, exit_logits). They come in the order of the rows, whatever
    `train_sampling_strategy` says.

    Datasets are checked before the first step, see [`~gaml_hf.data.checks.check_dataset`].

    Logged beside the loss (which is L of Eq. 2 in every mode), as means over the steps since the last entry, without
    those that a gradient scaler had to skip: `alignment/cos_angle` (Eq. 4, over all parameters),
    `alignment/coefficient` (c of `g_GA = c * g_CE`, mean over groups), `alignment/coefficient_min`,
    `alignment/coefficient_max` and `alignment/conflict` (share of steps with an angle above 90°).

    Each training checkpoint is sealed with checksums when it is whole, and only then are older ones deleted
    (`save_total_limit`). `train(resume_from_checkpoint=True)` goes on from the newest that is whole, and ends with the
    weights of a training that was never interrupted. With DeepSpeed and FSDP checkpoints are the stock Trainer's.

    Every push, at the end or with `hub_strategy="every_save"`, is one commit of a complete repository, see
    [`~GamlTrainer.push_to_hub`].

    Raises:
        ValueError: at construction, or when training starts, where alignment would not see the plain gradients
            (DeepSpeed, FSDP and other sharding, `nn.DataParallel`, optimizers that step inside the backward pass,
            `torch_compile`, reentrant checkpointing), where `compute_loss_func` would leave exits or `class_weights`
            out, or where exits are new and frozen, see [`~GamlBertForSequenceClassification.exit_modules`]. At
            construction with `push_to_hub=True`, where a push would not be complete or would hold a pickle. When
            training starts, where a dataset is empty, lacks a column, or holds a wrong label, or the checkpoint to
            resume from is not complete. In the first step, where a `compute_loss` of a subclass leaves exits or the
            alignment out.
        FloatingPointError: the loss, the gradient or the weights are no longer finite, on any rank: all ranks stop,
            and nothing is saved after that. Also where an answer in an evaluation or a prediction is not finite.
        OSError: the disk is full. The checkpoints before are as they were.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            self._refuse_unpushable()
        self.label_smoother = None  # it would take the labels away from the model; `compute_loss` has its own way
        self._reset()
        self._refuse_unsupported()
        self.add_callback(_TrainingGuard(self))

    def _reset(self) -> None:
        self._g_kd: list[Tensor] | None = None  # gradient of L^KD, accumulated since the last optimizer step
        self._kd_loss: Tensor | None = None  # of the micro-batch in progress
        self._row_weights: list[Tensor | float] = []  # of the micro-batches of this step that are still to come
        self._alignment_sum: Tensor | float = 0.0  # over the steps since the last log; the last number counts them
        self._grad_norm: Tensor | float = 0.0  # of the last step
        # So far, in this training; None before the first step.
        self._loss_is_finite: Tensor | None = None
        self._gradient_is_finite: Tensor | bool = True

    @property
    def aligns(self) -> bool:
        """Whether steps are aligned: `ga_mode` asks for it, and some exit teaches another."""
        config = self.model.config
        if config.ga_mode == "none" or self._bare_model.last_exit_alone:
            return False
        return bool(distillation_pairs(config.distillation, config.exit_layers))

    @property
    def _bare_model(self) -> Module:
        """The model itself, also where PEFT has put another around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "smoothing": self.args.label_smoothing_factor}
        if not (model.training and self.aligns):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        outputs = model(**inputs)
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

    # Exits: what they read, where they start, and how fast they learn

    def _start_exits(self, exit_layers: list[int]) -> None:
        """Look at what the exits read of some training rows, and let the new ones of `exit_layers` start there."""
        model, config = self._bare_model, self.model.config
        if self._is_sharded or not has_length(self.train_dataset):
            logger.info("The exits' inputs are not looked at: the model is sharded, or the dataset has no length.")
            return
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(self.train_dataset), generator=generator)[:NUM_ROWS].sort().values.tolist()
        rows = self.train_dataset
        rows = rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)
        with torch.random.fork_rng(devices=[]):  # a data loader draws a number when it starts
            # No more than there are, which `dataloader_drop_last` would leave out.
            world_size = self.args.world_size  # of which a batch that is split must be a multiple
            batch_size = min(self.args.eval_batch_size, len(chosen) // world_size)
            batch_size = max(world_size, batch_size // world_size * world_size)
            batches = self._get_dataloader(rows, "Training", batch_size)
            states, labels = collect_exit_states(
                model, (self._prepare_inputs(batch) for batch in batches), self.accelerator.gather_for_metrics
            )
        variation = input_variation(states)
        told = ", ".join(f"{m}: {share:.3g}" for m, share in zip(config.exit_layers, variation, strict=True))
        logger.info(f"How much an exit's input varies from text to text, beside its length: {told}.")
        blind = [m for m, share in zip(config.exit_layers, variation, strict=True) if share < LEAST_VARIATION]
        if blind and config.exit_norm == "none":
            logger.warning(
                f"The inputs of exits {str(blind)[1:-1]} vary by less than {LEAST_VARIATION:.0%} of their length from "
                "text to text, and such exits tend to answer with the most frequent class. Use "
                '`exit_pooling="mean"`, or scale them (`exit_norm="layer"`).'
            )
        if config.exit_warm_start:
            warm_start(model, states, labels, exit_layers)

    def create_optimizer(self, *args, **kwargs):
        """As the stock Trainer's; the exits' parameters in groups of their own, with their own learning rate."""
        is_ours = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        multiplier = self.model.config.exit_learning_rate_multiplier
        if not is_ours or multiplier == 1:
            return optimizer
        exits = {id(p) for name, p in self.model.named_parameters() if EXIT_PARAMETER.search(name)}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in exits]
            if own and len(own) == len(group["params"]):
                group["lr"] *= multiplier
            elif own:
                group["params"] = [p for p in group["params"] if id(p) not in exits]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * multiplier})
        return optimizer

    # Rows: each counts once, however a step is cut into ranks and micro-batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Called by the stock Trainer for the micro-batches of one step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._row_weights = []
        if batches and self.aligns:
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

    def _rows_of_its_own(self, batch_size: int) -> int:
        """
        How many rows of the batch that was read last are not there to fill it up.

        Over several ranks, the last batch is filled up with rows from the start, behind the others.
        """
        state = self.accelerator.gradient_state
        sampling = getattr(self.args, "train_sampling_strategy", None)
        if self.args.world_size == 1 or not state.end_of_dataloader or sampling == "batch_rebalance":
            return batch_size
        remainder = state.remainder
        loader = state.active_dataloader
        if remainder < 0 and not self.args.dataloader_drop_last and has_length(loader.dataset):
            # Not known to accelerate in an epoch that was resumed in the middle.
            remainder = len(loader.dataset) % (batch_size * self.args.world_size)
        if remainder <= 0:
            return batch_size
        return min(max(remainder - self.args.process_index * batch_size, 0), batch_size)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None:
            ignore_keys = getattr(self.compute_metrics, "ignore_keys", None)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        batch_size = 0 if loss is None else find_batch_size(inputs)
        own = self._rows_of_its_own(batch_size)
        if 0 < own < batch_size:
            # The stock loop takes this loss once for each row of its own; it is to be theirs alone. Not by `model`:
            # DistributedDataParallel would wait for the other ranks.
            loss, _, _ = super().prediction_step(self.model, slice_tensors(inputs, slice(own)), True)
        return loss, logits, labels

    def _get_eval_sampler(self, eval_dataset):
        # None is the rows' own order. With "group_by_length" the stock Trainer would sort them as it does in training,
        # and what is said of each row (predictions in a file, lengths) would be said of another.
        return None

    # Datasets

    def get_train_dataloader(self):
        """As the stock Trainer's; the evaluation rows are checked as well, not after an epoch of training."""
        if self.train_dataset is not None:
            self._check_dataset(self.train_dataset, "train")
        evaluates = str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no"
        if evaluates and self.eval_dataset is not None:
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for name, dataset in several.items():
                self._check_dataset(dataset, f"eval ({name})" if name else "eval")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is not None and not isinstance(dataset, dict):
            self._check_dataset(dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        self._check_dataset(test_dataset, "test")
        return super().get_test_dataloader(test_dataset)

    def _check_dataset(self, dataset: Any, split: str) -> None:
        config = self.model.config
        check_dataset(
            dataset,
            split,
            num_labels=config.num_labels,
            max_length=config.max_input_length,
            needs_labels=split != "test",
            # Else a collator of one's own may make labels and tokens out of other columns.
            columns_are_final=getattr(self.data_collator, "__module__", "").startswith("transformers."),
        )

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        collator = self.data_collator
        split = {"Training": "train", "Evaluation": "eval"}.get(description, description)
        self.data_collator = CheckedCollator(
            collator, split, num_labels=self.model.config.num_labels, needs_labels=split != "test"
        )
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    # Numbers that are not finite, and an evaluation that fails

    def evaluation_loop(self, dataloader, description, *args, **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if not output.num_samples:
            raise ValueError(f"{description}: the dataset gave no rows.")
        predictions = output.predictions if isinstance(output.predictions, tuple) else (output.predictions,)
        for values in predictions:
            if isinstance(values, np.ndarray) and not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                raise FloatingPointError(
                    f"{description}: the logits of row {row} are not finite (NaN or infinite), so it has no answer. "
                    "Look at the weights of this checkpoint, or evaluate in float32."
                )
        loss = output.metrics.get(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", 0.0)
        if not np.isfinite(loss):  # where the logits were not kept
            raise FloatingPointError(f"{description}: the loss is not finite (NaN or infinite). Got {loss}.")
        return output

    def _evaluate(self, trial, *args, **kwargs):
        """Called by the stock Trainer during training, before it saves what it evaluates."""
        try:
            # A data loader draws a number when it starts. Behind a checkpoint of this step, a resume would not draw
            # it.
            with torch.random.fork_rng(devices=[]):
                return super()._evaluate(trial, *args, **kwargs)
        except FloatingPointError:
            raise
        except Exception:
            if self.args.save_strategy != SaveStrategy.NO and self.state.global_step > 0:
                logger.error(f"The evaluation failed. The model is saved as it is at step {self.state.global_step}.")
                self._save_checkpoint(self.model_wrapped, trial)
            raise

    def _get_grad_norm(self, *args, **kwargs):
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    # Gradients

    def training_step(self, model, inputs, num_items_in_batch=None):
        is_ours = getattr(self.compute_loss, "__func__", None) is GamlTrainer.compute_loss
        if self._loss_is_finite is None and not is_ours:
            loss = self._first_training_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._kd_loss is not None:
            loss = total_loss(loss, self._kd_loss, self.model.config.alpha)
            self._kd_loss = None
        finite = torch.isfinite(loss)
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        if self._g_kd is not None and self.accelerator.sync_gradients:
            self._align_gradients()
        return loss

    def _first_training_step(self, model, inputs, num_items_in_batch) -> Tensor:
        """With the `compute_loss` of a subclass: see what its loss reaches, before a weight has moved."""
        config = self.model.config
        reached: list[Tensor] = []  # gradients of the loss at `exit_logits`, (batch_size, num_exits, num_labels)

        def watch(module, args, output) -> None:
            output.exit_logits.register_hook(reached.append)

        hook = self.model.register_forward_hook(watch)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            hook.remove()
        forgotten = [m for i, m in enumerate(config.exit_layers) if not any(g[:, i].any() for g in reached)]
        forgotten = [m for m in forgotten if m in self._learning_exits()]
        name = f"`{type(self).__name__}.compute_loss`"
        if self.aligns and self._kd_loss is None:
            raise ValueError(
                f"{name} does not call that of GamlTrainer, so nothing would be aligned "
                f"(`ga_mode={config.ga_mode!r}`). {OTHER_LOSSES}"
            )
        if forgotten:
            raise ValueError(f"{name} leaves out exits {forgotten}: its loss has no gradient there. {OTHER_LOSSES}")
        return loss

    def _learning_exits(self) -> set[int]:
        """The layers of the exits that have a part in L, as the config says."""
        config = self.model.config
        if self._bare_model.last_exit_alone:
            return set(config.exit_layers[-1:])
        weights = exit_weights(config.exit_layers, config.exit_loss_weights)
        students = {student for _, student in distillation_pairs(config.distillation, config.exit_layers)}
        return students | {m for m, weight in zip(config.exit_layers, weights, strict=True) if weight}

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
        config = self.model.config
        if not 0 <= self.args.label_smoothing_factor <= 1:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1]. Got {self.args.label_smoothing_factor}.")
        if self.compute_loss_func is not None and (
            self.aligns or config.class_weights or self._learning_exits() != {config.exit_layers[-1]}
        ):
            raise ValueError(
                "`compute_loss_func` takes the place of the loss of all exits (Eq. 1) and of `class_weights`, and is "
                f"for models that train their last exit alone. {OTHER_LOSSES}"
            )
        untrainable_exits = getattr(self.model, "untrainable_exits", None)  # which a PEFT model passes on
        if untrainable_exits is not None and (sentence := untrainable_exits()):
            raise ValueError(sentence)
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
            "`torch_compile` (a compiled graph can be walked back once, not twice)": self.args.torch_compile,
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

    # Checkpoints. The stock Trainer takes the folder of the highest number for the newest checkpoint, whole or not,
    # and leaves it to chance whether the older ones are gone by then.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint and not self._is_sharded:
            if resume_from_checkpoint is True:
                checkpoint = newest_complete_checkpoint(self.args.output_dir)
            else:
                checkpoint = check_named_checkpoint(resume_from_checkpoint)
            self._refuse_other_groups(checkpoint)
            self._tell_missing_state(checkpoint)
            resume_from_checkpoint = str(checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _refuse_other_groups(self, checkpoint: Path) -> None:
        """The optimizer's groups, and the learning rate of each, are stored: they cannot be others on a resume."""
        path, now = checkpoint / "config.json", self.model.config.exit_learning_rate_multiplier
        if not path.is_file():  # of PEFT
            return
        # A checkpoint that does not say it is of a time when exits learned at the rate of the encoder.
        then = json.loads(path.read_text(encoding="utf-8")).get("exit_learning_rate_multiplier", 1.0)
        if now != then:
            raise ValueError(
                f"`exit_learning_rate_multiplier` must be as in the checkpoint to go on from, `{checkpoint}`, where "
                f"it is {then}. Got {now}."
            )

    def _tell_missing_state(self, checkpoint: Path) -> None:
        """Warn of what makes a resume inexact; the stock Trainer says nothing of it, or at level INFO."""
        rng = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        effects = {
            # The stock Trainer loads both or none.
            "optimizer.pt": "the optimizer starts without its moments, the learning rate at the start of its schedule",
            "scheduler.pt": "the optimizer starts without its moments, the learning rate at the start of its schedule",
            rng: "dropout draws other random numbers",
        }
        if self.accelerator.scaler is not None:
            effects["scaler.pt"] = "the gradient scaler starts with its first scale"
        missing = {name: effect for name, effect in effects.items() if not (checkpoint / name).is_file()}
        if missing:
            logger.warning(
                f"`{checkpoint}` holds no {', '.join(f'`{name}`' for name in missing)}. Training goes on from its "
                f"weights, but {'; '.join(dict.fromkeys(missing.values()))}. It will not end as an uninterrupted one."
            )

    def _save_checkpoint(self, model, trial) -> None:
        if self._is_sharded:
            return super()._save_checkpoint(model, trial)
        args, run_folder = self.args, Path(self._get_output_dir(trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if args.should_save and folder.exists():  # of a killed save, or of a resume from an older one
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()  # or rank 0 would delete what another has written
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                write_seal(folder)
        except Exception as error:  # safetensors and torch raise nothing narrower on a full disk
            tensors = [*self.model.state_dict().values()]
            tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + 2**20
            why = explain_full_disk(error, run_folder, needed)
            if why is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"`{folder}` was not saved, and training stopped; the checkpoints before are as they were. {why} Then "
                "go on with `resume_from_checkpoint=True`."
            ) from error
        finally:
            args.save_total_limit = limit
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(run_folder, limit, [folder] if best is None else [folder, best])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle, which nothing reads; `trainer_state.json` and `run.json` tell more.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if isinstance(self.processing_class, PreTrainedTokenizerBase):
                save_tokenizer(self.processing_class, folder)

    def _load_best_model(self) -> None:
        if not self._is_sharded:
            verify_weights(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _run_epoch(self, *args, **kwargs) -> None:
        # The stock Trainer looks at this after a step only: resumed at its end, a training would make one too many.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # To the Hub. The stock Trainer would commit `training_args.bin`, a pickle, and a card of its own; it forgets the
    # handler and, in the middle of a training, the model's code.

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """
        Save the model to `output_dir` and push it: code, config, weights, tokenizer, handler and card in one commit.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait. Otherwise leave `output_dir` alone until the returned `Future` is done.
            token (`str`, *optional*): defaults to `args.hub_token`, then to that of `hf auth login`.
            revision (`str`, *optional*): the branch, made if it is not there. Defaults to `args.hub_revision`.
            private (`bool`, *optional*): of a repository made here. Defaults to `args.hub_private_repo`.
            card:
                What the card shall tell beside the training arguments, see [`~gaml_hf.hub.render_card`]: `base_model`,
                `dataset`, `license`, `metric_name` with `exit_scores`. A `README.md` in `output_dir` is replaced.

        Returns:
            `CommitInfo`, a `Future` of it with `blocking=False`, or `None` on all ranks but the first.

        Raises:
            ValueError: there is no tokenizer (`processing_class`), the weights are spread over ranks, or what was
                saved is not complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._refuse_unpushable()
        if self.hub_model_id is None:  # called without `push_to_hub=True`
            if private is not None:  # `init_hf_repo` of Transformers 5.17 reads it here alone
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self._save_complete(self.args.output_dir, card)
        push = self._pushing(self.args.output_dir, commit_message, token=token, revision=revision, private=private)
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by the stock Trainer after each save: push the model as it is now, in the background."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        at = (
            f"step {self.state.global_step}"
            if args.save_strategy == SaveStrategy.STEPS
            else f"epoch {round(self.state.epoch)}"
        )
        # A folder of its own, so that training may go on and save again while this one goes up.
        folder = staging_folder(Path(args.output_dir))
        self._save_complete(folder, {})
        push = self._pushing(folder, f"Training in progress, {at}")

        def push_and_forget() -> None:
            try:
                push()
            except Exception as error:  # in a thread that nobody asks for its result
                logger.warning(f"The push of {at} failed, and training goes on: {error}")
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        job = run_as_future(push_and_forget)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

    def _save_complete(self, folder: str | Path, card: dict[str, Any]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        arguments, config = self.args.to_dict(), model.config.to_dict()
        known = {
            "model_name": self.hub_model_id,
            "training_arguments": {key: arguments[key] for key in TOLD_ARGUMENTS}
            | {key: config[key] for key in TOLD_FIELDS},
            "seed": self.args.seed,
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        save_checkpoint(model, self.processing_class, folder, card=known | card)

    def _pushing(
        self,
        folder: str | Path,
        commit_message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Callable[[], CommitInfo]:
        return partial(
            push_checkpoint,
            folder,
            self.hub_model_id,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token or self.args.hub_token,
        )

    def _refuse_unpushable(self) -> None:
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                '`hub_strategy` must be "end" or "every_save": the others push optimizer states, which are pickles. '
                f'Got "{self.args.hub_strategy.value}".'
            )
        if self.processing_class is None:
            raise ValueError("A push needs the tokenizer, `GamlTrainer(processing_class=tokenizer)`. Got None.")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "GamlTrainer pushes a model that is whole on one rank, not one spread by DeepSpeed or FSDP. Save it, "
                "load it without them, and push it with `gaml_hf.hub.save_checkpoint` and `push_checkpoint`."
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
        if state.global_step:  # resumed
            self._resume_stopping(state, control)
        elif self.trainer._bare_model.exits_are_new:
            config = self.trainer.model.config
            # With mixed training the others start when their time comes, at what the layers tell then.
            self.trainer._start_exits(config.exit_layers[-1:] if config.mixed_training else config.exit_layers)

    def on_step_begin(self, args, state, control, **kwargs: Any):
        """Mixed training (Kubaty et al., 2025): first the last exit alone, then all."""
        trainer, model = self.trainer, self.trainer._bare_model
        first = math.ceil(model.config.mixed_training * state.max_steps)
        model.last_exit_alone = state.global_step < first
        if model.last_exit_alone:
            return
        if first and state.global_step == first and model.exits_are_new:
            trainer._start_exits(model.config.exit_layers[:-1])
        model.exits_are_new = False

    def on_train_end(self, args, state, control, **kwargs: Any):
        getattr(self.trainer.model, "new_exit_weights", set()).clear()

    def _resume_stopping(self, state, control) -> None:
        """What had come to its end does not go on. The stock Trainer forgets what early stopping has counted."""
        control.should_training_stop = state.global_step >= state.max_steps
        for callback in self.trainer.callback_handler.callbacks:
            saved = state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, EarlyStoppingCallback) and isinstance(saved, dict):
                counter = saved["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = counter
                control.should_training_stop |= counter >= callback.early_stopping_patience

    def on_step_end(self, args, state, control, model: Module | None = None, **kwargs: Any):
        trainer = self.trainer
        if not trainer.accelerator.optimizer_step_was_skipped:  # by a gradient scaler, which has seen the overflow
            # Clipping turns a gradient whose norm overflows into zero, and nothing else would tell.
            trainer._gradient_is_finite = trainer._gradient_is_finite & torch.as_tensor(trainer._grad_norm).isfinite()
        # The stock callback, which comes first, has set these.
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._check(args, state, model)

    def on_epoch_end(self, args, state, control, model: Module | None = None, **kwargs: Any):
        if self.trainer._loss_is_finite is None:
            raise ValueError("The train dataset gave no rows: not a step was made.")
        self._check(args, state, model)

    def _check(self, args, state, model: Module) -> None:
        trainer = self.trainer
        weights = get_total_norm([p.detach() for p in model.parameters()])  # finite only if every weight is
        if hasattr(weights, "full_tensor"):  # a sharded one's
            weights = weights.full_tensor()
        finite = torch.stack(
            [
                torch.as_tensor(flag, device=weights.device).float()
                for flag in (trainer._loss_is_finite, trainer._gradient_is_finite, weights.isfinite())
            ]
        )
        if args.world_size > 1:  # so that all ranks stop, and say the same
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        finite = finite.tolist()  # one wait for the GPU
        if not all(finite):
            what = ("the loss", "the gradient", "a weight")[finite.index(0)]
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
