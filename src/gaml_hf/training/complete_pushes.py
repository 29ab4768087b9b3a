"""To the Hub out of a training: each push is one commit of a complete repository."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from gaml_hf.hub import TOLD_ARGUMENTS, TOLD_FIELDS, push_checkpoint, save_checkpoint
from gaml_hf.hub.folders import staging_folder


logger = logging.get_logger(__name__)


class CompletePushes:
    """
    A part of [`RobustTrainer`]. The stock Trainer would commit `training_args.bin`, a pickle, and a card of its own;
    it forgets the handler and, in the middle of a training, the model's code.
    """

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
        stack = ExitStack()
        folder = stack.enter_context(staging_folder(Path(args.output_dir)))
        self._save_complete(folder, {})
        push = self._pushing(folder, f"Training in progress, {at}")

        def push_and_forget() -> None:
            try:
                push()
            except Exception as error:  # in a thread that nobody asks for its result
                logger.warning(f"The push of {at} failed, and training goes on: {error}")
            finally:
                stack.close()

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
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                "GamlTrainer pushes whole models, and of one with adapters it would push those alone. Train without "
                "`push_to_hub`, merge them (`merge_and_unload()`), and push the model with "
                "`gaml_hf.hub.save_checkpoint` and `push_checkpoint`; or the adapters by PEFT's own `push_to_hub`."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "GamlTrainer pushes a model that is whole on one rank, not one spread by DeepSpeed or FSDP. Save it, "
                "load it without them, and push it with `gaml_hf.hub.save_checkpoint` and `push_checkpoint`."
            )
