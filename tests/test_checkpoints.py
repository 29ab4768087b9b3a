"""Nothing is lost: trainings that were killed, checkpoints that are not whole, damaged files, full disks."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest import fixture, mark, raises
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModel, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer, hub
from gaml_hf.hub import check_checkpoint, folders, save_checkpoint
from gaml_hf.hub.folders import SEAL, why_incomplete, write_seal
from gaml_hf.models.checksums_gaml import verify_checksum, write_checksum
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx
from test_trainer import IS_OLD_TRANSFORMERS


ROOT = Path(__file__).parents[1]


class Rows(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(5, 20, (20, 6), generator=generator)
        self.labels = torch.randint(0, 2, (20,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"input_ids": self.input_ids[row], "labels": self.labels[row]}


needs_exact_resume = mark.skipif(
    IS_OLD_TRANSFORMERS, reason="resumed in the middle of an epoch, it does not end as an undisturbed training"
)


@fixture
def make(bert_kwargs, tmp_path, monkeypatch):
    """Makes a trainer of 6 steps (GA-soft, dropout on, 2 micro-batches a step, 2 and a half steps an epoch)."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog

    def make(folder="out", *, trainer_class=GamlTrainer, callbacks=(), compute_metrics=None, **changes):
        torch.manual_seed(3)
        model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, **PAPER_LETTER, initializer_range=0.3))
        arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
        arguments |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "warmup_steps": 2}
        arguments |= {"logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path / folder), **{**arguments, **changes})
        return trainer_class(
            model,
            args,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            callbacks=list(callbacks),
            compute_metrics=compute_metrics,
        )

    return make


class Begin(TrainerCallback):
    """At which step a training begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


class StopAt(TrainerCallback):
    """The nearest to a kill that one process can do: an exception behind a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_identical(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# Resuming


@needs_exact_resume
@mark.skipif(sys.platform != "linux", reason="needs Linux's fork and clocks")
def test_a_short_campaign_of_kills(tmp_path):
    """SIGKILL; the long one is `python benchmarks/kills.py`."""
    words = f"--trials 2 --seed 4 --parts training saving --output {tmp_path / 'kills.json'}"
    environment = os.environ | {"PYTHONPATH": str(Path(folders.__file__).parents[2])}
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), *words.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    counts = json.loads((tmp_path / "kills.json").read_text())
    assert counts["training"]["trainings"] == 2
    assert counts["training"]["kills"] >= 2
    assert counts["training"]["lost"] == counts["saving"]["lost"] == 0


@needs_exact_resume
@mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "`optimizer.pt` is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "`model.safetensors` is missing"),
        (lambda folder: cut(folder / "model.safetensors"), "`model.safetensors` is damaged or cut short"),
        (lambda folder: cut(folder / "scheduler.pt"), "`scheduler.pt` is damaged or cut short"),
        (lambda folder: flip(folder / "optimizer.pt", 3000), "`optimizer.pt` is damaged or cut short"),
        (lambda folder: cut(folder / SEAL), f"`{SEAL}` cannot be read"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "`trainer_state.json` is missing"),
    ],
    ids=["no optimizer", "no weights", "weights cut", "scheduler cut", "a bit of the optimizer", "seal cut", "empty"],
)
def test_resume_passes_over_what_is_not_whole(make, tmp_path, caplog, spoil, reason):
    trainer = make()
    trainer.train()
    newest = tmp_path / "out" / "checkpoint-6"
    spoil(newest)
    begin = Begin()
    resumed = make(callbacks=[begin])
    resumed.train(resume_from_checkpoint=True)
    assert begin.step == 4
    assert_identical(weights_of(resumed), weights_of(trainer))
    warnings = [record.getMessage() for record in caplog.records if "Passed over" in record.getMessage()]
    assert len(warnings) == 1
    assert f"`{newest}`: {reason}" in warnings[0]
    assert f"goes on from `{tmp_path / 'out' / 'checkpoint-4'}`" in warnings[0]
    assert why_incomplete(newest) is None  # written anew


