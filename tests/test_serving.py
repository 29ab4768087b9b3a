"""The server: the pipeline's answers over HTTP, clear errors, nothing lost."""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from huggingface_hub import InferenceClient, constants
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pytest import approx, fixture, mark, raises
from transformers import BertTokenizer

import gaml_hf.runtime.serving
import gaml_serve
from benchmarks import serving as benchmark
from conftest import WORDS as VOCABULARY
from conftest import sharpen
from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline
from gaml_hf.evaluation import ExitCertificate
from gaml_hf.models.configuration_gaml import CERTIFIED_FIELDS
from gaml_hf.runtime import batching
from gaml_hf.runtime.batching import Item, MicroBatcher, take_batch
from gaml_hf.runtime.ort import export_onnx
from gaml_hf.runtime.scoring import ClassifierLoader
from gaml_hf.runtime.serving import PARAMETERS, Refusal, ServerSettings, make_app, read_query


TEXTS = ["a good film", "dull and sad", "he was so very funny", "the worst plot of the movie", "great"]
PAIR = {"text": "a good film", "text_pair": "a dull one"}
JSON = {"content-type": "application/json"}


@fixture(scope="module")
def model():
    """Texts differ in class and in exit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = GamlBertConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
        **sizes,
        **PAPER_LETTER,
        num_labels=3,
        exit_strategy="patience",
        patience=1,
    )
    model = GamlBertForSequenceClassification(config).eval()
    sharpen(model)
    return model


@fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@fixture
def certificate(model):
    """What the model is promised to lose at most, in its config, as a test wants it."""

    def certify(max_loss=0.1, risk="disagreement"):
        config = model.config
        found = ExitCertificate(
            exit_strategy="patience",
            parameter=1,
            risk=risk,
            max_loss=max_loss,
            confidence=0.9,
            num_rows=100,
            num_lost=4,
            bound=0.08,
            speed_up=2.0,
            exit_bounds=[0.4, 0.1, 0.05, 0.0],
            method="by hand",
            rows_sha256="",
            date="2026-01-31",
            versions={},
            exits={field: getattr(config, field) for field in CERTIFIED_FIELDS},
        )
        config.exit_certificate = dataclasses.asdict(found)
        return found

    yield certify
    model.config.exit_certificate = None


@fixture
def classifier(model, tokenizer: BertTokenizer):
    return GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")


@contextlib.asynccontextmanager
async def serving(load, is_ready=True, **settings):
    """A client of an application that runs in this process."""
    token = settings.pop("admin_token", None)
    app = make_app(load, ServerSettings(**settings), name="tiny", admin_token=token)
    transport = httpx.ASGITransport(app)
    async with (
        app.state.service.running(),
        httpx.AsyncClient(transport=transport, base_url="http://here", timeout=30) as client,
    ):
        client.service = app.state.service
        while is_ready and (await client.get("/health")).status_code != 200:
            assert client.service.failure is None, client.service.failure
            await asyncio.sleep(0.002)
        yield client


def ask(classifier, *requests, **settings):
    """The responses to requests, `(method, path, keyword arguments)` each, one after another."""

    async def all_of_them():
        async with serving(lambda: classifier, **settings) as client:
            return [await client.request(method, path, **arguments) for method, path, arguments in requests]

    return asyncio.run(all_of_them())


def predict(classifier, *bodies, path="/predict", **settings):
    return ask(classifier, *(("POST", path, {"json": body}) for body in bodies), **settings)


def close(answers):
    """Answers to compare with: scores up to rounding, which depends on the batch."""
    return [{**answer, "score": approx(answer["score"], abs=1e-5)} for answer in answers]


def metric(text, name, **labels):
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


# The batches


def items(*sizes_and_kinds):
    return deque(Item(number, size, kind, None) for number, (size, kind) in enumerate(sizes_and_kinds))


@mark.parametrize(
    ("waiting", "taken", "left"),
    [
        ([(3, "a"), (3, "a"), (2, "a"), (1, "a")], [0, 1, 2], [3]),
        ([(3, "a"), (4, "a"), (3, "a"), (1, "a")], [0, 1], [2, 3]),  # padding counts: 3 x 4
        ([(3, "a"), (4, "b"), (3, "a"), (2, "b")], [0, 2], [1, 3]),
        ([(99, "a"), (1, "a")], [0], [1]),
        ([(6, "a"), (5, "a"), (1, "a")], [0], [1, 2]),
        ([(2, "a"), (6, "a"), (1, "a"), (1, "a")], [0, 2, 3], [1]),  # the long one would make the others long
        ([(6, "a"), (1, "b"), (5, "a"), (1, "b")], [0], [1, 2, 3]),
        ([], [], []),
    ],
)
def test_a_batch_by_hand(waiting, taken, left):
    queue = items(*waiting)
    assert [item.value for item in take_batch(queue, 10)] == taken
    assert [item.value for item in queue] == left


@given(st.lists(st.integers(1, 512), min_size=1, max_size=300), st.integers(1, 4096))
def test_a_batch_has_little_padding_and_all_get_their_turn(lengths, max_tokens):
    queue, taken = items(*((length, "a") for length in lengths)), []
    while queue:
        oldest = queue[0]
        batch = take_batch(queue, max_tokens)
        assert batch[0] is oldest
        padded, tokens = len(batch) * max(item.tokens for item in batch), sum(item.tokens for item in batch)
        assert padded <= max_tokens or len(batch) == 1
        assert padded <= max(2 * tokens, 512)
        assert [item.value for item in batch] == sorted(item.value for item in batch)
        taken += [item.value for item in batch]
    assert sorted(taken) == list(range(len(lengths)))


def test_one_long_row_does_not_make_many_short_ones_long():
    queue = items(*[(5, "a")] * 150, (512, "a"), *[(5, "a")] * 150)
    assert [len(take_batch(queue, 4096)) for _ in range(2)] == [300, 1]


def batched(run, submit):
    """What `submit(batcher)` returns, beside a batcher at work."""

    async def at_work():
        with ThreadPoolExecutor(1) as thread:
            dropped = []
            batcher = MicroBatcher(run, thread, lambda: 10, dropped.append)
            work = asyncio.create_task(batcher.work())
            try:
                return await submit(batcher), sum(dropped)
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    return asyncio.run(at_work())


def test_what_comes_while_the_model_is_busy_runs_together():
    release, batches = threading.Event(), []

    def run(batch, waiting):
        batches.append(([item.value for item in batch], waiting))
        release.wait(10)
        return [item.value * 2 for item in batch]

    async def submit(batcher):
        first = batcher.submit(1, 4)
        while not batches:
            await asyncio.sleep(0.001)
        later = [batcher.submit(value, 4) for value in (2, 3, 4, 5)]
        later[1].cancel()
        release.set()
        return await asyncio.gather(first, *later, return_exceptions=True)

    answers, dropped = batched(run, submit)
    assert batches == [([1], 4), ([2, 4], 12), ([5], 4)]
    assert answers[:2] + answers[3:] == [2, 4, 8, 10]
    assert isinstance(answers[2], asyncio.CancelledError)
    assert dropped == 1


def test_who_gives_up_while_a_batch_takes_for_ever_leaves_nothing_in_the_queue(monkeypatch):
    monkeypatch.setattr(batching, "MANY", 4)
    release, lengths = threading.Event(), []

    def run(batch, waiting):
        release.wait(10)
        return [item.value for item in batch]

    async def submit(batcher):
        first, last = batcher.submit(0, 4), batcher.submit(1, 4)
        await asyncio.sleep(0.01)
        for value in range(40):
            batcher.submit(value, 4).cancel()
            lengths.append(len(batcher.queue))
        release.set()
        return await asyncio.gather(first, last)

    answers, dropped = batched(run, submit)
    assert answers == [0, 1]
    assert dropped == 40
    assert max(lengths) <= 5


def test_what_may_wait_runs_when_nothing_else_does():
    order = []

    def run(batch, waiting):
        order.extend(item.value for item in batch)
        return order[-len(batch) :]

    async def submit(batcher):
        futures = [batcher.submit(value, 6, later=value < 0) for value in (-1, 1, -2, 2)]
        return await asyncio.gather(*futures)

    assert batched(run, submit)[0] == [-1, 1, -2, 2]
    assert order == [1, 2, -1, -2]


def test_what_may_wait_runs_a_few_at_a_time():
    """For what comes next waits until they are through."""

    async def submit(batcher):
        batcher.max_tokens = lambda: 160
        return await asyncio.gather(*(batcher.submit(number, 4, later=True) for number in range(20)))

    batches, _ = batched(lambda batch, waiting: [len(batch)] * len(batch), submit)
    assert batches == [2] * 20


def test_a_batch_that_runs_out_costs_no_other():
    """A future takes no StopIteration: who waits would never be told, nor anybody after."""

    def run(batch, waiting):
        return [next(iter(item.value)) for item in batch]

    async def submit(batcher):
        futures = [batcher.submit(value, 10) for value in ([], [1])]
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)

    (error, answer), _ = batched(run, submit)
    assert (type(error), answer) == (RuntimeError, 1)


def test_a_batch_that_fails_costs_no_other():
    def run(batch, waiting):
        if batch[0].value == "bad":
            raise MemoryError("no more")
        return [item.value for item in batch]

    async def submit(batcher):
        futures = [batcher.submit(value, 1, kind) for value, kind in (("bad", 0), ("good", 1), ("worse", 0))]
        return await asyncio.gather(*futures, return_exceptions=True)

    answers, _ = batched(run, submit)
    assert [str(answer) for answer in answers] == ["no more", "good", "no more"]


# Answers


def test_answers_are_the_pipelines(classifier):
    pair = list(PAIR.values())
    single, one, two, pairs, mixed, dictionary = predict(
        classifier,
        {"inputs": TEXTS[0]},
        {"inputs": [TEXTS[0]]},
        {"inputs": pair},
        {"inputs": [[text] for text in TEXTS]},
        {"inputs": [pair, TEXTS[1:2], TEXTS[2], PAIR]},
        {"inputs": PAIR},
    )
    expected = [classifier(text, top_k=None) for text in TEXTS]
    assert single.json() == one.json() == close(expected[0])
    assert two.json() == dictionary.json() == close(classifier(PAIR, top_k=None))
    assert pairs.json() == [close(answers) for answers in expected]
    assert [answers[0] for answers in mixed.json()] == close(classifier([PAIR, *TEXTS[1:3], PAIR]))
    assert len({answers[0]["exit_layer"] for answers in pairs.json()}) > 1
    assert "x-exit-cap" not in pairs.headers


def test_the_root_answers_as_inference_clients_want_it(classifier):
    (response,) = predict(classifier, {"inputs": TEXTS[0], "parameters": {"top_k": 2}}, path="/")
    assert response.json() == [close(classifier(TEXTS[0], top_k=2))]


def test_knobs_of_a_request(classifier):
    long = " ".join(["good"] * 200)
    for arguments in (
        {"budgeted_exit": 2},
        {"exit_strategy": "none"},
        {"exit_strategy": "max_prob", "exit_threshold": 0.5},
    ):
        (response,) = predict(classifier, {"inputs": [[text] for text in TEXTS], "parameters": arguments})
        assert response.json() == [close(classifier(text, top_k=None, **arguments)) for text in TEXTS]
    raw, skipped, whole, cut = predict(
        classifier,
        {"inputs": TEXTS[0], "raw_scores": True},
        {"inputs": [["good"], [" "]], "parameters": {"on_error": "skip"}},
        {"inputs": long, "truncate": False},
        {"inputs": long, "truncate": True},
    )
    assert raw.json() == close(classifier(TEXTS[0], top_k=None, function_to_apply="none"))
    assert [answers[0]["label"] is None for answers in skipped.json()] == [False, True]
    assert "`inputs[1]`: `text` must hold more than blanks" in skipped.json()[1][0]["error"]
    assert whole.status_code == 422
    assert "the text has" in whole.json()["error"]
    assert cut.json()[0]["truncated"] is True


def test_many_clients_get_their_own_answers_in_few_batches(classifier):
    parameters = [{}, {"budgeted_exit": 1}, {"exit_strategy": "none"}]
    expected = [[close(classifier(text, top_k=None, **more)) for more in parameters] for text in TEXTS]

    async def together():
        async with serving(lambda: classifier) as client:
            asked = [(text, which) for text in range(len(TEXTS)) for which in range(3)] * 8
            bodies = [{"inputs": TEXTS[text], "parameters": parameters[which]} for text, which in asked]
            responses = await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))
            return asked, responses, (await client.get("/metrics")).text

    asked, responses, told = asyncio.run(together())
    for (text, which), response in zip(asked, responses, strict=True):
        assert response.json() == expected[text][which]
    assert metric(told, "gaml_requests_total", outcome="ok") == len(asked) == 120
    assert metric(told, "gaml_batch_rows_sum") == 1 + metric(told, "gaml_exit_layer_count") == 121  # with the probe
    assert metric(told, "gaml_batch_rows_count") < 60
    assert metric(told, "gaml_exit_layer_bucket", le="1.0") >= 40
    assert metric(told, "gaml_request_seconds_count") == 120
    assert metric(told, "gaml_queue_rows") == 0
    assert metric(told, "gaml_exit_cap") == 4


@mark.parametrize("kind", ["checkpoint", "prepacked", "export"])
def test_folders_of_each_kind(kind, folder, classifier, tmp_path, caplog):
    source = folder
    if kind == "export":
        source = tmp_path / "export"
        export_onnx(classifier.model, source, tokenizer=classifier.tokenizer)
    load = ClassifierLoader(str(source), kind == "export", "cpu", 1, prepack=kind == "prepacked")

    async def answers():
        async with serving(load, slo_ms=60_000) as client:
            client.service.exit_cap.position = 1
            return await client.post("/predict", json={"inputs": [[text] for text in TEXTS]}), client.service.name

    response, _ = asyncio.run(answers())
    free = [classifier(text)[0]["exit_layer"] for text in TEXTS]
    budgeted = [
        classifier(text, top_k=None, budgeted_exit=min(layer, 2)) for text, layer in zip(TEXTS, free, strict=True)
    ]
    assert response.json() == [close(answers) for answers in budgeted]
    assert response.headers["x-exit-cap"] == "2"
    assert int(response.headers["x-forced-exits"]) == sum(layer > 2 for layer in free) > 0


@mark.parametrize("exits", [{"exit_strategy": "none"}, {"exit_strategy": "budgeted", "budgeted_exit": 3}], ids=str)
def test_a_fixed_depth_under_the_cap(classifier, exits):
    """Both kinds of rows leave there; and who asks after them is answered too."""

    async def answers():
        async with serving(lambda: classifier, slo_ms=60_000, timeout_ms=20_000) as client:
            client.service.exit_cap.position = 1
            body = {"inputs": [[text] for text in TEXTS], "parameters": exits}
            return await client.post("/predict", json=body), await client.post("/predict", json={"inputs": TEXTS[0]})

    capped, after = asyncio.run(answers())
    expected = [close(classifier(text, top_k=None, exit_strategy="budgeted", budgeted_exit=2)) for text in TEXTS]
    assert capped.json() == expected
    assert (capped.headers["x-exit-cap"], int(capped.headers["x-forced-exits"])) == ("2", len(TEXTS))
    assert after.status_code == 200


def test_a_text_that_takes_long_by_itself_moves_no_cap(classifier):
    """A bound shorter than any forward pass, and nothing else waits; the server's own trial counts as no text."""

    async def ask():
        async with serving(lambda: classifier, slo_ms=0.001) as client:
            assert client.service.exit_cap.tokens_per_second is None
            responses = [await client.post("/predict", json={"inputs": text}) for text in TEXTS]
            return responses, client.service.exit_cap

    responses, cap = asyncio.run(ask())
    assert not any("x-exit-cap" in response.headers for response in responses)
    assert (cap.exit_layer, cap.tokens_per_second > 0) == (4, True)


