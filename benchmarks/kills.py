"""
Kill trainings and saves at random moments, and count what is lost.

    python benchmarks/kills.py --trials 50 --seed 0 --output kills.json

Three parts, `--trials` each. The model is a tiny random BERT with dropout, trained with GA-soft:

- `training`: a [`GamlTrainer`] is killed (SIGKILL) again and again and resumed each time, until it gets through. Then
  its weights must be, bit for bit, those of a training that nobody disturbed, and the last resume must not have gone
  back behind a sealed checkpoint.
- `script`: the same with `run_glue_gaml.py`. `config.json`, in which the chosen exit policy stands, must be the same
  too.
- `saving`: `save_checkpoint` writes two models in turn over one folder and is killed. The folder must load as one of
  the two. Where their configs differ it may also say that `config.json` is missing; never may it load as a mixture.

Each attempt is a fork of this process, which has imported everything but computes nothing itself: that saves the eight
seconds that the imports take. The moments are drawn in CPU time of the process. Both need Linux.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path


# One thread: a forked process has no others, and sums must not depend on the machine.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, BertTokenizer, TrainingArguments, logging, set_seed

import run_glue_gaml
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTrainer
from gaml_hf.hub import check_checkpoint, save_checkpoint
from gaml_hf.hub.folders import SEAL, training_checkpoints


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film is good bad fine dull and very".split()
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 16, "initializer_range": 0.3}
KILLS = 8  # of one training at most; the attempt after them is left alone
PATIENCE_S = 300  # for one attempt, on the clock
# What differs between the trainings of the first part.
SETTINGS = [
    {"save_steps": 1},
    {"save_steps": 1, "save_total_limit": 1, "gradient_accumulation_steps": 2},
    {"save_steps": 3, "save_total_limit": 2},
    {
        "save_steps": 2,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    },
    {"save_strategy": "epoch", "save_total_limit": 1, "gradient_accumulation_steps": 3},
]


class Rows(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(5, len(WORDS), (22, 6), generator=generator)
        self.labels = torch.randint(0, 2, (22,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"input_ids": self.input_ids[row], "labels": self.labels[row]}


def fork(work: Callable[[], None], log: Path) -> int:
    """Do `work` in a process of its own, which writes to `log`; returns its id. It ends with 0, or 1 on an error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def announce_training(begun: Path) -> None:
    """Let `begun` appear when a training begins in this process: starting takes as long as all the steps."""
    begun.unlink(missing_ok=True)
    stock = GamlTrainer.train

    def train(self, *args, **kwargs):
        begun.write_text(str(time.process_time()))
        return stock(self, *args, **kwargs)

    GamlTrainer.train = train


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far: it does not depend on what else the machine does."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # Linux's CPU clock of another process
    except OSError:  # it has just ended
        return 0.0


def ends_within(pid: int, seconds: float, begun: Path | None = None) -> int | None:
    """
    The exit code of a process, or `None` where it had to be killed, after `seconds` of its CPU time, which count from
    now or from when `begun` appears.
    """
    start = cpu_seconds(pid) if begun is None else None
    patience = time.monotonic() + PATIENCE_S
    while time.monotonic() < patience:
        if start is None and begun.exists():
            start = cpu_seconds(pid)
        if start is not None and cpu_seconds(pid) - start > seconds:
            break
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if status == -signal.SIGKILL else status


def through(work: Callable[[], None], log: Path) -> float:
    """Do `work` in a fork, undisturbed; returns its CPU seconds from the beginning of the training, if it is one."""
    begun, spent = log.with_suffix(".begun"), log.with_suffix(".spent")

    def timed() -> None:
        announce_training(begun)
        work()
        if begun.exists():
            spent.write_text(str(time.process_time() - float(begun.read_text())))

    if (code := ends_within(fork(timed, log), PATIENCE_S)) != 0:
        raise RuntimeError(f"An undisturbed run ended with {code}:\n{log.read_text()[-3000:]}")
    return float(spent.read_text()) if spent.exists() else 0.0