def test_an_evaluation_behind_a_checkpoint_changes_nothing(make, tmp_path):
    """Saved in the last step of an epoch (its third), evaluated when the epoch is over."""
    changes = {"save_steps": 3, "eval_strategy": "epoch"}
    trainer = make(**changes)
    trainer.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    begin = Begin()
    resumed = make(callbacks=[begin], **changes)
    resumed.train(resume_from_checkpoint=True)
    assert begin.step == 3
    assert_identical(weights_of(resumed), weights_of(trainer))


@needs_exact_resume
def test_a_checkpoint_without_a_seal(make, tmp_path, caplog):
    """By a stock Trainer: it is taken where its files can be read, and what is cut short is seen all the same."""
    trainer = make(trainer_class=Trainer)
    trainer.model.config.ga_mode = "none"
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-4"
    assert why_incomplete(folder) is None
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        kept = (folder / name).read_bytes()
        cut(folder / name)
        assert why_incomplete(folder), name
        (folder / name).unlink()
        assert f"`{name}` is missing" in why_incomplete(folder)
        (folder / name).write_bytes(kept)
    cut(tmp_path / "out" / "checkpoint-6" / "rng_state.pth")
    begin = Begin()
    resumed = make(callbacks=[begin])
    resumed.model.config.ga_mode = "none"
    resumed.train(resume_from_checkpoint=True)
    assert begin.step == 4
    assert_identical(weights_of(resumed), weights_of(trainer))
    assert "`rng_state.pth` is damaged or cut short" in caplog.text


@mark.parametrize("name", ["model.safetensors", "trainer_state.json", "config.json"])
def test_a_named_checkpoint_must_be_whole(make, tmp_path, name):
    make().train()
    folder = tmp_path / "out" / "checkpoint-4"
    cut(folder / name)
    with raises(ValueError, match=f"must be a complete checkpoint. Got `{folder}`: `{name}` is damaged or cut short"):
        make().train(resume_from_checkpoint=str(folder))
    with raises(ValueError, match="Got `.*nowhere`, which is not there"):
        make().train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@mark.parametrize("is_told", [True, False], ids=["told", "of before"])
