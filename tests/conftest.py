"""What every test shares: a sealed-off environment, a tiny BERT, a tiny tokenizer, and the optional real data."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


# Before anything imports huggingface_hub, datasets or torch: they read these once. A test that talks to a Hub server
# of its own overrides them for its subprocess: `env=os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}`.
HF_HOME = tempfile.mkdtemp(prefix="gaml_hf-tests-")  # no cache, token or code of the user's
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[name]
os.environ |= {
    "HF_HOME": HF_HOME,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # datasets and transformers read this one too
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",  # the models are tiny: a second thread costs time and makes sums depend on the machine
    "TOKENIZERS_PARALLELISM": "false",  # or every fork after a tokenizer's first use warns
}

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers.utils.hub  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from transformers import BertTokenizer  # noqa: E402

from gaml_hf.models.exiting_gaml import ExitPolicy  # noqa: E402
from hub_server import HubServer  # noqa: E402


SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository; never part of it

WORDS = """
[PAD] [UNK] [CLS] [SEP] [MASK] . , ! ? ' a an the this that it is was are not no never and but of in to with for i you
he she they we film movie story plot actor scene good great bad awful dull funny sad fine very too so really quite less
more most best worst ##s ##ed ##ly ##ing
""".split()


# The beginning of a stranger's program: no gaml_hf, however it is installed.
WITHOUT_THE_PACKAGE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gaml_hf":
            raise ModuleNotFoundError("No module named 'gaml_hf'", name="gaml_hf")

sys.meta_path.insert(0, Blocked())
"""


def sharpen(model: torch.nn.Module) -> None:
    """Make weights large enough that texts differ in class and in exit."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight *= 30 if name.startswith("exit_") else 8


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random weights whether a test runs alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    """A real WordPiece tokenizer over `WORDS`; a new one each time, for a tokenizer remembers its last truncation."""
    vocab = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocab.write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizer(str(vocab), model_max_length=64)


@pytest.fixture
def bert_kwargs() -> dict[str, int]:
    """Sizes of a BERT that runs in milliseconds, for `BertConfig` and its subclasses."""
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }


@pytest.fixture
def folder(bert_kwargs, tokenizer, tmp_path) -> Path:
    """A checkpoint whose texts differ in class and in exit."""
    from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification

    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, **PAPER_LETTER, num_labels=3)).eval()
    sharpen(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load(folder):
    """Makes the pipeline of `folder`, and can be sent to another process."""
    from gaml_hf.runtime.scoring import ClassifierLoader

    return ClassifierLoader(str(folder), False, "cpu", None)


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub of one's own, to which this process is logged in; a subprocess gets there by `hub_environment`."""
    server = HubServer()
    changes = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # a client kept, with its address
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    yield server
    server.close()


def hub_environment(server: HubServer, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **more}


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs real data in ../shared/{name}, beside the repository")
    return folder


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """GLUE as `{cola,mrpc,sst2}/{train,validation,test}.parquet`."""
    return _shared_folder("glue")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """A checkpoint of sentence-transformers/all-MiniLM-L6-v2: a real BERT of 6 layers."""
    return _shared_folder("models/all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def mpnet_folder() -> Path:
    """
    A checkpoint of sentence-transformers/all-mpnet-base-v2: a real MPNet of 12 layers, too large to lie beside every
    repository. The environment variable `MPNET` names its folder.
    """
    if "MPNET" not in os.environ:
        pytest.skip("needs the folder of all-mpnet-base-v2 in the environment variable MPNET")
    return Path(os.environ["MPNET"])


class Margin(ExitPolicy):
    """A strategy of one's own with a parameter: leave where the two largest logits are far apart."""

    name, parameter = "margin", "exit_threshold"

    def __init__(self, exit_threshold):
        self.exit_threshold = exit_threshold

    @classmethod
    def from_config(cls, config):
        return cls(config.exit_threshold)

    def should_exit(self, exit_logits):
        first, second = exit_logits[:, -1].topk(2).values.T
        return first - second > self.exit_threshold
