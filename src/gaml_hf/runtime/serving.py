"""
A classifier behind HTTP: the command `gaml-serve`, whose command line is `gaml_serve.py`.

    gaml-serve --model path/to/checkpoint --slo_ms 200

`POST /predict` speaks the language of text-embeddings-inference, `POST /` that of `huggingface_hub.InferenceClient`.
What a row or a setting may be is the pipeline's to say; a request that it refuses is answered by its sentence.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers.pipelines.base import pad_collate_fn

from gaml_hf.evaluation import ExitCertificate
from gaml_hf.models.exiting_gaml import EXIT_FIELDS, FullDepth, policy_from_config, shown
from gaml_hf.models.pipeline_gaml import TOKENIZER_ARGUMENTS, GamlTextClassificationPipeline, _Row

from .adaptive import Capped, ExitCap
from .batching import Item, MicroBatcher


logger = logging.getLogger(__name__)

# What `parameters` of a request may hold. The pipeline's other arguments are a policy object and how it batches.
PARAMETERS = (*EXIT_FIELDS, *TOKENIZER_ARGUMENTS, "top_k", "function_to_apply", "on_error")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LOADER = "loader"  # the name of the thread that loads the model
PROBE = "probe"  # the kind of a row by which the server tries the model
SHADOW, MAX_SHADOWS = "shadow", 256  # the kind of rows that run again, and how many may wait
SHADOW_WINDOW = 500  # rows that are compared with the certificate at a time
DAY = 86_400_000  # milliseconds
POWERS = tuple(2**i for i in range(15))


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """
    The knobs of a server. Those above the line may change while it runs.

    Args:
        exit_strategy, patience, budgeted_exit, exit_threshold (*optional*):
            When a row leaves, where a request does not say; as in the pipeline.
        slo_ms (`float`, *optional*): latency to keep, in milliseconds: rows leave earlier when requests pile up.
        min_exit (`int`, *optional*): the layer before which no row is made to leave; defaults to the first exit.
        max_disagreement (`float`, *optional*):
            Share of the rows that may get another class than the last exit's, at any load. Read with `slo_ms`; needs
            a checkpoint with a certificate of disagreement, see [`~evaluation.ExitCertificate.lowest_cap`].
        max_batch_tokens (`int`): tokens that run together, padding included.
        max_concurrent_requests (`int`): a request beyond is refused before anything is read of it.
        shadow_fraction (`float`):
            Share of the requests whose rows run again to full depth, when nothing else waits: how many classes differ
            is counted in the metrics.
        timeout_ms (`float`): a request that has no answer by then is given up, in milliseconds.

        max_client_batch_size (`int`): rows of one request.
        payload_limit (`int`): bytes of one request.

    Raises:
        ValueError: a number is out of range.
    """

    exit_strategy: str | None = None
    patience: int | None = None
    budgeted_exit: int | None = None
    exit_threshold: float | None = None
    slo_ms: float | None = None
    min_exit: int | None = None
    max_disagreement: float | None = None
    max_batch_tokens: int = 4096
    max_concurrent_requests: int = 512
    timeout_ms: float = 30_000.0
    shadow_fraction: float = 0.0

    max_client_batch_size: int = 32
    payload_limit: int = 2_000_000

    def __post_init__(self):
        for name in ("max_batch_tokens", "max_concurrent_requests", "max_client_batch_size", "payload_limit"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1. Got `{name}={shown(value)}`.")
        if self.min_exit is not None and type(self.min_exit) is not int:
            raise ValueError(f"`min_exit` must be the layer of an exit. Got `min_exit={shown(self.min_exit)}`.")
        for name in ("slo_ms", "timeout_ms"):
            value = getattr(self, name)
            if value is None and name == "slo_ms":
                continue
            if type(value) not in (int, float) or not 0 < value <= DAY:
                raise ValueError(
                    f"`{name}` must be a number above 0 and up to {DAY:,}, of milliseconds. "
                    f"Got `{name}={shown(value)}`."
                )
        for name in ("shadow_fraction", "max_disagreement"):
            share = getattr(self, name)
            if share is None and name == "max_disagreement":
                continue
            if type(share) not in (int, float) or not 0 <= share <= 1:
                raise ValueError(f"`{name}` must be a number in [0, 1]. Got `{name}={shown(share)}`.")
        for name in ("min_exit", "max_disagreement"):
            if (value := getattr(self, name)) is not None and self.slo_ms is None:
                raise ValueError(f"`{name}` is read with `slo_ms` alone. Got `{name}={shown(value)}`.")

    @property
    def exits(self) -> dict[str, Any]:
        """The exit knobs that are set."""
        return {name: value for name in EXIT_FIELDS if (value := getattr(self, name)) is not None}


FIXED = ("max_client_batch_size", "payload_limit")
LIVE = tuple(field.name for field in dataclasses.fields(ServerSettings) if field.name not in FIXED)


def _cap_knobs(settings: ServerSettings) -> tuple:
    return settings.slo_ms, settings.min_exit, settings.max_disagreement


def _lowest_cap(settings: ServerSettings, certificate: ExitCertificate | None, exit_layers: list[int]) -> int | None:
    """The layer before which no row is made to leave: `min_exit`, or a deeper one that `max_disagreement` asks for."""
    limit, min_exit = settings.max_disagreement, settings.min_exit
    if limit is None:
        return min_exit
    if settings.exits:
        raise ValueError(
            "`max_disagreement` holds for the checkpoint's own exit policy, the one that was certified: leave "
            f"{', '.join(f'`{name}`' for name in settings.exits)} out."
        )
    if certificate is None or certificate.risk != "disagreement":
        raise ValueError(
            "`max_disagreement` needs a checkpoint with a certificate of disagreement, as `run_glue_gaml.py "
            f"--max_loss` makes it. Got {'none' if certificate is None else f'one of {certificate.risk}'}."
        )
    lowest = certificate.lowest_cap(limit)
    if lowest is None:
        raise ValueError(
            f"`max_disagreement` must be at least the {certificate.max_loss:.4g} that the certificate promises of the "
            f"exit policy alone. Got `max_disagreement={limit}`."
        )
    if lowest == exit_layers[-1]:
        logger.warning(f"`max_disagreement={limit}` leaves no room: no row is made to leave early under load.")
    # One that is no exit is for `ExitCap` to refuse.
    return min_exit if min_exit not in (None, *exit_layers) else max(lowest, min_exit or 0)


class Refusal(Exception):
    """A request that gets no answer: the HTTP status, what kind of error it is, and a sentence."""

    def __init__(self, status: int, error_type: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.error_type, self.headers = status, error_type, headers


def invalid(message: str) -> Refusal:
    return Refusal(422, "validation", message)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class AsciiJson(Response):
    """JSON in which each character can be written as UTF-8, as a lone surrogate cannot."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