def test_a_resume_keeps_the_learning_rates_of_the_groups(make, tmp_path, is_told):
    """Else torch's words for an optimizer of other groups, or the old rate without a word."""
    make(max_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    if not is_told:
        config = json.loads((folder / "config.json").read_text())
        del config["exit_learning_rate_multiplier"]
        (folder / "config.json").write_text(json.dumps(config))
        write_seal(folder)
    resumed = make(max_steps=4)
    resumed.model.config.exit_learning_rate_multiplier = 10.0
    with raises(ValueError, match="`exit_learning_rate_multiplier` must be as in the checkpoint .*is 1.0. Got 10.0"):
        resumed.train(resume_from_checkpoint=True)
    resumed.model.config.exit_learning_rate_multiplier = 1
    resumed.train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(make, tmp_path):
    with raises(ValueError, match="needs a folder `checkpoint-<step>` in `output_dir`. Got `.*out`, which has none"):
        make().train(resume_from_checkpoint=True)
    make(max_steps=2).train()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    with raises(ValueError, match="no complete checkpoint in .*checkpoint-2`: `trainer_state.json` is missing"):
        make().train(resume_from_checkpoint=True)


@mark.parametrize(
    ("names", "effects"),
    [
        (["optimizer.pt"], ["without its moments, the learning rate at the start of its schedule"]),
        (["scheduler.pt", "rng_state.pth"], ["the learning rate at the start", "dropout draws other random numbers"]),
    ],
)
def test_what_a_named_checkpoint_lacks_is_told(make, tmp_path, caplog, names, effects):
    make().train()
    folder = tmp_path / "out" / "checkpoint-4"
    for name in names:
        (folder / name).unlink()
    make().train(resume_from_checkpoint=str(folder))
    (warning,) = [record.getMessage() for record in caplog.records if "holds no" in record.getMessage()]
    assert f"`{folder}` holds no {', '.join(f'`{name}`' for name in names)}." in warning
    assert all(effect in warning for effect in effects)


def test_weights_alone_are_a_whole_checkpoint_if_that_was_asked(make, tmp_path, caplog):
    make(save_only_model=True).train()
    make(max_steps=8).train(resume_from_checkpoint=True)
    assert "holds no `optimizer.pt`, `scheduler.pt`, `rng_state.pth`" in caplog.text


def test_older_checkpoints_go_only_when_the_new_one_is_sealed(make, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    trainer = make(save_total_limit=1, callbacks=[StopAt(3)])
    with raises(KeyboardInterrupt):
        trainer.train()
    trainer = make(save_total_limit=1)
    with monkeypatch.context() as patch:
        patch.setattr("gaml_hf.training.sealed_checkpoints.write_seal", killed)
        with raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
    make(save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_rotation_keeps_the_new_one_and_the_best(tmp_path):
    def steps():
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    new, best = tmp_path / "checkpoint-8", tmp_path / "checkpoint-2"  # 10 is of an abandoned run
    folders.rotate_checkpoints(tmp_path, None, [new])
    assert steps() == [2, 4, 6, 8, 10]
    folders.rotate_checkpoints(tmp_path, 4, [new, best])
    assert steps() == [2, 6, 8, 10]
    folders.rotate_checkpoints(tmp_path, 1, [new, best])
    assert steps() == [2, 8]
    folders.rotate_checkpoints(tmp_path, 1, [new])
    assert steps() == [8]


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "turn", "greater_is_better": True, "max_steps": 8}


def turns(*scores):
    """A metric that has these values, one an evaluation."""
    rest = iter(scores)
    return lambda prediction: {"turn": next(rest)}


def test_the_best_checkpoint_survives_an_interruption(make, tmp_path):
    whole = make("whole", **BEST, compute_metrics=turns(1, 2, 9, 4, 5, 6, 7, 8))
    whole.train()
    with raises(KeyboardInterrupt):
        make(**BEST, compute_metrics=turns(1, 2, 9, 4, 5), callbacks=[StopAt(5)]).train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    resumed = make(**BEST, compute_metrics=turns(6, 7, 8))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 3
    assert_identical(weights_of(resumed), weights_of(whole))


def test_a_damaged_best_checkpoint_is_not_loaded(make, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                flip(tmp_path / "out" / "checkpoint-3" / "model.safetensors", -1 + 9000)

    with raises(ValueError, match="checkpoint-3/model.safetensors` is not what was saved"):
        make(**BEST, compute_metrics=turns(1, 2, 9, 4, 5, 6, 7, 8), callbacks=[Spoil()]).train()


def test_early_stopping_goes_on_counting(make):
    """The third worse score in a row stops the training, whether it was interrupted or not."""
    scores = [5, 6, 1, 2, 3, 9, 9, 9]
    whole = make("whole", **BEST, compute_metrics=turns(*scores), callbacks=[EarlyStoppingCallback(3)])
    assert whole.train().global_step == 5
    for stop in (3, 4):
        interrupted = [EarlyStoppingCallback(3), StopAt(stop)]
        with raises(KeyboardInterrupt):
            make(f"{stop}", **BEST, compute_metrics=turns(*scores), callbacks=interrupted).train()
        resumed = make(f"{stop}", **BEST, compute_metrics=turns(*scores[stop:]), callbacks=[EarlyStoppingCallback(3)])
        assert resumed.train(resume_from_checkpoint=True).global_step == 5
        assert_identical(weights_of(resumed), weights_of(whole))


@mark.parametrize("early", [True, False], ids=["stopped early", "at max_steps, in an epoch's middle"])
def test_a_finished_training_makes_no_further_step(make, early):
    if early:
        changes = BEST | {"load_best_model_at_end": False, "save_total_limit": None}
        changes |= {"compute_metrics": turns(5, 4, 3, 9, 9, 9)}
        changes |= {"callbacks": [EarlyStoppingCallback(2)]}
    else:
        changes = {"max_steps": 4}  # an epoch has 3 steps
    trainer = make(**changes)
    trainer.train()
    resumed = make(**changes)
    assert resumed.train(resume_from_checkpoint=True).global_step == (3 if early else 4)
    assert_identical(weights_of(resumed), weights_of(trainer))


# Damaged files


@fixture
def model(bert_kwargs):
    return GamlBertForSequenceClassification(
        GamlBertConfig(**bert_kwargs, exit_strategy="patience", patience=1)
    ).eval()


@fixture
def folder(model, tokenizer, tmp_path) -> Path:
    return save_checkpoint(model, tokenizer, tmp_path / "checkpoint")


def positions(path: Path) -> list[int]:
    """Every byte of the header's length, of its first and last part and of the checksum, and a thousand others."""
    size = path.stat().st_size
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    checksum = path.read_bytes().index(b'"checksum"')
    chosen = [*range(500), *range(start - 200, start + 200), *range(checksum, checksum + 110)]
    return sorted({*chosen, *range(0, size, size // 1000), size - 1})


def test_every_flipped_bit_is_noticed(folder):
    path = folder / "model.safetensors"
    assert verify_checksum(path)
    for number, position in enumerate(positions(path)):
        flip(path, position, number % 8)
        with raises(ValueError, match=f"`{path}` is (damaged|not what was saved)"):
            verify_checksum(path)
        flip(path, position, number % 8)
    assert verify_checksum(path)


@mark.parametrize("position", [3, 40, -2000], ids=["the length", "the header", "a weight"])
def test_a_damaged_file_is_not_loaded(folder, position):
    path = folder / "model.safetensors"
    flip(path, position % path.stat().st_size, 1)
    for load in (GamlBertForSequenceClassification.from_pretrained, AutoModel.from_pretrained):
        with raises(ValueError, match="model.safetensors` is (damaged|not what was saved)"):
            load(folder)
    with raises(ValueError, match="`model.safetensors` cannot be read: .*(damaged|not what was saved)"):
        check_checkpoint(folder)


@mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@mark.parametrize("ours", [True, False], ids=["with a checksum", "without"])
def test_a_file_cut_short_is_noticed(folder, share, ours):
    path = folder / "model.safetensors"
    if not ours:
        save_file(load_file(path), path, metadata={"format": "pt"})
    os.truncate(path, int(share * path.stat().st_size))
    with raises(ValueError, match="model.safetensors` is damaged or cut short"):
        GamlBertForSequenceClassification.from_pretrained(folder)


def test_weights_written_by_another_program_load_unchecked(folder, model):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert verify_checksum(path) is False
    loaded = GamlBertForSequenceClassification.from_pretrained(folder)
    assert_identical(loaded.state_dict(), model.state_dict())
    write_checksum(path)
    assert verify_checksum(path)
    before = path.read_bytes()
    write_checksum(path)  # has one
    assert path.read_bytes() == before


def test_shards_have_checksums_too(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    *_, shard = sorted(tmp_path.glob("model-*.safetensors"))
    assert all(verify_checksum(path) for path in tmp_path.glob("model-*.safetensors"))
    flip(shard, shard.stat().st_size - 5)
    with raises(ValueError, match=f"{shard.name}` is not what was saved"):
        GamlBertForSequenceClassification.from_pretrained(tmp_path)


def test_a_damaged_file_in_the_cache_of_the_hub(folder, hub_server, tmp_path):
    hub.push_checkpoint(folder, "me/mine")
    cache = tmp_path / "cache"
    GamlBertForSequenceClassification.from_pretrained("me/mine", cache_dir=cache)
    (path,) = cache.glob("models--me--mine/snapshots/*/model.safetensors")
    for position in (path.stat().st_size - 5, 40):
        flip(path, position)
        with raises(ValueError, match="model.safetensors` is (damaged|not what was saved)"):
            GamlBertForSequenceClassification.from_pretrained("me/mine", cache_dir=cache)
        flip(path, position)
    GamlBertForSequenceClassification.from_pretrained("me/mine", cache_dir=cache)


def test_a_damaged_export_is_not_loaded(model, tmp_path):
    folder = export_onnx(model, tmp_path / "onnx")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"patience": 2}))  # may be edited
    assert GamlOrtModelForSequenceClassification.from_pretrained(folder).config.patience == 2
    flip(folder / "layer_2.onnx", 9000)
    with raises(ValueError, match="`layer_2.onnx` is damaged or cut short"):
        GamlOrtModelForSequenceClassification.from_pretrained(folder)


# Full disks, killed saves


@fixture
def small_disk(tmp_path):
    """Mounts a disk of so many KiB, where that is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("mounting is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_full_disk_leaves_the_old_folder(model, tokenizer, small_disk):
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    disk = small_disk(2 * weights // 1024 + 300)
    folder = save_checkpoint(model, tokenizer, disk / "checkpoint")
    free = shutil.disk_usage(disk).free
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.normal_(model.exit_classifiers["1"].weight)
    for left in (3 * weights // 2, weights // 2, 0):  # full in the second copy, in the first, at once
        filler = disk / "filler"
        filler.write_bytes(b"x" * max(free - left, 0))
        with raises(
            OSError, match=r"was not saved to .*; what was there is as it was.* MiB are free, and about .* MiB"
        ):
            save_checkpoint(model, tokenizer, folder)
        assert_identical(GamlBertForSequenceClassification.from_pretrained(folder).state_dict(), old)
        assert not list(disk.rglob(".saving-*"))
        filler.unlink()


def test_a_full_disk_in_a_training(make, small_disk, tmp_path):
    whole = make("whole")
    whole.train()
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-2").iterdir())
    disk = small_disk(int(1.8 * size / 1024))
    with raises(
        OSError, match=r"checkpoint-4` was not saved, and training stopped; .* MiB are free, and about .* MiB"
    ):
        make("disk").train()
    assert [path.name for path in disk.glob("checkpoint-*")] == ["checkpoint-2"]
    assert why_incomplete(disk / "checkpoint-2") is None
    subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
    resumed = make("disk")
    resumed.train(resume_from_checkpoint=True)
    assert_identical(weights_of(resumed), weights_of(whole))


def test_the_error_of_a_full_disk_says_how_much(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    told = folders.explain_full_disk(RuntimeError("writer failed"), tmp_path / "new" / "one", 8 * 2**20)
    assert "writer failed. There 3.0 MiB are free, and about 8.0 MiB are needed." in told
    assert folders.explain_full_disk(RuntimeError("another"), tmp_path, 2 * 2**20) is None
    assert folders.explain_full_disk(OSError(28, "No space left on device"), tmp_path, 2 * 2**20)


KILLED = """
import os, sys
from pathlib import Path
from gaml_hf.hub.folders import staging_folder
with staging_folder(Path(sys.argv[1])) as stage:
    (stage / "model.safetensors").write_bytes(b"half")
    print(stage, flush=True)
    if sys.stdin.read():
        os._exit(9)
"""


@mark.skipif(os.name == "nt", reason="no locks on folders there")
def test_the_next_save_takes_away_what_a_killed_one_left(model, tokenizer, folder):
    """And not what another process still writes, whatever its number: in another container it may be anything."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    killed, alive = (subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2))
    left, written = (Path(process.stdout.readline().strip()) for process in (killed, alive))
    killed.communicate("now")
    assert killed.returncode == 9
    assert left.is_dir()
    save_checkpoint(model, tokenizer, folder)
    assert list(folder.glob(".saving-*")) == [written]
    alive.communicate("")
    assert list(folder.glob(".saving-*")) == []


@mark.skipif(os.name == "nt", reason="no locks on folders there")
def test_what_another_machine_left_goes_after_a_day(model, tokenizer, folder):
    """A container's name is gone with it."""
    days = {".saving-elsewhere-1": 2, ".saving-elsewhere-2": 0.5, ".saving-new-3": 2}
    for name, age in days.items():
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
        for path in (folder / name / "model.safetensors", folder / name):
            os.utime(path, (time.time() - age * 86_400,) * 2)
    written = folder / ".saving-elsewhere-4"  # for days, in one file
    written.mkdir()
    (written / "out.csv").write_bytes(b"half")
    os.utime(written, (time.time() - 2 * 86_400,) * 2)
    save_checkpoint(model, tokenizer, folder)
    assert sorted(path.name for path in folder.glob(".saving-*")) == [".saving-elsewhere-2", written.name]


def test_a_save_without_a_tokenizer(model, tmp_path):
    with raises(ValueError, match="`tokenizer` must be given"):
        save_checkpoint(model, None, tmp_path / "new")


def test_a_folder_without_its_config_is_refused(folder):
    """Not read with BERT's default config, as the stock class does."""
    (folder / "config.json").unlink()
    for load in (GamlBertForSequenceClassification.from_pretrained, GamlBertConfig.from_pretrained):
        with raises(OSError, match="`.*checkpoint` has no `config.json`"):
            load(folder)
