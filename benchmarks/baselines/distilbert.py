"""
DistilBERT at the stage of fine-tuning: half of BERT's layers learn from the answers of a fine-tuned BERT.

Source: Sanh et al., 2019, "DistilBERT, a distilled version of BERT", Sec. 3 (the student takes "one layer out of
two") and Sec. 4 (a second distillation, from a fine-tuned BERT). The paper distils in pre-training: for that, set
`context.student` to a DistilBERT checkpoint. Without one the student starts from layers of the backbone. Zhu et al.,
2021, footnote 4, count the method among those that distil in fine-tuning.

Read elsewhere, for the paper has no number: the layers are those of its code for 12 layers (0, 2, 4, 7, 9, 11 from 0),
which are the evenly spaced ones with both ends; temperature 2 and equal weights are the defaults of its SQuAD program.
"""

from torch import linspace
from torch.nn import ModuleList
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, set_seed

from .context import Context, for_trainer, load_backbone, make_trainer
from .distillation import DistillationTrainer, soft_target_loss


def make(context: Context, *, temperature: float = 2.0, alpha: float = 0.5, first_layers: bool = False) -> Trainer:
    """
    Args:
        temperature (`float`, *optional*, defaults to 2.0): of both answers in the distillation loss; above 0.
        alpha (`float`, *optional*, defaults to 0.5): weight of the distillation loss in `[0, 1]`; the rest is that of
            the cross-entropy.
        first_layers (`bool`, *optional*, defaults to `False`): start from the first layers, not from evenly spaced.
    """
    if context.student is not None:
        set_seed(context.arguments.seed)
        student = for_trainer(
            AutoModelForSequenceClassification.from_pretrained(context.student, num_labels=context.num_labels)
        )
    else:
        student = load_backbone(context)
        encoder, depth = student.bert.encoder, student.config.num_hidden_layers
        kept = range(context.layers) if first_layers else spaced_layers(depth, context.layers)
        encoder.layer = ModuleList(encoder.layer[i] for i in kept)
        student.config.num_hidden_layers = context.layers

    def loss(student_output, teacher_output):
        soft = soft_target_loss(student_output.logits, teacher_output.logits, temperature)
        return alpha * soft + (1 - alpha) * student_output.loss

    return make_trainer(context, student, DistillationTrainer, teacher=context.teacher(), loss=loss)


def spaced_layers(depth: int, layers: int) -> list[int]:
    """`layers` of `depth` layers, from 0, evenly spaced, the first and the last among them."""
    if not 2 <= layers <= depth:
        raise ValueError(
            f"`layers` must be between 2 and {depth}, the layers of the backbone, for the first and the last are kept "
            f"(or set `first_layers=True`). Got `layers={layers}`."
        )
    return [round(position) for position in linspace(0, depth - 1, layers).tolist()]


def finish(trainer: Trainer) -> PreTrainedModel:
    return trainer.model
