"""
The static baselines of Table 2 (Zhu et al., 2021, Sec. 6.3), behind one interface.

Each module names its method and source, and has

    make(context, **hyper_parameters) -> Trainer    ready to train; but for head pruning, its evaluations are those of
                                                    the model used at inference
    finish(trainer) -> PreTrainedModel              that model, which the trainer then evaluates as well

`make` sets the seed of `context.arguments`, so that all methods start from the same classifier. Where a paper searches
a hyper-parameter and so gives no value, the default is from its code or its grid; the docstring says which.
"""

from types import ModuleType

from . import distilbert, head_pruning, layer_drop, pkd, theseus, truncated
from .context import Context


BASELINES: dict[str, ModuleType] = {
    "truncated": truncated,
    "distilbert": distilbert,
    "pkd": pkd,
    "layer_drop": layer_drop,
    "theseus": theseus,
    "head_pruning": head_pruning,
}

__all__ = ["BASELINES", "Context"]
