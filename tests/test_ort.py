"""The CPU runtime: PyTorch's logits and exits in fp32, near them in int8, and the habits of a model class."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import torch
from pytest import fixture, mark, raises, skip
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline
from gaml_hf.hub.folders import SEAL
from gaml_hf.models.engine_gaml import PrepackedLinear
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience
from gaml_hf.models.modeling_gaml_resnet import GamlResNetConfig, GamlResNetForImageClassification
from gaml_hf.models.modeling_gaml_roberta import GamlRobertaConfig, GamlRobertaForSequenceClassification
from gaml_hf.runtime import ort
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification, export_onnx
from gaml_hf.runtime.scoring import ClassifierLoader


POLICIES = [FullDepth(), Budgeted(1), Budgeted(2), Patience(1), Entropy(0.6), MaxProb(0.8)]
TEXTS = ["a good film", "so sad", "the story is not dull but very funny and never so bad", "an awful plot", "fine"]


def make_model(bert_kwargs, **changes) -> GamlBertForSequenceClassification:
    """Weights large enough that rows differ in class and in exit."""
    torch.manual_seed(0)
    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs | {"num_labels": 3} | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight *= 30 if name.startswith("exit_class") else 6
            elif name.endswith("bias"):
                weight += 0.1 * torch.randn_like(weight)
    return model


def load(model, folder, precision="fp32", **changes) -> GamlOrtModelForSequenceClassification:
    return GamlOrtModelForSequenceClassification.from_pretrained(
        export_onnx(model, folder / precision, precision=precision), **changes
    )


def make_batch(config, rows=6, length=11):
    lengths = torch.arange(rows) * (length - 3) // max(rows - 1, 1) + 3
    attention_mask = (torch.arange(length + 2) < lengths[:, None]).long()  # two columns are padding in every row
    shape = attention_mask.shape
    return {
        "input_ids": torch.randint(config.vocab_size, shape),
        "attention_mask": attention_mask,
        "token_type_ids": torch.randint(config.type_vocab_size, shape),
    }


def assert_same(ours, theirs):
    assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)
    assert_close(ours.exit_layer, theirs.exit_layer)


@fixture
def model(bert_kwargs):
    return make_model(bert_kwargs, exit_pooling="cls")


@mark.parametrize(
    "changes",
    [
        {},
        {"exit_layers": [2, 4]},
        {"exit_layers": [4]},
        {"exit_pooler": "shared"},
        {"exit_pooler": "per_exit", "exit_layers": [1, 3, 4]},
        {"exit_norm": "layer"},
        PAPER_LETTER,
        PAPER_LETTER | {"exit_pooler": "per_exit", "exit_norm": "layer"},
        {"exit_temperatures": [0.5, 2.0, 1.0, 3.0]},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-3, "num_labels": 2},
    ],
    ids=str,
)
def test_fp32_answers_and_exits_are_pytorchs(bert_kwargs, tmp_path, changes):
    model = make_model(bert_kwargs, **changes)
    runtime = load(model, tmp_path)
    batch = make_batch(model.config)
    left = set()
    for policy in POLICIES[: 2 if model.config.num_exits == 1 else None]:
        with torch.no_grad():
            theirs = model(**batch, exit_policy=policy)
            all_exits = model(**batch, exit_policy=policy, output_exit_logits=True)
        ours = runtime(**batch, exit_policy=policy)
        assert_same(ours, theirs)
        assert type(ours) is type(theirs)
        left |= set(ours.exit_layer.tolist())
        ours = runtime(**batch, exit_policy=policy, output_exit_logits=True)
        assert_same(ours, theirs)
        assert_close(ours.exit_logits, all_exits.exit_logits, atol=2e-4, rtol=1e-4)
    assert len(left) > 1 or model.config.num_exits == 1


@mark.parametrize(("pooling", "threshold"), [("cls", 0.6), ("mean", 0.2)])
def test_the_answer_of_a_row_in_a_batch_is_that_of_the_row_alone(pooling, threshold, bert_kwargs, tmp_path):
    model = make_model(bert_kwargs, exit_pooling=pooling)
    batch = make_batch(model.config)
    for precision in ("fp32", "int8"):
        runtime = load(model, tmp_path, precision)
        together = runtime(**batch, exit_policy=Entropy(threshold))
        assert len(set(together.exit_layer.tolist())) > 1
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            policy = Entropy(threshold)
            alone = runtime(**{k: v[row : row + 1, :length] for k, v in batch.items()}, exit_policy=policy)
            assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
            assert together.exit_layer[row] == alone.exit_layer[0]


def test_mask_and_token_types_may_be_left_out_and_the_config_decides(model, tmp_path):
    model.config.exit_strategy, model.config.patience = "patience", 1
    runtime = load(model, tmp_path)
    input_ids = torch.randint(model.config.vocab_size, (3, 7))
    with torch.no_grad():
        assert_same(runtime(input_ids), model(input_ids))
    assert isinstance(runtime(input_ids, return_dict=False), tuple)
    other = GamlOrtModelForSequenceClassification.from_pretrained(
        runtime.folder, exit_strategy="budgeted", budgeted_exit=3
    )
    assert other(input_ids).exit_layer.tolist() == [3, 3, 3]


def quantize_dequantize(weight):
    """8 bits for each row of a matrix, as a loop over rows."""
    rows = []
    for row in weight:
        scale = row.abs().max() / 127
        rows.append((row / scale).round() * scale if scale else row)
    return torch.stack(rows)


def test_int8_is_pytorch_with_rounded_weights(model, tmp_path):
    """Rounded weights are written out by hand; what remains is the rounding of activations, about 1 in 255."""
    runtime = load(model, tmp_path, "int8")
    batch = make_batch(model.config)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(quantize_dequantize(module.weight))
        theirs = model(**batch, output_exit_logits=True).exit_logits
    ours = runtime(**batch, output_exit_logits=True).exit_logits
    difference = (ours - theirs).abs().mean() / theirs.abs().mean()
    assert 0 < difference < 0.1
    assert runtime.precision == "int8"


@mark.parametrize("rows", [1, 5])
@mark.parametrize("weight_type", ["the one chosen", "uint8"])
def test_int8_products_are_those_of_whole_numbers(model, tmp_path, monkeypatch, weight_type, rows):
    """
    Bytes at the ends of their range, in the graphs and sessions of a model: 2 * 255 * 127 is more than 16 bits hold.

    `query` has its activations to itself and `key` shares them, which are two operators of ONNX Runtime.
    """
    if weight_type == "uint8":
        monkeypatch.setattr(ort, "exact_weight_type", lambda: "uint8")
    attention, projections = model.bert.encoder.layer[0].attention.self, ("query", "key", "value")
    signs = torch.ones(32, 32).copysign(torch.randn(32, 32) + torch.linspace(-3, 3, 32)[:, None])
    for name in projections:
        getattr(attention, name).weight.data = signs * torch.rand(32, 1)  # 127 or -127 times a scale for each row
    folder = export_onnx(model, tmp_path / "int8", precision="int8")
    segment = onnx.load(folder / "layer_1.onnx")
    for name in projections:
        segment.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(segment, folder / "layer_1.onnx")
    (folder / SEAL).unlink()
    runtime = GamlOrtModelForSequenceClassification.from_pretrained(folder)

    x = np.random.default_rng(0).integers(200, 256, (1, rows, 32))
    x[:, :, 5], x[:, :, 17] = 0, 255  # so that the bytes are these numbers themselves
    feeds = {"hidden_states": x.astype(np.float32), "attention_mask": np.ones((1, rows), dtype=np.int32)}
    found = runtime._segments["layer_1"].run(list(projections), feeds | {"num_queries": np.array([rows])})
    for name, product in zip(projections, found, strict=True):
        layer = getattr(attention, name)
        scale = layer.weight.detach().abs().amax(dim=1).double().numpy() / 127
        expected = (x @ (127 * signs.T.long().numpy())) * scale + layer.bias.detach().numpy()
        assert np.allclose(product, expected, rtol=1e-6, atol=1e-3), np.abs(product - expected).max()


LOADS_AND_ANSWERS = """
import sys, torch
from gaml_hf.runtime.ort import GamlOrtModelForSequenceClassification
runtime = GamlOrtModelForSequenceClassification.from_pretrained(sys.argv[1])
print(runtime.weight_type)
torch.save(runtime(**torch.load(sys.argv[2]), output_exit_logits=True).exit_logits, sys.argv[2])
"""


def test_one_export_answers_alike_on_a_processor_without_a_dot_product_of_bytes(model, tmp_path):
    """In a process that is told that there is AVX2 alone; `benchmarks/as_cpu.c` says how."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux" or os.uname().machine != "x86_64":
        skip("needs Linux on x86-64 and a C compiler")
    library = tmp_path / "as_cpu.so"
    source = Path(__file__).parents[1] / "benchmarks" / "as_cpu.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    runtime, batch = load(model, tmp_path, "int8"), make_batch(model.config)
    assert runtime.weight_type == ort.exact_weight_type()
    assert load(model, tmp_path).weight_type == "float32"
    torch.save(batch, tmp_path / "batch.pt")
    words = [sys.executable, "-c", LOADS_AND_ANSWERS, runtime.folder, tmp_path / "batch.pt"]
    environment = os.environ | {"AS_CPU": "avx2", "LD_PRELOAD": str(library)}
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    if "CPUID faulting" in run.stderr:
        skip("needs a processor with CPUID faulting")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "uint8\n"
    theirs = runtime(**batch, output_exit_logits=True).exit_logits
    assert_close(torch.load(tmp_path / "batch.pt"), theirs, atol=1e-4, rtol=1e-4)


