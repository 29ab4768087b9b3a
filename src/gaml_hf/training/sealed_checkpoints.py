"""Training checkpoints that are whole or not there, and a training that goes on as if never interrupted."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from gaml_hf.hub.folders import (
    check_named_checkpoint,
    explain_full_disk,
    newest_complete_checkpoint,
    rotate_checkpoints,
    save_tokenizer,
    write_seal,
)
from gaml_hf.models.checksums_gaml import verify_weights


logger = logging.get_logger(__name__)


class SealedCheckpoints:
    """
    A part of [`RobustTrainer`]. Each training checkpoint is sealed with checksums when it is whole, and only then are
    older ones deleted (`save_total_limit`). `train(resume_from_checkpoint=True)` goes on from the newest that is
    whole, and ends with the weights of a training that was never interrupted. With DeepSpeed and FSDP checkpoints are
    the stock Trainer's, which takes the folder of the highest number for the newest checkpoint, whole or not, and
    leaves it to chance whether the older ones are gone by then.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint and not self._is_sharded:
            if resume_from_checkpoint is True:
                checkpoint = newest_complete_checkpoint(self.args.output_dir)
            else:
                checkpoint = check_named_checkpoint(resume_from_checkpoint)
            self._check_resume(checkpoint)
            self._tell_missing_state(checkpoint)
            resume_from_checkpoint = str(checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resume(self, checkpoint: Path) -> None:
        """Raise where what the checkpoint holds is not for this training."""

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

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


class StoppingMemory(TrainerCallback):
    """What had come to its end does not go on. The stock Trainer forgets what early stopping has counted."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        if not state.global_step:
            return
        control.should_training_stop = state.global_step >= state.max_steps
        for callback in self.trainer.callback_handler.callbacks:
            saved = state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, EarlyStoppingCallback) and isinstance(saved, dict):
                counter = saved["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = counter
                control.should_training_stop |= counter >= callback.early_stopping_patience
