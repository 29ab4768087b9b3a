"""What a baseline is given, and how it gets its first model and its Trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments, set_seed


@dataclass
class Context:
    """
    Args:
        backbone (`str`): folder or Hub name of the BERT that was not fine-tuned.
        num_labels (`int`): number of classes.
        arguments (`TrainingArguments`): of this one training run.
        trainer_arguments (`dict`): further keywords of a Trainer: `train_dataset`, `eval_dataset`, `data_collator`,
            `compute_metrics`, `callbacks`, `processing_class`.
        teacher (`Callable[[], PreTrainedModel]`): gives a full-depth `BertForSequenceClassification` fine-tuned with
            the same seed. Only the methods that learn from one ask for it.
        plain (`Callable[[], PreTrainedModel]`): gives the same as a GAML-BERT with one exit, at the last layer.
        layers (`int`): the depth to reach; half of the backbone's in the paper.
        student (`str`, *optional*): for `distilbert`, a pre-trained student; it must read the teacher's vocabulary.
    """

    backbone: str
    num_labels: int
    arguments: TrainingArguments
    trainer_arguments: dict[str, Any]
    teacher: Callable[[], PreTrainedModel]
    plain: Callable[[], PreTrainedModel]
    layers: int
    student: str | None = None


def load_backbone(context: Context, layers: int | None = None) -> BertForSequenceClassification:
    """The backbone with a new classifier: its first `layers` layers, or all."""
    set_seed(context.arguments.seed)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    model = BertForSequenceClassification.from_pretrained(context.backbone, num_labels=context.num_labels, **depth)
    return for_trainer(model)


def for_trainer(model: PreTrainedModel) -> PreTrainedModel:
    # Else the stock Trainer takes the mean over a micro-batch for one over the whole batch, and the gradient grows
    # with the number of accumulation steps: https://github.com/huggingface/transformers/issues/47688
    model.accepts_loss_kwargs = False
    return model


def make_trainer(context: Context, model: PreTrainedModel, cls: type[Trainer] = Trainer, **more: Any) -> Trainer:
    return cls(model=model, args=context.arguments, **context.trainer_arguments, **more)


def layers_per_module(context: Context, depth: int) -> int:
    """How many of `depth` layers become one, where that must be a whole number."""
    if not 1 <= context.layers <= depth or depth % context.layers:
        raise ValueError(
            f"`layers` must divide the {depth} layers of the full model, as {depth // 2} does if {depth} is even. Got "
            f"`layers={context.layers}`."
        )
    return depth // context.layers
