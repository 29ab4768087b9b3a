"""
The seven GLUE classification tasks of the paper (Zhu et al., 2021, Sec. 6.1) and their metric.

`GLUE_TASKS` says where a task's texts, labels and splits are, and how the paper trained it (Table 7). [`GlueMetric`]
scores one list of predictions; with twelve exits it is called twelve times per evaluation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """
    One GLUE task: its columns, labels, splits and metrics, and the recipe of Table 7.

    Args:
        name (`str`): configuration name in `nyu-mll/glue`, for example `"sst2"`.
        text_columns (`tuple[str, ...]`): the one or two text columns, in the order in which they are encoded.
        label_names (`tuple[str, ...]`): names of the labels; the position is the class index.
        metrics (`tuple[str, ...]`): keys of the scores that [`GlueMetric`] returns, the official ones of GLUE.
        main_metric (`str`): the one of `metrics` to put beside Table 2. For MRPC and QQP it is F1: the paper only says
            that metrics follow GLUE, but 70.4 for BERT-base on the test set of QQP can only be F1 (the accuracy is
            near 89). Checkpoints are chosen by [`selection_score`] instead.
        learning_rate (`float`): Table 7.
        warmup_epochs (`float`): Table 7, warm-up steps as a multiple of the steps in an epoch.
        batch_size (`int`): Table 7, per step over all devices. MNLI and QQP say 256 there, which the grid of Sec. 6.4
            (16, 32, 128) does not contain.
        alpha (`float`): Table 7, the KD weight α of Eqs. 2, 6 and 7.
        submission_files (`tuple[str, ...]`): file names of the GLUE server, one per split of `test_splits`. A file has
            the columns `index` (from 0) and `prediction`, separated by a tab, under a line with these two names.
        submission_rows (`tuple[int, ...]`): how many rows each of these files must have.
        submission_labels (`tuple[str, ...]`): what a submission file writes for each class index.
        validation_splits (`tuple[str, ...]`, *optional*, defaults to `("validation",)`): the splits with public labels
            for development; MNLI has a matched and a mismatched one, in this order.
        test_splits (`tuple[str, ...]`, *optional*, defaults to `("test",)`): the splits that the GLUE server scores.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    main_metric: str
    learning_rate: float
    warmup_epochs: float
    batch_size: int
    alpha: float
    submission_files: tuple[str, ...]
    submission_rows: tuple[int, ...]
    submission_labels: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    def class_index(self, class_name: str) -> int:
        """
        The class of this task that goes by a name.

        Args:
            class_name (`str`): a name of `label_names`, or the class index as text (`"1"`), which is what a class is
                called where the data have numbers, or `"LABEL_1"`, which is what a config calls it that has no names.

        Returns:
            `int`: its position in `label_names`.

        Raises:
            ValueError: no class goes by this name.
        """
        numbers = [str(k) for k in range(self.num_labels)]
        for names in (self.label_names, numbers, [f"LABEL_{number}" for number in numbers]):
            if class_name in names:
                return names.index(class_name)
        raise ValueError(
            f"The classes of {self.name} must be called {', '.join(self.label_names)}, or by their numbers from 0, "
            f"{', '.join(numbers)}. Got {class_name!r}. Rename the class, or leave out `task_name`."
        )


