"""The campaigns of benchmarks/reliability.py, bounded; and that they see what goes wrong."""

import json

from pytest import fixture, mark

from benchmarks import reliability


@fixture
def classifier():
    return reliability.tiny_pipeline()


def test_16_threads_share_one_pipeline(classifier):
    counts = reliability.threads(classifier, calls=16 * 60, seed=0)
    assert (counts["tried"], counts["wrong"], counts["lost"]) == (960, 0, 0)
    assert min(counts["answered"], counts["refused"]) > 30


def test_odd_inputs(classifier, capsys):
    counts = reliability.fuzz(classifier, inputs=500, seed=1)
    assert (counts["tried"], counts["wrong"], counts["lost"]) == (500, 0, 0), capsys.readouterr().err
    assert min(counts["answered"], counts["refused"]) > 100


def swap(answers):
    return answers[::-1] if isinstance(answers, list) else answers


FAULTS = {
    "other rows' answers": (swap, "wrong"),
    "a row without an answer": (lambda answers: answers[1:] if isinstance(answers, list) else answers, "lost"),
    "another exception": (lambda answers: answers.nothing, "wrong"),
    "no error where one is due": (None, "wrong"),
}


@mark.parametrize("fault", FAULTS)
def test_the_campaign_sees(classifier, fault):
    change, verdict = FAULTS[fault]

    def broken(rows, **arguments):
        if change is not None:
            return change(classifier(rows, **arguments))
        try:
            return classifier(rows, **arguments)
        except (TypeError, ValueError):
            return classifier(["a good film"])

    assert reliability.fuzz(broken, inputs=60, seed=0, show=0)[verdict] > 0


def test_threads_with_other_answers_are_seen(classifier):
    calls = []

    def broken(rows, **arguments):
        calls.append(rows)
        answers = classifier(rows, **arguments)
        return answers[::-1] if len(calls) > 60 else answers  # the first 60 are those of one thread

    assert reliability.threads(broken, calls=64, seed=0)["wrong"] > 20


def test_the_command(tmp_path, capsys):
    words = f"--campaigns threads fuzz --inputs 32 --seed 3 --output {tmp_path / 'counts.json'}"
    assert reliability.main(words.split()) == 0
    results = json.loads((tmp_path / "counts.json").read_text())["results"]
    assert {name: counts["tried"] for name, counts in results.items()} == {"threads": 32, "fuzz": 32}
    assert "fuzz: tried 32, answered " in capsys.readouterr().out