def test_shadow_traffic_counts_the_classes_that_differ_at_full_depth(classifier):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(VOCABULARY[11:], k=rng.randint(1, 20))) for _ in range(30)]
    first, last = ([answer["label"] for answer in classifier(texts, budgeted_exit=m)] for m in (1, 4))
    differ = sum(a != b for a, b in zip(first, last, strict=True))

    async def shadow():
        async with serving(lambda: classifier, shadow_fraction=1.0, budgeted_exit=1, slo_ms=1000) as client:
            response = await client.post("/predict", json={"inputs": [[text] for text in texts]})
            assert [answers[0]["label"] for answers in response.json()] == first
            while metric(told := (await client.get("/metrics")).text, "gaml_shadow_rows_total") < 30:
                await asyncio.sleep(0.002)
            # With which none can differ, unless the cap acts.
            client.service.change({"budgeted_exit": None, "exit_strategy": "none", "slo_ms": None})
            await client.post("/predict", json={"inputs": [[text] for text in texts]})
            while metric((await client.get("/metrics")).text, "gaml_shadow_rows_total") < 60:
                await asyncio.sleep(0.002)
            client.service.change({"shadow_fraction": 0.0})
            await client.post("/predict", json={"inputs": "good"})
            return told, (await client.get("/metrics")).text

    told, later = asyncio.run(shadow())
    assert metric(told, "gaml_shadow_disagreements_total") == differ > 0
    assert metric(later, "gaml_shadow_disagreements_total") == differ
    assert metric(told, "gaml_exit_layer_count") == 30  # of what was answered
    assert metric(later, "gaml_shadow_rows_total") == 60


