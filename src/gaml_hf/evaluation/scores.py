"""The score of every exit, from one pass over the data."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from .checks import check_exit_logits, check_labels, main_score


# `(predictions, references)`, both of shape `(num_rows,)`, to the scores by name; `GlueMetric.compute`, say.
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Share of the rows that are right, as `{"accuracy": ...}` in [0, 1]; both of shape `(num_rows,)`."""
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def score_exits(
    exit_logits: np.ndarray | Tensor, labels: np.ndarray | Tensor, exit_layers: Sequence[int], score: Score
) -> dict[int, dict[str, float]]:
    """
    Score of each exit, as if every row left there (budgeted exiting; Fig. 4 of Zhu et al., 2021).

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        labels (`np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): classes.
        exit_layers (`list[int]`): the layers of the exits, from 1; `config.exit_layers`.
        score (`Callable`): `(predictions, references) -> dict[str, float]`, `GlueMetric.compute` say.

    Returns:
        `dict[int, dict[str, float]]`: the scores by exit layer.

    Raises:
        ValueError: shapes do not agree, there is no row, or a logit is not finite.
    """
    exit_logits = check_exit_logits(exit_logits, exit_layers)
    labels = check_labels(labels, exit_logits)
    predictions = exit_logits.argmax(dim=-1).numpy()  # (num_rows, num_exits)
    return {m: score(predictions[:, i], labels) for i, m in enumerate(exit_layers)}


def exit_mean(scores: Mapping[int, Mapping[str, float]], main_metric: str) -> float:
    """
    Mean of the main metric over all exits, by which the paper chooses checkpoints (Zhu et al., 2021, Sec. 6.4).

    Args:
        scores (`dict[int, dict[str, float]]`): what `score_exits` returned.
        main_metric (`str`): one of the names in it.
    """
    return float(np.mean([main_score(scores[m], main_metric) for m in scores]))


def overthinking(scores: Mapping[int, Mapping[str, float]], main_metric: str) -> dict[str, int | float]:
    """
    Does the deepest exit answer best? Where it does not, the model over-thinks (Zhu et al., 2021, Appendix A, Fig. 5).

    Args:
        scores (`dict[int, dict[str, float]]`): what `score_exits` returned.
        main_metric (`str`): one of the names in it.

    Returns:
        `dict`: `best_exit` (the shallowest among equals), `best_score`, `last_exit`, `last_score`, and `gap`, best
        minus last: 0 where nothing is over-thought.
    """
    main = {m: main_score(scores[m], main_metric) for m in sorted(scores)}
    best, last = max(main, key=main.get), max(main)
    return {
        "best_exit": best,
        "best_score": main[best],
        "last_exit": last,
        "last_score": main[last],
        "gap": main[best] - main[last],
    }


def one_class_exits(exit_logits: np.ndarray | Tensor, exit_layers: Sequence[int]) -> list[int]:
    """
    The exits that answer every row with one and the same class: they have learned nothing yet, and what they agree on
    is no evidence.

    Args:
        exit_logits (`np.ndarray` or `torch.Tensor` of shape `(num_rows, num_exits, num_labels)`): of every exit.
        exit_layers (`list[int]`): the layers of the exits, from 1; `config.exit_layers`.

    Returns:
        `list[int]`: their layers. None of one row.
    """
    predictions = check_exit_logits(exit_logits, exit_layers).argmax(dim=-1)  # (num_rows, num_exits)
    same = (predictions == predictions[:1]).all(dim=0) & (len(predictions) > 1)
    return [m for m, is_same in zip(exit_layers, same.tolist(), strict=True) if is_same]