GLUE_TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            name="cola",
            text_columns=("sentence",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            main_metric="matthews_correlation",
            learning_rate=5e-5,
            warmup_epochs=1.2,
            batch_size=32,
            alpha=0.3,
            submission_files=("CoLA.tsv",),
            submission_rows=(1063,),
            submission_labels=("0", "1"),
        ),
        GlueTask(
            name="mnli",
            text_columns=("premise", "hypothesis"),
            label_names=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            main_metric="accuracy",
            learning_rate=2e-5,
            warmup_epochs=0.8,
            batch_size=256,
            alpha=0.2,
            submission_files=("MNLI-m.tsv", "MNLI-mm.tsv"),
            submission_rows=(9796, 9847),
            submission_labels=("entailment", "neutral", "contradiction"),
            validation_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
        ),
        GlueTask(
            name="mrpc",
            text_columns=("sentence1", "sentence2"),
            label_names=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            main_metric="f1",
            learning_rate=2e-5,
            warmup_epochs=1.0,
            batch_size=16,
            alpha=0.2,
            submission_files=("MRPC.tsv",),
            submission_rows=(1725,),
            submission_labels=("0", "1"),
        ),
        GlueTask(
            name="qnli",
            text_columns=("question", "sentence"),
            label_names=("entailment", "not_entailment"),
            metrics=("accuracy",),
            main_metric="accuracy",
            learning_rate=1e-5,
            warmup_epochs=1.0,
            batch_size=128,
            alpha=0.5,
            submission_files=("QNLI.tsv",),
            submission_rows=(5463,),
            submission_labels=("entailment", "not_entailment"),
        ),
        GlueTask(
            name="qqp",
            text_columns=("question1", "question2"),
            label_names=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            main_metric="f1",
            learning_rate=1e-5,
            warmup_epochs=0.8,
            batch_size=256,
            alpha=0.3,
            submission_files=("QQP.tsv",),
            submission_rows=(390_965,),
            submission_labels=("0", "1"),
        ),
        GlueTask(
            name="rte",
            text_columns=("sentence1", "sentence2"),
            label_names=("entailment", "not_entailment"),
            metrics=("accuracy",),
            main_metric="accuracy",
            learning_rate=5e-5,
            warmup_epochs=1.2,
            batch_size=16,
            alpha=0.2,
            submission_files=("RTE.tsv",),
            submission_rows=(3000,),
            submission_labels=("entailment", "not_entailment"),
        ),
        GlueTask(
            name="sst2",
            text_columns=("sentence",),
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            main_metric="accuracy",
            learning_rate=5e-5,
            warmup_epochs=0.8,
            batch_size=128,
            alpha=0.3,
            submission_files=("SST-2.tsv",),
            submission_rows=(1821,),
            submission_labels=("0", "1"),
        ),
    )
}

_EXCLUDED_TASKS = {
    "stsb": "STS-B is a regression task and the exits here are classifiers; the paper leaves it out (Sec. 6.1).",
    "wnli": "The paper leaves WNLI out (Sec. 6.1), as BERT's authors did.",
}


def get_task(task_name: str) -> GlueTask:
    """
    Looks a task up by its name in `nyu-mll/glue`.

    Args:
        task_name (`str`): a key of `GLUE_TASKS`, in upper or lower case.

    Returns:
        [`GlueTask`].
    """
    key = str(task_name).lower()
    if key in GLUE_TASKS:
        return GLUE_TASKS[key]
    reason = f" {_EXCLUDED_TASKS[key]}" if key in _EXCLUDED_TASKS else ""
    raise ValueError(f"`task_name` must be one of {', '.join(GLUE_TASKS)}. Got {task_name!r}.{reason}")


def selection_score(scores: Mapping[str, float]) -> float:
    """
    The single score by which checkpoints and hyper-parameters are compared: the plain mean of a task's metrics.

    It is the `combined_score` of `run_glue.py`, and GLUE's own score for a task with two metrics: (accuracy + F1) / 2
    for MRPC and QQP, the one metric elsewhere. Our own data ([`GlueMetric`] without a task) follow the same rule. The
    paper leaves the choice open. F1 alone would flatter a collapsed exit, and it selects on the mean over exits
    (Sec. 6.4): answering "equivalent" to everything has an F1 of 0.812 on MRPC's validation set.

    Args:
        scores (`Mapping[str, float]`): what [`GlueMetric`] returned, untouched.

    Returns:
        `float`.
    """
    if not scores:
        raise ValueError("`scores` must hold at least one score, as returned by `GlueMetric`. Got an empty mapping.")
    return float(np.mean(list(scores.values())))


