"""To the Hub: a checkpoint, or a Space that shows one, each in one commit."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from transformers import PreTrainedConfig

from gaml_hf.models.auto import classes_of

from .checking import WEIGHTS_INDEX, check_checkpoint, pushed_files


SPACE_GRADIO = "6.31.0"  # what the Space was tested with


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
    names = pushed_files(folder)
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

    Raises:
        ValueError: the checkpoint has no exits, or is of images.
    """
    api = HfApi(token=token)
    revision = api.model_info(model, revision=model_revision).sha
    found, _ = PreTrainedConfig.get_config_dict(model, revision=revision, token=token)
    classes = classes_of(kind := found.get("model_type"))
    if classes is None or classes[0].model_type != kind or classes[0].pipeline_type != "text":
        raise ValueError(
            "`model` must be a checkpoint of texts with exits, which is what the Space shows. Got "
            f"`{model}`, of type `{kind}`."
        )
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
