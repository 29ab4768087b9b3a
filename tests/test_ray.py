"""More than one machine: a Ray cluster on this one gives what this process gives."""

import gc
import json
import re
import socket
import tempfile
import warnings

import httpx
import psutil
from pytest import MonkeyPatch, approx, fixture, importorskip, mark, raises

from gaml_hf.runtime.scoring import ClassifierLoader, score_file
from gaml_score import main


ray = importorskip("ray", reason="needs `pip install gaml_hf[ray]`")

from ray import serve  # noqa: E402

from gaml_hf.runtime import ray_app  # noqa: E402
from gaml_hf.runtime.ray_scoring import RayEngine, actors_that_fit  # noqa: E402
from gaml_hf.runtime.serving import ServerSettings  # noqa: E402


WORDS = "film movie story plot actor scene good great bad awful dull funny sad fine very too so not never".split()
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 2 + i % 17)) for i in range(23)]
HALF = RayEngine(num_actors=2, actor_cpus=0.5)


@fixture(scope="module")
def cluster():
    """A cluster of this machine, of two CPUs, that writes to a folder of its own and leaves nothing running."""
    before = set(psutil.Process().children(recursive=True))
    # Not below pytest's folder: the name of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)  # else one is written into the home folder
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        ours = set(psutil.Process().children(recursive=True)) - before
        yield
        ours |= set(psutil.Process().children(recursive=True)) - before
        ray.shutdown()
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()  # Ray does not wait for the processes that it has ended
        _, alive = psutil.wait_procs(ours, timeout=30)
        assert not alive


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


ROWS = [{"text": text, "other": i if i % 2 else "x"} for i, text in enumerate(TEXTS)]
ROWS[2], ROWS[5], ROWS[9], ROWS[22] = {"text": None}, {"other": []}, {"text": 7}, {"text": "bad \ud800"}


@mark.parametrize("window", [1, 5, 4096])
def test_predictions_are_those_of_one_process(cluster, load, tmp_path, window):
    """The same ones, in the same order, whatever the cells."""
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    files = {}
    for name, engine in (("here", None), ("ray", HALF)):
        counts = score_file(
            tmp_path / "in.json",
            tmp_path / f"{name}.jsonl",
            load,
            engine=engine,
            window=window,
            patience=1,
            progress=False,
        )
        assert counts == {"rows": 23, "skipped": 4}
        files[name] = read(tmp_path / f"{name}.jsonl")
    for here, there in zip(files["here"], files["ray"], strict=True):
        assert here == there | {"score": None if there["score"] is None else approx(there["score"], abs=1e-5)}
    assert len({row["exit_layer"] for row in files["ray"]}) > 2


def test_what_actors_find_wrong_is_told_as_here(cluster, load, tmp_path):
    """A file that breaks off, a bad row that ends the run, an argument, a model: one sentence each, and no file."""
    (tmp_path / "cut.jsonl").write_text('{"text": "good"}\n' * 1500 + '{"text":')
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    nowhere = ClassifierLoader(str(tmp_path / "nowhere"), False, "cpu", None)
    for source, loader, changes in (
        ("cut.jsonl", load, {}),
        ("in.json", load, {"on_error": "raise"}),
        ("in.json", load, {"patience": 0}),
        ("in.json", nowhere, {}),
    ):
        sentences = []
        for engine in (None, HALF):
            with raises((ValueError, OSError)) as error:
                score_file(tmp_path / source, tmp_path / "out.csv", loader, engine=engine, progress=False, **changes)
            sentences.append((type(error.value), str(error.value)))
        assert sentences[0] == sentences[1]
    assert not (tmp_path / "out.csv").exists()


