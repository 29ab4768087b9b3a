"""Rows that a training can read, each counted once and in its order."""

from typing import Any

from accelerate.utils import find_batch_size, slice_tensors
from transformers.trainer_utils import has_length

from gaml_hf.data.checks import TOKENS, CheckedCollator, check_dataset


class CheckedRows:
    """
    A part of [`RobustTrainer`]. Datasets are checked before the first step, see
    [`~gaml_hf.data.checks.check_dataset`], and batches as they come. Predictions are in the order of the rows,
    whatever `train_sampling_strategy` says, and a row that is there twice to fill up a batch counts once in the loss
    of an evaluation.
    """

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
            max_length=getattr(config, "max_input_length", None),  # which images have not
            inputs=("pixel_values",) if self.model.main_input_name == "pixel_values" else TOKENS,
            needs_labels=split != "test",
            # Else a collator of one's own may make labels and tokens out of other columns.
            columns_are_final=getattr(self.data_collator, "__module__", "").startswith("transformers."),
        )

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        split = {"Training": "train", "Evaluation": "eval"}.get(description, description)
        self.data_collator = CheckedCollator(
            collator, split, num_labels=self.model.config.num_labels, needs_labels=split != "test"
        )
        # The rows of a last batch that is not full are left out of a step, never out of a score or a prediction.
        self.args.dataloader_drop_last = drop_last and split == "train"
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def _get_eval_sampler(self, eval_dataset):
        # None is the rows' own order. With "group_by_length" the stock Trainer would sort them as it does in training,
        # and what is said of each row (predictions in a file, lengths) would be said of another.
        return None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        batch_size = 0 if loss is None else find_batch_size(inputs)
        own = self._rows_of_its_own(batch_size)
        if 0 < own < batch_size:
            # The stock loop takes this loss once for each row of its own; it is to be theirs alone. Not by `model`:
            # DistributedDataParallel would wait for the other ranks.
            loss, _, _ = super().prediction_step(self.model, slice_tensors(inputs, slice(own)), True)
        return loss, logits, labels

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
