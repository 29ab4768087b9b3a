"""The Space: what it says about a text, its page over HTTP and in a real browser, and its push."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from pytest import approx, fixture, mark, raises

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.hub import push_checkpoint, push_space, save_checkpoint
from gaml_hf.hub.push import SPACE_GRADIO
from gaml_hf.models.modeling_gaml_resnet import GamlResNetConfig


ROOT = Path(__file__).parents[1]
SPACE = ROOT / "src" / "gaml_hf" / "hub" / "space"
TEXT = "the plot is dull , the actor awful and the story never so very sad"


@fixture
def app():
    pytest.importorskip("gradio")
    import gaml_hf.hub.space.app as app

    return app


@fixture
def folder(bert_kwargs, tokenizer, tmp_path) -> Path:
    config = GamlBertConfig(
        **bert_kwargs,
        initializer_range=0.3,  # far from zero, so that exits disagree
        exit_strategy="entropy",
        exit_threshold=0.5,
        id2label={0: "dull", 1: "<b>fine</b>"},
        label2id={"dull": 0, "<b>fine</b>": 1},
    )
    return save_checkpoint(GamlBertForSequenceClassification(config).eval(), tokenizer, tmp_path / "checkpoint")


def rows(page: str) -> list[tuple[str, int]]:
    """State and layer of each bar."""
    return [(state, int(layer)) for state, layer in re.findall(r'class="row ?(\w*)" data-layer="(\d+)"', page)]


def test_the_slider_runs_from_the_surest_to_the_fastest(app):
    config = GamlBertConfig(num_hidden_layers=6, num_labels=3)
    expected = {
        "none": [{}, {}, {}],
        "budgeted": [{"budgeted_exit": 6}, {"budgeted_exit": 3}, {"budgeted_exit": 1}],
        "patience": [{"patience": 5}, {"patience": 3}, {"patience": 1}],
        "entropy": [{"exit_threshold": 0}, {"exit_threshold": 0.5}, {"exit_threshold": 1}],
        "max_prob": [{"exit_threshold": 1}, {"exit_threshold": 0.667}, {"exit_threshold": 0.333}],
    }
    for strategy, settings in expected.items():
        got = [app.call_arguments(strategy, speed, config) for speed in (0, 0.5, 1)]
        assert got == [{"exit_strategy": strategy, **setting} for setting in settings]


@mark.parametrize(
    ("arguments", "layer", "sentence"),
    [
        ({"exit_strategy": "none"}, 3, "All 3 layers ran"),
        ({"exit_strategy": "budgeted", "budgeted_exit": 2}, 2, "Every text leaves after layer 2"),
        (
            {"exit_strategy": "entropy", "exit_threshold": 0.5},
            2,
            "layer 2 because there its entropy, 0.469, is below 0.5",
        ),
        ({"exit_strategy": "entropy", "exit_threshold": 0.1}, 3, "No exit was sure enough"),
        ({"exit_strategy": "max_prob", "exit_threshold": 0.8}, 2, "its best class has 0.900, above 0.8"),
        ({"exit_strategy": "max_prob", "exit_threshold": 0.99}, 3, "No exit was sure enough"),
        ({"exit_strategy": "patience", "patience": 1}, 3, "the last 2 exits agree"),
        ({"exit_strategy": "patience", "patience": 2}, 3, "No exit was sure enough"),
    ],
)
def test_the_reason_by_hand(app, arguments, layer, sentence):
    config = GamlBertConfig(num_hidden_layers=3, num_labels=2)
    # H(0.1, 0.9) / log 2 = 0.469; the answers of the three exits are 0, 1, 1.
    assert sentence in app.reason(arguments, layer, [[0.6, 0.4], [0.1, 0.9], [0.2, 0.8]], config)


@mark.parametrize("strategy", ["none", "budgeted", "patience", "entropy", "max_prob"])
@mark.parametrize("speed", [0.0, 0.3, 0.7, 1.0])
def test_what_is_shown_is_what_the_pipeline_does(app, folder, strategy, speed):
    viewer = app.Viewer(str(folder))
    bars, table = viewer.show(TEXT, "", strategy, speed)
    arguments = app.call_arguments(strategy, speed, viewer.config)
    answer = viewer.classifier({"text": TEXT}, **arguments)
    left = answer["exit_layer"]
    state = {layer: "left" if layer == left else "idle" if layer > left else "" for layer in (1, 2, 3, 4)}
    assert rows(bars) == [(state[layer], layer) for layer in (1, 2, 3, 4)]
    assert f"{answer['score']:.1%} sure" in bars
    assert f"{left} of 4 layers run" in bars
    # The bar of the layer where it left is the pipeline's own score.
    assert max(viewer.exit_probabilities({"text": TEXT})[left - 1]) == approx(answer["score"], abs=1e-5)
    chosen = re.search(r'<tr class="chosen">.*?</tr>', table)[0]
    assert f"<td>{strategy}</td>" in chosen
    assert f'<td class="number">layer {left}</td><td class="number">{4 / left:.2f}x</td>' in chosen
    assert "<b>fine</b>" not in bars + table  # a label is text, not HTML


@mark.parametrize("split", [True, False])
def test_the_exits_read_what_the_pipeline_reads(app, folder, split):
    viewer = app.Viewer(str(folder))
    tokenizer = viewer.classifier.tokenizer
    tokenizer.model_max_length, tokenizer.split_special_tokens = 8, split
    for row in ({"text": "good [SEP] film"}, {"text": "[MASK] " * 9, "text_pair": "a good film"}):
        for layer, probabilities in enumerate(viewer.exit_probabilities(row), start=1):
            assert max(probabilities) == approx(viewer.classifier(row, budgeted_exit=layer)["score"], abs=1e-5)


def test_a_blank_text_gets_a_message(app, folder):
    import gradio

    with raises(gradio.Error, match="`text` must hold more than blanks"):
        app.Viewer(str(folder)).show(" ", "", "none", 0.5)


@fixture
def page(app, folder) -> str:
    """Address of the page of `folder`, started as a user would, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(SPACE / "app.py"), str(folder), TEXT, "a good film"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            seen = []
            for line in server.stdout:
                seen.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise AssertionError("".join(seen))
            yield found[0]
        finally:
            server.terminate()