def train(folder: Path, setting: dict) -> None:
    """Train into `folder`, resuming where a checkpoint is complete; the weights go to `final.safetensors`."""
    set_seed(1)
    model = GamlBertForSequenceClassification(GamlBertConfig(**SIZES, ga_mode="soft"))
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "warmup_steps": 3}
    arguments |= {"save_strategy": "steps", "logging_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments |= {"metric_for_best_model": "loss", "greater_is_better": False, "dataloader_pin_memory": False}
    args = TrainingArguments(str(folder), **{**arguments, **setting})
    trainer = GamlTrainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    resume = bool(training_checkpoints(folder))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if "found no complete checkpoint" not in str(error):
            raise
        shutil.rmtree(folder)  # killed in its first save: nothing to lose
        return train(folder, setting)
    with (folder / "resumed.txt").open("a") as file:
        print(trainer._initial_global_step, file=file)
    save_file(trainer.model.state_dict(), folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / "final.safetensors")


def run_script(folder: Path, source: Path) -> None:
    words = f"--model_name_or_path {source / 'backbone'} --output_dir {folder} --train_file {source / 'train.csv'}"
    words += f" --validation_file {source / 'train.csv'} --do_train --use_cpu True --report_to none --latency_rows 0"
    words += " --learning_rate 5e-3 --per_device_train_batch_size 8 --num_train_epochs 4 --holdout_fraction 0.3"
    words += f" --gradient_accumulation_steps 2 --disable_tqdm True --cache_dir {source / 'cache'}"
    words += " --dataloader_pin_memory False --early_stopping_patience 2"
    if training_checkpoints(folder):
        try:
            run_glue_gaml.main([*words.split(), "--resume_from_checkpoint", "True"])
            return
        except ValueError as error:
            if "found no complete checkpoint" not in str(error):
                raise
    run_glue_gaml.main([*words.split(), "--overwrite_output_dir"])


def make_source(source: Path) -> None:
    """A backbone, its tokenizer and rows."""
    set_seed(0)
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertModel(BertConfig(**SIZES)).save_pretrained(source / "backbone")
    BertTokenizer(str(source / "vocab.txt"), model_max_length=16).save_pretrained(source / "backbone")
    lines = ["sentence,label"]
    for row in range(60):
        word = random.Random(row).choice(["good", "fine", "bad", "dull"])
        lines.append(f"the film is {'very ' * (row % 3)}{word},{int(word in ('good', 'fine'))}")
    (source / "train.csv").write_text("\n".join(lines), encoding="utf-8")


def kill_until_done(
    run: Callable[[Path], None], folder: Path, seconds: float, rng: random.Random, counts: Counter, log: Path
) -> bool:
    """Kill `run(folder)` at random moments until it gets through; returns whether no attempt failed by itself."""
    begun = log.with_suffix(".begun")

    def attempt() -> None:
        announce_training(begun)
        run(folder)

    for kill in range(KILLS + 1):
        # Shorter and shorter ones would never get through; a resumed one has less to do.
        limit = rng.uniform(0, 1.1 * seconds) if kill < KILLS else PATIENCE_S
        begun.unlink(missing_ok=True)
        code = ends_within(fork(attempt, log), limit, begun)
        if code is None:
            counts["kills"] += 1
            checkpoints = training_checkpoints(folder)
            sealed = [step for step, path in checkpoints.items() if (path / SEAL).exists()]
            counts["kills with the newest checkpoint not sealed"] += max(sealed, default=0) < max(
                checkpoints, default=0
            )
            counts["kills before the first sealed checkpoint"] += not sealed
            (folder.parent / "sealed").write_text(str(max(sealed, default=0)))
            continue
        return code == 0
    return False


def kill_trainings(work: Path, trials: int, rng: random.Random) -> Counter:
    counts: Counter = Counter()
    whole: dict[int, tuple[Path, float]] = {}
    for trial in range(trials):
        number = trial % len(SETTINGS)
        setting = SETTINGS[number]
        if number not in whole:
            folder = work / f"whole-{number}"
            whole[number] = folder, through(lambda f=folder, s=setting: train(f, s), work / "whole.log")
        reference, seconds = whole[number]
        folder, log, before = work / f"trial-{trial}", work / f"trial-{trial}.log", counts["kills"]
        done = kill_until_done(lambda f, s=setting: train(f, s), folder, seconds, rng, counts, log)
        same = done and same_file(folder / "final.safetensors", reference / "final.safetensors")
        if same and counts["kills"] > before:
            same = int((folder / "resumed.txt").read_text().split()[-1]) >= int((work / "sealed").read_text())
        counts["trainings"] += 1
        counts["lost"] += not same
        report(same, counts, folder, log)
    return counts


def kill_scripts(work: Path, trials: int, rng: random.Random) -> Counter:
    counts: Counter = Counter()
    through(lambda: make_source(work / "source"), work / "source.log")
    reference = work / "whole"
    seconds = through(lambda: run_script(reference, work / "source"), work / "whole.log")
    for trial in range(trials):
        folder, log = work / f"trial-{trial}", work / f"trial-{trial}.log"
        done = kill_until_done(lambda f: run_script(f, work / "source"), folder, seconds, rng, counts, log)
        same = done and all(
            same_file(folder / name, reference / name) for name in ("model.safetensors", "config.json")
        )
        same = same and not list(folder.glob(".saving-*"))
        counts["runs"] += 1
        counts["lost"] += not same
        report(same, counts, folder, log)
    return counts


def make_model(number: int, other_config: bool) -> GamlBertForSequenceClassification:
    set_seed(number)
    patience = 1 + number if other_config else 1
    return GamlBertForSequenceClassification(GamlBertConfig(**SIZES, exit_strategy="patience", patience=patience))


def look(folder: Path, other_config: bool) -> str:
    """What a folder is after a kill."""
    try:
        model = GamlBertForSequenceClassification.from_pretrained(folder)
    except OSError as error:
        return "refused" if "config.json" in str(error) and other_config else f"broken: {error}"
    for number in (0, 1):
        expected = make_model(number, other_config)
        weights = expected.state_dict()
        if model.config.patience == expected.config.patience and all(
            torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()
        ):
            return "whole"
    return "mixture"


def save_in_turn(folder: Path, other_config: bool, source: Path, told: Path) -> None:
    """Look at what the last kill left, put it right by a save, tell both, and save until killed."""
    tokenizer = BertTokenizer.from_pretrained(source / "backbone")
    models = [make_model(number, other_config) for number in (0, 1)]
    found = look(folder, other_config) if folder.exists() else "new"
    started = time.process_time()
    save_checkpoint(models[0], tokenizer, folder, card={})
    seconds = time.process_time() - started
    check_checkpoint(folder)
    if list(folder.glob(".saving-*")):
        found = "leftovers stay"
    told.with_suffix(".tmp").write_text(json.dumps([found, seconds]))
    os.replace(told.with_suffix(".tmp"), told)
    while True:
        for model in reversed(models):
            save_checkpoint(model, tokenizer, folder, card={})


def kill_saves(work: Path, trials: int, rng: random.Random) -> Counter:
    counts: Counter = Counter()
    source, told = work / "source", work / "told"
    through(lambda: make_source(source), work / "source.log")
    for other_config in (False, True):
        folder, log = work / f"folder-{other_config}", work / f"folder-{other_config}.log"
        for trial in range(trials // 2 + 1):  # the last one looks at what the one before it left
            told.unlink(missing_ok=True)
            pid = fork(lambda f=folder, o=other_config: save_in_turn(f, o, source, told), log)
            end = time.monotonic() + PATIENCE_S
            while not told.exists() and time.monotonic() < end and os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
            if not told.exists():
                raise RuntimeError(f"A save failed:\n{log.read_text()[-3000:]}")
            found, seconds = json.loads(told.read_text())
            if trial:
                counts[f"{'another config' if other_config else 'the same config'}: {found}"] += 1
                counts["lost"] += found not in ("whole", "refused")
                print(dict(counts), flush=True)
            ends_within(pid, rng.uniform(0, 3 * seconds) if trial < trials // 2 else 0)
            if trial < trials // 2:
                counts["kills"] += 1
                counts["kills in the middle of a save"] += bool(list(folder.glob(".saving-*")))
    return counts


def same_file(path: Path, other: Path) -> bool:
    if path.suffix == ".safetensors":
        tensors, others = load_file(path), load_file(other)
        return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
    return hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def report(good: bool, counts: Counter, folder: Path, log: Path) -> None:
    if good:
        log.unlink()
        shutil.rmtree(folder)
    else:
        print(f"Lost; see {folder}, {log}:\n{log.read_text()[-3000:]}", flush=True)
    print(dict(counts), flush=True)


PARTS = {"training": kill_trainings, "script": kill_scripts, "saving": kill_saves}


def campaign(trials: int, seed: int, parts: tuple[str, ...] = tuple(PARTS), folder: Path | None = None) -> dict:
    """
    Kill `trials` trainings, runs of the script and saves each.

    Args:
        trials (`int`): of each part.
        seed (`int`): of the moments.
        parts (`tuple[str, ...]`): out of `PARTS`.
        folder (`Path`, *optional*): where to work; what was lost stays there. Defaults to a temporary one.

    Returns:
        `dict`: for each part what was tried and how much of it was `lost`, and its `seconds`.
    """
    work = folder or Path(tempfile.mkdtemp(prefix="kills-"))
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # which would start a thread
    make_model(0, False).save_pretrained(work / "warm")  # tables that Transformers builds once
    gc.freeze()  # else each fork copies the whole heap when it first collects
    results = {}
    for part in parts:
        started = time.monotonic()
        place = work / part
        place.mkdir(parents=True)
        counts = PARTS[part](place, trials, random.Random(seed))
        results[part] = dict(counts) | {"seconds": round(time.monotonic() - started)}
    if folder is None and not any(result["lost"] for result in results.values()):
        shutil.rmtree(work)
    return results


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, help="write the counts there, as JSON")
    options = parser.parse_args(argv)
    results = campaign(options.trials, options.seed, tuple(options.parts))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    sys.exit(any(result["lost"] for result in main().values()))
