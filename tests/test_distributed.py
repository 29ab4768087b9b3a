"""
Two ranks do what one process does, and none of them hangs.

Run by `torchrun`, this file is one rank of `two_ranks`; run as a script, it launches the jobs of `failed_jobs`.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from pytest import approx, fixture, mark
from torch.testing import assert_close
from transformers import BertConfig, BertModel, BertTokenizer, TrainerCallback

import gaml_hf.training.trainer
import run_glue_gaml
from gaml_hf import GamlBertForSequenceClassification
from gaml_hf.evaluation import ExitMetrics
from test_run_glue_gaml import sentences, write_csv
from test_trainer import (
    CASES,
    CHECKPOINTING,
    IS_OLD_TRANSFORMERS,
    LEARNING,
    Rows,
    assert_same_weights,
    make_model,
    make_trainer,
    reference_training,
    train,
    weights_of,
)


TIME_LIMIT = 60  # seconds, for a job with a rank that fails; on an idle machine it takes two
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# One step of 8 rows as 2 ranks x 4, or 2 ranks x 2 x 2 micro-batches.
LAYOUTS = {"whole": (8, 1), "accumulated": (4, 2)}  # rows of a micro-batch over all ranks, micro-batches

# Three epochs over a number of rows that fits no layout: `rows`, micro-batch over all ranks, micro-batches, and more.
UNEVEN = {
    "a rank has fewer rows": (7, 4, 1, {}),
    "a rank has none": (5, 4, 1, {}),
    "less than a batch": (3, 8, 1, {}),
    "one row": (1, 4, 2, {}),
    "a short micro-batch in the last step": (7, 4, 2, {}),
    "a last step of one micro-batch": (5, 2, 2, {}),
    "checkpointing": (7, 4, 2, {CHECKPOINTING: True}),
    "Adam": (7, 4, 2, {"optim": "adamw_torch", "adam_epsilon": 1e-2, "weight_decay": 0.1}),
    "a batch is split": (7, 4, 1, {"accelerator_config": {"split_batches": True}}),
    "drop_last": (7, 4, 1, {"dataloader_drop_last": True}),
    "exits that learn": (7, 4, 2, {"config": LEARNING}),
    "smoothed labels, weighted classes": (7, 4, 2, {"label_smoothing_factor": 0.2}),
}
MODES = ["soft", "hard", "none"]
EVALUATED = [1, 3, 7, 8]  # rows; 2 a batch on each rank


def train_uneven(folder, mode, key):
    """Weights after three epochs in random order, with clipping and a falling learning rate, and the losses logged."""
    rows, batch, micro_batches, more = UNEVEN[key]
    more = {"lr_scheduler_type": "linear", "max_grad_norm": 1.0, **more}
    changes = more.pop("config", {})
    split = more.get("accelerator_config", {}).get("split_batches", False)
    if "weighted" in key:
        changes = {"class_weights": [0.5, 4.0, 1.0]}
    model = make_model(ga_mode=mode, **{"ga_granularity": "layer", **changes})
    weights, log = train(
        folder,
        model,
        rows=rows,
        per_device_train_batch_size=batch if split else batch // WORLD_SIZE,
        gradient_accumulation_steps=micro_batches,
        max_steps=-1,
        num_train_epochs=3,
        **more,
    )
    return weights, [entry["loss"] for entry in log]


def evaluate(folder, rows):
    trainer = make_trainer(folder, make_model(exit_strategy="patience", patience=1), per_device_eval_batch_size=2)
    told = trainer.predict(Rows(rows), ignore_keys=ExitMetrics.ignore_keys)
    unlabelled = [{k: v for k, v in Rows(rows)[i].items() if k != "labels"} for i in range(rows)]
    untold = trainer.predict(unlabelled, ignore_keys=ExitMetrics.ignore_keys)
    return [told.metrics["test_loss"], told.label_ids, *told.predictions, *untold.predictions]


RESUMED = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": -1,
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "adamw_torch",
}  # 7 rows: 4 micro-batches an epoch, 2 steps


def resume(folder):
    """The weights of a training, and of one that went on from the middle of its second epoch; with dropout."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.1}
    whole, resumed = make_model(**dropout), make_model(**dropout)
    make_trainer(folder, whole, rows=7, **RESUMED).train()
    trainer = make_trainer(folder / "resumed", resumed, rows=7, **RESUMED)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return weights_of(whole), weights_of(resumed)


