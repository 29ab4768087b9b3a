"""
A checkpoint folder that a stranger can load: saving it whole, checking it, its model card, and pushing it to the Hub.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import requires
from math import isfinite
from pathlib import Path

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from .checkpoints import SEAL, explain_full_disk, save_tokenizer, staging_folder
from .checksums_gaml import verify_checksum, weight_files
from .configuration_gaml_bert import GamlBertConfig
from .evaluation import OperatingPoint
from .exiting_gaml import EXIT_POLICIES
from .modeling_gaml_bert import GamlBertForSequenceClassification


# What a Trainer leaves beside a model, and our own unfinished saves: never pushed.
TRAINING_STATE = (
    "checkpoint-*",
    "runs/*",
    "run.json",  # with the paths of this machine
    "*.tsv",  # predictions
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    SEAL,
    ".saving-*",
    ".git/*",
    ".cache/*",
)
SPACE_GRADIO = "6.31.0"  # what the Space was tested with
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What a card tells of a training: fields of TrainingArguments and of the config.
TOLD_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "max_grad_norm",
    "optim",
    "fp16",
    "bf16",
)
TOLD_FIELDS = (
    "exit_pooling",
    "exit_norm",
    "exit_learning_rate_multiplier",
    "exit_warm_start",
    "stop_gradient_between_exits",
    "mixed_training",
    "exit_loss_weights",
    "class_weights",
    "distillation",
    "kd_reduction",
    "kd_temperature",
    "alpha",
    "ga_mode",
    "ga_granularity",
)
# Drawn by `plots.py`; shown in the card when they lie in the folder.
FIGURES = {
    "depth_score.png": "Score of each exit against its depth",
    "speed_score.png": "Score against speed-up",
}


def save_checkpoint(model, tokenizer, folder: str | os.PathLike, *, card: Mapping | None = None) -> Path:
    """
    Save everything a stranger needs to load the model: config, weights (safetensors), tokenizer, code, the handler of
    Inference Endpoints and the model card. Nothing is pickled, and every file gets the mode that the umask gives.

    Everything is written to a temporary folder first and checked there ([`check_checkpoint`]). So a save that fails (a
    full disk, weights with NaN) leaves the old folder as it was. Then:

    - A new folder appears whole, in one rename.
    - In an existing folder only the files written here are replaced, each in one step; training checkpoints, results
      and figures stay. Where config and tokenizer are the same as before, which is the same run with better weights,
      the folder loads at every moment. Where they differ, `config.json` goes first and comes back last: whoever reads
      the folder within these milliseconds, or after a crash in them, is told that the config is missing, and never
      gets the weights of one model with the labels, exits or vocabulary of another.

    Args:
        model ([`GamlBertForSequenceClassification`]): the model itself, not one wrapped for several GPUs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        folder (`str` or `os.PathLike`): where to; made if it is not there.
        card (`dict`, *optional*):
            Keyword arguments of [`render_card`]; `figures` is filled in from the folder, `max_length` from the
            tokenizer. Without it, a `README.md` that is already there stays, and a new folder gets a card of what the
            config knows.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: the folder would not be complete, or a weight is not finite.
        OSError: the disk is full; says how much is free and how much is needed.
    """
    folder = Path(folder)
    exists = folder.is_dir()
    # Inside an existing folder: a rename must not cross file systems, and `folder` may be a mount.
    stage = staging_folder(folder if exists else folder.parent)
    try:
        model.save_pretrained(stage)
        save_tokenizer(tokenizer, stage)
        if card is not None or not (folder / "README.md").exists():
            figures = [name for name in FIGURES if (folder / name).exists()]
            length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
            values = {"figures": figures, "max_length": length} | dict(card or {})
            text = render_card(model.config, **values | {"model_name": values.get("model_name") or folder.name})
            (stage / "README.md").write_text(text, encoding="utf-8")
        if problems := _problems(stage):
            raise ValueError(f"The checkpoint was not saved to `{folder}`:\n" + "\n".join(f"- {p}" for p in problems))
        if exists:
            _move_in(stage, folder)
        else:
            stage.rename(folder)
    except ValueError:  # told above
        raise
    except Exception as error:  # the Rust libraries raise nothing narrower on a full disk
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        # Twice, for the checksum is put into a copy.
        if (why := explain_full_disk(error, folder, 2 * weights + 2**20)) is None:
            raise
        raise OSError(f"The checkpoint was not saved to `{folder}`; what was there is as it was. {why}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def _move_in(stage: Path, folder: Path) -> None:
    """Replace files of `folder` by those of `stage`, `config.json` last; see [`save_checkpoint`]."""
    new = sorted(stage.iterdir(), key=lambda path: path.name == "config.json")
    decides = [path for path in new if path.name == "config.json" or "token" in path.name or path.name == "vocab.txt"]
    # What is there already is not moved: the less, the shorter the folder is without its config.
    kept = {path for path in new if path.suffix != ".safetensors" and _is_there(path, folder / path.name)}
    if not kept.issuperset(decides):
        (folder / "config.json").unlink(missing_ok=True)
        kept.discard(stage / "config.json")
    for path in new:
        if path not in kept:
            os.replace(path, folder / path.name)
    # A single file is loaded in preference to shards, so none of an older save may stay.
    for path in [*folder.glob("model*.safetensors"), folder / WEIGHTS_INDEX]:
        if path.name not in {path.name for path in new}:
            path.unlink(missing_ok=True)


def _is_there(path: Path, old: Path) -> bool:
    return old.is_file() and not old.is_symlink() and old.read_bytes() == path.read_bytes()


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Check that a folder holds all that loading it elsewhere needs: a valid config which names its code, every file of
    that code, finite safetensors weights for exactly the model that the config describes, a tokenizer that fits it,
    and no pickle. Training state, which is never pushed, is not looked at.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.

    Raises:
        ValueError: lists everything that is missing or wrong.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"`folder` must be an existing checkpoint folder. Got `{folder}`.")
    if problems := _problems(Path(folder)):
        raise ValueError(
            f"`{folder}` is not a complete GAML-BERT checkpoint:\n"
            + "\n".join(f"- {problem}" for problem in problems)
            + "\nSave it with `gaml_hf.hub.save_checkpoint`."
        )


def _problems(folder: Path) -> list[str]:
    """What is missing or wrong in a checkpoint folder, one sentence each."""
    problems = [
        f"`{name}` is a pickle, which can run code when it is loaded; weights belong into `{WEIGHTS}`."
        for name in _files(folder)
        if name.endswith(PICKLES)
    ]
    problems += [
        f"`{name}` is a link to a file outside the folder." for name in _files(folder) if _leads_out(folder, name)
    ]
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = GamlBertConfig.from_pretrained(folder, local_files_only=True)
    except FileNotFoundError:
        return [*problems, "`config.json` is missing."]
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        return [*problems, f"`config.json` is not valid: {error}"]
    return (
        problems
        + _code_problems(folder, names)
        + _weight_problems(folder, config)
        + _tokenizer_problems(folder, config)
    )


def _files(folder: Path) -> list[str]:
    """Paths of the files that a push would send, relative to the folder."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(paths, ignore_patterns=list(TRAINING_STATE)))


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a push would send a file that is not of this folder. A snapshot in the Hub's cache is links to blobs."""
    folder = folder.resolve()
    target = (folder / name).resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else None
    return not target.is_relative_to(folder) and target.parent != blobs


