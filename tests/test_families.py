"""
The contract of an encoder family: what every class with exits keeps, over the registry of families.

A family added to `gaml_hf.models.auto.FAMILIES` is tested here as soon as it has its sizes in `SIZES`.
"""

import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module

import torch
from datasets import Dataset as Table
from pytest import approx, fixture, mark, raises
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Data2VecTextConfig,
    Data2VecTextModel,
    GPT2Config,
    Trainer,
    TrainingArguments,
)

from conftest import WITHOUT_THE_PACKAGE, WORDS
from gaml_hf import GamlAutoConfig, GamlAutoModelForSequenceClassification, GamlTrainer, register_family
from gaml_hf.evaluation import flops_speed_up
from gaml_hf.hub import save_checkpoint
from gaml_hf.models import auto
from gaml_hf.models.auto import FAMILIES, classes_of, families
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, MaxProb, Patience
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx
from gaml_hf.training.alignment import parameter_groups
from reference import alignment_reference


BERT = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
BERT |= {"intermediate_size": 48, "max_position_embeddings": 40}
DISTILBERT = {"vocab_size": len(WORDS), "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
DEBERTA |= {"position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
# Sizes of each kind of plain encoder; some families have several. Windows and buckets are smaller than the texts are.
SIZES = {
    "albert": {**BERT, "embedding_size": 16},
    "albert, two groups": {**BERT, "embedding_size": 16, "num_hidden_groups": 2},
    "bert": BERT,
    "camembert": {**BERT, "type_vocab_size": 1},
    "deberta-v2": {**BERT, **DEBERTA, "share_att_key": False},
    "deberta-v2, shared keys": {**BERT, **DEBERTA, "share_att_key": True},
    "deberta-v2, no buckets": {**BERT, **DEBERTA, "position_buckets": -1, "max_relative_positions": 12},
    "distilbert": {**DISTILBERT, "max_position_embeddings": 40},
    "electra": {**BERT, "embedding_size": 16},
    "electra, one width": {**BERT, "embedding_size": 32},
    "ernie": BERT,
    "ernie, tasks": {**BERT, "use_task_id": True},
    "modernbert": {**BERT, **TOKENS, "local_attention": 8},
    "mpnet": BERT,
    "roberta": {**BERT, "type_vocab_size": 1},
    "xlm-roberta": {**BERT, "type_vocab_size": 1},
}
NO_EXPORT = {  # to ONNX, and why
    "deberta-v2": "its attention adds what queries and keys say to each other's places",
    "modernbert": "its layers are normalized before they read, and rotate queries and keys",
}
NO_CHECKPOINTING = {"albert": "not in Transformers", "mpnet": "not in Transformers"}  # of activations
LENGTHS = [30, 11, 3, 22, 7]  # of texts; RoBERTa with 40 positions holds 39 - pad_token_id tokens

each_kind = mark.parametrize("kind", SIZES)


def family(kind: str) -> str:
    return kind.partition(",")[0]


def plain_config(kind: str):
    config = AutoConfig.for_model(family(kind), **SIZES[kind])
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        config.pad_token_id = 1
    return config


def spread_weights(model) -> None:
    """Far from zero, biases too, so that texts differ, exits disagree, and a part left out shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)


@fixture
def make(tmp_path):
    """A plain checkpoint with random weights, opened with exits."""

    def make(kind: str, **fields):
        folder = tmp_path / f"plain-{len(list(tmp_path.iterdir()))}"
        plain = AutoModel.from_config(plain_config(kind))
        spread_weights(plain)
        plain.save_pretrained(folder)
        model = GamlAutoModelForSequenceClassification.from_pretrained(folder, **fields).eval()
        spread_weights(model.exit_classifiers)
        return model, plain.eval()

    return make


@fixture
def texts():
    """Token ids and mask of a padded batch, for a vocabulary without special meanings beyond padding."""

    def texts(model, lengths=LENGTHS) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        ids = torch.randint(4, len(WORDS), mask.shape).masked_fill(mask == 0, model.config.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    return texts


ELSEWHERE = """
from typing import ClassVar
from huggingface_hub.dataclasses import strict
from transformers import Data2VecTextConfig, Data2VecTextModel, Data2VecTextPreTrainedModel
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.exits_gaml import ExitsMixin

@strict
class OwnConfig(GamlConfigMixin, Data2VecTextConfig):
    model_type = "own_text"
    plain_model_types: ClassVar[tuple[str, ...]] = ("data2vec-text",)

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1

class OwnForSequenceClassification(ExitsMixin, Data2VecTextPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.data2vec_text = Data2VecTextModel(config, add_pooling_layer=False)
        self.add_exits()
"""


def test_a_family_of_ones_own(tmp_path, monkeypatch, texts):
    monkeypatch.setattr(auto, "_REGISTERED", dict(auto._REGISTERED))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "modeling_own_text.py").write_text(ELSEWHERE)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    plain = Data2VecTextModel(Data2VecTextConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64))
    plain.save_pretrained(tmp_path / "plain")
    load = GamlAutoModelForSequenceClassification.from_pretrained
    with raises(ValueError, match="docs/families.md says how to add one"):
        load(tmp_path / "plain")
    own = import_module("modeling_own_text")
    with raises(ValueError, match="OwnConfig is not registered: `register_family` does it"):
        GamlAutoModelForSequenceClassification.from_config(own.OwnConfig(**sizes))
    register_family(own.OwnConfig, own.OwnForSequenceClassification)
    assert type(GamlAutoModelForSequenceClassification.from_config(own.OwnConfig(**sizes))) is (
        own.OwnForSequenceClassification
    )
    model = load(tmp_path / "plain", exit_strategy="max_prob", exit_threshold=0.5).eval()
    spread_weights(model.exit_classifiers)
    batch = texts(model)
    live, replayed = model(**batch), model(**batch, output_exit_logits=True)
    assert_close(live.logits, replayed.logits)
    assert live.exit_layer.tolist() == replayed.exit_layer.tolist()
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_own_text.py").is_file()
    for again in (load(tmp_path / "saved"), AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")):
        assert type(again) is own.OwnForSequenceClassification
        assert_close(again.eval()(**batch).logits, live.logits)


def test_every_family_is_here():
    assert {config.model_type for config, _ in families()} == {
        classes_of(family(kind))[0].model_type for kind in SIZES
    }
    assert len(families()) == len(FAMILIES)
    plain = [kind for config, _ in families() for kind in config.plain_model_types]
    assert sorted(set(plain)) == sorted({family(kind) for kind in SIZES})
    assert len(plain) == len(set(plain))


@each_kind
@mark.parametrize("exit_pooling", ["mean", "cls"])
@torch.no_grad()
def test_full_depth_is_the_stock_encoder(kind, exit_pooling, make, texts):
    model, plain = make(kind, exit_pooling=exit_pooling)
    batch = texts(model)
    states = plain(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    state = states[:, 0] if exit_pooling == "cls" else (states * mask).sum(dim=1) / mask.sum(dim=1)
    expected = model.exit_classifiers["4"](state)
    assert_close(model(**batch, output_exit_logits=True).logits, expected, rtol=1e-5, atol=1e-5)  # on the padded grid
    assert_close(model(**batch, exit_policy=Budgeted(4)).logits, expected, rtol=1e-5, atol=1e-5)  # without padding
    no_padding = {"input_ids": batch["input_ids"][:1]}
    assert_close(model(**no_padding).logits, expected[:1], rtol=1e-5, atol=1e-5)


@each_kind
@mark.parametrize("exit_pooling", ["mean", "cls"])
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(kind, exit_pooling, make, texts):
    model, _ = make(kind, exit_pooling=exit_pooling)
    batch = texts(model, LENGTHS * 2)
    exit_logits = model(**batch, output_exit_logits=True).exit_logits
    sureness = exit_logits.softmax(dim=-1).amax(dim=-1)[:, :3].flatten().sort().values
    threshold = float(sureness[14:16].mean())  # between two rows, for rounding must not decide
    seen = set()
    for policy in (MaxProb(threshold), Entropy(0.9), Patience(1), Patience(2), Budgeted(2)):
        output = model(**batch, exit_policy=policy)
        replayed = model(**batch, exit_policy=policy, output_exit_logits=True)
        assert output.exit_layer.equal(replayed.exit_layer)
        assert_close(output.logits, replayed.logits, rtol=1e-5, atol=1e-5)
        seen |= set(output.exit_layer.tolist())
        for row, length in enumerate(LENGTHS * 2):
            alone = model(input_ids=batch["input_ids"][row : row + 1, :length], exit_policy=policy)
            assert alone.exit_layer.item() == output.exit_layer[row].item()
            assert_close(alone.logits[0], output.logits[row], rtol=1e-5, atol=1e-5)
    assert len(seen) > 1


@each_kind
def test_a_plain_checkpoint_with_a_head_starts_it(kind, tmp_path):
    """Nothing of the encoder is lost, nothing else is taken, and the config calls itself ours."""
    plain = AutoModelForMaskedLM.from_config(plain_config(kind))
    spread_weights(plain)
    plain.save_pretrained(tmp_path)
    model, info = GamlAutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    own = plain.base_model.state_dict()
    encoder = model.base_model.state_dict()
    assert encoder.keys() <= own.keys()
    assert all(encoder[key].equal(own[key]) for key in encoder)
    assert all(key.startswith("exit_") for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert model.config.model_type.startswith("gaml_")
    assert model.exits_are_new
    ours, theirs = model.config.to_dict(), plain.config.to_dict()
    changed = {"model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "id2label", "label2id"}
    assert {key: ours[key] for key in theirs.keys() - changed} == {key: theirs[key] for key in theirs.keys() - changed}


@each_kind
@torch.no_grad()
def test_saved_and_loaded_again(kind, make, texts, tmp_path):
    model, _ = make(kind, exit_strategy="patience", patience=1, exit_pooler="per_exit", num_labels=3)
    spread_weights(model)
    model.save_pretrained(tmp_path / "saved")
    batch = texts(model)
    expected = model(**batch)
    for auto_class in (AutoModelForSequenceClassification, GamlAutoModelForSequenceClassification):
        loaded = auto_class.from_pretrained(tmp_path / "saved").eval()
        assert type(loaded) is type(model)
        assert all(weight.equal(model.state_dict()[name]) for name, weight in loaded.state_dict().items())
        output = loaded(**batch)
        # Read from a file they lie elsewhere in memory, and on some processors a product's last digit depends on that.
        assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)
        assert output.exit_layer.equal(expected.exit_layer)
    (tmp_path / "saved" / "model.safetensors").unlink()


STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

told = {}
for name, folder in json.loads(sys.argv[1]).items():
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
    for auto in AutoModel, AutoModelForSequenceClassification:
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        output = model(**batch)
    pipe = pipeline("text-classification", model=folder, trust_remote_code=True)
    exits = [row["exit_layer"] for row in pipe(json.loads(sys.argv[2]))]
    told[name] = {"logits": output.logits.tolist(), "exits": output.exit_layer.tolist(), "pipeline": exits}
    model.save_pretrained(folder + "-again")
    tokenizer.save_pretrained(folder + "-again")
print(json.dumps(told))
"""
)


def test_a_stranger_loads_it_and_saves_it_and_loads_it(make, tokenizer, tmp_path):
    """In interpreters that cannot import the package; each family once."""
    texts = ["a good film", "the plot is dull , the actor awful and the story so very sad", "not bad !"]
    expected, folders = {}, {}
    for kind in SIZES:
        if "," in kind or family(kind) in ("camembert", "xlm-roberta"):
            continue
        model, _ = make(kind, exit_strategy="entropy", exit_threshold=0.9)
        if "token_type_ids" not in inspect.signature(type(model.base_model).forward).parameters:
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        folders[kind] = str(save_checkpoint(model, tokenizer, tmp_path / f"saved-{family(kind)}"))
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        with torch.no_grad():
            output = model(**tokenizer(texts, padding=True, return_tensors="pt"))
        exits = output.exit_layer.tolist()
        expected[kind] = {"logits": output.logits, "exits": exits, "pipeline": exits}
    assert len(folders) == len(FAMILIES)
    for suffix in ("", "-again"):
        names = {kind: folder + suffix for kind, folder in folders.items()}
        run = subprocess.run(
            [sys.executable, "-c", STRANGER, json.dumps(names), json.dumps(texts)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / f"modules{suffix}")},
        )
        assert run.returncode == 0, run.stderr
        told = json.loads(run.stdout.splitlines()[-1])
        for kind, answers in told.items():
            assert_close(torch.tensor(answers["logits"]), expected[kind]["logits"], rtol=1e-5, atol=1e-5)
            assert answers["exits"] == answers["pipeline"] == expected[kind]["exits"]


@each_kind
@torch.no_grad()
def test_truncated_it_answers_as_that_exit(kind, make, texts):
    model, _ = make(kind, exit_temperatures=[1.0, 2.0, 1.0, 3.0])
    batch = texts(model)
    expected = model(**batch, exit_policy=Budgeted(2))
    smaller = model.truncate(2)
    assert smaller.config.num_hidden_layers == len(smaller.encoder_layers) == 2
    assert_close(smaller(**batch).logits, expected.logits, rtol=1e-5, atol=1e-5)
    count = [sum(p.numel() for p in part.base_model.parameters()) for part in (model, smaller)]
    assert count[1] < count[0] or kind == "albert"  # whose layers are one


@each_kind
@torch.no_grad()
def test_prepacked_it_answers_the_same(kind, make, texts, monkeypatch):
    monkeypatch.setattr("gaml_hf.models.exits_gaml.prepacking_gain", lambda linears: 2.0)
    model, _ = make(kind, exit_strategy="max_prob", exit_threshold=0.8)
    batch = texts(model)
    expected = model(**batch)
    packed = copy.deepcopy(model).prepack()
    output = packed(**batch)
    assert output.exit_layer.equal(expected.exit_layer)
    assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    linears = [m for layer in packed.encoder_layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert not linears


@each_kind
@mark.parametrize("exit_pooling", ["mean", "cls"])
@torch.no_grad()
def test_compiled_it_answers_the_same(kind, exit_pooling, make, texts):
    """Without a graph break; what the compiler makes of the graph is tested with BERT."""
    model, _ = make(kind, exit_pooling=exit_pooling)
    batch = texts(model)
    policy = MaxProb(0.9)
    expected = model(**batch, exit_policy=policy)
    torch.compiler.reset()
    model.compile(backend="eager", fullgraph=True)
    output = model(**batch, exit_policy=policy)
    assert output.exit_layer.equal(expected.exit_layer)
    assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)


@each_kind
@mark.parametrize("exit_pooling", ["mean", "cls"])
@torch.no_grad()
def test_exported_it_answers_the_same(kind, exit_pooling, make, texts, tmp_path):
    model, _ = make(kind, exit_pooling=exit_pooling)
    batch = texts(model)
    if family(kind) in NO_EXPORT:
        with raises(ValueError, match="cannot be exported"):
            export_onnx(model, tmp_path / "onnx")
        return
    runtime = GamlOrtModelForSequenceClassification.from_pretrained(export_onnx(model, tmp_path / "fp32"))
    for policy in (Budgeted(4), Budgeted(2), MaxProb(0.8)):
        expected, output = model(**batch, exit_policy=policy), runtime(**batch, exit_policy=policy)
        assert output.exit_layer.equal(expected.exit_layer)
        assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-3)
    rounded = copy.deepcopy(model)
    for layer in dict.fromkeys(rounded.encoder_layers):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):  # as the export does: one scale for each row of a matrix
                scale = module.weight.abs().amax(dim=1, keepdim=True) / 127
                module.weight.copy_((module.weight / scale).round() * scale)
    runtime = GamlOrtModelForSequenceClassification.from_pretrained(
        export_onnx(model, tmp_path / "int8", precision="int8")
    )
    expected = rounded(**batch, exit_policy=Budgeted(4)).logits
    output = runtime(**batch, exit_policy=Budgeted(4)).logits
    # What is left is the rounding of activations.
    assert (output - expected).abs().max() < 0.3 * expected.std()
    if model.config.shares_layers:
        layers = {path.name for path in (tmp_path / "fp32").glob("layer_*.onnx")}
        assert len(layers) == model.config.num_hidden_groups