# The certificate


def test_the_cap_stops_where_the_certificate_does(classifier, certificate):
    """Exit 1 may differ in 0.4 of the rows, exit 2 in 0.1, the policy itself in 0.1."""
    found = certificate()

    async def lowest(**knobs):
        async with serving(lambda: classifier, slo_ms=100, **knobs) as client:
            info = (await client.get("/info")).json()
            assert info["certificate"] == found.promise()
            client.service.exit_cap.ran(1, 1000.0)  # far too slow
            for _ in range(9):
                client.service.exit_cap.update(1000)
            response = await client.post("/predict", json={"inputs": [[text] for text in TEXTS]})
            layers = [labels[0]["exit_layer"] for labels in response.json()]
            return client.service.exit_cap.exit_layer, max(layers)

    assert asyncio.run(lowest()) == (1, 1)
    assert asyncio.run(lowest(max_disagreement=0.5)) == (1, 1)
    assert asyncio.run(lowest(max_disagreement=0.2)) == (2, 2)
    assert asyncio.run(lowest(max_disagreement=0.2, min_exit=3)) == (3, 3)
    assert asyncio.run(lowest(max_disagreement=0.5, min_exit=2)) == (2, 2)
    assert asyncio.run(lowest(max_disagreement=0.1)) == (4, 4)