def script_words(folder, batch):
    words = f"--model_name_or_path {folder / 'backbone'} --output_dir {folder / f'out-{WORLD_SIZE}'} --use_cpu True"
    for split in ("train", "validation", "test"):
        words += f" --{split}_file {folder / f'{split}.csv'}"
    words += " --do_train --do_eval --do_predict --report_to none --disable_tqdm True --seed 7 --latency_rows 0"
    words += f" --optim sgd --learning_rate 0.1 --num_train_epochs 2 --per_device_train_batch_size {batch}"
    words += " --per_device_eval_batch_size 4 --exit_strategy entropy --target_speed_up 1 4 --ga_mode soft"
    return words.split() + ["--dataloader_pin_memory", "False"]


def run_script(folder):
    """The script's scores, the weights it leaves, and the files that this process opened for writing meanwhile."""
    written = []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[1] and set("wax+") & set(arguments[1]):
            written.append(arguments[0])

    sys.addaudithook(note)
    run = run_glue_gaml.main(script_words(folder, 16 // WORLD_SIZE))
    # Its thresholds are spaced over the distinct entropies seen, and equal texts may differ in the last digit.
    run["evaluation"]["validation"].pop("curves")
    return {key: run[key] for key in ("rows", "chosen", "evaluation", "global_step", "best_step")}, [
        Path(path).name for path in written if Path(path).is_relative_to(folder / f"out-{WORLD_SIZE}")
    ]


def rank_of_two(folder):
    results = {}
    for mode, granularity in CASES:
        for layout, (batch, micro_batches) in LAYOUTS.items():
            results[f"{mode}-{granularity}-{layout}"], _ = train(
                folder / "x",
                make_model(ga_mode=mode, ga_granularity=granularity),
                per_device_train_batch_size=batch // 2,
                gradient_accumulation_steps=micro_batches,
            )
    results["shared"], _ = train(
        folder / "x",
        make_model(ga_granularity="layer", exit_pooler="shared"),
        per_device_train_batch_size=4,
    )
    for mode in MODES:
        for key in UNEVEN:
            results[f"{mode}-{key}"] = train_uneven(folder / "x", mode, key)
    for rows in EVALUATED:
        results[f"evaluate-{rows}"] = evaluate(folder / "x", rows)
    if not IS_OLD_TRANSFORMERS:  # it cannot load an optimizer onto "cpu:0"
        results["resume"] = resume(folder / "resume")
    results["script"] = run_script(folder)
    torch.save(results, folder / f"{RANK}.pt")
    JOBS["sigkill"](folder / "killed")


def run_this_file(folder, *launcher):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, *launcher, __file__, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, timeout=500, env=environment)


def make_material(folder):
    """What `script_words` names: a backbone without dropout, and rows that fill no batch."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    from conftest import WORDS  # which seals off the process it is imported in

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes, **no_dropout)).save_pretrained(
        folder / "backbone"
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "backbone")
    for split, count, seed in (("train", 150, 1), ("validation", 41, 2), ("test", 13, 3)):  # 135 to train on, 15 aside
        write_csv(folder / f"{split}.csv", sentences(count, seed))


@fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each rank found; the folder; and how and when the job ended, whose second rank is killed at last."""
    folder = tmp_path_factory.mktemp("two_ranks")
    make_material(folder)
    done = run_this_file(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert {"0.pt", "1.pt"} <= {path.name for path in folder.iterdir()}, done.stderr[-4000:]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return ranks, folder, (done.returncode, time.time())


# The same weights


@mark.parametrize("layout", LAYOUTS)
@mark.parametrize(("mode", "granularity"), CASES)
def test_weights_are_the_reference(two_ranks, mode, granularity, layout):
    for rank in two_ranks[0]:
        assert_same_weights(rank[f"{mode}-{granularity}-{layout}"], reference_training(mode, granularity)[0])


def test_a_shared_pooler(two_ranks, tmp_path):
    """A parameter used by every exit is one that DistributedDataParallel must not count several times."""
    weights, _ = train(tmp_path, make_model(ga_granularity="layer", exit_pooler="shared"))
    assert_same_weights(two_ranks[0][0]["shared"], weights)


@mark.parametrize("key", UNEVEN)
@mark.parametrize("mode", ["soft", "hard"])
def test_any_number_of_rows_gives_the_weights_of_one_process(two_ranks, tmp_path, mode, key):
    weights, losses = train_uneven(tmp_path, mode, key)
    for rank in two_ranks[0]:
        two_weights, two_losses = rank[f"{mode}-{key}"]
        assert_same_weights(two_weights, weights, atol=1e-6, rtol=0)
        assert two_losses == approx(losses, abs=1e-5)


def test_each_row_of_a_step_weighs_the_same(tmp_path):
    """Seven rows in one step, as one micro-batch, or as 4 and 3, or as 2, 2, 2 and 1."""
    trainings = [
        train(
            tmp_path,
            make_model(ga_granularity="layer"),
            rows=7,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=math.ceil(7 / batch),
        )
        for batch in (7, 4, 2)
    ]
    expected, expected_log = reference_training("soft", "layer", batches=((0, 7),) * 3)
    for weights, log in trainings:
        assert_same_weights(weights, expected)
        assert [entry["loss"] for entry in log] == approx([entry["loss"] for entry in expected_log], rel=1e-4)


def test_what_the_stock_way_makes_of_it(two_ranks, tmp_path):
    """With `ga_mode="none"` two ranks are one process where the rows fill every batch, and not elsewhere."""
    for key, equal in {"drop_last": True, "a rank has fewer rows": False, "a rank has none": False}.items():
        weights, _ = train_uneven(tmp_path, "none", key)
        two = two_ranks[0][0][f"none-{key}"][0]
        error = max((weights[name] - two[name]).abs().max().item() for name in weights)
        assert (error < 1e-6) if equal else (error > 1e-3), key


@mark.skipif(IS_OLD_TRANSFORMERS, reason='it cannot load an optimizer onto "cpu:0", the device of a rank on a CPU')
def test_resuming_equals_the_undisturbed_run(two_ranks):
    whole, resumed = two_ranks[0][0]["resume"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other, _ = two_ranks[0][1]["resume"]
    assert all(torch.equal(whole[name], other[name]) for name in whole)


# The same answers


@mark.parametrize("rows", EVALUATED)
def test_each_row_is_evaluated_once(two_ranks, tmp_path, rows):
    expected = evaluate(tmp_path, rows)
    assert [values.shape for values in expected[1:5]] == [(rows,), (rows, 3), (rows,), (rows, 3, 3)]
    for rank in two_ranks[0]:
        loss, *arrays = rank[f"evaluate-{rows}"]
        assert loss == approx(expected[0], abs=1e-6)
        for ours, one in zip(arrays, expected[1:], strict=True):
            assert_close(torch.tensor(ours), torch.tensor(one), atol=1e-5, rtol=0)


def assert_same_results(ours, expected):
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_results(ours[key], value)
    elif isinstance(expected, list):
        for value, other in zip(ours, expected, strict=True):
            assert_same_results(value, other)
    elif isinstance(expected, float):
        assert ours == approx(expected, abs=1e-5)
    else:
        assert ours == expected


def test_the_script_gives_the_results_of_one_process(two_ranks):
    ranks, folder, _ = two_ranks
    run, written = run_script(folder)
    assert run["rows"] == {"train": 135, "holdout": 15}
    assert run["global_step"] == 2 * math.ceil(135 / 16)
    for rank in ranks:
        assert_same_results(rank["script"][0], run)
    one, two = ((folder / f"out-{n}" / "predictions_test.tsv").read_text().splitlines() for n in (1, 2))
    assert len(one) == 14
    for line, other in zip(one[1:], two[1:], strict=True):
        (row, label, score, exit_layer), others = line.split("\t"), other.split("\t")
        assert [row, label, exit_layer] == [others[i] for i in (0, 1, 3)]
        assert float(others[2]) == approx(float(score), abs=2e-6)
    one, two = (weights_of(GamlBertForSequenceClassification.from_pretrained(folder / f"out-{n}")) for n in (1, 2))
    assert_same_weights(two, one, atol=1e-6, rtol=0)
    assert {"run.json", "predictions_test.tsv"} <= set(written)
    assert {"run.json", "predictions_test.tsv"} <= set(ranks[0]["script"][1])
    assert set(ranks[1]["script"][1]) <= {"rng_state_1.pth"}


# A rank that fails


class At(TrainerCallback):
    """Calls `action` on the second rank, before its third step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if RANK == 1 and state.global_step == 2:
            self.action(**kwargs)


def fail(**kwargs):
    raise KeyError("on this rank alone")


def kill(**kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def poison(model, **kwargs):
    with torch.no_grad():
        model.exit_classifiers["1"].weight[0, 0] = math.nan


def poison_the_loss(**kwargs):
    gaml_hf.training.trainer.total_loss = lambda *_: torch.tensor(math.nan)


def bad_label(folder):
    rows = Rows()
    if RANK == 1:
        rows.labels[3] = 7
    trainer = make_trainer(folder, make_model(), per_device_train_batch_size=4)
    trainer.train_dataset = [rows[i] for i in range(len(rows))]
    trainer.train()


def wrong_column(folder):
    run_glue_gaml.main([*script_words(folder.parent, 8), "--label_column", ["label", "nothing"][RANK]])


def fully_sharded(folder):
    make_trainer(folder, make_model(), fsdp=True, fsdp_config={"version": 2})


def train_with(action):
    def job(folder):
        every_step = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "no"}
        trainer = make_trainer(folder, make_model(), per_device_train_batch_size=4, max_steps=50, **every_step)
        trainer.add_callback(At(action))
        trainer.train()

    return job


JOBS = {
    "exception": train_with(fail),
    "sigkill": train_with(kill),
    "nan-weight": train_with(poison),
    "nan-loss": train_with(poison_the_loss),
    "bad-label": bad_label,
    "wrong-column": wrong_column,
    "fsdp": fully_sharded,
}


def one_job(name, folder, rank, port):
    """One rank of a job that fails."""
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = rank, 2
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        JOBS[name](folder / name)
    except BaseException as error:
        (folder / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise


def launch_jobs(folder):
    """Forks the ranks, so that what was imported here need not be again, and writes how and when they ended."""
    context = torch.multiprocessing.get_context("fork")
    ended = {}
    for name in JOBS:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        started = time.time()
        ranks = [context.Process(target=one_job, args=(name, folder, rank, port)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(max(0.0, started + TIME_LIMIT - time.time()))
        ended[name] = {"exit": [rank.exitcode for rank in ranks], "seconds": time.time() - started}
        for rank in ranks:
            rank.kill()
    (folder / "ended.json").write_text(json.dumps(ended))


@fixture(scope="module")
def failed_jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed_jobs")
    make_material(folder)
    done = run_this_file(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "ended.json").read_text())


@mark.parametrize("name", JOBS)
def test_when_one_rank_fails_all_end(failed_jobs, name):
    """By themselves, without a launcher that ends them."""
    exits = failed_jobs[1][name]["exit"]
    assert all(exits), exits  # None: still running at the time limit; 0: ended as if nothing had happened
    assert exits[1] == (-signal.SIGKILL if name == "sigkill" else 1)


def test_torchrun_ends_when_a_rank_is_killed(two_ranks):
    folder, (returncode, ended_at) = two_ranks[1:]
    assert returncode == 1
    assert ended_at - (folder / "1.pt").stat().st_mtime < TIME_LIMIT


@mark.parametrize(("name", "what"), [("nan-weight", "the loss"), ("nan-loss", "the loss")])
def test_a_nan_on_one_rank_stops_all(failed_jobs, name, what):
    folder = failed_jobs[0]
    for rank in (0, 1):
        assert f"FloatingPointError: Training stopped at step 3: {what}" in (folder / f"{name}-{rank}.txt").read_text()
    assert {path.name for path in (folder / name).glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@mark.skipif(IS_OLD_TRANSFORMERS, reason="the oldest accelerate does not know FSDP 2")
def test_fsdp_is_refused(failed_jobs):
    """Version 2; torch has no version 1 on a CPU."""
    for rank in (0, 1):
        error = (failed_jobs[0] / f"fsdp-{rank}.txt").read_text()
        assert "ValueError: Gradient alignment (`ga_mode='soft'`) needs the plain gradients" in error
        assert "does not work with FSDP" in error


def test_a_bad_row_on_one_rank(failed_jobs):
    error = (failed_jobs[0] / "bad-label-1.txt").read_text()
    assert "Row 3 of the train dataset, column 'labels', must be a whole number from 0 to 2" in error


def test_an_error_of_the_script_on_one_rank(failed_jobs):
    assert "`label_column` must be one of" in (failed_jobs[0] / "wrong-column-1.txt").read_text()


if __name__ == "__main__":
    (rank_of_two if "RANK" in os.environ else launch_jobs)(Path(sys.argv[1]))
