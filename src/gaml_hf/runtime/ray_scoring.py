"""
Rows scored by the machines of a Ray cluster, with Ray Data: `gaml-score --engine ray`.

One task beside the caller reads the file, a window after the other; actors, which hold the model, answer them. Windows
travel as one pickle each: a cell may be anything, and what Arrow would make of it is not what stands there.
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from gaml_hf.models.exiting_gaml import shown
from gaml_hf.models.pipeline_gaml import GamlTextClassificationPipeline

from .scoring import _score_window, check_first_rows


class RayEngine(NamedTuple):
    """
    Where the rows of [`~scoring.score_file`] are answered: by actors of a Ray cluster, which it joins for the run.

    Each machine needs `gaml_hf[ray]`, and sees the model under the same name. The rows are read on this machine, which
    must be one of the cluster's, and the predictions are written here.

    Args:
        address (`str`, *optional*):
            Of the cluster, such as `"auto"` or `"10.0.0.1:6379"`. By default the one in the environment variable
            `RAY_ADDRESS` or on this machine, or, where there is none, one that is started for the run. Not read where
            this process has joined a cluster before.
        num_actors (`int`, *optional*): replicas of the model; defaults to as many as the cluster has room for.
        actor_cpus (`float`, *optional*, defaults to 1.0): CPUs of an actor, and whole ones of them its threads.
        actor_gpus (`float`, *optional*, defaults to 0.0): GPUs of an actor; 0.5 lets two share one.

    Raises:
        ValueError: a number is out of range, or no machine has room for an actor.
        ConnectionError: there is no cluster at `address`.
    """

    address: str | None = None
    num_actors: int | None = None
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0

    def check(self) -> None:
        """Raise what is wrong with the numbers."""
        if self.num_actors is not None and (type(self.num_actors) is not int or self.num_actors < 1):
            raise ValueError(
                f"`num_actors` must be a whole number of at least 1. Got `num_actors={shown(self.num_actors)}`."
            )
        for name in ("actor_cpus", "actor_gpus"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1e6 or (value > 1 and value % 1):
                raise ValueError(f"`{name}` must be a share of one, or a whole number. Got `{name}={shown(value)}`.")
        if self.actor_cpus == self.actor_gpus == 0:
            raise ValueError("`actor_cpus` must be above 0 where `actor_gpus` is 0. Got `actor_cpus=0`.")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"`address` must be that of a cluster which this machine is part of. Got `{self.address}`, of Ray "
                "Client, whose driver is elsewhere and would not see the file: run it there, with `auto`."
            )

    def predictions(
        self,
        rows: Iterable[Mapping[str, Any]],
        load_classifier: Callable[[], GamlTextClassificationPipeline],
        text_columns: list[str],
        batch_size: int,
        window: int,
        on_error: str,
        arguments: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """One for each row, in the order of the rows; `rows`, which must be picklable, is read on this machine."""
        with self._cluster():
            room = self._room()  # which raises where there is none
            size = room if self.num_actors is None else self.num_actors
            node = ray.get_runtime_context().get_node_id()
            # The context holds for what is made in it, and not while the caller has a prediction in hand.
            with ray.data.DataContext.current(_context()):
                windows = ray.data.read_datasource(
                    _Windows(rows, text_columns, window, os.getcwd()),
                    override_num_blocks=1,
                    num_cpus=0,  # else it would wait for one where actors have them all
                    label_selector={"ray.io/node-id": node},
                )
                answers = windows.map_batches(
                    _Actor,
                    fn_constructor_args=(load_classifier, text_columns, batch_size, arguments),
                    batch_size=1,
                    batch_format="pyarrow",
                    # Of a fixed size, Ray warns where there are fewer windows than actors.
                    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
                    num_cpus=self.actor_cpus,
                    num_gpus=self.actor_gpus,
                )
            number = 0
            with contextlib.closing(iter(answers.iter_rows())) as found:
                for answer in found:
                    result = pickle.loads(answer["window"])
                    if isinstance(result, Exception):
                        raise result
                    for prediction in result:
                        if prediction["row"] != number:
                            raise RuntimeError(f"Ray gave row {prediction['row']} where row {number} is due.")
                        if on_error == "raise" and prediction["error"] is not None:
                            raise ValueError(f"Row {number}: {prediction['error']}")
                        yield prediction
                        number += 1

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        ray.init(self.address, logging_level="warning", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()

    def _room(self) -> int:
        return actors_that_fit(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], self.actor_cpus, self.actor_gpus
        )


def actors_that_fit(machines: list[Mapping[str, float]], actor_cpus: float, actor_gpus: float) -> int:
    """How many actors machines with these resources (`CPU`, `GPU`) have room for; an error where it is none."""
    needs = {name: need for name, need in (("CPU", actor_cpus), ("GPU", actor_gpus)) if need > 0}
    # Ray counts in ten-thousandths, and 0.3 / 0.1 is less than 3.
    room = sum(
        min(round(machine.get(name, 0) * 1e4) // max(round(need * 1e4), 1) for name, need in needs.items())
        for machine in machines
    )
    if room == 0:
        raise ValueError(
            f"`actor_cpus` and `actor_gpus` must fit on a machine of the cluster. Got {actor_cpus:g} and "
            f"{actor_gpus:g}; the machines have "
            + ", ".join(f"{machine.get('CPU', 0):g} and {machine.get('GPU', 0):g}" for machine in machines)
            + "."
        )
    return room


def _context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # byte: each window is a block, and so a task, of its own
    context.enable_progress_bars = False  # there is one already
    return context


class _Windows(Datasource):
    """The rows, a window in each block: its pickle, or that of the exception that reading it raised."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], text_columns: Sequence[str], window: int, folder: str):
        self.rows, self.text_columns, self.window, self.folder = rows, text_columns, window, folder

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args, **kwargs) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._read, unknown)]

    def _read(self) -> Iterator[pa.Table]:
        start = 0
        try:
            with contextlib.chdir(self.folder):  # for a relative path: a worker has a folder of its own
                rows = iter(self.rows)
                while chunk := list(islice(rows, self.window)):
                    if start == 0:
                        check_first_rows(self.text_columns, chunk)
                    yield _block((start, chunk))
                    start += len(chunk)
        except Exception as error:
            yield _block(error)


class _Actor:
    """A replica of the model."""

    def __init__(self, load_classifier, text_columns, batch_size, arguments):
        self.load_classifier = cache(load_classifier)  # not called here: Ray would wrap what it raises, and try again
        self.text_columns, self.batch_size, self.arguments = text_columns, batch_size, arguments

    def __call__(self, block: pa.Table) -> pa.Table:
        content = pickle.loads(block["window"][0].as_py())
        if isinstance(content, Exception):
            return block
        start, chunk = content
        try:
            classifier = self.load_classifier()
            return _block(_score_window(chunk, start, classifier, self.text_columns, self.batch_size, self.arguments))
        except Exception as error:
            return _block(error)


def _block(content: Any) -> pa.Table:
    return pa.table({"window": pa.array([pickle.dumps(content)], pa.large_binary())})


__all__ = ["RayEngine", "actors_that_fit"]