def selection_scorer(
    metric: "GlueMetric",
) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str]:
    """
    How exits, checkpoints and policies are scored and compared.

    Args:
        metric ([`GlueMetric`]): of the task.

    Returns:
        `tuple`: `(predictions, references)` to the scores by name, with `combined_score` ([`selection_score`]) in
        front where there are several; and the name of the one that compares.
    """
    if len(metric.metric_names) == 1:
        return metric.compute, metric.metric_names[0]

    def score(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        scores = metric.compute(predictions, references)
        return {"combined_score": selection_score(scores), **scores}

    return score, "combined_score"


class GlueMetric(evaluate.Metric):
    """
    The official metric of a GLUE task, without a download (`evaluate.load("glue", ...)` asks the Hub for its script).

    CoLA: Matthews correlation; MRPC and QQP: accuracy and F1 of class 1; MNLI (matched and mismatched alike), QNLI,
    RTE and SST-2: accuracy. Our own data: accuracy and macro F1, the mean of the F1 of every class that occurs in the
    references or in the predictions; of two classes, one of which is named positive, accuracy and the F1 of that one.
    A score whose definition divides zero by zero is 0, as in the stock metric, but without its warning.

    `compute(predictions=..., references=...)` keeps no state and writes no file, so one object may serve several
    threads and several processes may score at once. `add` and `add_batch` gather rows as in any `evaluate.Metric`.

    Args:
        config_name (`str`, *optional*, defaults to `"classification"`): a key of `GLUE_TASKS`, or `"classification"`
            for our own data.
        num_labels (`int`, *optional*): number of classes, to catch labels that do not exist. Known for a GLUE task.
        positive_class (`int`, *optional*): the class of which F1 is the score, of two. Defaults to 1 for MRPC and QQP,
            the one that GLUE counts; another one is for a model whose classes are in another order. For our own data
            it makes accuracy and F1 the scores.
        keep_in_memory (`bool`, *optional*, defaults to `True`): whether rows that are added wait in memory rather than
            in a locked file of the cache.
        kwargs (*optional*): further arguments of `evaluate.Metric`.

    Example:

    ```python
    >>> from gaml_hf.evaluation.glue import GlueMetric, selection_score

    >>> scores = GlueMetric("mrpc").compute(predictions=[1, 1, 0, 1], references=[1, 0, 0, 1])
    >>> scores
    {'accuracy': 0.75, 'f1': 0.8}
    >>> selection_score(scores)
    0.775
    ```
    """

    def __init__(
        self,
        config_name: str | None = None,
        num_labels: int | None = None,
        positive_class: int | None = None,
        keep_in_memory: bool = True,
        **kwargs,
    ):
        config_name = "classification" if config_name is None else config_name.lower()
        if config_name == "classification":
            self.metric_names = ("accuracy", "macro_f1" if positive_class is None else "f1")
        else:
            task = get_task(config_name)
            if num_labels not in (None, task.num_labels):
                raise ValueError(f"`num_labels` must be {task.num_labels} for {task.name}. Got {num_labels}.")
            self.metric_names = task.metrics
            num_labels = task.num_labels
        if positive_class is not None and (positive_class not in (0, 1) or num_labels not in (None, 2)):
            raise ValueError(
                "`positive_class` must be 0 or 1, and there must be two classes. "
                f"Got `positive_class={positive_class!r}`, `num_labels={num_labels}`."
            )
        self.num_labels = num_labels
        self.positive_class = 1 if positive_class is None else positive_class
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Scores of the GLUE classification tasks, and accuracy with macro F1 for other data.",
            citation="",
            features=datasets.Features({"predictions": label, "references": label}),
            reference_urls=["https://gluebenchmark.com"],
            format="numpy",
        )

    def _build_data_dir(self) -> str:
        # The stock method makes a folder in the cache even for rows kept in memory, and fails where none can be made.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def compute(self, predictions=None, references=None, **kwargs) -> dict[str, float] | None:
        """
        Scores the rows given here and those added before. By position too, so that it is a `Score` of `evaluation`.

        Args:
            predictions (`list[int]`, `np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): predicted class indices.
            references (`list[int]`, `np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): true class indices.

        Returns:
            `dict[str, float]`: one entry per name in `metric_names`.
        """
        if predictions is None and references is None and self.writer is None:
            raise ValueError("`predictions` and `references` must be given, or added with `add_batch`. Got no rows.")
        if self.writer is None and self.num_process == 1:
            # The stock way goes through an Arrow table, row by row: about ten times as long on QQP's validation set.
            predictions, references = self._as_class_indices(predictions, references)
            return self._compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """
        Adds rows for a later `compute()`.

        Args:
            predictions (`list[int]`, `np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): predicted class indices.
            references (`list[int]`, `np.ndarray` or `torch.Tensor` of shape `(num_rows,)`): true class indices.
        """
        # Checked before the stock method opens its table: after a failure there, the next `compute` would fail too.
        predictions, references = self._as_class_indices(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """
        Adds one row for a later `compute()`.

        Args:
            prediction (`int`): predicted class index.
            reference (`int`): true class index.
        """
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {name: float(_SCORES[name](references, predictions, self.positive_class)) for name in self.metric_names}

    def _as_class_indices(self, predictions, references) -> tuple[np.ndarray, np.ndarray]:
        predictions = self._as_class_index_array("predictions", predictions)
        references = self._as_class_index_array("references", references)
        if len(predictions) != len(references):
            raise ValueError(
                "`predictions` and `references` must have the same length. "
                f"Got {len(predictions)} predictions and {len(references)} references."
            )
        return predictions, references

    def _as_class_index_array(self, argument: str, values) -> np.ndarray:
        expected = f"`{argument}` must hold one class index per row"
        if values is None:
            raise ValueError(f"{expected}. Got None.")
        try:
            values = np.asarray(values)
        except ValueError as error:  # NumPy's word for rows of different lengths
            raise ValueError(f"{expected}. Got rows of different lengths.") from error
        if values.ndim != 1:
            hint = "; take the argmax of logits first" if values.ndim == 2 else ""
            raise ValueError(f"{expected}, in the shape `(num_rows,)`. Got the shape {values.shape}{hint}.")
        if values.size == 0:
            raise ValueError(f"{expected}, and at least one row. Got no rows.")
        if values.dtype.kind not in "biu":
            raise ValueError(f"{expected}, as integers. Got the type {values.dtype}.")

        outside = values < 0 if self.num_labels is None else (values < 0) | (values >= self.num_labels)
        if outside.any():
            row = int(outside.argmax())
            last = "" if self.num_labels is None else f" and below {self.num_labels}, the number of labels"
            hint = " A negative label marks a row without one, as in GLUE's test splits." if values[row] < 0 else ""
            raise ValueError(f"{expected}, at least 0{last}. Got {int(values[row])} in row {row}.{hint}")
        return values.astype(np.int64, copy=False)


def _matthews_correlation(references: np.ndarray, predictions: np.ndarray, positive: int) -> float:
    # With one class predicted, MCC is 0 / 0, and 0 by convention. scikit-learn agrees, but warns where the references
    # hold no other class either.
    if (predictions == predictions[0]).all():
        return 0.0
    return matthews_corrcoef(references, predictions)


# All take (references, predictions), the order of scikit-learn, and the positive class, which only F1 looks at.
# `zero_division=0` is its default without the warning.
_SCORES = {
    "accuracy": lambda references, predictions, _: accuracy_score(references, predictions),
    "f1": lambda references, predictions, positive: f1_score(
        references, predictions, pos_label=positive, zero_division=0
    ),
    "macro_f1": lambda references, predictions, _: f1_score(references, predictions, average="macro", zero_division=0),
    "matthews_correlation": _matthews_correlation,
}