@mark.parametrize(
    ("knobs", "risk", "message"),
    [
        ({"max_disagreement": 0.2}, None, "`max_disagreement` needs a checkpoint with a certificate .* Got none."),
        ({"max_disagreement": 0.2}, "accuracy_loss", "a certificate of disagreement, .* Got one of accuracy_loss."),
        ({"max_disagreement": 0.05}, "disagreement", "must be at least the 0.1 that the certificate promises"),
        ({"max_disagreement": 0.2, "patience": 1}, "disagreement", "own exit policy, .*: leave `patience` out"),
        ({"max_disagreement": 0.2, "min_exit": 9}, "disagreement", "`min_exit` must be one of the exits"),
        ({"max_disagreement": 0.2, "slo_ms": None}, "disagreement", "`max_disagreement` is read with `slo_ms` alone"),
        ({"max_disagreement": 2}, "disagreement", r"`max_disagreement` must be a number in \[0, 1\]"),
    ],
)
def test_what_no_certificate_allows(classifier, certificate, knobs, risk, message):
    if risk is not None:
        certificate(risk=risk)

    async def change():
        async with serving(lambda: classifier) as client:
            before = client.service.settings
            with raises(Refusal, match=message):
                client.service.change({"slo_ms": 100} | knobs)
            assert client.service.settings == before

    asyncio.run(change())


def test_shadow_traffic_that_contradicts_the_certificate(classifier, certificate, monkeypatch, caplog):
    monkeypatch.setattr("gaml_hf.runtime.serving.SHADOW_WINDOW", 60)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(VOCABULARY[11:], k=rng.randint(1, 20))) for _ in range(60)]
    free, full = ([answer["label"] for answer in classifier(texts, exit_strategy=s)] for s in ("patience", "none"))
    differ = sum(a != b for a, b in zip(free, full, strict=True))
    assert differ > 6  # of 60 where 0.01 are promised: never, by chance

    async def told(max_loss, **parameters):
        """The metric after one window of rows that the certified policy answers, or another."""
        certificate(max_loss)
        caplog.clear()
        async with serving(lambda: classifier, shadow_fraction=1.0, max_client_batch_size=60) as client:
            body = {"inputs": [[text] for text in texts], "parameters": parameters}
            assert (await client.post("/predict", json=body)).status_code == 200
            while metric(text := (await client.get("/metrics")).text, "gaml_shadow_rows_total") < 60:
                await asyncio.sleep(0.002)
            client.service.change({"timeout_ms": 20_000})
            unchanged = (await client.get("/metrics")).text
            client.service.change({"exit_strategy": "none"})  # which nobody promised anything of
            assert metric((await client.get("/metrics")).text, "gaml_shadow_contradicts_certificate") == 0
            told = metric(text, "gaml_shadow_contradicts_certificate")
            assert metric(unchanged, "gaml_shadow_contradicts_certificate") == told
            return told

    assert asyncio.run(told(0.01)) == 1
    assert f"Of the last 60 shadow rows {differ} get another class at full depth: more than" in caplog.text
    assert asyncio.run(told(0.9)) == 0
    assert "shadow rows" not in caplog.text
    assert asyncio.run(told(0.01, exit_strategy="budgeted", budgeted_exit=1)) == 0  # another policy: nothing promised


# Refusals


@mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [["good"], [" "]]}, "`inputs[1]`: `text` must hold more than blanks"),
        ({"inputs": "\ud800"}, r"`inputs`: `text` must be valid Unicode. Got the lone surrogate '\ud800'"),
        ({"inputs": 5}, "`inputs`: a row must be a `str` or a dict"),
        ({"inputs": [["a", "b", "c"]]}, "`inputs[0]`: a row must be"),
        ({"inputs": ["a", "b", "c"]}, 'a batch is [["a"], ["b"], ["c"]]'),
        ({"inputs": []}, "at least one row"),
        ({"inputs": {"text": "a", "\ud800": "b"}}, "a dict must have the key `text`"),
        ({"input": "a"}, "The body must be an object such as"),
        (["a"], "The body must be an object such as"),
        ({"inputs": "a", "\ud800": 1}, "is not a field of a request"),
        ({"inputs": "a", "truncate": 1}, "`truncate` must be true or false. Got 1"),
        ({"inputs": "a", "truncate": True, "parameters": {"truncation": True}}, "say the same"),
        ({"inputs": "a", "parameters": [1]}, "`parameters` must be an object"),
        ({"inputs": "a", "parameters": {"exit_policy": 1}}, "`exit_policy` is not among `parameters`"),
        ({"inputs": "a", "parameters": {"batch_size": 1}}, "`batch_size` is not among `parameters`"),
        ({"inputs": "a", "parameters": {"patience": 0}}, "`parameters`: `patience` must be a whole number"),
        ({"inputs": "a", "parameters": {"patience": [[]]}}, "`parameters`: `patience` must be a whole number"),
        ({"inputs": "a", "parameters": {"top_k": 10**40}}, None),  # fine: all there are
    ],
)
def test_what_is_refused_is_named(classifier, body, message):
    (response,) = ask(classifier, ("POST", "/predict", {"content": json.dumps(body), "headers": JSON}))
    if message is None:
        assert response.status_code == 200
        return
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert message in response.json()["error"]


DEEP = "[" * 100_000


@mark.parametrize(
    ("content", "headers", "status", "kind"),
    [
        (DEEP, JSON, 422, "validation"),
        ('{"inputs": ' + "[" * 300 + "]" * 300 + "}", JSON, 422, "validation"),
        (b"\xff\xfe\xfa", JSON, 422, "validation"),
        ('{"inputs": NaN}', JSON, 422, "validation"),
        (
            '{"inputs": "a", "parameters": {"exit_threshold": 1e999, "exit_strategy": "entropy"}}',
            JSON,
            422,
            "validation",
        ),
        ('{"inputs": ' + "9" * 5000 + "}", JSON, 422, "validation"),
        ("", JSON, 422, "validation"),
        ('{"inputs": "a"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (
            gzip.compress(b'{"inputs": "a"}', mtime=0),
            JSON | {"content-encoding": "gzip"},
            415,
            "unsupported_media_type",
        ),
        ('{"inputs": "' + "a" * 200_000 + '"}', JSON, 413, "too_large"),
        (json.dumps({"inputs": [["a"]] * 33}), JSON, 413, "too_large"),
    ],
)
def test_odd_bodies(classifier, content, headers, status, kind):
    (response,) = ask(
        classifier, ("POST", "/predict", {"content": content, "headers": headers}), payload_limit=150_000
    )
    assert response.status_code == status
    assert response.json()["error_type"] == kind


