"""
BERT-kL: the first k layers of BERT, fine-tuned with one classifier on top.

Source: Zhu et al., 2021, Sec. 6.3 ("directly reducing layers"), there the lower bound of all methods.
"""

from transformers import PreTrainedModel, Trainer

from .context import Context, load_backbone, make_trainer


def make(context: Context) -> Trainer:
    return make_trainer(context, load_backbone(context, context.layers))


def finish(trainer: Trainer) -> PreTrainedModel:
    return trainer.model
