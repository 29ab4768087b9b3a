"""What a checkpoint folder must hold, so that a stranger can load it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from gaml_hf.models.auto import GamlAutoConfig, GamlAutoModelForSequenceClassification
from gaml_hf.models.checksums_gaml import verify_checksum, weight_files
from gaml_hf.models.configuration_gaml import GamlConfigMixin

from .folders import SEAL


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
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PROCESSOR = "preprocessor_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Check that a folder holds all that loading it elsewhere needs: a valid config which names its code, every file of
    that code, finite safetensors weights for exactly the model that the config describes, a tokenizer that fits it or,
    for images, an image processor, and no pickle. Training state, which is never pushed, is not looked at.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.

    Raises:
        ValueError: lists everything that is missing or wrong.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"`folder` must be an existing checkpoint folder. Got `{folder}`.")
    if problems := find_problems(Path(folder)):
        raise ValueError(
            f"`{folder}` is not a complete checkpoint with exits:\n"
            + "\n".join(f"- {problem}" for problem in problems)
            + "\nSave it with `gaml_hf.hub.save_checkpoint`."
        )


def find_problems(folder: Path) -> list[str]:
    """What is missing or wrong in a checkpoint folder, one sentence each."""
    problems = [
        f"`{name}` is a pickle, which can run code when it is loaded; weights belong into `{WEIGHTS}`."
        for name in pushed_files(folder)
        if name.endswith(PICKLES)
    ]
    problems += [
        f"`{name}` is a link to a file outside the folder."
        for name in pushed_files(folder)
        if _leads_out(folder, name)
    ]
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = GamlAutoConfig.from_pretrained(folder, local_files_only=True)
    except FileNotFoundError:
        return [*problems, "`config.json` is missing."]
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        return [*problems, f"`config.json` is not valid: {error}"]
    is_text = config.pipeline_type == "text"
    return (
        problems
        + _code_problems(folder, names, config)
        + _weight_problems(folder, config)
        + (_tokenizer_problems(folder, config) if is_text else _image_processor_problems(folder))
    )


def pushed_files(folder: Path) -> list[str]:
    """Paths of the files that a push would send, relative to the folder."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(paths, ignore_patterns=list(TRAINING_STATE)))


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a push would send a file that is not of this folder. A snapshot in the Hub's cache is links to blobs."""
    folder = folder.resolve()
    target = (folder / name).resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else None
    return not target.is_relative_to(folder) and target.parent != blobs


def _code_problems(folder: Path, names: Mapping, config: GamlConfigMixin) -> list[str]:
    references = dict(names.get("auto_map") or {})
    problems = [
        f"`auto_map` in `config.json` does not name the class for `{auto_class}`."
        for auto_class in ("AutoConfig", "AutoModel", config.auto_class)
        if auto_class not in references
    ]
    pipelines = names.get("custom_pipelines") or {}
    if (task := config.pipeline_task) not in pipelines:
        problems.append(f"`custom_pipelines` in `config.json` does not name the class for `{task}`.")
    named = [("config.json", name, reference) for name, reference in references.items()]
    named += [("config.json", task, pipeline.get("impl")) for task, pipeline in pipelines.items()]
    for file, auto_class in (("tokenizer_config.json", "AutoTokenizer"), (PROCESSOR, "AutoImageProcessor")):
        named += [(file, *pair) for pair in _classes_in(folder / file, auto_class)]
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


def _classes_in(path: Path, auto_class: str) -> list[tuple[str, str]]:
    """What the file of a tokenizer or an image processor names as code: mostly nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):  # told elsewhere
        return []
    if not isinstance(found, Mapping):
        found = {auto_class: found}
    pairs = [
        (name, value) for name, values in found.items() for value in (values if isinstance(values, list) else [values])
    ]
    return [(name, value) for name, value in pairs if value is not None]


def _weight_problems(folder: Path, config: GamlConfigMixin) -> list[str]:
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
        model = GamlAutoModelForSequenceClassification.from_config(config)
        expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
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


def _image_processor_problems(folder: Path) -> list[str]:
    if not (folder / PROCESSOR).is_file():
        return [f"`{PROCESSOR}` is missing."]
    try:
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # upstream raises nothing narrower
        return [f"The image processor cannot be loaded: {error}"]
    return []


def _tokenizer_problems(folder: Path, config: GamlConfigMixin) -> list[str]:
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