def test_the_command_line(cluster, folder, tmp_path, monkeypatch, capsys):
    """Relative paths are those of this process, wherever Ray runs an actor."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text(json.dumps(ROWS))
    words = "--model model --input in.json --output out.jsonl --no_progress".split()
    ray_words = "--engine ray --num_actors 1 --actor_cpus 0.5".split()
    assert main([*words, *ray_words]) == 1
    assert capsys.readouterr().out == "23 rows, 4 of them skipped; predictions in out.jsonl\n"
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == list(range(23))


@mark.parametrize(
    ("engine", "message"),
    [
        (RayEngine(num_actors=0), "`num_actors` must be a whole number of at least 1. Got `num_actors=0`."),
        (RayEngine(actor_cpus=1.5), "`actor_cpus` must be a share of one, or a whole number. Got `actor_cpus=1.5`."),
        (RayEngine(actor_cpus=0), "`actor_cpus` must be above 0 where `actor_gpus` is 0"),
        (RayEngine(actor_gpus=-1), "`actor_gpus` must be a share of one"),
        (RayEngine("ray://there:10001"), "`address` must be that of a cluster which this machine is part of"),
    ],
)
def test_a_wrong_engine_is_told_before_anything_starts(tmp_path, engine, message):
    (tmp_path / "in.csv").write_text("text\ngood\n")
    with raises(ValueError, match=re.escape(message)):
        score_file(tmp_path / "in.csv", tmp_path / "out.csv", None, engine=engine)
    with raises(ValueError, match="with `engine` it must be 1. Got `num_proc=2`."):
        score_file(tmp_path / "in.csv", tmp_path / "out.csv", None, engine=engine, num_proc=2)


def test_actors_that_fit_by_hand():
    machines = [{"CPU": 8, "GPU": 1}, {"CPU": 3}, {"memory": 1e9}]
    assert actors_that_fit(machines, 2, 0) == 4 + 1
    assert actors_that_fit(machines, 0.5, 0) == 16 + 6
    assert actors_that_fit(machines, 1, 0.25) == 4
    assert actors_that_fit([{"CPU": 0.3}], 0.1, 0) == 3
    with raises(ValueError, match="Got 9 and 0; the machines have 8 and 1, 3 and 0, 0 and 0."):
        actors_that_fit(machines, 9, 0)


def built(**arguments):
    """What `serve run gaml_hf.runtime.ray_app:app name=value ...` makes of its words."""
    return ray_app.app(ray_app.Arguments.model_validate({name: str(value) for name, value in arguments.items()}))


def test_two_replicas_answer_as_the_pipeline(cluster, folder, load):
    classifier = load()
    # Also the port: none that is free beforehand is kept for Ray.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        app = built(model=folder, num_replicas=2, num_cpus=0.5, max_client_batch_size=23, patience=1)
        serve.run(app)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            body = {"inputs": [[text] for text in TEXTS]}
            response = client.post("/predict", json=body)
            expected = classifier(TEXTS, patience=1, top_k=None)
            assert response.json() == [
                [answer | {"score": approx(answer["score"], abs=1e-5)} for answer in row] for row in expected
            ]
            assert client.get("/health").status_code == 200
            assert client.get("/info").json()["settings"]["patience"] == 1
            assert "gaml_requests_total" in client.get("/metrics").text
            refused = client.post("/predict", json={"inputs": " "})
            assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
            assert client.put("/config", json={"patience": 2}).status_code == 403
            # Live, in all replicas, and what is left out is as at the start.
            deployment = app._bound_deployment
            for user_config, patience in (({"patience": 2}, 2), ({"timeout_ms": 9_000}, 1)):
                serve.run(deployment.options(user_config=user_config).bind(*deployment.init_args))
                knobs = [client.get("/info").json()["settings"] for _ in range(12)]
                assert {settings["patience"] for settings in knobs} == {patience}
    finally:
        serve.shutdown()


@mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model"),
        ({"model": "m", "nope": 1}, "nope"),
        ({"model": "m", "num_replicas": 0}, "num_replicas"),
        ({"model": "m", "patience": "x"}, "patience"),
        ({"model": "m", "min_exit": 2}, "`min_exit` is read with `slo_ms` alone"),
    ],
)
def test_wrong_arguments_of_an_application(arguments, message):
    with raises(ValueError, match=message):
        built(**arguments)


def test_a_replica_gets_the_words_as_they_are_meant(folder):
    app = built(model=folder, num_replicas=3, num_cpus=0.5, slo_ms=200, max_concurrent_requests=7)
    deployment = app._bound_deployment
    load, settings = deployment.init_args
    assert load == ClassifierLoader(str(folder), False, "cpu", None, True)
    assert settings == ServerSettings(slo_ms=200.0, max_concurrent_requests=7)
    assert (deployment.num_replicas, deployment.max_ongoing_requests) == (3, 14)
    assert deployment.ray_actor_options["num_cpus"] == 0.5