def test_a_body_without_a_length_is_not_read_beyond_the_limit(classifier):
    sent = []

    async def chunks():
        for _ in range(100):
            sent.append(1)
            yield b" " * 1000

    async def post():
        async with serving(lambda: classifier, payload_limit=5000) as client:
            return await client.post("/predict", content=chunks(), headers=JSON)

    assert asyncio.run(post()).status_code == 413
    assert len(sent) < 10


def test_other_routes_refuse_in_the_same_words(classifier):
    paths = ("/x", "/predict", "/docs", "/openapi.json", "/info")
    slash, nowhere, get, docs, schema, info = ask(
        classifier, ("POST", "/predict/", {"json": {"inputs": "good"}}), *(("GET", path, {}) for path in paths)
    )
    assert (slash.status_code, slash.json()["error_type"]) == (404, "not_found")  # no redirect, to http perhaps
    assert (nowhere.status_code, nowhere.json()["error_type"]) == (404, "not_found")
    assert (get.status_code, get.json()["error_type"]) == (405, "method_not_allowed")
    assert docs.status_code == 200
    operation = schema.json()["paths"]["/predict"]["post"]
    assert {"413", "422", "429", "503", "504"} <= operation["responses"].keys()
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        read_query(example["value"])
    assert info.json()["exit_layers"] == [1, 2, 3, 4]
    assert info.json()["model_id"] == "tiny"
    assert info.json()["text_columns"] is None


def test_a_model_of_pairs_is_asked_for_pairs(classifier):
    body = {"inputs": [["good", "bad"], ["good"]], "parameters": {"on_error": "skip"}}
    classifier.model.config.text_columns = ["one", "two"]
    try:
        one, pair, both, info = ask(
            classifier,
            *(
                ("POST", "/predict", {"json": json})
                for json in ({"inputs": "good"}, {"inputs": ["good", "bad"]}, body)
            ),
            ("GET", "/info", {}),
        )
    finally:
        classifier.model.config.text_columns = None
    assert one.status_code == 422
    assert "must be as in the training, of pairs" in one.json()["error"]
    assert pair.status_code == both.status_code == 200
    assert "of pairs" in both.json()[1][0]["error"]
    assert both.json()[0] == close(pair.json())
    assert info.json()["text_columns"] == ["one", "two"]


class Slow:
    """A classifier that waits in its forward pass until it is let go."""

    def __init__(self, classifier, monkeypatch):
        self.gate, self.batches, forward = threading.Event(), [], type(classifier).forward

        def slow(pipeline, inputs, **arguments):
            self.batches.append(len(inputs["input_ids"]))
            assert self.gate.wait(20)
            return forward(pipeline, inputs, **arguments)

        monkeypatch.setattr(type(classifier), "forward", slow)

    async def until_busy(self, batches=1):
        while len(self.batches) < batches:
            await asyncio.sleep(0.001)


def test_not_ready_overloaded_late_and_draining(classifier, monkeypatch):
    slow = Slow(classifier, monkeypatch)

    async def through_its_life():
        async with serving(lambda: classifier, is_ready=False, max_concurrent_requests=2) as client:
            ask_one = lambda: client.post("/predict", json={"inputs": "good"})  # noqa: E731
            responses = {"loading": await ask_one(), "unwell": await client.get("/health")}
            slow.gate.set()
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.002)
            slow.gate.clear()
            waiting = [asyncio.create_task(ask_one()) for _ in range(2)]
            await slow.until_busy(2)
            responses["too many"] = await ask_one()
            client.service.is_draining = True
            responses["draining"], responses["unwell at last"] = await ask_one(), await client.get("/health")
            slow.gate.set()
            for number, task in enumerate(waiting):
                responses[f"in flight {number}"] = await task
            client.service.is_draining = False
            client.service.change({"timeout_ms": 30})
            slow.gate.clear()
            responses["late"] = await ask_one()
            slow.gate.set()
            client.service.change({"timeout_ms": 30_000.0})
            responses["after"] = await ask_one()
            return responses, client.service.in_flight, (await client.get("/metrics")).text

    responses, in_flight, told = asyncio.run(through_its_life())
    told_of = {}
    for name, response in responses.items():
        content = response.json()
        told_of[name] = (
            response.status_code,
            content[0]["label"] if isinstance(content, list) else content["error_type"],
        )
    assert told_of == {
        "loading": (503, "unhealthy"),
        "unwell": (503, "unhealthy"),
        "too many": (429, "overloaded"),
        "draining": (503, "draining"),
        "unwell at last": (503, "draining"),
        "in flight 0": (200, classifier("good")[0]["label"]),
        "in flight 1": (200, classifier("good")[0]["label"]),
        "late": (504, "timeout"),
        "after": (200, classifier("good")[0]["label"]),
    }
    assert responses["too many"].headers["retry-after"] == "1"
    assert in_flight == 0
    for outcome, count in {"ok": 3, "timeout": 1, "overloaded": 1, "draining": 1, "unhealthy": 1}.items():
        assert metric(told, "gaml_requests_total", outcome=outcome) == count


def test_a_model_that_hangs_is_unwell(classifier, monkeypatch):
    slow = Slow(classifier, monkeypatch)
    slow.gate.set()

    async def hang():
        async with serving(lambda: classifier, timeout_ms=300) as client:
            slow.gate.clear()
            late = [(await client.post("/predict", json={"inputs": "good"})).status_code for _ in range(2)]
            unwell, told = await client.get("/health"), (await client.get("/metrics")).text
            slow.gate.set()
            while client.service._began is not None:
                await asyncio.sleep(0.001)
            return late, unwell, told, await client.get("/health")

    late, unwell, told, well = asyncio.run(hang())
    assert late == [504, 504]
    assert unwell.status_code == 503
    assert "The model has been at one batch for " in unwell.json()["error"]
    assert metric(told, "gaml_queue_rows") == 0  # nobody waits any more
    assert well.status_code == 200


