"""Numbers that are not finite stop a training before they are logged, evaluated or saved."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy
from transformers.utils import logging


logger = logging.get_logger(__name__)


class FiniteNumbers:
    """
    A part of [`RobustTrainer`]. A loss, gradient, weight or answer that is not finite stops all ranks; the stock
    Trainer leaves NaN out of the loss it reports and goes on. An evaluation that fails in the middle of a training
    costs nothing: the model is saved first.
    """

    def _reset(self) -> None:
        """Called where a training begins."""
        self._grad_norm: Tensor | float = 0.0  # of the last step
        # So far, in this training; None before the first step.
        self._loss_is_finite: Tensor | None = None
        self._gradient_is_finite: Tensor | bool = True

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._note_loss(loss)
        return loss

    def _note_loss(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss)
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite

    def evaluation_loop(self, dataloader, description, *args, **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if not output.num_samples:
            raise ValueError(f"{description}: the dataset gave no rows.")
        # A list of batches with `eval_do_concat_batches=False`, whose rows are counted on.
        batches, start = output.predictions if isinstance(output.predictions, list) else [output.predictions], 0
        for predictions in batches:
            arrays = [x for x in (predictions if isinstance(predictions, tuple) else [predictions]) if np.ndim(x)]
            for values in arrays:
                if not np.isfinite(values).all():
                    row = start + int(np.argwhere(~np.isfinite(values))[0][0])
                    raise FloatingPointError(
                        f"{description}: the logits of row {row} are not finite (NaN or infinite), so it has no "
                        "answer. Look at the weights of this checkpoint, or evaluate in float32."
                    )
            start += len(arrays[0]) if arrays else 0
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
        except Exception as error:
            if type(error).__name__ == "TrialPruned":  # Optuna's word for a trial that is not worth going on with
                raise
            if self.args.save_strategy != SaveStrategy.NO and self.state.global_step > 0:
                logger.error(f"The evaluation failed. The model is saved as it is at step {self.state.global_step}.")
                self._save_checkpoint(self.model_wrapped, trial)
            raise

    def _get_grad_norm(self, *args, **kwargs):
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm


class FiniteGuard(TrainerCallback):
    """
    Starts each training afresh, and stops it before a NaN is logged, evaluated or saved. The weights are looked at as
    well as the loss: a NaN gradient shows in the loss one step later only.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        # Not in `train`, which tries several times where `auto_find_batch_size` is on.
        self.trainer._reset()

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
            if state.global_step:  # of a training that was resumed at the end of a pass
                return
            raise ValueError("The train dataset gave no rows: not a step was made.")
        self._check(args, state, model)

    def _check(self, args, state, model: Module) -> None:
        trainer = self.trainer
        # Finite only if every weight is. Those of a quantized encoder are whole numbers, and always are.
        weights = get_total_norm([p.detach() for p in model.parameters() if p.is_floating_point()])
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
