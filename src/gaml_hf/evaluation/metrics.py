"""What a Trainer is told of the exits at each evaluation."""

from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from .checks import check_labels, main_score
from .choice import replay
from .scores import Score, exit_mean, one_class_exits, overthinking, score_exits
from .speed import layer_speed_up


logger = logging.get_logger(__name__)


def warn_of_one_class(exit_logits: np.ndarray | Tensor, config: Any) -> None:
    """Warn where the config's exit policy lets rows leave at exits that answer everything with one class."""
    blind = one_class_exits(exit_logits, config.exit_layers)
    _, exit_layer = replay(exit_logits, config)
    share = np.isin(exit_layer, blind).mean()
    if share:
        logger.warning(
            f"{share:.0%} of the rows leave at the exits {str(blind)[1:-1]}, which answer every row with one class. "
            "Choose a slower policy"
            + (", `entropy` or `max_prob` in place of `patience`," if config.exit_strategy == "patience" else "")
            + " or train longer."
        )


class ExitMetrics:
    """
    `compute_metrics` of a Trainer: one evaluation scores every exit, and the config's exit policy.

    Its keys (to which the Trainer adds `eval_`) are those of `score`, for the answers of the policy; `speed_up`, in
    layers, of the policy; `exit_{m}`, the main metric of exit m; `exit_mean`, by which to choose checkpoints
    (`metric_for_best_model="exit_mean"`); `best_exit`; and `one_class_exits`, how many exits answer every row with one
    class, which are named in the log.

    It needs the logits of every exit. `ignore_keys` asks a [`GamlTrainer`] for them; the stock Trainer takes it as
    `train(ignore_keys_for_eval=ExitMetrics.ignore_keys)` and `evaluate(ignore_keys=ExitMetrics.ignore_keys)`.

    Args:
        config ([`GamlBertConfig`]): of the model that is evaluated; its policy is read at each call.
        score (`Callable`): `(predictions, references) -> dict[str, float]`.
        main_metric (`str`): the name of the one score that is compared.

    Raises:
        ValueError: when called, where the predictions lack the exits.
    """

    ignore_keys: ClassVar[list[str]] = ["ce_loss", "kd_loss"]  # of the output; what else it has are the predictions

    def __init__(self, config: Any, score: Score, main_metric: str):
        self.config, self.score, self.main_metric = config, score, main_metric

    def __call__(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = eval_prediction.predictions, eval_prediction.label_ids
        if isinstance(predictions, list) and isinstance(predictions[0], tuple):  # `eval_do_concat_batches=False`
            predictions = tuple(np.concatenate(batches) for batches in zip(*predictions, strict=True))
            labels = np.concatenate(labels)
        if not isinstance(predictions, tuple) or len(predictions) < 3:
            raise ValueError(
                "`predictions` must be the tuple (logits, exit_layer, exit_logits), which the model returns for rows "
                "with labels and a stock Trainer keeps with `ignore_keys=ExitMetrics.ignore_keys` (in `train`, "
                f"`ignore_keys_for_eval`). Got {type(predictions).__name__}."
            )
        exit_logits = predictions[2]
        scores = score_exits(exit_logits, labels, self.config.exit_layers, self.score)
        answers, exit_layer = replay(exit_logits, self.config)
        blind = one_class_exits(exit_logits, self.config.exit_layers)
        if blind:
            logger.info(f"Exits {str(blind)[1:-1]} answer every row with one class.")
        return {
            **self.score(answers, check_labels(labels, exit_logits)),
            "speed_up": layer_speed_up(exit_layer, self.config.num_hidden_layers),
            "exit_mean": exit_mean(scores, self.main_metric),
            "best_exit": overthinking(scores, self.main_metric)["best_exit"],
            "one_class_exits": len(blind),
            **{f"exit_{m}": main_score(scores[m], self.main_metric) for m in scores},
        }
