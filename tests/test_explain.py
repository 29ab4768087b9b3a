"""The blocks of docs/explain.md, run as they stand, and what their values must be."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from pytest import approx, fixture, skip

from conftest import sharpen
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.hub import save_checkpoint


PAGE = Path(__file__).parents[1] / "docs" / "explain.md"

# What the page does not say: the same by the stock pipeline, which knows one way to read and to exit; and sums.
CHECKS = """
import json
from transformers import TextClassificationPipeline

tokenizer = classifier.tokenizer
tokenizer.split_special_tokens = False
model.config.exit_strategy = "none"
stock = TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu", top_k=None)
by_stock = shap.Explainer(stock)([text])
with torch.inference_mode():
    changed, base = (probability(x, mask, types, exit_layer)[0, label] for x in (ids, masked))
print(json.dumps({
    "shap": explanation.values[0].tolist(),
    "shap_by_stock": by_stock.values[0].tolist(),
    "shap_sum": (explanation.base_values[0] + explanation.values[0].sum(0)).tolist(),
    "served": [answer["score"] for answer in sorted(classifier([text])[0], key=lambda answer: answer["label"])],
    "gradients_sum": float(attributions.sum()),
    "change": float(changed - base),
    "seen": list(seen["first"].shape),
    "hidden_size": model.config.hidden_size,
    "tokens": ids.shape[1],
}))
"""


@fixture
def folder(bert_kwargs, tokenizer, tmp_path) -> Path:
    """Its policy lets texts leave where they like, and it reads "[MASK]" in a text as characters."""
    tokenizer.split_special_tokens = True
    model = GamlBertForSequenceClassification(
        GamlBertConfig(**bert_kwargs, exit_strategy="patience", patience=1)
    ).eval()
    sharpen(model)
    save_checkpoint(model, tokenizer, tmp_path / "out" / "films")
    return tmp_path


def test_the_page_runs_and_its_values_add_up(folder):
    # Looked for and not imported: SHAP warns when it is.
    if missing := [name for name in ("shap", "captum") if importlib.util.find_spec(name) is None]:
        skip(f"needs {' and '.join(missing)}: pip install gaml_hf[explain]")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 5
    if importlib.util.find_spec("lime") is None:
        blocks = [block for block in blocks if "import LimeTextExplainer" not in block]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks, CHECKS])],
        cwd=folder,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},  # compiling SHAP's loops would take longer than running them
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    values = json.loads(done.stdout.splitlines()[-1])
    expected = torch.tensor(values["shap_by_stock"])
    torch.testing.assert_close(torch.tensor(values["shap"]), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.01
    assert values["shap_sum"] == approx(values["served"], abs=1e-5)
    assert values["gradients_sum"] == approx(values["change"], abs=1e-3)
    assert abs(values["change"]) > 0.01
    assert values["seen"] == [1, values["tokens"], values["hidden_size"]]
