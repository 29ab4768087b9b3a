"""What LayerDrop and BERT-of-Theseus share: an encoder that runs other layers in training than at inference."""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder


class SamplingEncoder(BertEncoder):
    """A BERT encoder whose training passes run `sampled_layers()`, and all others `kept_layers()`, of a subclass."""

    sampled_layers: Callable[[], Iterable[Module]]
    kept_layers: Callable[[], Iterable[Module]]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        for layer in self.sampled_layers() if self.training else self.kept_layers():
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def keep_layers(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """The model with a stock encoder of the kept layers alone: it saves and loads as any BERT."""
    kept = ModuleList(model.bert.encoder.kept_layers())
    model.config.num_hidden_layers = len(kept)
    encoder = BertEncoder(model.config)
    encoder.layer = kept
    model.bert.encoder = encoder.train(model.training)
    return model