def test_the_page_over_http(page):
    with urllib.request.urlopen(page) as answer:
        text = answer.read().decode()
    assert "Where does a text leave?" in text
    # Nothing is fetched from elsewhere before the page works: no font, no script.
    assert not re.search(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!127)[^"]*\.(?:js|css)', text)
    body = json.dumps({"data": [TEXT, "", "none", 0.5]}).encode()
    post = urllib.request.Request(f"{page}/gradio_api/call/show", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{page}/gradio_api/call/show/{event}") as answer:
        data = next(line for line in answer.read().decode().splitlines() if line.startswith("data: "))
    bars, _ = json.loads(data.removeprefix("data: "))
    assert rows(bars) == [("", 1), ("", 2), ("", 3), ("left", 4)]


class Browser:
    """The few commands of WebDriver (https://www.w3.org/TR/webdriver2/) that a test needs, sent to chromedriver."""

    def __init__(self, folder: Path):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        self.url = f"http://127.0.0.1:{found[1]}"
        switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        switches = [f"--{name}" for name in f"{switches} disable-component-update disable-sync".split()]
        switches += [f"--user-data-dir={folder}", "--window-size=1280,1000", "--force-prefers-reduced-motion"]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": switches}}}
        self.url += f"/session/{self.send('/session', {'capabilities': wanted})['sessionId']}"

    def send(self, path: str, body: dict | None = None):
        request = urllib.request.Request(
            self.url + path, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.send("/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script: str):
        """Until the script's value is true."""
        for _ in range(300):
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(f"Never true: {script}\n{self.run('document.body.innerText')}")

    def find(self, css: str) -> str:
        element = self.send("/element", {"using": "css selector", "value": css})
        return next(iter(element.values()))

    def close(self) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE")).close()
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()


@mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Debian's chromium-driver")
def test_the_page_in_a_browser(page, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.send("/url", {"url": page})
        left = "document.querySelector('#bars .row.left')?.dataset.layer"
        browser.wait(left)  # the first example is shown at once
        assert browser.run("document.querySelectorAll('#bars .row').length") == 4
        browser.send(f"/element/{browser.find('#strategy input[value=budgeted]')}/click", {})
        browser.wait("document.querySelector('#table tr.chosen')?.innerText.includes('budgeted')")
        assert browser.wait(left) == "3"  # of 4, in the middle of the slider
        number = browser.find("#speed input[type=number]")
        browser.send(f"/element/{number}/clear", {})
        browser.send(f"/element/{number}/value", {"text": "1\ue007"})
        browser.send(f"/element/{browser.find('#go')}/click", {})
        browser.wait(f"{left} === '1'")
        widths = browser.run("[...document.querySelectorAll('#bars .bar')].map(b => b.getBoundingClientRect().width)")
        assert all(width > 10 for width in widths)
    finally:
        browser.close()


def test_a_space_is_pushed_whole_and_pinned(folder, hub_server):
    pinned = push_checkpoint(folder, "me/films")
    push_checkpoint(folder, "me/films", commit_message="Later")
    push_space("me/show", "me/films", model_revision=pinned.oid, examples=["a good film"], private=True)
    repo = hub_server.repo("me/show", "space")
    files = hub_server.files("me/show", repo_type="space")
    assert (repo.private, repo.settings["sdk"]) == (True, "gradio")
    assert hub_server.history("me/show", "space") == ["initial commit", "Upload Space"]
    chosen = {"model": "me/films", "revision": pinned.oid, "examples": ["a good film"]}
    assert json.loads(files["model.json"]) == chosen
    assert files["app.py"] == (SPACE / "app.py").read_bytes()
    readme = files["README.md"].decode()
    for part in ("sdk: gradio\n", f"sdk_version: {SPACE_GRADIO}\n", "app_file: app.py\n", "- me/films\n", pinned.oid):
        assert part in readme
    assert "{{" not in readme


def test_a_space_of_what_reads_no_texts(hub_server, tmp_path):
    GamlResNetConfig.cifar(8).save_pretrained(tmp_path)
    HfApi().create_repo("me/images")
    HfApi().upload_folder(repo_id="me/images", folder_path=tmp_path)
    with raises(ValueError, match="must be a checkpoint of texts with exits.* Got `me/images`, of type `gaml_resnet`"):
        push_space("me/show", "me/images")


def test_the_space_names_the_versions_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound = next(name for name in project["dependencies"] if name.startswith("transformers"))
    assert bound in (SPACE / "requirements.txt").read_text().splitlines()
    assert f"gradio=={SPACE_GRADIO}" in (ROOT / "constraints.txt").read_text().splitlines()