class Query(NamedTuple):
    """What a request asks."""

    rows: list[Any]
    is_batch: bool
    parameters: dict[str, Any]


class Plan(NamedTuple):
    """A request's settings, as the three steps of the pipeline read them, and what must be equal to share a batch."""

    preprocess: dict[str, Any]
    forward: dict[str, Any]
    postprocess: dict[str, Any]
    kind: Any


class Outcome(NamedTuple):
    """What the model said of a row."""

    outputs: dict[str, Any]
    cap: int | None  # layer of the cap that was in force
    was_forced: bool


class Metrics:
    """What `GET /metrics` tells; of one application, not of the process."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("gaml_requests", "Requests by outcome", ["outcome"], registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.in_flight = Gauge("gaml_requests_in_flight", "Requests that are being answered", registry=registry)
        self.request_seconds = histogram("gaml_request_seconds", "From arrival to answer, if `ok`", buckets=SECONDS)
        self.queue_seconds = histogram("gaml_queue_seconds", "From tokens to the model, by row", buckets=SECONDS)
        self.inference_seconds = histogram("gaml_inference_seconds", "Of one batch in the model", buckets=SECONDS)
        self.batch_rows = histogram("gaml_batch_rows", "Rows of one batch", buckets=POWERS)
        self.batch_tokens = histogram("gaml_batch_tokens", "Tokens of one batch", buckets=POWERS)
        self.queue_rows = Gauge("gaml_queue_rows", "Rows that wait for the model", registry=registry)
        self.dropped_rows = Counter(
            "gaml_dropped_rows", "Rows that did not run: their client left, or their time was up", registry=registry
        )
        self.exit_cap = Gauge("gaml_exit_cap", "Layer that no row goes beyond", registry=registry)
        self.forced_exits = Counter("gaml_forced_exits", "Rows that left at the cap alone", registry=registry)
        self.shadow_rows = Counter("gaml_shadow_rows", "Rows that ran again to full depth", registry=registry)
        self.shadow_disagreements = Counter(
            "gaml_shadow_disagreements", "Rows of these whose class differs at full depth", registry=registry
        )
        self.certificate_broken = Gauge(
            "gaml_shadow_contradicts_certificate", "1 where the last rows disagree too often for it", registry=registry
        )
        self.exit_layer: Histogram | None = None  # its buckets are the model's exits

    def know_exits(self, exit_layers: list[int]) -> None:
        self.exit_layer = Histogram(
            "gaml_exit_layer", "Layer at which a row left", buckets=exit_layers, registry=self.registry
        )


class Service:
    """
    The classifier, the queue before it, and the two threads beside the event loop: the model's, and the tokenizer's.

    Args:
        load_classifier (`Callable`): makes the [`GamlTextClassificationPipeline`]; called once, in its own thread.
        settings ([`ServerSettings`]): to begin with.
        name (`str`): of the model, for `/info`.
    """

    def __init__(
        self, load_classifier: Callable[[], GamlTextClassificationPipeline], settings: ServerSettings, name: str
    ):
        self.load_classifier, self.settings, self.name = load_classifier, settings, name
        self.metrics = Metrics()
        self._loaded: GamlTextClassificationPipeline | None = None
        self.classifier: GamlTextClassificationPipeline | None = None  # the same model, with the exits of the settings
        self.exit_cap: ExitCap | None = None
        self.certificate: ExitCertificate | None = None  # of disagreement, of the policy in force
        self._shadows = [0, 0]  # rows since the certificate was last compared with them, and those that disagreed
        self.in_flight = 0
        self.is_draining = False
        self.is_ready = False  # whether any forward pass has worked
        self.is_healthy = False  # whether the last one has
        self._began: float | None = None  # when the forward pass that runs did, of `time.perf_counter`
        self.failure: Exception | None = None  # why the model could not be loaded
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")

    # Life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the start to the end of the application. It answers at once; it is ready when the model is."""
        self.batcher = MicroBatcher(self._run, self._model_thread, self._max_tokens, self.metrics.dropped_rows.inc)
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.metrics.queue_rows.set_function(lambda: sum(not item.future.done() for item in self.batcher.queue))
        self.loading, self._batching = asyncio.create_task(self._load()), asyncio.create_task(self.batcher.work())
        tasks = [self.loading, self._batching]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._model_thread.shutdown()
            self._tokenizer_thread.shutdown()

    async def _load(self) -> None:
        try:
            self._loaded = await _in_thread_that_may_be_left(self.load_classifier)
            self.metrics.know_exits(exit_layers := self._loaded.model.config.exit_layers)
            self.metrics.exit_cap.set_function(lambda: self.exit_cap_now or exit_layers[-1])
            self._apply(self.settings)
            await self._probe()
            self.is_ready = True
        except Exception as error:
            self.failure = error
            logger.error(f"The model could not be loaded: {error}")

    def _apply(self, settings: ServerSettings) -> None:
        """Take over new settings, all at once or, if one is wrong, none."""
        if not settings.exits:
            classifier = self._loaded
        elif self.classifier is None or settings.exits != self.settings.exits:
            # A new pipeline around the same model, and not a change of the old one: requests may be in its hands.
            classifier = type(self._loaded)(
                model=self._loaded.model,
                tokenizer=self._loaded.tokenizer,
                device=self._loaded.device,
                **settings.exits,
            )
        else:
            classifier = self.classifier
        exit_cap, config = self.exit_cap, classifier.model.config
        certificate = None if settings.exits else ExitCertificate.from_config(config)
        lowest = _lowest_cap(settings, certificate, config.exit_layers)
        if exit_cap is None or _cap_knobs(settings) != _cap_knobs(self.settings):
            exit_cap = None if settings.slo_ms is None else ExitCap(config.exit_layers, settings.slo_ms / 1e3, lowest)
        self.classifier, self.settings, self.exit_cap = classifier, settings, exit_cap
        certificate = certificate if certificate and certificate.risk == "disagreement" else None
        if certificate != self.certificate:  # what was counted, and the alarm, were another's
            self._shadows = [0, 0]
            self.metrics.certificate_broken.set(0)
            self.certificate = certificate

    @property
    def exit_cap_now(self) -> int | None:
        """The layer that no row would go beyond; `None` without `slo_ms`."""
        return None if (exit_cap := self.exit_cap) is None else exit_cap.exit_layer_now

    def change(self, changes: Any) -> ServerSettings:
        """New values of live knobs, for the requests to come."""
        if not isinstance(changes, dict):
            raise invalid(f"The body must be an object of knobs. Got {shown(changes)}.")
        if unknown := [name for name in changes if name not in LIVE]:
            raise invalid(f"`{unknown[0][:50]}` is no knob that can change live. These are: {', '.join(LIVE)}.")
        if self.classifier is None:
            raise self._not_ready()
        try:
            self._apply(dataclasses.replace(self.settings, **changes))
        except ValueError as error:
            raise invalid(str(error)) from error
        return self.settings

    async def check_health(self) -> None:
        """Raise what keeps the server from answering; after a failed forward pass, try another."""
        if self.is_draining:
            raise self._draining()
        if not self.is_ready:
            raise self._not_ready()
        if self._batching.done():
            raise Refusal(503, "unhealthy", f"The batcher has ended: {self._batching.exception()!r}")
        limit = self.settings.timeout_ms / 1e3
        if (began := self._began) is not None and (seconds := time.perf_counter() - began) > limit:
            raise Refusal(503, "unhealthy", f"The model has been at one batch for {seconds:.3g} s: it hangs.")
        if not self.is_healthy:
            try:
                await asyncio.wait_for(self._probe(), limit)
            except Exception as error:
                raise Refusal(
                    503, "unhealthy", f"The model does not answer: {error or type(error).__name__}"
                ) from error

    async def _probe(self) -> None:
        """One row of nothing but special tokens through the model; an error where that does not work."""
        classifier = self.classifier
        encoding = classifier.preprocess("", on_error="skip") | {
            "about": {"row": "", "truncated": False, "error": None}
        }
        await self.batcher.submit((encoding, classifier, {}), _tokens(encoding), PROBE)
        if not self.is_healthy:
            raise ValueError("Its logits are NaN or infinite.")

    @staticmethod
    def _not_ready() -> Refusal:
        return Refusal(503, "unhealthy", "The model is not loaded yet.", **{"retry-after": "1"})

    @staticmethod
    def _draining() -> Refusal:
        return Refusal(503, "draining", "The server is shutting down.", connection="close")

    # A request

    async def predict(self, request: Request, *, always_batch: bool) -> Response:
        """Answer a request. The errors are all here: whatever goes wrong is a [`Refusal`] or [`ClientLeft`]."""
        if self.is_draining:
            raise self._draining()
        if not self.is_ready:
            raise self._not_ready()
        if self.in_flight >= self.settings.max_concurrent_requests:
            raise Refusal(
                429,
                "overloaded",
                f"{self.in_flight} requests are being answered, and no more are taken in.",
                **{"retry-after": "1"},
            )
        self.in_flight += 1
        try:
            async with asyncio.timeout(self.settings.timeout_ms / 1e3):
                return await self._predict(request, always_batch)
        except TimeoutError:
            message = f"The answer took longer than {self.settings.timeout_ms:g} ms."
            raise Refusal(504, "timeout", message) from None
        except ClientDisconnect as error:
            raise ClientLeft from error
        except (Refusal, ClientLeft):
            raise
        except Exception as error:
            logger.exception("A request failed.")
            raise Refusal(500, "backend", "The model failed; the log says why.") from error
        finally:
            self.in_flight -= 1

    async def _predict(self, request: Request, always_batch: bool) -> Response:
        settings, classifier = self.settings, self.classifier
        query = read_query(await read_json(request, settings.payload_limit))
        if len(query.rows) > settings.max_client_batch_size:
            message = f"`inputs` may hold {settings.max_client_batch_size} rows at most. Got {len(query.rows)}."
            raise Refusal(413, "too_large", message)
        plan = self._plan(classifier, query.parameters)
        try:
            encodings = await asyncio.get_running_loop().run_in_executor(
                self._tokenizer_thread, _encode, classifier, query, plan.preprocess
            )
        except (TypeError, ValueError) as error:
            raise invalid(str(error)) from error
        futures = {
            number: self.batcher.submit((encoding, classifier, plan.forward), _tokens(encoding), plan.kind)
            for number, encoding in enumerate(encodings)
            if encoding["about"]["error"] is None
        }
        outcomes = dict(zip(futures, await _unless_client_leaves(request, list(futures.values())), strict=True))
        answers = [
            classifier.postprocess(
                outcomes[number].outputs if number in outcomes else {"about": encoding["about"]}, **plan.postprocess
            )
            for number, encoding in enumerate(encodings)
        ]
        headers = {}
        if caps := [outcome.cap for outcome in outcomes.values() if outcome.cap is not None]:
            forced = sum(outcome.was_forced for outcome in outcomes.values())
            headers = {"x-exit-cap": str(min(caps)), "x-forced-exits": str(forced)}
        if random.random() < settings.shadow_fraction:
            is_certified = not any(name in query.parameters for name in EXIT_FIELDS)
            for number, outcome in outcomes.items():
                self._shadow(classifier, encodings[number], outcome, is_certified)
        return AsciiJson(answers if query.is_batch or always_batch else answers[0], headers=headers)

    def _plan(self, classifier: GamlTextClassificationPipeline, parameters: dict[str, Any]) -> Plan:
        try:
            steps = classifier._sanitize_parameters(**{"top_k": None} | parameters)
        except ValueError as error:
            raise invalid(f"`parameters`: {error}") from error
        stored = (classifier._preprocess_params, classifier._forward_params, classifier._postprocess_params)
        preprocess, forward, postprocess = ({**old, **new} for old, new in zip(stored, steps, strict=True))
        # The same numbers are the same policy; the pipeline stands for what a request leaves to the server.
        kind = (id(classifier), *(parameters.get(name) for name in EXIT_FIELDS))
        return Plan(preprocess, forward, postprocess, kind)

    def _shadow(
        self,
        classifier: GamlTextClassificationPipeline,
        encoding: dict[str, Any],
        outcome: Outcome,
        is_certified: bool,
    ) -> None:
        """Run a row that has its answer again, to full depth, and count whether the class is another."""
        if len(self.batcher.later) >= MAX_SHADOWS:
            return
        answered = int(outcome.outputs["logits"].argmax())
        # Of rows that the policy alone answered: the certificate says nothing of others.
        certificate = self.certificate if is_certified and not outcome.was_forced else None

        def compare(future: asyncio.Future) -> None:
            if not future.cancelled() and future.exception() is None:
                disagrees = int(future.result().outputs["logits"].argmax()) != answered
                self.metrics.shadow_rows.inc()
                self.metrics.shadow_disagreements.inc(disagrees)
                if certificate is not None and certificate is self.certificate:
                    self._compare_with_certificate(certificate, disagrees)

        value = (encoding, classifier, {"exit_policy": FullDepth()})
        self.batcher.submit(value, _tokens(encoding), SHADOW, later=True).add_done_callback(compare)

    def _compare_with_certificate(self, certificate: ExitCertificate, disagrees: bool) -> None:
        """Every `SHADOW_WINDOW` rows, whether the promise still fits the texts that come."""
        self._shadows[0] += 1
        self._shadows[1] += disagrees
        rows, lost = self._shadows
        if rows < SHADOW_WINDOW:
            return
        self._shadows = [0, 0]
        self.metrics.certificate_broken.set(is_contradicted := certificate.is_contradicted(lost, rows))
        if is_contradicted:
            logger.warning(
                f"Of the last {rows} shadow rows {lost} get another class at full depth: more than the certificate "
                f"promises, {certificate.max_loss:.4g}. These texts are not like those that it was made on."
            )

    # In the model's thread

    def _max_tokens(self) -> int:
        limit = self.settings.max_batch_tokens
        return limit if self.exit_cap is None else self.exit_cap.batch_tokens(limit)

    def _run(self, batch: list[Item], waiting_tokens: int) -> list[Outcome]:
        """One forward pass."""
        is_asked = batch[0].kind not in (SHADOW, PROBE)  # by a client; of others cap and metrics know nothing
        started, metrics = time.perf_counter(), self.metrics
        exit_cap = self.exit_cap if is_asked else None
        tokens = sum(item.tokens for item in batch)
        for item in batch if is_asked else ():
            metrics.queue_seconds.observe(started - item.since)
        _, classifier, forward = batch[0].value
        config, capped = classifier.model.config, None
        if exit_cap is not None:
            exit_cap.update(waiting_tokens - tokens)
            if exit_cap.is_acting:
                policy = forward.get("exit_policy") or policy_from_config(config)
                capped = Capped(policy, exit_cap.position + 1)
                forward = {**forward, "exit_policy": capped}
        try:
            self._began = time.perf_counter()
            inputs = pad_collate_fn(classifier.tokenizer, None)([item.value[0] for item in batch])
            outputs = classifier.forward(inputs, **forward)
        except Exception:
            self.is_healthy = False
            raise
        finally:
            self._began = None
        self.is_healthy = bool(torch.isfinite(outputs["logits"]).all())
        seconds = time.perf_counter() - started
        if exit_cap is not None:
            exit_cap.ran(tokens, seconds)
        metrics.inference_seconds.observe(seconds)
        metrics.batch_rows.observe(len(batch))
        metrics.batch_tokens.observe(tokens)
        exit_layers = outputs["exit_layer"].tolist()
        cap = None if capped is None else config.exit_layers[capped.num_exits - 1]
        at_cap = iter(() if capped is None else capped.forced)
        forced = [layer == cap and next(at_cap) for layer in exit_layers]
        metrics.forced_exits.inc(sum(forced))
        for layer in exit_layers if is_asked else ():
            metrics.exit_layer.observe(layer)
        return [
            Outcome(
                {name: value[row : row + 1] for name, value in outputs.items() if name != "about"}
                | {"about": outputs["about"][row]},
                cap,
                forced[row],
            )
            for row in range(len(batch))
        ]