def test_a_client_that_left_costs_nothing_more(classifier, monkeypatch):
    slow = Slow(classifier, monkeypatch)
    slow.gate.set()
    body = json.dumps({"inputs": "good"}).encode()

    async def leave():
        async with serving(lambda: classifier) as client:
            slow.gate.clear()
            first = asyncio.create_task(client.post("/predict", json={"inputs": "good"}))
            await slow.until_busy(2)
            messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])

            async def receive():
                while len(client.service.batcher.queue) == 0 and not body_was_read:
                    body_was_read.append(1)
                    return next(messages)
                while len(client.service.batcher.queue) == 0:
                    await asyncio.sleep(0.001)
                return next(messages)

            async def send(message):
                pass

            body_was_read = []
            scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
            await client._transport.app(scope, receive, send)
            slow.gate.set()
            response = await first
            await client.post("/predict", json={"inputs": "good"})
            return response, (await client.get("/metrics")).text

    response, told = asyncio.run(leave())
    assert response.status_code == 200
    assert metric(told, "gaml_requests_total", outcome="client_left") == 1
    assert metric(told, "gaml_dropped_rows_total") == 1
    assert slow.batches == [1, 1, 1]  # the probe, and the two that stayed


def test_a_model_that_fails_is_unwell_until_it_works_again(classifier, monkeypatch, caplog):
    forward, broken = type(classifier).forward, []

    def sometimes(pipeline, inputs, **arguments):
        if broken:
            raise RuntimeError("out of memory")
        return forward(pipeline, inputs, **arguments)

    monkeypatch.setattr(type(classifier), "forward", sometimes)

    async def fail():
        async with serving(lambda: classifier) as client:
            broken.append(1)
            responses = [await client.post("/predict", json={"inputs": "good"}), await client.get("/health")]
            broken.clear()
            return [*responses, await client.get("/health"), await client.post("/predict", json={"inputs": "good"})]

    responses = asyncio.run(fail())
    assert [response.status_code for response in responses] == [500, 503, 200, 200]
    assert responses[0].json() == {"error": "The model failed; the log says why.", "error_type": "backend"}
    assert "out of memory" in responses[1].json()["error"]
    assert "out of memory" in caplog.text


def test_a_server_whose_batcher_has_ended_is_unwell(classifier, monkeypatch):
    async def end():
        async with serving(lambda: classifier) as client:
            monkeypatch.setattr(client.service.batcher, "max_tokens", lambda: 1 / 0)
            late = asyncio.create_task(client.post("/predict", json={"inputs": "good"}))
            while (health := await client.get("/health")).status_code == 200:
                await asyncio.sleep(0.002)
            await asyncio.gather(late, return_exceptions=True)
            return health

    assert "division by zero" in asyncio.run(end()).json()["error"]


def test_a_server_that_still_loads_can_be_stopped():
    gate = threading.Event()

    async def start_and_stop():
        async with serving(gate.wait, is_ready=False):
            pass

    try:
        asyncio.run(asyncio.wait_for(start_and_stop(), 60))
    finally:
        gate.set()


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path, caplog):
    async def start():
        async with serving(ClassifierLoader(str(tmp_path), False, "cpu", None), is_ready=False) as client:
            while client.service.failure is None:
                await asyncio.sleep(0.001)
            return client.service.failure

    assert isinstance(asyncio.run(start()), (OSError, ValueError))


# The knobs


def test_knobs_change_under_load_and_no_request_fails(classifier):
    expected = [
        close(classifier("good", top_k=None, exit_strategy="none")),
        close(classifier("good", top_k=None, budgeted_exit=1)),
    ]
    assert expected[0][0]["exit_layer"] != expected[1][0]["exit_layer"]
    admin = {"authorization": "Bearer s3cret"}

    async def change_under_load():
        async with serving(lambda: classifier, admin_token="s3cret", exit_strategy="none") as client:

            async def ask_many():
                return [await client.post("/predict", json={"inputs": "good"}) for _ in range(400)]

            askers = [asyncio.create_task(ask_many()) for _ in range(5)]
            changes = []
            knobs = [
                {"exit_strategy": "none", "budgeted_exit": None},
                {"exit_strategy": "budgeted", "budgeted_exit": 1},
            ]
            while not all(asker.done() for asker in askers) or len(changes) % 2:
                changes.append(await client.put("/config", json=knobs[len(changes) % 2], headers=admin))
                await asyncio.sleep(0.02)
            responses = [response for answers in await asyncio.gather(*askers) for response in answers]
            last = await client.post("/predict", json={"inputs": "good"})
            return changes, responses, last

    changes, responses, last = asyncio.run(change_under_load())
    assert len(responses) == 2000
    assert len(changes) >= 10
    assert {response.status_code for response in (*changes, *responses)} == {200}
    assert changes[-1].json()["budgeted_exit"] == 1
    assert all(response.json() in expected for response in responses)
    assert {response.json()[0]["exit_layer"] for response in responses} == {1, 4}
    assert last.json() == expected[1]