def test_int8_is_refused_where_no_product_is_exact(model, tmp_path, monkeypatch):
    folder = export_onnx(model, tmp_path / "int8", precision="int8")
    asked = []
    monkeypatch.setattr(ort, "_is_exact", asked.append)
    ort.exact_weight_type.cache_clear()
    with raises(RuntimeError, match="does not multiply 8-bit integers exactly on this processor"):
        GamlOrtModelForSequenceClassification.from_pretrained(folder)
    assert asked == ["int8", "uint8"]
    assert load(model, tmp_path).precision == "fp32"


def test_int8_weights_are_a_quarter_and_exits_stay_fp32(model, tmp_path):
    for precision, weight_type in (("fp32", onnx.TensorProto.FLOAT), ("int8", onnx.TensorProto.INT8)):
        folder = export_onnx(model, tmp_path / precision, precision=precision)
        graph = onnx.load(folder / "layer_2.onnx").graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        matrices = [name for name, _ in types.items() if name.endswith(".weight") and "norm" not in name]
        assert sorted(matrices) == [
            "attended.product.weight",
            "exit.weight",
            "inner.weight",
            "key.weight",
            "output.product.weight",
            "query.weight",
            "value.weight",
        ]
        assert all(types[name] == weight_type for name in matrices if name != "exit.weight")
        assert types["exit.weight"] == onnx.TensorProto.FLOAT


