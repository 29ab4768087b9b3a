"""A Trainer that loses nothing: what every training here stands on, with exits or without."""

from transformers import Trainer, TrainerCallback

from .checked_rows import CheckedRows
from .complete_pushes import CompletePushes
from .finite_numbers import FiniteGuard, FiniteNumbers
from .sealed_checkpoints import SealedCheckpoints, StoppingMemory


class RobustTrainer(FiniteNumbers, CheckedRows, SealedCheckpoints, CompletePushes, Trainer):
    """
    A stock Trainer, and four things that it leaves to chance, each in a file of its own: [`FiniteNumbers`],
    [`CheckedRows`], [`SealedCheckpoints`] and [`CompletePushes`].

    Raises:
        ValueError: at construction with `push_to_hub=True`, where a push would not be complete or would hold a pickle.
            When training starts, where a dataset is empty, lacks a column, or holds a wrong label, or the checkpoint
            to resume from is not complete.
        FloatingPointError: the loss, the gradient or the weights are no longer finite, on any rank: all ranks stop,
            and nothing is saved after that. Also where an answer in an evaluation or a prediction is not finite.
        OSError: the disk is full. The checkpoints before are as they were.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            self._refuse_unpushable()
        self._reset()
        self._refuse_unsupported()
        for callback in (FiniteGuard(self), _Refusals(self), StoppingMemory(self)):
            self.add_callback(callback)

    def _refuse_unsupported(self) -> None:
        """Raise where model and arguments do not go together."""


class _Refusals(TrainerCallback):
    """Looks again where training starts: `model_init` and checkpointing are known only then."""

    def __init__(self, trainer: RobustTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._refuse_unsupported()
