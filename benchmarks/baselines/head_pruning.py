"""
Head pruning: fine-tune BERT, then remove the attention heads that the loss depends on least.

Source: Michel et al., 2019, "Are Sixteen Heads Really Better than One?", Sec. 4. With a mask of ones on the heads'
outputs, the importance of a head is the mean over the training rows of |dL/dmask| (their Eq. 2), divided by the l2
norm of the importances in its layer. Heads go in the order of importance over all layers, without further training.

Zhu et al., 2021, name the method in Sec. 6.3, but Table 2 has no line for it, and it cannot reach half of BERT's cost:
the four projections of the heads are a third of a layer's weights, so that on short texts all heads together are 1.5x.
The default takes half of them: 1.2x, a little above the 40% that the source prunes from BERT without noticeable harm.
Evaluations during training are those of all heads; only `finish` prunes.
"""

import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel, Trainer
from transformers.pytorch_utils import prune_linear_layer

from .context import Context, load_backbone, make_trainer


class HeadPruningTrainer(Trainer):
    """The stock Trainer; it remembers the share of heads to prune."""

    share: float


def make(context: Context, *, share: float = 0.5) -> Trainer:
    """
    Args:
        share (`float`, *optional*, defaults to 0.5): share of all heads to prune, in `[0, 1)`. Each layer keeps one.
    """
    if not 0 <= share < 1:
        raise ValueError(f"`share` must lie in [0, 1), a share of all heads. Got {share}.")
    trainer = make_trainer(context, load_backbone(context), HeadPruningTrainer)
    trainer.share = share
    return trainer


def finish(trainer: Trainer) -> PreTrainedModel:
    """The pruned model. It lives in memory: `save_pretrained` would lose which layer has how many heads."""
    importance = head_importance(trainer)
    return prune(trainer.model, heads_to_prune(importance, trainer.share))


def head_importance(trainer: Trainer) -> Tensor:
    """
    Importance of every head, `(num_layers, num_heads)`, over the training rows; each layer has norm 1.

    The model runs without dropout. Each row has a mask of its own, so that its gradient is known before the absolute
    value is taken, at any batch size.
    """
    model = trainer.model.eval()
    layers = model.bert.encoder.layer
    size = layers[0].attention.self.attention_head_size
    importance = torch.zeros(len(layers), layers[0].attention.self.num_attention_heads, device=trainer.args.device)
    masks: list[Tensor] = []

    def mask_heads(dense, args):
        (heads,) = args  # (batch_size, sequence_length, hidden_size), head by head
        masks.append(torch.ones(len(heads), 1, importance.shape[1], device=heads.device, requires_grad=True))
        return heads * masks[-1].repeat_interleave(size, dim=-1)

    hooks = [layer.attention.output.dense.register_forward_pre_hook(mask_heads) for layer in layers]
    try:
        for batch in trainer.get_eval_dataloader(trainer.train_dataset):
            masks.clear()
            batch = trainer._prepare_inputs(batch)
            loss = model(**batch).loss * len(batch["labels"])  # a sum over rows: each mask sees its row's own gradient
            gradients = torch.autograd.grad(loss, masks)
            importance += torch.stack([gradient.abs().sum(dim=(0, 1)) for gradient in gradients])
    finally:
        for hook in hooks:
            hook.remove()
    importance = trainer.accelerator.reduce(importance)  # over ranks: all must prune the same heads
    return importance / importance.norm(dim=1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)


def heads_to_prune(importance: Tensor, share: float) -> dict[int, list[int]]:
    """The least important heads, `{layer: [heads]}` from 0; the most important one of each layer is not among them."""
    count = round(share * importance.numel())
    spared = importance.clone()
    spared[torch.arange(len(importance)), importance.argmax(dim=1)] = torch.inf
    order = [index for index in spared.flatten().argsort().tolist() if spared.flatten()[index] < torch.inf]
    pruned: dict[int, list[int]] = {}
    for index in order[:count]:
        layer, head = divmod(index, importance.shape[1])
        pruned.setdefault(layer, []).append(head)
    return pruned


def prune(model: BertForSequenceClassification, heads: dict[int, list[int]]) -> BertForSequenceClassification:
    """Cut the heads out of the weights: the answers are those of the model with these heads masked."""
    for i, gone in heads.items():
        attention = model.bert.encoder.layer[i].attention
        own, output = attention.self, attention.output
        kept = [head for head in range(own.num_attention_heads) if head not in gone]
        rows = torch.arange(own.all_head_size).view(-1, own.attention_head_size)[kept].flatten()
        for name in ("query", "key", "value"):
            setattr(own, name, prune_linear_layer(getattr(own, name), rows))
        output.dense = prune_linear_layer(output.dense, rows, dim=1)
        own.num_attention_heads, own.all_head_size = len(kept), len(rows)
    return model
