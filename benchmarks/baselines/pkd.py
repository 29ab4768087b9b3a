"""
BERT-PKD: the first layers of BERT learn from the answers and the [CLS] states of a fine-tuned BERT.

    L = (1 - alpha) * CE + alpha * KD + beta * PT

Source: Sun et al., 2019, "Patient Knowledge Distillation for BERT Model Compression", Sec. 3. PT compares [CLS] states
of unit length; the last layer, which the classifier reads, has none. The student's layer j learns from the teacher's
layer j * r (PKD-Skip; r is the ratio of depths) or from its j-th of the last (PKD-Last): of 12 layers, 2, 4, 6, 8, 10
or 7, 8, 9, 10, 11.

The paper searches alpha in {0.2, 0.5, 0.7}, the temperature in {5, 10, 20} and beta in {10, 100, 500, 1000}. The
defaults are the most frequent choices in the results that its authors published for 6 layers. There, PT is
the mean over the elements of a state and over layers and rows, where the paper writes a sum; so it is here, for a beta
of that grid to mean the same. KD is the mean over rows; in their code also over classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from .context import Context, layers_per_module, load_backbone, make_trainer
from .distillation import DistillationTrainer, soft_target_loss


def make(
    context: Context, *, alpha: float = 0.5, temperature: float = 10.0, beta: float = 100.0, last: bool = False
) -> Trainer:
    """
    Args:
        alpha (`float`, *optional*, defaults to 0.5): weight of the distillation of answers, in `[0, 1]`.
        temperature (`float`, *optional*, defaults to 10.0): of both answers there; above 0.
        beta (`float`, *optional*, defaults to 100.0): weight of the distillation of states, at least 0.
        last (`bool`, *optional*, defaults to `False`): PKD-Last instead of PKD-Skip.
    """
    teacher = context.teacher()
    taught_by = teacher_layers(context, teacher.config.num_hidden_layers, last)

    def loss(student_output, teacher_output):
        soft = soft_target_loss(student_output.logits, teacher_output.logits, temperature)
        # `hidden_states[0]` are the embeddings; layer j is at j.
        patience = patient_loss(
            [student_output.hidden_states[j + 1] for j in range(len(taught_by))],
            [teacher_output.hidden_states[j] for j in taught_by],
        )
        return (1 - alpha) * student_output.loss + alpha * soft + beta * patience

    student = load_backbone(context, context.layers)
    return make_trainer(context, student, DistillationTrainer, teacher=teacher, loss=loss, hidden_states=True)


def teacher_layers(context: Context, depth: int, last: bool) -> list[int]:
    """For each layer of the student but its last, the teacher's layer that it learns from, from 1."""
    ratio = layers_per_module(context, depth)
    if context.layers < 2:
        raise ValueError(f"`layers` must be at least 2: a layer before the last one learns. Got {context.layers}.")
    return [j + depth - context.layers if last else j * ratio for j in range(1, context.layers)]


def patient_loss(student_states: list[Tensor], teacher_states: list[Tensor]) -> Tensor:
    """
    Mean squared difference of [CLS] states of unit length (PT of the paper, as a mean).

    Args:
        student_states (`list[torch.Tensor]` of shape `(batch_size, sequence_length, hidden_size)`): one per layer.
        teacher_states (`list[torch.Tensor]`): likewise, as many and of the same hidden size.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    student, teacher = (
        F.normalize(torch.stack([state[:, 0] for state in states]), dim=-1)
        for states in (student_states, teacher_states)
    )
    return F.mse_loss(student, teacher)


def finish(trainer: Trainer) -> PreTrainedModel:
    return trainer.model