class Rows(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, row):
        return {key: values[row] for key, values in self.batch.items()}


def gradients(model, loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@each_kind
@mark.parametrize("granularity", ["global", "layer"])
def test_a_step_is_the_reference(kind, granularity, make, texts, tmp_path):
    """One step of SGD with GA-soft, against Eqs. 4-6 in plain loops on the gradients of the two losses."""
    dropouts = {"classifier_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dropouts |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "classifier_dropout_prob": 0.0}
    fields = {
        "ga_mode": "soft",
        "ga_granularity": granularity,
        "alpha": 0.4,
        "exit_learning_rate_multiplier": 1,
        "kd_reduction": "sum",
    }
    known = {field.name for field in dataclasses.fields(classes_of(family(kind))[0])}
    fields |= {name: value for name, value in dropouts.items() if name in known}
    model, _ = make(kind, exit_warm_start=False, **fields)
    with torch.no_grad():  # gradients of one size, for the trainer's is not in float64
        for parameter in model.exit_classifiers.parameters():
            parameter.mul_(0.1)
    batch = texts(model) | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    reference = copy.deepcopy(model).double().train()
    names = [name for name, _ in reference.named_parameters()]
    parameters = list(reference.parameters())
    output = reference(**batch)
    g_ce, g_kd = (gradients(reference, loss, parameters) for loss in (output.ce_loss, output.kd_loss))
    groups = parameter_groups(names, granularity)
    if granularity == "layer":
        layers = {group for group, name in zip(groups, names, strict=True) if "layer" in name and "exit" not in name}
        assert len(layers) >= len(set(model.config.layer_of_depth))
    g_ga, _, _ = alignment_reference(
        [g.flatten().tolist() for g in g_ce], [g.flatten().tolist() for g in g_kd], groups, 0.4, "soft", 1e-4
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=5,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    GamlTrainer(model, arguments, train_dataset=Rows(batch)).train()
    for name, parameter, expected in zip(names, model.parameters(), g_ga, strict=True):
        step = (before[name] - parameter.detach()).flatten().double()
        scale = max(1e-3, float(torch.tensor(expected).abs().max()))
        assert_close(step / scale, torch.tensor(expected, dtype=torch.float64) / scale, rtol=0, atol=2e-4, msg=name)


@each_kind
def test_every_parameter_learns(kind, make, texts):
    model, _ = make(kind)
    model.train()
    batch = texts(model) | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    model(**batch).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused


@each_kind
def test_activation_checkpointing_gives_the_same_gradients(kind, make, texts):
    model, _ = make(kind)
    if family(kind) in NO_CHECKPOINTING:
        assert not model.supports_gradient_checkpointing
        return
    batch = texts(model) | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    found = []
    for checkpoints in (False, True):
        copied = copy.deepcopy(model).train()
        if checkpoints:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # of Transformers
            getattr(copied, new if hasattr(copied, new) else old)({"use_reentrant": False})
        torch.manual_seed(5)
        copied(**batch).loss.backward()
        found.append([p.grad for p in copied.parameters()])
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@each_kind
@torch.no_grad()
def test_hidden_states_are_those_of_the_stock_encoder(kind, make, texts):
    model, plain = make(kind)
    batch = texts(model)
    states = model(**batch, output_hidden_states=True).hidden_states
    expected = plain(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 5
    last = 4 if family(kind) == "modernbert" else 5  # whose last one is normalized upstream, and the others are not
    assert_close(states[:last], tuple(expected)[-5:][:last], rtol=1e-5, atol=1e-5)


@each_kind
def test_what_is_computed_is_counted(kind, make):
    """Of 4 layers and 4 exits, all of a size: `(4L + E) / (mL + mE)` where a row leaves at layer m."""
    model, _ = make(kind)  # with gradients, as after a training
    first = flops_speed_up(model, [1], [7])
    exit_of_layer = (4 - first) / (first - 1)  # E / L
    assert 0 < exit_of_layer < 1
    for m in (2, 3, 4):
        assert flops_speed_up(model, [m], [7]) == approx((4 + exit_of_layer) / (m + m * exit_of_layer), rel=1e-12)
    assert flops_speed_up(model, [4], [7], one_exit=True) == approx(1, rel=1e-12)


@each_kind
def test_what_the_encoder_cannot_read_is_refused(kind, make):
    model, _ = make(kind)
    longest = model.config.max_input_length
    ids = torch.full((1, longest), 5)
    assert model(ids).logits.isfinite().all()
    with raises(ValueError, match=f"must be at most {longest} tokens long"):
        model(torch.full((1, longest + 1), 5))
    types = model.config.num_token_types
    model(ids, token_type_ids=torch.full_like(ids, types - 1))
    with raises(ValueError, match=f"`token_type_ids` must lie between 0 and {types - 1}"):
        model(ids, token_type_ids=torch.full_like(ids, types))
    with raises(ValueError, match="where its text begins"):
        model(ids, attention_mask=torch.arange(longest)[None] > 0)


@each_kind
def test_new_tokens_get_embeddings(kind, make, texts):
    model, _ = make(kind)
    batch = texts(model)
    expected = model(**batch).logits
    model.resize_token_embeddings(len(WORDS) + 3)
    assert model.config.vocab_size == len(WORDS) + 3
    assert_close(model(**batch).logits, expected)


def test_a_family_that_is_not_here(tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    for load in (GamlAutoConfig, GamlAutoModelForSequenceClassification):
        with raises(ValueError, match=r"type albert, bert, camembert, .*xlm-roberta. .* holds a model of type `gpt2`"):
            load.from_pretrained(tmp_path)
    with raises(ValueError, match="must be a configuration with exits. Got BertConfig"):
        GamlAutoModelForSequenceClassification.from_config(BertConfig())
    (tmp_path / "config.json").unlink()
    with raises(OSError, match=r"has no `config.json`|does not appear to have a file named config.json"):
        GamlAutoConfig.from_pretrained(tmp_path)


@mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("distilbert", {"exit_pooler": "shared"}, "the encoder has no pooler to share"),
        ("albert", {"inner_group_num": 2}, "`inner_group_num` must be 1"),
        ("deberta-v2", {"relative_attention": False}, "needs `relative_attention=True`"),
        ("distilbert", {"n_layers": 3, "exit_layers": [1, 4]}, "between 1 and 3"),
        ("distilbert", {"num_hidden_layers": 3, "exit_layers": [1, 4]}, "between 1 and 3"),
    ],
    ids=str,
)
def test_what_a_family_cannot_do(kind, fields, message, tmp_path):
    plain_config(kind).save_pretrained(tmp_path)
    with raises(Exception, match=message):
        GamlAutoConfig.from_pretrained(tmp_path, **fields)


def test_the_convolution_of_deberta_xlarge_is_refused(tmp_path):
    config = plain_config("deberta-v2")
    config.conv_kernel_size = 3  # no field of the class
    config.save_pretrained(tmp_path)
    with raises(Exception, match=r"no convolution .* `conv_kernel_size=3`"):
        GamlAutoConfig.from_pretrained(tmp_path)


def test_albert_is_cut_where_its_groups_stay_of_one_size(make):
    config = GamlAutoConfig.for_model("albert", **SIZES["albert"] | {"num_hidden_layers": 6, "num_hidden_groups": 2})
    assert config.layer_of_depth == [1, 1, 1, 4, 4, 4]
    model = GamlAutoModelForSequenceClassification.from_config(config)
    assert model.truncate(2).config.num_hidden_groups == 1
    with raises(ValueError, match="2 groups cannot be cut to 4 layers"):
        model.truncate(4)


def test_a_stock_trainer_trains_any(make, texts, tmp_path):
    model, _ = make("mpnet")
    batch = texts(model) | {"labels": torch.tensor([0, 1, 1, 0, 1])}
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    before = copy.deepcopy(model.state_dict())
    Trainer(model, arguments, train_dataset=Rows(batch)).train()
    assert any(not before[key].equal(value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_the_embeddings_of_a_real_mpnet(mpnet_folder, glue_folder):
    """200 sentences of SST-2: what the last exit reads, packed and in batches, is the stock sentence embedding."""
    sentences = Table.from_parquet(str(glue_folder / "sst2" / "validation.parquet"))["sentence"][:200]
    tokenizer = AutoTokenizer.from_pretrained(mpnet_folder)
    plain = AutoModel.from_pretrained(mpnet_folder).eval()
    size = plain.config.hidden_size
    model = GamlAutoModelForSequenceClassification.from_pretrained(mpnet_folder, exit_layers=[12], num_labels=size)
    model.eval().exit_classifiers["12"].weight.copy_(torch.eye(size))
    model.exit_classifiers["12"].bias.zero_()
    for start in range(0, 200, 50):
        batch = tokenizer(list(sentences[start : start + 50]), padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        expected = (plain(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        found = model(**batch, exit_policy=Budgeted(12)).logits
        expected, found = (torch.nn.functional.normalize(x) for x in (expected, found))
        assert_close(found, expected, rtol=0, atol=1e-5)