@mark.parametrize(("pooling", "queries"), [("cls", 1), ("mean", 7)])
def test_a_layer_behind_which_nobody_goes_on_runs_for_what_the_exit_reads(pooling, queries, bert_kwargs, tmp_path):
    model = make_model(bert_kwargs, exit_pooling=pooling)
    runtime = load(model, tmp_path)
    shapes = []
    run_layer = runtime._run_layer

    def spy(m, states, mask, is_last):
        answer = run_layer(m, states, mask, is_last)
        shapes.append((m, states[0].shape[1]))
        return answer

    runtime._run_layer = spy
    input_ids = torch.randint(model.config.vocab_size, (2, 7))
    runtime(input_ids, exit_policy=Budgeted(2))
    assert shapes == [(1, 7), (2, queries)]
    shapes.clear()
    runtime(input_ids, exit_policy=FullDepth())
    assert shapes == [(1, 7), (2, 7), (3, 7), (4, queries)]


def test_rows_that_left_and_their_padding_are_dropped(model, tmp_path):
    """The longest row is the first to leave: later layers see the others, no wider than they need."""

    class LongestLeaves(FullDepth):
        def should_exit(self, exit_logits):
            leave = torch.zeros(len(exit_logits), dtype=torch.bool)
            leave[-1] = True
            return leave

    runtime = load(model, tmp_path)
    shapes = []
    run_layer = runtime._run_layer
    runtime._run_layer = lambda m, h, mask, is_last: shapes.append(mask.shape) or run_layer(m, h, mask, is_last)
    lengths = torch.tensor([3, 5, 7, 9])
    mask = (torch.arange(12) < lengths[:, None]).long()
    output = runtime(torch.ones(4, 12, dtype=torch.long), mask, exit_policy=LongestLeaves())
    assert shapes == [(4, 9), (3, 7), (2, 5), (1, 3)]
    assert output.exit_layer.tolist() == [4, 3, 2, 1]


def test_nan_leaves_at_once(model, tmp_path):
    with torch.no_grad():
        model.exit_classifiers["1"].bias.fill_(float("nan"))
    runtime = load(model, tmp_path)
    assert runtime(torch.ones(2, 5, dtype=torch.long), exit_policy=Patience(3)).exit_layer.tolist() == [1, 1]


