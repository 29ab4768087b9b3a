"""What DistilBERT and BERT-PKD share: a Trainer with a frozen teacher, and the loss on its logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """
    KL(teacher || student) of the softened answers, mean over rows, times temperature^2 (Hinton et al., 2015, Sec. 2).

    Args:
        student_logits (`torch.Tensor` of shape `(batch_size, num_labels)`).
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`): no gradient flows into them.
        temperature (`float`): above 0.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class DistillationTrainer(Trainer):
    """
    Trains a student on `loss(student_output, teacher_output)`; its evaluations are those of the stock Trainer.

    Args:
        teacher (`PreTrainedModel`): frozen, and run without dropout.
        loss (`Callable`): takes two outputs, of which the student's has `loss` (cross-entropy), and gives a scalar.
        hidden_states (`bool`, *optional*, defaults to `False`): whether both outputs have `hidden_states`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        loss: Callable[[SequenceClassifierOutput, SequenceClassifierOutput], Tensor],
        hidden_states: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        student = self.model.config
        if teacher.config.vocab_size != student.vocab_size or teacher.config.num_labels != student.num_labels:
            raise ValueError(
                "`teacher` must have the student's vocabulary and classes: "
                f"{student.vocab_size} tokens, {student.num_labels} labels. Got {teacher.config.vocab_size} tokens, "
                f"{teacher.config.num_labels} labels."
            )
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.distillation_loss = loss
        self.hidden_states = hidden_states

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**inputs, output_hidden_states=self.hidden_states)
        seen_by_teacher = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_output = self.teacher(**seen_by_teacher, output_hidden_states=self.hidden_states)
        loss = self.distillation_loss(output, teacher_output)
        return (loss, output) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        # A DistilBERT has no `token_type_ids`: the stock method would drop them from the teacher's inputs as well.
        # Its `forward` passes over what it does not know.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += ["token_type_ids"] * ("token_type_ids" not in self._signature_columns)