def _code_problems(folder: Path, config: Mapping) -> list[str]:
    references = dict(config.get("auto_map") or {})
    problems = [
        f"`auto_map` in `config.json` does not name the class for `{auto_class}`."
        for auto_class in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
        if auto_class not in references
    ]
    pipelines = config.get("custom_pipelines") or {}
    if "text-classification" not in pipelines:
        problems.append("`custom_pipelines` in `config.json` does not name the class for `text-classification`.")
    named = [("config.json", name, reference) for name, reference in references.items()]
    named += [("config.json", task, pipeline.get("impl")) for task, pipeline in pipelines.items()]
    named += [("tokenizer_config.json", *pair) for pair in _tokenizer_classes(folder)]
    needed = {}  # module: who needs it
    for file, name, reference in named:
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            where = "from another repository" if "--" in str(reference) else "by something else than `module.Class`"
            problems.append(f"`{file}` takes the class for `{name}` {where}, `{reference}`.")
        else:
            needed[reference.split(".")[0]] = f"`{file}` (for `{name}`)"
    found = set()
    while needed:
        module, needed_by = needed.popitem()
        path = folder / f"{module}.py"
        found.add(module)
        if not path.is_file():
            problems.append(f"`{path.name}` is missing; {needed_by} needs it.")
            continue
        needed |= {other: f"`{path.name}`" for other in get_relative_imports(path) if other not in found}
    return problems