@mark.parametrize("precision", ["fp32", "int8"])
def test_the_pipeline_takes_it(model, tokenizer, tmp_path, precision):
    runtime = load(model, tmp_path, precision)
    classifier = GamlTextClassificationPipeline(model=runtime, tokenizer=tokenizer, device="cpu")
    answers = classifier(TEXTS, batch_size=3, patience=1)
    assert [answer["exit_layer"] for answer in answers] == [
        int(runtime(**tokenizer(text, return_tensors="pt"), exit_policy=Patience(1)).exit_layer) for text in TEXTS
    ]
    if precision == "fp32":
        torchs = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")(TEXTS, patience=1)
        for ours, theirs in zip(answers, torchs, strict=True):
            assert abs(ours.pop("score") - theirs.pop("score")) < 1e-4
            assert ours == theirs
    copy = pickle.loads(pickle.dumps(classifier))
    assert [answer["exit_layer"] for answer in copy(TEXTS, patience=1)] == [a["exit_layer"] for a in answers]
    assert len(pickle.dumps(runtime)) < 20_000


def test_threads_get_the_answers_of_one(model, tmp_path):
    runtime = load(model, tmp_path)
    batches = [make_batch(model.config, rows, 12) for rows in (1, 2, 3, 4) * 4]
    alone = [runtime(**batch, exit_policy=Entropy(0.6)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(
            alone, pool.map(lambda batch: runtime(**batch, exit_policy=Entropy(0.6)), batches), strict=True
        ):
            assert_close(one.logits, other.logits, atol=0, rtol=0)
            assert_close(one.exit_layer, other.exit_layer)


def test_save_and_load_again_with_the_policy_and_the_tokenizer(model, tokenizer, tmp_path):
    export_onnx(model, tmp_path / "a", tokenizer=tokenizer)
    runtime = GamlOrtModelForSequenceClassification.from_pretrained(tmp_path / "a")
    runtime.config.exit_strategy, runtime.config.patience = "patience", 2
    runtime.save_pretrained(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    again = GamlOrtModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert (again.config.exit_strategy, again.config.patience, again.config.num_labels) == ("patience", 2, 3)
    batch = make_batch(model.config)
    assert_close(again(**batch).logits, runtime(**batch).logits, atol=0, rtol=0)
    assert (tmp_path / "b" / "tokenizer_config.json").is_file()
    with raises(ValueError, match="must be new"):
        again.save_pretrained(tmp_path / "b")


def test_what_cannot_be_exported(model, bert_kwargs, tmp_path):
    images = GamlResNetForImageClassification(GamlResNetConfig.cifar(8))
    with raises(ValueError, match="GamlResNetForImageClassification cannot be exported"):
        export_onnx(images, tmp_path / "export")
    with raises(ValueError, match="`model` must be a model with exits. Got a BertModel"):
        export_onnx(BertModel(BertConfig(**bert_kwargs)), tmp_path / "export")
    model.encoder_layers[0].output.dense = PrepackedLinear(model.encoder_layers[0].output.dense)
    with raises(ValueError, match=r"are prepacked for PyTorch. Export it before `prepack\(\)`"):
        export_onnx(model.eval(), tmp_path / "export")


def test_places_do_not_count_padding_tokens_of_a_text(bert_kwargs, tmp_path):
    """RoBERTa's places, which a text that says <pad> changes, as does padding without a mask."""
    torch.manual_seed(0)
    config = GamlRobertaConfig(**bert_kwargs | {"num_labels": 3, "initializer_range": 0.3}, pad_token_id=1)
    model = GamlRobertaForSequenceClassification(config).eval()
    input_ids = torch.tensor([[2, 9, 1, 1, 11, 3], [2, 9, 10, 3, 1, 1]])
    with torch.no_grad():
        assert_same(load(model, tmp_path)(input_ids), model(input_ids))
        moved = model(torch.tensor([[2, 9, 10, 10, 11, 3]])).logits - model(input_ids[:1]).logits
    assert moved.abs().max() > 0.01


def test_a_config_edited_into_another_model_is_refused(model, tmp_path):
    export = export_onnx(model, tmp_path / "export")
    text = (export / "config.json").read_text()
    for name, value in {"exit_layers": [2, 4], "exit_norm": "layer", "exit_pooling": "mean"}.items():
        (export / "config.json").write_text(json.dumps(json.loads(text) | {name: value}))
        with raises(ValueError, match=f"`{name}` of the config in .* must be that of the export"):
            GamlOrtModelForSequenceClassification.from_pretrained(export)
    (export / "config.json").write_text(text)
    with raises(ValueError, match="`num_labels` of the config in .* must be that of the export, 3. Got 2"):
        GamlOrtModelForSequenceClassification.from_pretrained(export, id2label={0: "a", 1: "b"})


@mark.parametrize("token", [1, 2, -1, 0.5])
def test_a_mask_is_of_what_is_not_0(bert_kwargs, tmp_path, token):
    model = make_model(bert_kwargs)
    batch = make_batch(model.config)
    batch["attention_mask"] = batch["attention_mask"] * token
    with torch.no_grad():
        assert_same(load(model, tmp_path)(**batch), model(**batch))


def test_int8_answers_as_its_exit_logits_say(model, tmp_path):
    """Where exits read [CLS] too: computed for it alone, a layer would have another scale of activations."""
    runtime, batch = load(model, tmp_path, "int8"), make_batch(model.config)
    for policy in (Budgeted(2), Entropy(0.6), FullDepth()):
        every = runtime(**batch, exit_policy=policy, output_exit_logits=True)
        live = runtime(**batch, exit_policy=policy)
        assert live.logits.equal(every.logits)
        assert live.exit_layer.equal(every.exit_layer)


def test_a_pipeline_saves_it(model, tokenizer, tmp_path):
    export = export_onnx(model, tmp_path / "export")
    runtime = GamlOrtModelForSequenceClassification.from_pretrained(export)
    classifier = GamlTextClassificationPipeline(model=runtime, tokenizer=tokenizer, device="cpu")
    classifier.save_pretrained(tmp_path / "saved")
    again = ClassifierLoader(str(tmp_path / "saved"), True, "cpu", 1)()
    assert again(TEXTS) == classifier(TEXTS)
    with raises(ValueError, match="`model` must be an export with its tokenizer. Got .*export.* without"):
        ClassifierLoader(str(export), True, "cpu", 1)()


def test_an_export_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(onnx, "save", full)
    with raises(OSError, match="disk full"):
        export_onnx(model, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_half_precision_is_of_its_rounded_weights(model, tmp_path):
    model = model.to(torch.bfloat16)
    runtime = load(model, tmp_path)
    batch = make_batch(model.config)
    with torch.no_grad():
        assert_same(runtime(**batch, exit_policy=Budgeted(2)), model.float()(**batch, exit_policy=Budgeted(2)))


def test_errors_name_what_is_wrong(model, bert_kwargs, tmp_path):
    export = export_onnx(model, tmp_path / "export")
    cls = GamlOrtModelForSequenceClassification
    with raises(ValueError, match="`precision` must be 'fp32' or 'int8'. Got `precision='int4'`"):
        export_onnx(model, tmp_path / "x", precision="int4")
    with raises(ValueError, match="must be new"):
        export_onnx(model, export)
    with raises(ValueError, match="`hidden_act` of the model must be one of .* Got 'silu'"):
        export_onnx(make_model(bert_kwargs, hidden_act="silu"), tmp_path / "x")
    with raises(ValueError, match="must be a folder written by `gaml_hf.runtime.ort.export_onnx`"):
        cls.from_pretrained(tmp_path)
    with raises(ValueError, match="`exit_layers` is not among what an export can change"):
        cls.from_pretrained(export, exit_layers=[4])
    with raises(ValueError, match="`num_threads` must be a whole number of at least 1. Got `num_threads=0`"):
        cls.from_pretrained(export, num_threads=0)
    runtime = cls.from_pretrained(export)
    with raises(ValueError, match='give the pipeline `device="cpu"`. Got `cuda`'):
        runtime.to("cuda")
    with raises(ValueError, match="`input_ids` must lie between 0 and"):
        runtime(torch.tensor([[2, model.config.vocab_size]]))
    with raises(ValueError, match="at most 64 tokens long"):
        runtime(torch.ones(1, 65, dtype=torch.long))
    with raises(ValueError, match="Row 0 starts with padding"):
        runtime(torch.ones(1, 2, dtype=torch.long), torch.tensor([[0, 1]]))
    (export / "layer_3.onnx").unlink()
    with raises(ValueError, match="`layer_3.onnx` is missing"):
        cls.from_pretrained(export)


def test_several_threads_in_a_layer_change_nothing(model, tmp_path):
    batch = make_batch(model.config)
    one, two = load(model, tmp_path / "1", num_threads=1), load(model, tmp_path / "2", num_threads=2)
    assert np.allclose(one(**batch).logits, two(**batch).logits, atol=1e-5)