def _tokens(encoding: dict[str, Any]) -> int:
    return encoding["input_ids"].shape[1]  # with the padding that a request asks for


def _in_thread_that_may_be_left(work: Callable[[], Any]) -> asyncio.Future:
    """What `work` returns; the process may end before, for which it would wait for a thread of an executor."""
    outcome = Future()

    def settle() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work())
            except BaseException as error:  # to whoever waits
                outcome.set_exception(error)

    threading.Thread(target=settle, name=LOADER, daemon=True).start()
    return asyncio.wrap_future(outcome)


def _encode(
    classifier: GamlTextClassificationPipeline, query: Query, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    if not query.is_batch:
        return [classifier.preprocess(query.rows[0], **arguments)]
    return [classifier.preprocess(_Row(number, row), **arguments) for number, row in enumerate(query.rows)]


async def _unless_client_leaves(request: Request, futures: list[asyncio.Future]) -> list[Any]:
    """The results; [`ClientLeft`] once the client has closed its connection, and all futures are then cancelled."""
    if not futures:
        return []
    left, answers = asyncio.ensure_future(_client_leaves(request)), asyncio.gather(*futures)
    answers.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs what nobody asked
    try:
        await asyncio.wait((left, answers), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientLeft
        return answers.result()
    finally:
        for future in (left, answers, *futures):
            future.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request, limit: int) -> Any:
    """The body of a request."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "unsupported_media_type", f"The body must be `application/json`. Got {shown(kind)}.")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise Refusal(415, "unsupported_media_type", f"The body must not be compressed. Got {shown(coding)}.")
    too_large = Refusal(413, "too_large", f"The body may hold {limit} bytes at most.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except ValueError as error:  # UTF-8 too, and whole numbers of thousands of digits
        raise invalid(f"The body must be JSON: {error}.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_query(body: Any) -> Query:
    """
    What a request asks, of its JSON.

    `inputs` is a text, `{"text": ..., "text_pair": ...}`, or, as in text-embeddings-inference, `[text]`, the pair
    `[text, text]`, or a batch of lists of this kind. What a row holds is the pipeline's to check.
    """
    if not isinstance(body, dict) or "inputs" not in body:
        raise invalid('The body must be an object such as {"inputs": "A text."}.')
    known = ("inputs", "parameters", "truncate", "raw_scores")
    if unknown := [name for name in body if name not in known]:
        raise invalid(f"`{unknown[0][:50]}` is not a field of a request. These are: {', '.join(known)}.")
    parameters = body.get("parameters")
    if not isinstance(parameters, dict | None):
        raise invalid(f'`parameters` must be an object such as {{"patience": 3}}. Got {shown(parameters)}.')
    parameters = dict(parameters or {})
    if unknown := [name for name in parameters if name not in PARAMETERS]:
        raise invalid(f"`{unknown[0][:50]}` is not among `parameters`. These are: {', '.join(PARAMETERS)}.")
    for name, argument, value in (
        ("truncate", "truncation", lambda flag: flag),
        ("raw_scores", "function_to_apply", lambda flag: "none" if flag else None),
    ):
        flag = body.get(name)
        if not isinstance(flag, bool | None):
            raise invalid(f"`{name}` must be true or false. Got {shown(flag)}.")
        if flag is None or (meant := value(flag)) is None:
            continue
        if argument in parameters:
            raise invalid(f"`{name}` and `{argument}` say the same: give one of them. Got both.")
        parameters[argument] = meant
    inputs = body["inputs"]
    if not isinstance(inputs, list):
        return Query([inputs], False, parameters)
    if not inputs:
        raise invalid("`inputs` must hold at least one row. Got an empty list.")
    if all(isinstance(text, str) for text in inputs):
        if len(inputs) > 2:
            raise invalid(
                f'`inputs` of texts alone is one text or a pair. Got {len(inputs)}; a batch is [["a"], ["b"], ["c"]].'
            )
        return Query([_row(inputs)], False, parameters)
    return Query([_row(row) for row in inputs], True, parameters)


def _row(row: Any) -> Any:
    """A row as the pipeline knows it."""
    if isinstance(row, list) and len(row) in (1, 2):
        return row[0] if len(row) == 1 else {"text": row[0], "text_pair": row[1]}
    return row


# The application

REQUEST = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "additionalProperties": False,
                    "properties": {
                        "inputs": {
                            "description": "A text; a pair, `[text, text]`; or a batch, a list of lists of these.",
                            "anyOf": [
                                {"type": "string"},
                                {
                                    "type": "object",
                                    "properties": dict.fromkeys(("text", "text_pair"), {"type": "string"}),
                                },
                                {"type": "array", "items": {}},
                            ],
                        },
                        "truncate": {"type": "boolean", "description": "false: a text that is too long is an error."},
                        "raw_scores": {"type": "boolean", "description": "Logits in place of probabilities."},
                        "parameters": {
                            "type": "object",
                            "description": "Of the pipeline, for this request.",
                            "additionalProperties": False,
                            "properties": {name: {} for name in PARAMETERS},
                        },
                    },
                },
                "examples": {
                    "a text": {"value": {"inputs": "a good film"}},
                    "a pair": {"value": {"inputs": ["He left.", "He is gone."]}},
                    "a batch": {"value": {"inputs": [["a good film"], ["a dull one"]], "parameters": {"patience": 2}}},
                },
            }
        },
    }
}
ERRORS = {
    413: "Too many rows, or too many bytes.",
    415: "The body is not `application/json`, or compressed.",
    422: "What the pipeline refuses; the row is named.",
    429: "Too many requests at a time.",
    503: "Not ready, or shutting down.",
    504: "No answer in time.",
}


def make_app(
    load_classifier: Callable[[], GamlTextClassificationPipeline],
    settings: ServerSettings | None = None,
    *,
    name: str = "",
    admin_token: str | None = None,
) -> FastAPI:
    """
    The application.

    Args:
        load_classifier (`Callable`): makes the pipeline, a [`~scoring.ClassifierLoader`] say.
        settings ([`ServerSettings`], *optional*): the knobs.
        name (`str`): of the model, as `/info` tells it.
        admin_token (`str`, *optional*): who shows it may change knobs live; without one nobody may.

    Returns:
        `fastapi.FastAPI`: its [`Service`] is `app.state.service`.
    """
    service = Service(load_classifier, settings or ServerSettings(), name)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # Without redirects: that of `/predict/` would name the host and the scheme that the client's proxy speaks to.
    app = FastAPI(title="gaml-serve", version=version("gaml_hf"), lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    errors = {status: {"description": text} for status, text in ERRORS.items()}

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        content = {"error": str(refusal), "error_type": refusal.error_type}
        return AsciiJson(content, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "validation")
        return AsciiJson({"error": str(error.detail), "error_type": kind}, error.status_code, error.headers)

    async def answer(request: Request, always_batch: bool) -> Response:
        started, outcome = time.perf_counter(), "ok"
        try:
            return await service.predict(request, always_batch=always_batch)
        except Refusal as refusal:
            outcome = refusal.error_type
            raise
        except ClientLeft:
            outcome = "client_left"
            return Response(status_code=499)  # nobody reads it
        except asyncio.CancelledError:  # how Ray Serve tells it
            outcome = "client_left"
            raise
        finally:
            service.metrics.requests.labels(outcome).inc()
            if outcome == "ok":  # refusals, which take no time, would hide how long the others waited
                service.metrics.request_seconds.observe(time.perf_counter() - started)

    @app.post("/predict", openapi_extra=REQUEST, responses=errors)
    async def predict(request: Request) -> Response:
        """Classify a text, a pair or a batch: for each, its labels, best first, and the layer at which it left."""
        return await answer(request, always_batch=False)

    @app.post("/", openapi_extra=REQUEST, responses=errors)
    async def predict_for_clients(request: Request) -> Response:
        """As `/predict`, and the answer to one text is a batch of one, as `InferenceClient` wants it."""
        return await answer(request, always_batch=True)

    @app.get("/health", responses={503: errors[503]})
    @app.head("/health", include_in_schema=False)  # as some balancers ask
    async def health() -> Response:
        """200 once a forward pass has worked."""
        await service.check_health()
        return Response()

    @app.get("/info")
    async def info() -> Response:
        """The model, its exits and the knobs."""
        return AsciiJson(_info(service))

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.put("/config")
    async def config(request: Request) -> Response:
        """Change knobs while the server runs."""
        _check_admin(request, admin_token)
        settings = service.change(await read_json(request, service.settings.payload_limit))
        return AsciiJson(dataclasses.asdict(settings))

    return app


def _info(service: Service) -> dict[str, Any]:
    if service.classifier is None:
        raise service._not_ready()
    config = service.classifier.model.config
    return {
        "model_id": service.name,
        "model_type": {"classifier": {"id2label": config.id2label, "label2id": config.label2id}},
        "architecture": config.model_type,
        "exit_layers": config.exit_layers,
        "max_input_length": service.classifier.max_length,
        "text_columns": config.text_columns,
        "exit_cap": service.exit_cap_now,
        "certificate": None if service.certificate is None else service.certificate.promise(),
        "settings": dataclasses.asdict(service.settings),
        "version": version("gaml_hf"),
    }


def _check_admin(request: Request, admin_token: str | None) -> None:
    if admin_token is None:
        raise Refusal(403, "forbidden", "The knobs are fixed: the server was started without `--admin_token`.")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # In the same time, however many characters agree.
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), admin_token.encode()):
        message = "`Authorization: Bearer ...` must hold the admin token."
        raise Refusal(401, "unauthorized", message, **{"www-authenticate": "Bearer"})


class DrainingServer(uvicorn.Server):
    """
    Uvicorn that, on the first SIGTERM or SIGINT, lets the application refuse new requests while it answers those in
    flight, and ends when none is left; on a second signal, when the forward pass that runs is over. Who does not read
    the answer is waited for as long as a request may take, `timeout_ms` from the first signal.
    """

    def handle_exit(self, sig: int, frame: Any) -> None:
        service = self.config.app.state.service
        if service.is_draining:
            self.should_exit = self.force_exit = True
        else:
            self._deadline = time.monotonic() + service.settings.timeout_ms / 1e3
        service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        service = self.config.app.state.service
        if service.failure is not None:
            self.should_exit = True
        elif service.is_draining and service.in_flight == 0:
            self.should_exit = True
            self.config.timeout_graceful_shutdown = max(1, math.ceil(self._deadline - time.monotonic()))
        return await super().on_tick(counter)


__all__ = ["DrainingServer", "ServerSettings", "make_app"]