def _tokenizer_classes(folder: Path) -> list[tuple[str, str]]:
    """What `tokenizer_config.json` names as code: mostly nothing."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):  # told elsewhere
        return []
    if not isinstance(found, Mapping):
        found = {"AutoTokenizer": found}
    pairs = [
        (name, value) for name, values in found.items() for value in (values if isinstance(values, list) else [values])
    ]
    return [(name, value) for name, value in pairs if value is not None]


def _weight_problems(folder: Path, config: GamlBertConfig) -> list[str]:
    try:
        paths = weight_files(folder)
    except ValueError as error:
        return [str(error)]
    if not paths:
        return [f"`{WEIGHTS}` is missing."]
    shapes, problems, broken = {}, [], []
    for path in paths:
        try:
            verify_checksum(path)
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(key)
                    shapes[key] = tuple(tensor.shape)
                    if not torch.isfinite(tensor).all():
                        broken.append(key)
        except (OSError, SafetensorError, ValueError) as error:
            problems.append(f"`{path.name}` cannot be read: {error}")
    if problems:
        return problems
    with torch.device("meta"):  # names and shapes alone
        expected = {key: tuple(t.shape) for key, t in GamlBertForSequenceClassification(config).state_dict().items()}
    differences = {
        "lack": [key for key in expected if key not in shapes],
        "hold, though the config describes no such part,": [key for key in shapes if key not in expected],
        "hold in another shape than the config says": [
            f"{key} {shapes[key]} instead of {shape}"
            for key, shape in expected.items()
            if shapes.get(key, shape) != shape
        ],
        "hold NaN or infinity in": broken,
    }
    for what, keys in differences.items():
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"The weights {what} {', '.join(keys[:4])}{more}.")
    return problems


def _tokenizer_problems(folder: Path, config: GamlBertConfig) -> list[str]:
    # Loading is no test of this: a folder without these files gives a tokenizer that answers [UNK] to every word.
    problems = []
    if not (folder / "tokenizer_config.json").is_file():
        problems.append("`tokenizer_config.json` is missing.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        problems.append("The vocabulary is missing: `tokenizer.json` or `vocab.txt`.")
    if problems:
        return problems
    try:
        size = len(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # the Rust tokenizer raises nothing narrower
        return [f"The tokenizer cannot be loaded: {error}"]
    if size > config.vocab_size:
        return [f"The tokenizer has {size} tokens, but the model has embeddings for {config.vocab_size} only."]
    return []


def render_card(
    config: GamlBertConfig,
    *,
    model_name: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    task: str | None = None,
    split: str | None = None,
    metric_name: str | None = None,
    exit_scores: Mapping[int, float] | None = None,
    points: Sequence[OperatingPoint] = (),
    chosen: OperatingPoint | None = None,
    chosen_scores: Mapping[str, float] | None = None,
    chosen_on: str | None = None,
    chosen_on_speed_up: float | None = None,
    target_speed_up: Sequence[float] | None = None,
    flops_speed_up: float | None = None,
    latency_speed_up: float | None = None,
    rows: Mapping[str, int] | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    max_length: int | None = None,
    baseline: tuple[str, float] | None = None,
    training_arguments: Mapping | None = None,
    seed: int | None = None,
    date: str | None = None,
    hardware: str | None = None,
    versions: Mapping[str, str] | None = None,
    command: str | None = None,
    license: str | None = None,
    language: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """
    The model card, from `model_card.md`. Only what is given appears; a score that is None or NaN was not measured.

    All scores are of `metric_name`, in its own unit.

    Args:
        config ([`GamlBertConfig`]): of the model; gives exits, labels and the exit strategy it is saved with.
        model_name (`str`, *optional*): the Hub id (`user/name`), or a name.
        base_model (`str`, *optional*): the checkpoint it started from; a local folder is named, never linked.
        dataset (`str`, *optional*): what it was trained on, if possible a Hub id (`nyu-mll/glue`).
        task (`str`, *optional*): the configuration of that dataset (`sst2`).
        split (`str`, *optional*): the split that gave the scores (`validation`).
        metric_name (`str`, *optional*): the metric of the scores (`accuracy`). Without it no score is shown.
        exit_scores (`dict[int, float]`, *optional*): score of each exit, by layer.
        points (`list[OperatingPoint]`, *optional*): the curve of score against speed-up.
        chosen ([`OperatingPoint`], *optional*): the one to use, which is the first number a reader sees.
        chosen_scores (`dict[str, float]`, *optional*): of `chosen`, where `metric_name` is the mean of several.
        chosen_on (`str`, *optional*): the rows that `chosen` was chosen on.
        chosen_on_speed_up (`float`, *optional*): the speed-up in layers on those rows.
        target_speed_up (`list[float]` of two numbers, *optional*):
            The range of speed-ups that was wanted. The card says where `chosen` missed it.
        flops_speed_up (`float`, *optional*): of `chosen`, in FLOPs instead of layers.
        latency_speed_up (`float`, *optional*): of `chosen`, on the clock at batch 1 on `hardware`.
        rows (`dict[str, int]`, *optional*): how many rows were used for what.
        text_columns (`list[str]`, *optional*): the columns of the texts; two make a model of pairs.
        label_column (`str`, *optional*): the column of the classes.
        max_length (`int`, *optional*): tokens to which a text is cut.
        baseline (`tuple[str, float]`, *optional*): something to compare with: its name and score.
        training_arguments (`dict`, *optional*): those worth printing, as they come: no paths, no tokens.
        seed (`int`), date (`str`), hardware (`str`), command (`str`), *optional*: of the training run.
        versions (`dict[str, str]`, *optional*): of the libraries.
        license (`str`), language (`str`), *optional*: Hub identifiers (`apache-2.0`, `en`).
        figures (`list[str]`, *optional*): file names in the folder, out of `FIGURES`.

    Returns:
        `str`: the text of `README.md`.
    """
    exit_scores = {int(layer): score for layer, score in (exit_scores or {}).items() if _measured(score)}
    points = [point for point in points if _measured(point.score, point.speed_up)]
    chosen = chosen if chosen and _measured(chosen.score, chosen.speed_up) else None
    baseline = baseline if baseline and _measured(baseline[1]) else None
    parts = {name: score for name, score in (chosen_scores or {}).items() if _measured(score)}
    if metric_name is None:
        exit_scores, points, chosen, baseline = {}, [], None, None
    if chosen is None or len(parts) < 2:
        parts = {}
    run = {f"rows, {use}": number for use, number in (rows or {}).items()}
    run |= {"seed": seed, "date": date, "hardware": hardware, **{f"`{k}`": v for k, v in (versions or {}).items()}}

    name = model_name or "gaml-bert"
    layers = config.num_hidden_layers
    results = []  # metric, what it is of, score
    if chosen is not None:
        at = f"at {chosen.speed_up:.2f}x ({_policy(chosen.config_fields())})"
        results += [(key, f"{key} {at}", score) for key, score in (parts or {metric_name: chosen.score}).items()]
    if layers in exit_scores:
        results.append((metric_name, f"{metric_name}, last exit", exit_scores[layers]))
    data = ModelCardData(
        model_name=name,
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=_hub_id(base_model),
        datasets=[dataset] if _hub_id(dataset) else None,
        metrics=list(parts) or ([metric_name] if metric_name else None),
        tags=["gaml-bert", "early-exit"],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset,
                dataset_name=f"{dataset} ({task})" if task else dataset,
                dataset_config=task,
                dataset_split=split,
                metric_type=metric,
                metric_name=label,
                metric_value=score,
            )
            for metric, label, score in results
            if _hub_id(dataset)
        ]
        or None,
    )
    if data.eval_results is None:  # the name belongs to the results; alone it is not a field of the Hub
        data.model_name = None
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=name,
        config=config,
        requirement=next(name for name in requires("gaml_hf") if name.startswith("transformers")),
        labels=[config.id2label[index] for index in sorted(config.id2label)],
        start=base_model if _hub_id(base_model) else base_model and Path(base_model).name,
        start_is_on_hub=_hub_id(base_model) is not None,
        dataset=dataset if _hub_id(dataset) else dataset and Path(dataset).name,
        task=task,
        split=split,
        metric_name=metric_name,
        exits=[(m, layers / m, exit_scores.get(m)) for m in config.exit_layers],
        has_scores=bool(exit_scores),
        policy=_policy(_config_fields(config)),
        points=[(_policy(p.config_fields()), p.score, p.speed_up) for p in sorted(points, key=lambda p: p.speed_up)],
        chosen=chosen and (_policy(chosen.config_fields()), chosen.score, chosen.speed_up),
        parts=parts,
        chosen_on=chosen_on,
        chosen_on_speed_up=chosen_on_speed_up,
        target_speed_up=target_speed_up,
        missed=chosen is not None and target_speed_up is not None and not chosen.within(tuple(target_speed_up)),
        text_columns=list(text_columns),
        label_column=label_column,
        max_length=max_length,
        flops_speed_up=flops_speed_up if _measured(flops_speed_up) else None,
        latency_speed_up=latency_speed_up if _measured(latency_speed_up) else None,
        baseline=baseline,
        training_arguments=_printable(training_arguments),
        run=_printable(run),
        command=command,
        figures=[(figure, FIGURES[figure]) for figure in figures],
    )
    return str(card) + "\n"


def _measured(*values: float | None) -> bool:
    return all(value is not None and isfinite(value) for value in values)


def _config_fields(config: GamlBertConfig) -> dict:
    """The exit strategy of `config` and the one field that it reads."""
    parameter = EXIT_POLICIES[config.exit_strategy].parameter
    return {"exit_strategy": config.exit_strategy} | ({parameter: getattr(config, parameter)} if parameter else {})


def _policy(fields: Mapping) -> str:
    """How a card names a policy: as keyword arguments, which can be copied from there."""
    return ", ".join(
        f"{key}={json.dumps(value) if isinstance(value, str) else f'{value:.4g}'}" for key, value in fields.items()
    )


def _printable(values: Mapping | None) -> dict[str, str]:
    """Cells of a Markdown table, without those that say nothing."""
    nothing = [("max_steps", -1)]  # to TrainingArguments, no limit
    shown = {key: value for key, value in (values or {}).items() if value is not None and (key, value) not in nothing}
    return {key: str(value).replace("|", r"\|") for key, value in shown.items()}


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository on the Hub; the Hub refuses a card whose metadata name anything else."""
    if name is None or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Push a complete checkpoint to the Hub in one commit, so that no revision holds weights without their code.

    Either the commit is there, whole, or the push raised and the repository is as it was: what an interrupted push had
    uploaded belongs to no revision.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint; see [`check_checkpoint`]. Training state in it is not pushed.
        repo_id (`str`): `user/name`; made if it is not there.
        private (`bool`, *optional*):
            Of a repository made here; an existing one stays as it is. Defaults to what its owner set, mostly public.
        revision (`str`, *optional*): the branch, made if it is not there. Defaults to `main`.
        commit_message (`str`, *optional*): defaults to `"Upload GAML-BERT checkpoint"`.
        token (`str`, *optional*): defaults to the one saved by `hf auth login`.

    Returns:
        `CommitInfo`: of the commit. Its `oid` is the hash that a user should pin; as a `str` it is the address.

    Raises:
        ValueError: the folder is not complete; nothing was pushed.
    """
    check_checkpoint(folder)
    folder = Path(folder)
    api = HfApi(token=token)
    repo_id = _open_repo(api, repo_id, private=private, revision=revision)
    names = _files(folder)
    # Weights of an earlier push would be loaded in preference to shards of this one.
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in names and "/" not in name and (name.endswith(".safetensors") or name == WEIGHTS_INDEX)
    ]
    # Not `upload_folder`: with Xet it commits a slow upload in parts.
    added = {name: CommitOperationAdd(name, folder / name) for name in names}
    if "README.md" in added:
        card = _named((folder / "README.md").read_text(encoding="utf-8"), repo_id)
        added["README.md"] = CommitOperationAdd("README.md", card.encode())
    return api.create_commit(
        repo_id,
        [*added.values(), *map(CommitOperationDelete, stale)],
        commit_message=commit_message or "Upload GAML-BERT checkpoint",
        revision=revision,
    )


def push_space(
    repo_id: str,
    model: str,
    *,
    model_revision: str | None = None,
    examples: Sequence[str] = (),
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Push a Gradio Space that shows where texts leave a checkpoint on the Hub, in one commit.

    Args:
        repo_id (`str`): `user/name` of the Space; made if it is not there.
        model (`str`): `user/name` of the checkpoint, see [`push_checkpoint`].
        model_revision (`str`, *optional*):
            Its branch, tag or commit. The Space pins the commit that this is now, for it runs the code of that commit.
        examples (`list[str]`, *optional*): texts to choose from; the first is shown when the page opens.
        private (`bool`, *optional*): of a Space made here. One that shows a private model needs the secret `HF_TOKEN`.
        commit_message (`str`, *optional*): defaults to `"Upload Space"`.
        token (`str`, *optional*): defaults to the one saved by `hf auth login`.

    Returns:
        `CommitInfo`: of the commit.
    """
    api = HfApi(token=token)
    revision = api.model_info(model, revision=model_revision).sha
    repo_id = _open_repo(api, repo_id, private=private, revision=None, repo_type="space", space_sdk="gradio")
    source = Path(__file__).with_name("space")
    readme = (source / "README.md").read_text(encoding="utf-8")
    for key, value in {"model": model, "revision": revision, "gradio": SPACE_GRADIO}.items():
        readme = readme.replace(f"{{{{ {key} }}}}", value)
    chosen = {"model": model, "revision": revision, "examples": list(examples)}
    files = {
        "README.md": readme.encode(),
        "app.py": (source / "app.py").read_bytes(),
        "requirements.txt": (source / "requirements.txt").read_bytes(),
        "model.json": json.dumps(chosen, indent=2, ensure_ascii=False).encode(),
    }
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=commit_message or "Upload Space",
        repo_type="space",
    )


def _named(card: str, repo_id: str) -> str:
    """A card whose title is no Hub id, as of a model saved before it had one, with `repo_id` there and in its code."""
    title = re.search(r"^# (\S+)$", card, flags=re.MULTILINE)
    if title is None or "/" in title[1]:
        return card
    return card.replace(title[0], f"# {repo_id}", 1).replace(f'"{title[1]}"', f'"{repo_id}"')


def _open_repo(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, **kwargs) -> str:
    """Make repository and branch where they are not there; returns the full id, `user/name`."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kwargs).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kwargs.get("repo_type"))
    return repo_id