@mark.parametrize(
    ("body", "message"),
    [
        ({"patience": 0}, "`patience` must be a whole number of at least 1"),
        ({"exit_strategy": "entropy", "exit_threshold": 2}, "`exit_threshold` must lie in [0, 1]"),
        ({"slo_ms": 0}, "`slo_ms` must be a number above 0"),
        ({"slo_ms": True}, "`slo_ms` must be a number above 0"),
        ({"slo_ms": 1e308}, "`slo_ms` must be a number above 0 and up to 86,400,000"),
        ({"slo_ms": 10**400}, "`slo_ms` must be a number above 0 and up to 86,400,000"),
        ({"slo_ms": 100, "min_exit": 9}, "`min_exit` must be one of the exits of this model"),
        ({"slo_ms": 100, "min_exit": True}, "`min_exit` must be the layer of an exit. Got `min_exit=True`"),
        ({"slo_ms": 100, "min_exit": 3.0}, "`min_exit` must be the layer of an exit. Got `min_exit=3.0`"),
        ({"shadow_fraction": 1.5}, "`shadow_fraction` must be a number in [0, 1]"),
        ({"min_exit": 2}, "`min_exit` is read with `slo_ms` alone"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens` must be a whole number"),
        ({"payload_limit": 5}, "`payload_limit` is no knob that can change live"),
        ({"\ud800": 5}, "is no knob that can change live"),
        ([], "The body must be an object of knobs"),
    ],
)
def test_a_wrong_knob_changes_nothing(classifier, body, message):
    admin = {"authorization": "Bearer s3cret"}
    before, response, after = ask(
        classifier,
        ("GET", "/info", {}),
        ("PUT", "/config", {"content": json.dumps(body), "headers": JSON | admin}),
        ("GET", "/info", {}),
        admin_token="s3cret",
    )
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert before.json() == after.json()
    assert "s3cret" not in before.text


def test_who_may_change_knobs(classifier):
    tries = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic s3cret"},
        {"authorization": "Bearer s3cret"},
    ]
    requests = [("PUT", "/config", {"json": {"slo_ms": 50}, "headers": headers}) for headers in tries]
    responses = ask(classifier, *requests, admin_token="s3cret")
    assert [response.status_code for response in responses] == [401, 401, 401, 200]
    assert [response.status_code for response in ask(classifier, *requests)] == [403] * 4


# Anything at all


def odd_request(rng: random.Random) -> tuple[str, str, dict]:
    """A request of which nobody knows what it will be, and which must have an answer."""
    texts = ["good", "", " ", "\x00", "\ud800", "a" * 3000, "[SEP]", "\u202e film", "film " * 300]

    def value(depth=0):
        leaves = [None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), *texts]
        if depth < 3 and rng.random() < 0.5:
            many = [value(depth + 1) for _ in range(rng.randint(0, 4))]
            return many if rng.random() < 0.5 else {rng.choice(["text", "text_pair", "\udfff", ""]): v for v in many}
        return rng.choice(leaves)

    names = [*PARAMETERS, "exit_policy", "num_workers", "\ud8ff"]
    body = {"inputs": value(), "parameters": {rng.choice(names): value(2) for _ in range(rng.randint(0, 2))}}
    body |= {name: value(2) for name in ("truncate", "raw_scores") if rng.random() < 0.1}
    good = rng.choice(["good", [["good"], ["dull", "sad"]]])
    body = rng.choice([body, {"inputs": good}, {"inputs": value()}, value()])
    content = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = bytearray(content)
        for _ in range(3):
            content.insert(rng.randint(0, len(content)), rng.randint(0, 255))
        content = bytes(content)
    if rng.random() < 0.05:
        content = b'{"inputs":' + b"[" * rng.choice([10, 500, 50_000]) + content
    kind = rng.choice(["application/json"] * 9 + ["text/html", "", "application/json; charset=x", "\x7f;;;"])
    method = rng.choice(["POST"] * 19 + ["PUT"])
    path = rng.choice(["/predict"] * 4 + ["/", "/config"])
    return method, path, {"content": content, "headers": {"content-type": kind}}


def test_no_request_whatever_is_an_error_of_the_server(classifier):
    rng = random.Random(0)
    requests = [odd_request(rng) for _ in range(3000)]

    async def all_at_once():
        async with serving(lambda: classifier, payload_limit=40_000) as client:
            responses = []
            for start in range(0, len(requests), 600):  # more at a time than are taken in
                part = requests[start : start + 600]
                responses += await asyncio.gather(
                    *(client.request(method, path, **arguments) for method, path, arguments in part)
                )
            return responses, (await client.get("/metrics")).text, client.service.in_flight

    responses, told, in_flight = asyncio.run(all_at_once())
    statuses = Counter(response.status_code for response in responses)
    assert statuses.keys() <= {200, 403, 405, 413, 415, 422, 429}
    assert {200, 413, 415, 422} <= statuses.keys()
    assert statuses[200] > 50
    for response in responses:
        assert response.status_code == 200 or {"error", "error_type"} == response.json().keys()
    counted = sum(
        sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
        if sample.name == "gaml_requests_total"
    )
    assert counted == sum(method == "POST" and path != "/config" for method, path, _ in requests)
    assert in_flight == 0


# The command


@contextlib.contextmanager
def command(folder, *options):
    """The command in a process of its own, and where it listens."""
    words = [sys.executable, "-m", "gaml_serve", "--model", str(folder), "--port", "0", "--num_threads", "1", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
                    yield process, found[1], lines
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            process.kill()


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_the_command_serves_and_drains(folder, classifier, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # 127.0.0.1 counts as the network
    body = {"inputs": [[" ".join(TEXTS * 2)]] * 16}  # 24 of these are some 200 batches
    options = ("--max_batch_tokens", "64", "--timeout_ms", "300000")
    with command(folder, *options) as (process, url, lines), httpx.Client(base_url=url, timeout=300) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.02)
        assert client.post("/predict", json={"inputs": "good"}).json() == close(classifier("good", top_k=None))
        elements = InferenceClient(base_url=url, token="none").text_classification("good", top_k=1)
        assert [(element.label, element.exit_layer) for element in elements] == [
            (answer["label"], answer["exit_layer"]) for answer in classifier("good")
        ]
        with ThreadPoolExecutor(24) as pool:
            in_flight = [pool.submit(client.post, "/predict", json=body) for _ in range(24)]
            while (
                metric(client.get("/metrics").text, "gaml_requests_in_flight") + sum(f.done() for f in in_flight) < 24
            ):
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            while (refused := client.post("/predict", json={"inputs": "good"})).status_code == 200:
                time.sleep(0.002)
            assert (refused.status_code, refused.json()["error_type"]) == (503, "draining")
            assert [future.result().status_code for future in in_flight] == [200] * 24
        assert process.wait(60) == 0


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_a_second_signal_does_not_wait_for_what_is_in_flight(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    body = {"inputs": [[" ".join(TEXTS * 2)]] * 32}
    options = ("--max_batch_tokens", "64", "--timeout_ms", "300000")
    with command(folder, *options) as (process, url, lines), httpx.Client(base_url=url, timeout=300) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.02)
        with ThreadPoolExecutor(32) as pool:
            in_flight = [pool.submit(client.post, "/predict", json=body) for _ in range(32)]
            while metric(client.get("/metrics").text, "gaml_requests_in_flight") < 24:
                assert not all(future.done() for future in in_flight)
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            while client.get("/health").status_code == 200:
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert any(future.exception() is not None or future.result().status_code != 200 for future in in_flight)


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_who_does_not_read_does_not_keep_the_server(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with command(folder, "--timeout_ms", "1500") as (process, url, lines), socket.socket() as deaf:
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.02)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        deaf.settimeout(1)
        with contextlib.suppress(TimeoutError):  # until neither side takes any more
            while True:
                deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_a_connection_may_rest_between_two_requests(folder, monkeypatch):
    """Longer than uvicorn's 5 seconds, which are httpx's too: who of the two comes first then loses a request."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    limits = httpx.Limits(max_connections=1, keepalive_expiry=60)
    with command(folder) as (process, url, lines), httpx.Client(base_url=url, limits=limits) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.02)
        ports = []
        for rest in (0, 6):
            time.sleep(rest)
            response = client.post("/predict", json={"inputs": "good"})
            assert response.status_code == 200
            ports.append(response.extensions["network_stream"].get_extra_info("client_addr"))
        assert ports[0] == ports[1]
        process.send_signal(signal.SIGTERM)  # for which an idle connection is no reason to stay
        assert process.wait(20) == 0


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_a_server_that_still_loads_its_model_ends_in_the_regular_way(folder):
    with command(folder) as (process, url, lines):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)


@mark.skipif(os.name == "nt", reason="no SIGTERM there")
@mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_command_still_imports(number):
    """To the first process of a container, one that nobody catches would be as if it had not come."""
    code = f"""
import os, gaml_serve
gaml_serve._wrong_options = lambda *_: os.kill(os.getpid(), {int(number)})
gaml_serve.main(["--model", "x"])
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_token_with_the_end_of_its_line(folder, monkeypatch):
    """As a file of a secret has it, and no header can."""

    def stop(*_, admin_token: str, **__):
        raise ValueError(admin_token)

    monkeypatch.setattr(gaml_hf.runtime.serving, "make_app", stop)
    with raises(ValueError, match="^s3cret$"):
        gaml_serve.main(["--model", str(folder), "--port", "0", "--admin_token", "s3cret\n"])


def test_options_and_settings_have_one_default():
    options = vars(gaml_serve.make_parser().parse_args(["--model", "x"]))
    for field in dataclasses.fields(ServerSettings):
        assert options[field.name] == field.default, field.name
    assert options["host"] == "127.0.0.1"
    for action in gaml_serve.make_parser()._actions:
        assert action.required or action.dest == "help" or "(default: " in action.help, action.dest


@mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no/where/at/all"], "`--model` must be a checkpoint folder"),
        (["--port", "99999"], "`--port` must be between 0 and 65535"),
        (["--num_threads", "0"], "`--num_threads` must be at least 1"),
        (
            ["--slo_ms", "-1"],
            "up to 86,400,000, of milliseconds. Got `--slo_ms=-1.0`.",
        ),
        (["--min_exit", "2"], "`--min_exit` is read with `--slo_ms` alone."),
        (["--admin_token", " "], "`--admin_token` must hold characters of ASCII, and more than blanks"),
        (["--admin_token", "é"], "`--admin_token` must hold characters of ASCII, and more than blanks"),
        (["--revision", "main"], "`--revision` is of a model on the Hub. Got `main` for the folder"),
    ],
)
def test_wrong_options(options, message, folder, capsys):
    with raises(SystemExit) as left:
        gaml_serve.main(["--model", str(folder), *options])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(folder, capsys):
    (folder / "model.safetensors").unlink()  # nobody gets that far
    with socket.create_server(("127.0.0.1", 0)) as taken, raises(SystemExit) as left:
        gaml_serve.main(["--model", str(folder), "--port", str(taken.getsockname()[1])])
    assert left.value.code == 2
    assert "`--host` and `--port` must be where this machine can listen. Got 127.0.0.1 and" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_told_and_the_command_ends(folder, capsys):
    (folder / "model.safetensors").unlink()
    with raises(SystemExit) as left:
        gaml_serve.main(["--model", str(folder), "--port", "0"])
    assert left.value.code == 2
    assert "gaml-serve: error: " in (told := capsys.readouterr().err)
    assert "model.safetensors" in told


# The benchmark


def test_the_load_comes_at_its_rate_and_is_summed_up_by_hand():
    times = benchmark.arrivals(rate=2, burst_rate=4, seconds=1)
    assert times == [
        (0, False),
        (0.5, False),
        (1, True),
        (1.25, True),
        (1.5, True),
        (1.75, True),
        (2, False),
        (2.5, False),
    ]
    answer = {"status": 200, "label": "a", "exit_layer": 2, "forced": 1}
    records = [
        answer | {"row": 0, "seconds": 0.1},
        answer | {"row": 1, "seconds": 0.3, "exit_layer": 4, "forced": 0},
        {"row": 0, "status": 429, "seconds": 0.01},
        {"row": 1, "status": "not sent"},
    ]
    told = benchmark.summary(records, labels=["a", "b"], slo=0.2)
    assert told["p50"] == 200
    assert (told["late"], told["forced"], told["mean_exit"], told["unanswered"]) == (0.75, 0.5, 3, 2)
    assert told["accuracy"] == 0.5


def test_the_load_is_answered(classifier, monkeypatch, tmp_path):
    async def send():
        async with serving(lambda: classifier) as client:
            monkeypatch.setattr(benchmark.httpx, "AsyncClient", lambda **_: contextlib.nullcontext(client))
            return await benchmark.load("", TEXTS, benchmark.arrivals(20, 200, 0.2), max_open=50)

    records = asyncio.run(send())
    assert [record["in_burst"] for record in records] == [False] * 4 + [True] * 40 + [False] * 4
    assert {record["status"] for record in records} == {200}
    assert [record["label"] for record in records[:5]] == [classifier(text)[0]["label"] for text in TEXTS]
    assert all(record["seconds"] > 0 for record in records)
    benchmark.draw({"adaptive exits": [record | {"cap": 2} for record in records]}, 0.2, tmp_path / "burst.png")
    assert (tmp_path / "burst.png").read_bytes().startswith(b"\x89PNG")
