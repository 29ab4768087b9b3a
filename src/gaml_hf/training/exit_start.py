"""
What new exits know before the first step: what the pre-trained layers already tell.

One pass over some training rows gives that, and says whether an exit has anything to read (docs/choices.md).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn


NUM_ROWS = 1000  # of the pass
LEAST_VARIATION = 0.05  # below which an exit's input is nearly the same for every text
RELATIVE_FLOOR = 1e-6  # of a feature's variance, beside the mean of all features
INVERSE_REGULARIZATION = 0.003  # `C` of the regression, on standardized inputs


@torch.no_grad()
def collect_exit_states(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], gather: Callable[[Any], Any] = lambda part: part
) -> tuple[Tensor, Tensor]:
    """
    What each exit reads of some rows.

    Args:
        model ([`GamlBertForSequenceClassification`]): run in evaluation mode, and left as it was.
        batches: as a DataLoader gives them, with `labels`.
        gather (`Callable`, *optional*): makes of one batch's tensors those of all ranks.

    Returns:
        `tuple`: the states `(num_rows, num_exits, hidden_size)`, float32 at least, and the labels `(num_rows,)`.
    """
    was_training = model.training
    model.eval()
    states, labels = [], []
    try:
        for batch in batches:
            part = gather((model(**batch, output_exit_states=True).exit_states, batch["labels"]))
            states.append(part[0])
            labels.append(part[1])
    finally:
        model.train(was_training)
    states = torch.cat(states)
    return states.to(torch.promote_types(states.dtype, torch.float32)), torch.cat(labels)


def input_variation(states: Tensor) -> list[float]:
    """
    How much each exit's input varies from text to text, beside its length: the norm of the features' standard
    deviations over the norm of their mean.

    Args:
        states (`torch.Tensor` of shape `(num_rows, num_exits, hidden_size)`).

    Returns:
        `list[float]`: one for each exit, from 0. Below 0.05 an exit has next to nothing to read.
    """
    deviation = states.std(dim=0, correction=0).norm(dim=-1)  # (num_exits,)
    return (deviation / states.mean(dim=0).norm(dim=-1).clamp(min=torch.finfo(states.dtype).tiny)).tolist()


@torch.no_grad()
def warm_start(model: nn.Module, states: Tensor, labels: Tensor, exit_layers: Iterable[int] | None = None) -> None:
    """
    Set each exit's linear layer to a logistic regression on `states`. One that is frozen stays as it is.

    Args:
        model ([`GamlBertForSequenceClassification`]): its `exit_norm` is applied first.
        states (`torch.Tensor` of shape `(num_rows, num_exits, hidden_size)`): see [`collect_exit_states`].
        labels (`torch.LongTensor` of shape `(num_rows,)`): classes. One that no row has becomes unlikely.
        exit_layers (`list[int]`, *optional*): do so for these exits; all by default.
    """
    y = labels.cpu().numpy()
    present = np.unique(y)
    if len(present) < 2:  # there is nothing to tell apart
        return
    parameters = exit_parameters(model)
    for i, m in enumerate(model.config.exit_layers):
        if exit_layers is not None and m not in exit_layers or (m, "weight") not in parameters:
            continue
        x = model.scale_exit_state(states[:, i]).cpu().double()  # an Apple GPU has no float64
        mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
        # Some features of a pre-trained encoder are constant but for rounding, which must not be blown up.
        deviation = (variance + RELATIVE_FLOOR * variance.mean()).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        fit = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=500)
        fit.fit(((x - mean) / deviation).numpy(), y)
        # Of two classes it has one row, the logit of the second against the first.
        rows = fit.coef_ if len(present) > 2 else np.concatenate([-fit.coef_ / 2, fit.coef_ / 2])
        offsets = fit.intercept_ if len(present) > 2 else np.concatenate([-fit.intercept_ / 2, fit.intercept_ / 2])
        weight = x.new_zeros(model.config.num_labels, x.shape[1])
        bias = x.new_full((model.config.num_labels,), offsets.min() - np.log(len(y)))
        weight[present] = torch.as_tensor(rows) / deviation
        bias[present] = torch.as_tensor(offsets) - weight[present] @ mean
        parameters[m, "weight"].copy_(weight)
        parameters[m, "bias"].copy_(bias)


def exit_parameters(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """
    Of the linear exits that are trained, by layer and name. PEFT keeps each as it was beside its copy: a copy that no
    longer is the same comes from an adapter, was trained already, and is left out.
    """
    found, everything = {}, dict(model.named_parameters())
    for name, parameter in everything.items():
        match = re.search(r"(?:^|\.)exit_classifiers\.(\d+)\.(modules_to_save\.\w+\.)?(weight|bias)$", name)
        if not match or not parameter.requires_grad:
            continue
        if match[2] and not torch.equal(parameter, everything[name.replace(match[2], "original_module.")]):
            continue
        found[int(match[1]), match[3]] = parameter
    return found
