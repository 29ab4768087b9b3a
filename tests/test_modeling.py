"""
The model: stock BERT is the yardstick for what it computes, one row at a time for whom it lets leave.

The exit policies themselves are tested in test_exiting.py, the losses in test_losses.py.
"""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from warnings import catch_warnings

import torch
from huggingface_hub.errors import StrictDataclassError
from onnxruntime import InferenceSession
from peft import LoraConfig
from pytest import approx, fixture, mark, raises
from safetensors.torch import load_file, save_file
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    TextClassificationPipeline,
)
from transformers.utils import find_labels, logging

from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience
from gaml_hf.runtime.ort import export_onnx
from reference import ce_loss_reference, kd_loss_reference


POLICIES = {
    "none": {"exit_strategy": "none"},
    "budgeted": {"exit_strategy": "budgeted", "budgeted_exit": 2},
    "patience": {"exit_strategy": "patience", "patience": 1},
    "entropy": {"exit_strategy": "entropy", "exit_threshold": 0.4},
    "max_prob": {"exit_strategy": "max_prob", "exit_threshold": 0.8},
}
each_policy = mark.parametrize("policy", POLICIES)
EXITS = {
    "paper": PAPER_LETTER,
    "mean": {"exit_pooling": "mean"},
    "mean, layer": {"exit_pooling": "mean", "exit_norm": "layer"},
}
each_exit = mark.parametrize("exits", EXITS)
each_attention = mark.parametrize("attention", ["eager", "sdpa"])


@fixture
def make(bert_kwargs):
    """`make(**fields)`: a tiny model whose exits disagree and are sure of themselves now and then."""

    def make(**changes):
        torch.manual_seed(0)
        config = GamlBertConfig(**bert_kwargs | {"num_labels": 3, "initializer_range": 0.3} | changes)
        return GamlBertForSequenceClassification(config).eval()

    return make


@fixture
def batch():
    """16 rows of 3 to 12 tokens, padded on the right."""
    lengths = torch.randint(3, 13, (16,))
    lengths[5] = 12
    attention_mask = (torch.arange(12) < lengths[:, None]).long()
    input_ids = torch.randint(5, 30, (16, 12)) * attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": torch.randint(2, (16, 12)) * attention_mask,
    }


def rows_of(batch, rows):
    return {name: values[rows] for name, values in batch.items()}


def alone(batch, row):
    """One row without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, :length] for name, values in batch.items()}


def stock_hidden_states(model, inputs):
    """Of transformers' own BERT with the same weights: embeddings and each layer."""
    config = {name: value for name, value in model.config.to_dict().items() if name in BertConfig().to_dict()}
    config = BertConfig(**config | {"model_type": "bert", "attn_implementation": model.config._attn_implementation})
    bert = BertModel(config, add_pooling_layer=model.bert.pooler is not None).to(model.dtype).eval()
    bert.load_state_dict(model.bert.state_dict())
    return bert(**inputs, output_hidden_states=True).hidden_states


def assert_same(output, expected, rows=slice(None)):
    """The same answers, and the same exits, for the same rows."""
    assert_close(output.logits, expected.logits[rows], rtol=1e-5, atol=1e-5)
    assert output.exit_layer.equal(expected.exit_layer[rows])


# ------------------------------------------------------------------------------------------------ where it starts from


@mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@mark.parametrize("stock", [BertModel, BertForSequenceClassification, BertForMaskedLM, BertForPreTraining])
def test_it_starts_from_any_bert(stock, dtype, bert_kwargs, tmp_path, batch):
    bert = stock(BertConfig(**bert_kwargs)).to(dtype).eval()
    bert.save_pretrained(tmp_path)
    model, info = GamlBertForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    encoder = getattr(bert, "bert", bert).state_dict()
    assert model.bert.state_dict().keys() == {name for name in encoder if not name.startswith("pooler.")}
    for name, weight in model.bert.state_dict().items():
        assert weight.dtype == dtype
        assert weight.equal(encoder[name]), name
    assert set(info["missing_keys"]) == {f"exit_classifiers.{m}.{x}" for m in range(1, 5) for x in ("weight", "bias")}
    assert not info["unexpected_keys"]
    assert not model.training
    assert model(**batch).logits.dtype == dtype
    assert model.config.model_type == "gaml_bert"


def test_a_shared_pooler_is_berts_own(bert_kwargs, tmp_path):
    bert = BertForSequenceClassification(BertConfig(**bert_kwargs))
    bert.save_pretrained(tmp_path)
    model = GamlBertForSequenceClassification.from_pretrained(tmp_path, exit_pooler="shared")
    assert model.bert.pooler.dense.weight.equal(bert.bert.pooler.dense.weight)


@each_exit
@mark.parametrize(
    ("attention", "exit_pooler"), [("eager", "none"), ("sdpa", "none"), ("sdpa", "shared"), ("sdpa", "per_exit")]
)
def test_exits_on_stock_hidden_states(attention, exit_pooler, exits, make, batch):
    """A 4.x loop over 5.x layers takes `layer_outputs[0]`: the first row, not the hidden states."""
    model = make(attn_implementation=attention, exit_pooler=exit_pooler, **EXITS[exits])
    output = model(**batch, output_exit_logits=True, output_hidden_states=True)
    expected = stock_hidden_states(model, batch)
    assert len(output.hidden_states) == len(expected) == 5
    for ours, stock in zip(output.hidden_states, expected, strict=True):
        assert_close(ours, stock, rtol=0, atol=0)
    assert output.exit_logits.shape == (16, 4, 3)
    for m in range(1, 5):
        rows = zip(expected[m], batch["attention_mask"].sum(dim=1).tolist(), strict=True)
        state = torch.stack([row[0] if exits == "paper" else sum(row[:length]) / length for row, length in rows])
        if exit_pooler != "none":
            pooler = model.bert.pooler if exit_pooler == "shared" else model.exit_poolers[str(m)]
            state = torch.tanh(F.linear(state, pooler.dense.weight, pooler.dense.bias))
        if exits == "mean, layer":
            state = (state - state.mean(dim=1, keepdim=True)) / state.std(dim=1, keepdim=True, correction=0)
        classifier = model.exit_classifiers[str(m)]
        assert_close(
            output.exit_logits[:, m - 1], F.linear(state, classifier.weight, classifier.bias), rtol=1e-4, atol=1e-4
        )


def test_attentions_are_stock(make, batch):
    model = make(attn_implementation="eager", **POLICIES["entropy"])
    attentions = model(**batch, output_attentions=True).attentions
    model.config.output_attentions = True  # as good as the argument, and as complete
    assert [x.shape for x in model(**batch).attentions] == [x.shape for x in attentions] == [(16, 2, 12, 12)] * 4
    assert_close(attentions[0].sum(dim=-1), torch.ones(16, 2, 12))


# ----------------------------------------------------------------------------------------------------- dynamic exiting


@each_exit
@each_policy
@mark.parametrize(("attention", "exit_layers"), [("eager", None), ("sdpa", None), ("sdpa", [1, 2, 4])])
def test_live_is_replay_is_one_row_alone(attention, policy, exits, exit_layers, make, batch):
    """Where a batch waits for its slowest row, or answers with the first row's exit, these three differ."""
    model = make(attn_implementation=attention, exit_layers=exit_layers, **POLICIES[policy] | EXITS[exits])
    live, replayed = model(**batch), model(**batch, output_exit_logits=True)
    assert live.exit_logits is None
    assert_same(live, replayed)
    position = [model.config.exit_layers.index(m) for m in live.exit_layer]
    assert_close(live.logits, replayed.exit_logits[range(16), position], rtol=1e-5, atol=1e-5)
    if policy not in ("none", "budgeted"):
        assert len(set(live.exit_layer.tolist())) > 1  # or the test would show nothing
    for row in range(16):
        assert_same(model(**alone(batch, row)), live, [row])
        assert_same(model(**alone(batch, row), output_exit_logits=True), live, [row])


@each_exit
@each_policy
def test_a_row_knows_no_neighbours(policy, exits, make, batch):
    model = make(**POLICIES[policy] | EXITS[exits])
    expected = model(**batch)
    order = torch.randperm(16)
    assert_same(model(**rows_of(batch, order)), expected, order)
    assert_same(model(**rows_of(batch, [3, 3, 8, 3])), expected, [3, 3, 8, 3])
    assert_same(model(**rows_of(batch, slice(4, 9))), expected, slice(4, 9))
    assert_same(model(**{name: F.pad(values, (0, 9)) for name, values in batch.items()}), expected)
    assert_same(model(**batch | {"attention_mask": batch["attention_mask"].bool()}), expected)
    embeds = {"inputs_embeds": model.bert.embeddings.word_embeddings(batch["input_ids"])}
    assert_same(model(**embeds, **{name: batch[name] for name in ("attention_mask", "token_type_ids")}), expected)


@mark.parametrize(("pooling", "first"), [("cls", True), ("cls", False), ("mean", True)])
def test_work_is_done_for_the_tokens_still_there_alone(pooling, first, make, batch):
    """Counted in tokens: no padding is ever multiplied; and where [CLS] goes first, a row that leaves stops there."""
    model = make(exit_pooling=pooling)
    reads_cls = pooling == "cls"
    policy = Patience(1)
    policy.may_exit = lambda history: torch.full(history.shape[:1], first)
    batch = {name: F.pad(values, (0, 9)) for name, values in batch.items()}
    keys, queries = [0] * 4, [0] * 4
    for position, layer in enumerate(model.bert.encoder.layer):

        def count(module, args, output, position=position):
            counted = keys if module is model.bert.encoder.layer[position].attention.self.key else queries
            counted[position] += args[0].shape[0]

        layer.attention.self.key.register_forward_hook(count)
        layer.intermediate.dense.register_forward_hook(count)
    exit_layer = model(**batch, exit_policy=policy).exit_layer
    lengths = batch["attention_mask"].sum(dim=1)
    tokens = [int(lengths[exit_layer >= m].sum()) for m in range(1, 5)]
    leaving = [int((lengths - 1)[exit_layer == m].sum()) for m in range(1, 5)]  # all but [CLS]
    assert keys == tokens
    assert queries == [
        n - less * (reads_cls and (first or m == 4)) for m, n, less in zip(range(1, 5), tokens, leaving, strict=True)
    ]
    assert tokens[0] > tokens[2] > tokens[3] > 0
    keys[:] = [0] * 4
    model(**batch, exit_policy=Budgeted(2))
    assert keys == [tokens[0], tokens[0], 0, 0]


def test_unsure_rows_get_the_last_answer(make, batch):
    """Not zeros, and not two classes."""
    model = make(exit_strategy="entropy", exit_threshold=0.0, num_labels=5, **PAPER_LETTER)
    output = model(**batch)
    assert output.exit_layer.tolist() == [4] * 16
    last = stock_hidden_states(model, batch)[4][:, 0]
    classifier = model.exit_classifiers["4"]
    assert_close(output.logits, F.linear(last, classifier.weight, classifier.bias), rtol=1e-5, atol=1e-5)
    assert output.logits.shape == (16, 5)


@mark.parametrize("size", [1000.0, 1e36])
def test_the_surest_rows_leave_first(make, batch, size):
    """Also with logits in the thousands; and where an exit's numbers are broken, every row leaves there with them."""
    model = make(**POLICIES["entropy"])
    with torch.no_grad():
        model.exit_classifiers["2"].bias.copy_(tensor([size, 0.0, -size]))
        model.exit_classifiers["1"].weight.zero_()  # never sure
    assert model(**batch).exit_layer.tolist() == [2] * 16
    with torch.no_grad():
        model.exit_classifiers["2"].bias.fill_(torch.nan)
    for options in ({}, {"output_exit_logits": True}):
        output = model(**batch, **options)
        assert output.exit_layer.tolist() == [2] * 16
        assert output.logits.isnan().all()


def test_the_policy_of_one_call(make, batch):
    model = make(**POLICIES["patience"])
    assert model(**batch, exit_policy=FullDepth()).exit_layer.tolist() == [4] * 16
    assert model(**batch, exit_policy=Budgeted(1), output_exit_logits=True).exit_layer.tolist() == [1] * 16
    assert model.config.exit_strategy == "patience"


def test_the_config_may_change_after_loading(make, batch):
    model = make()
    assert model(**batch).exit_layer.tolist() == [4] * 16
    model.config.exit_strategy = "patience"
    with raises(ValueError, match="`patience` must be a whole number of at least 1"):
        model(**batch)
    model.config.patience = 3
    assert_same(model(**batch), model(**batch, exit_policy=Patience(3)))
    model.config.exit_strategy, model.config.budgeted_exit = "budgeted", 1
    assert model(**batch).exit_layer.tolist() == [1] * 16


def test_threads_share_one_model(make, batch):
    """Counters kept on the module would make one thread's rows leave on another's account."""
    model = make()
    policies = [
        Patience(1),
        Patience(2),
        Entropy(0.4),
        Entropy(0.6),
        MaxProb(0.8),
        Budgeted(2),
        FullDepth(),
        Budgeted(3),
    ]
    expected = [model(**batch, exit_policy=policy) for policy in policies]

    def run(number):
        with torch.no_grad():
            return [model(**batch, exit_policy=policies[number]) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for outputs, want in zip(pool.map(run, range(8)), expected, strict=True):
            for output in outputs:
                assert_same(output, want)


def test_a_second_call_is_as_good_as_the_first_and_as_quiet(make, batch, capfd):
    model = make(**POLICIES["patience"])
    expected = model(**batch)
    model(**rows_of(batch, slice(7, 8)))
    assert_same(model(**batch), expected)
    assert capfd.readouterr() == ("", "")


@mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_live_is_replay_in_every_context(context, make, batch):
    model = make(**POLICIES["max_prob"])
    with context():
        live, replayed = model(**batch), model(**batch, output_exit_logits=True)
    assert_close(
        live.logits, replayed.logits, rtol=0.05, atol=0.05
    )  # same dtype, too; in bfloat16 a sum's order shows
    assert (live.exit_layer == replayed.exit_layer).float().mean() > 0.8


HOOKS = {
    "register_forward_hook": lambda seen: lambda layer, args, output: seen.append(output),
    "register_forward_pre_hook": lambda seen: lambda layer, args: seen.append(args[0]),
}


@mark.parametrize("register", HOOKS)
def test_a_hook_on_a_layer_fires_whatever_leaves(register, make, batch):
    """With the states of all rows, as in a stock BERT; and the answers are the same."""
    model, policy, seen = make(), Patience(1), []
    with torch.no_grad():
        expected = model(**batch, exit_policy=policy)
        states = model(**batch, output_hidden_states=True).hidden_states  # by hooks that stay, and do not count
        hooks = [getattr(layer, register)(HOOKS[register](seen)) for layer in model.bert.encoder.layer]
        watched = model(**batch, exit_policy=policy)
        for hook in hooks:
            hook.remove()
        again = model(**batch, exit_policy=policy)
    assert len(seen) == len(hooks)
    for state, expected_state in zip(
        seen, states[1:] if register == "register_forward_hook" else states, strict=False
    ):
        assert_close(state, expected_state)
    assert watched.exit_layer.equal(expected.exit_layer)
    assert_close(watched.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert again.exit_logits is None  # rows leave early again
    assert again.logits.equal(expected.logits)


def test_calibration_is_for_inference_alone(make, batch):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, plain = make(exit_temperatures=[2, 1.0, 0.5, 4.0], **no_dropout), make(**no_dropout)
    raw = plain(**batch, output_exit_logits=True).exit_logits
    expected = raw / tensor([2, 1.0, 0.5, 4.0])[:, None]
    assert_close(model(**batch, output_exit_logits=True).exit_logits, expected)
    assert_close(model(**batch, exit_policy=Budgeted(3)).logits, expected[:, 2])
    model.train().config.exit_temperatures = [2, 1.0, 0.5, 4.0]
    assert_close(model(**batch).exit_logits, plain.train()(**batch).exit_logits, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- training and output


@mark.parametrize("exit_layers", [[1, 2, 3, 4], [2, 4]])
def test_training_forward(exit_layers, make, batch):
    model = make(
        exit_layers=exit_layers, alpha=0.3, kd_temperature=2.0, kd_reduction="sum", **POLICIES["patience"]
    ).train()
    labels = torch.arange(16) % 3
    output = model(**batch, labels=labels)
    assert list(output.keys()) == ["loss", "logits", "exit_logits", "ce_loss", "kd_loss"]  # no exits without a policy
    assert output.exit_logits.shape == (16, len(exit_layers), 3)
    assert output.logits.equal(output.exit_logits[:, -1])
    ce = ce_loss_reference(output.exit_logits.tolist(), labels.tolist(), [m / sum(exit_layers) for m in exit_layers])
    exits = range(len(exit_layers))
    kd = kd_loss_reference(output.exit_logits.tolist(), [(i, j) for i in exits for j in exits if i != j], 2.0)
    losses = torch.stack([output.ce_loss, output.kd_loss, output.loss])
    assert_close(losses, tensor([ce, kd, 0.7 * ce + 0.3 * kd]), rtol=1e-4, atol=1e-5)  # Eqs. 1, 3, 2
    output.loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert list(model(**batch).keys()) == ["logits", "exit_logits"]


@mark.parametrize(
    ("changes", "weights", "pairs"),
    [
        ({"distillation": "last_to_all"}, [0.1, 0.2, 0.3, 0.4], [(3, 0), (3, 1), (3, 2)]),
        ({"distillation": [[1, 3]], "exit_loss_weights": "uniform"}, [0.25] * 4, [(0, 2)]),
        ({"distillation": "none", "exit_loss_weights": "last"}, [0, 0, 0, 1], []),
    ],
)
def test_losses_of_other_systems(changes, weights, pairs, make, batch):
    output = make(**changes)(**batch, labels=torch.arange(16) % 3)
    ce = ce_loss_reference(output.exit_logits.tolist(), [i % 3 for i in range(16)], weights)
    kd = kd_loss_reference(output.exit_logits.tolist(), pairs)
    kd = kd / max(1, len(pairs))  # `kd_reduction="mean"`
    total = 0.8 * ce + 0.2 * kd if pairs else ce  # without pairs alpha weighs nothing: PABEE's loss is Eq. 1
    losses = torch.stack([output.ce_loss, output.kd_loss, output.loss])
    assert_close(losses, tensor([ce, kd, total]), rtol=1e-4, atol=1e-5)


def test_class_weights_and_smoothing_are_of_every_exit(make, batch):
    labels, weights = torch.arange(16) % 3, [0.5, 4.0, 1.0]
    model = make(class_weights=weights).train()
    output = model(**batch, labels=labels, smoothing=0.2)
    expected = ce_loss_reference(output.exit_logits.tolist(), labels.tolist(), [0.1, 0.2, 0.3, 0.4], weights, 0.2)
    assert output.ce_loss.item() == approx(expected, rel=1e-5)
    kd = kd_loss_reference(output.exit_logits.tolist(), [(i, j) for i in range(4) for j in range(4) if i != j]) / 12
    assert output.kd_loss.item() == approx(kd, rel=1e-4, abs=1e-5)  # has neither
    # A Trainer takes each argument with "label" in its name for a column of labels, and would want both.
    assert find_labels(type(model)) == ["labels"]


def test_a_loss_of_the_last_exit_alone_is_told(make, batch, caplog):
    """What a stock Trainer does with `label_smoothing_factor` or `compute_loss_func`: it keeps the labels."""
    model = make().train()
    logging.warning_once.cache_clear()
    model(**batch, labels=torch.arange(16) % 3)
    model(**batch, output_exit_logits=True)
    model.eval()(**batch)
    assert "last exit alone" not in caplog.text
    model.train()(**batch)
    assert "trains the last exit alone" in caplog.text


def test_labels_in_evaluation(make, batch):
    """A Trainer's evaluation scores every exit, and the policy's answers, in one pass."""
    model = make(**POLICIES["patience"])
    output = model(**batch, labels=torch.arange(16) % 3)
    assert list(output.keys()) == ["loss", "logits", "exit_layer", "exit_logits", "ce_loss", "kd_loss"]
    assert_same(output, model(**batch))
    # What a Trainer keeps of it, unless it is asked for more.
    assert set(output.keys()) - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}


def test_forms_of_output(make, batch):
    model = make(**POLICIES["patience"])
    expected = model(**batch)
    logits, exit_layer = model(**batch, return_dict=False)
    assert logits.equal(expected.logits)
    assert exit_layer.equal(expected.exit_layer)
    assert exit_layer.dtype == torch.int64
    assert len(model(**batch, output_exit_logits=True, return_dict=False)) == 3
    model.config.output_hidden_states = True
    output = model(**batch)
    assert [len(states) for states in output.hidden_states] == [16] * 5  # every row's, though rows leave early
    assert_same(output, expected)
    assert model(**batch, output_hidden_states=False).exit_logits is None  # the argument wins over the config


def test_the_stock_pipeline_reads_it(make, tokenizer):
    """A model that returns a tuple fails here."""
    model = make(**POLICIES["patience"])
    texts = ["a good film .", "a bad , awful , sad story", "fine"]
    answers = TextClassificationPipeline(model=model, tokenizer=tokenizer, batch_size=2)(texts)
    expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(dim=-1)
    assert [answer["label"] for answer in answers] == [f"LABEL_{i}" for i in expected]


def test_training_compiles_in_one_graph(make, batch):
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    labels = torch.arange(16) % 3
    compiled = torch.compile(model, backend="eager", fullgraph=True)(**batch, labels=labels)
    assert_close(compiled.loss, model(**batch, labels=labels).loss)


class Answers(torch.nn.Module):
    """The model as a graph needs it: positional tensors in, a tuple out."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options
        self.eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        output = self.model(input_ids, attention_mask, token_type_ids, **self.options)
        return output.logits, output.exit_layer


def traced(model, example):
    return torch.jit.trace(model, example, check_trace=False)


def onnx_exported(model, example):
    names, file, free = ["input_ids", "attention_mask", "token_type_ids"], io.BytesIO(), {0: "rows", 1: "tokens"}
    axes = dict.fromkeys(names, free)
    torch.onnx.export(model, example, file, dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17)
    session = InferenceSession(file.getvalue())
    return lambda *inputs: map(
        torch.from_numpy, session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    )


def exported(model, example):
    example = tuple(x.expand(2, -1) for x in example)  # with one row, torch.export takes the number for a constant
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=64)}
    return torch.export.export(model, example, dynamic_shapes=(free,) * 3).module()


@mark.filterwarnings("ignore")  # tracing tells that it traces, and that it is deprecated
@mark.parametrize("to_graph", [traced, onnx_exported, exported])
@mark.parametrize(
    ("policy", "options"),
    [("none", {}), ("budgeted", {})]
    + [(x, {"output_exit_logits": True}) for x in ("budgeted", "patience", "entropy")],
)
def test_a_graph_answers_each_row_as_eager_does(to_graph, policy, options, make, batch):
    """From an example of one row without padding, for other numbers of rows and tokens."""
    model = Answers(make(num_hidden_layers=3, **POLICIES[policy]), **options)
    with torch.no_grad():
        graph = to_graph(model, tuple(alone(batch, 0).values()))
        for other in (batch, rows_of(batch, slice(3, 5)), alone(batch, 7)):
            (logits, exit_layer), (expected, expected_layer) = graph(*other.values()), model(*other.values())
            assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            assert exit_layer.equal(expected_layer)


def test_a_graph_has_no_decisions(make, batch):
    """Traced with its own exits, it would send other rows the example's way."""
    for policy, name in (("patience", "Patience"), ("max_prob", "MaxProb")):
        for to_graph in (traced, exported):
            with (
                catch_warnings(action="ignore"),
                raises(ValueError, match=f"{name} lets each row .* `output_exit_logits=True`"),
            ):
                to_graph(Answers(make(**POLICIES[policy])), tuple(alone(batch, 0).values()))


def test_gradient_checkpointing_is_exact(make, batch):
    def gradients(checkpointing):
        model, calls = make(), []
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)  # the same dropout
        model.train()(**batch, labels=torch.arange(16) % 3).loss.backward()
        return len(calls), [weight.grad for weight in model.parameters()]

    calls, expected = gradients(checkpointing=False)
    calls_again, actual = gradients(checkpointing=True)
    assert (calls, calls_again) == (1, 2)  # the forward was run again in the backward
    for grad, want in zip(actual, expected, strict=True):
        assert_close(grad, want, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- save and load


@mark.parametrize("auto", [GamlBertForSequenceClassification, AutoModel, AutoModelForSequenceClassification])
@mark.parametrize("policy", ["patience", "entropy"])
def test_save_and_load(auto, policy, make, batch, tmp_path):
    """PABEE's patience was an attribute of the model, 0 after loading; an Auto class dropped all its exits."""
    model = make(exit_layers=[1, 3, 4], exit_pooler="per_exit", exit_temperatures=[2.0, 1.0, 0.5], **POLICIES[policy])
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is GamlBertForSequenceClassification
    assert type(AutoConfig.from_pretrained(tmp_path)) is GamlBertConfig
    assert not loaded.training
    for key, weight in model.state_dict().items():
        assert loaded.state_dict()[key].equal(weight), key
    expected, output = model(**batch), loaded(**batch)
    assert output.logits.equal(expected.logits)
    assert output.exit_layer.equal(expected.exit_layer)
    overridden = auto.from_pretrained(tmp_path, exit_strategy="budgeted", budgeted_exit=3)
    assert overridden(**batch).exit_layer.tolist() == [3] * 16


def test_fewer_exits_than_were_trained(make, batch, tmp_path):
    """Each layer keeps its own classifier."""
    model = make()
    model.save_pretrained(tmp_path)
    loaded = GamlBertForSequenceClassification.from_pretrained(tmp_path, exit_layers=[2, 4])
    expected = model(**batch, output_exit_logits=True).exit_logits[:, [1, 3]]
    assert loaded(**batch, output_exit_logits=True).exit_logits.equal(expected)


def incomplete(folder, model, drop):
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if drop not in key}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@mark.parametrize("drop", ["exit_classifiers.2.weight", "exit_poolers.4.", "encoder.layer.2."])
@mark.parametrize("explicit_config", [False, True])
def test_missing_weights_are_an_error(drop, explicit_config, make, tmp_path):
    """Whoever loads it would get random answers, and no sign of it but a line in the log."""
    model = make(exit_pooler="per_exit")
    incomplete(tmp_path, model, drop)
    model.config.architectures = None
    config = {"config": model.config} if explicit_config else {}
    count = sum(drop in key for key in model.state_dict())
    with raises(
        ValueError, match=re.escape(f"lacks {count} weights that the config names, the first of them")
    ) as error:
        GamlBertForSequenceClassification.from_pretrained(tmp_path, **config)
    assert drop in str(error.value)
    assert "Load it with the `num_hidden_layers`, `exit_layers` and `exit_pooler` it was trained with." in str(
        error.value
    )


@mark.parametrize("key", ["foo.bar", "exit_classifiers.9.weight", "bert.encoder.layer.4.output.dense.weight"])
def test_more_weights_than_the_model_has_are_told_and_change_nothing(key, make, batch, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {key: torch.ones(3, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = GamlBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {key}
    assert loaded(**batch).logits.equal(model(**batch).logits)


def test_weights_of_another_size_are_an_error(make, tmp_path):
    make().save_pretrained(tmp_path)
    for changes in ({"num_labels": 5}, {"hidden_size": 64}, {"vocab_size": 99}):
        with raises(RuntimeError, match="ignore_mismatched_sizes"):  # upstream's
            GamlBertForSequenceClassification.from_pretrained(tmp_path, **changes)


@mark.parametrize("auto", [GamlBertForSequenceClassification, AutoModelForSequenceClassification])
def test_new_exits_keep_nothing_that_was_chosen_for_the_old(auto, make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    old = {"exit_temperatures": [2.0, 1.0, 0.5, 1.5], **POLICIES["entropy"]}
    make(alpha=0.7, **old).save_pretrained(tmp_path)
    new_task = {"num_labels": 5, "ignore_mismatched_sizes": True}
    config = auto.from_pretrained(tmp_path, **new_task).config
    fresh = GamlBertConfig()
    for field in ("exit_strategy", "exit_threshold", "exit_temperatures"):
        assert getattr(config, field) == getattr(fresh, field)
    assert config.alpha == 0.7  # how it is trained stays
    told = [record.getMessage() for record in caplog.records if "are new, for 5 classes" in record.getMessage()]
    gone = "`exit_strategy='entropy'`, `exit_threshold=0.4`, `exit_temperatures=[2.0, 1.0, 0.5, 1.5]`"
    assert [gone in message for message in told] == [True]

    config = auto.from_pretrained(tmp_path, **new_task, **POLICIES["patience"]).config  # the caller's own
    assert (config.exit_strategy, config.patience, config.exit_threshold) == ("patience", 1, None)
    with raises((ValueError, StrictDataclassError), match="`exit_threshold` must be a number"):
        auto.from_pretrained(tmp_path, **new_task, exit_strategy="max_prob")
    caplog.clear()
    config = auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True).config  # nothing is new
    assert {field: getattr(config, field) for field in old} == old
    assert "are new" not in caplog.text


def test_a_policy_for_the_new_exits_of_a_bert_stays(bert_kwargs, tmp_path):
    BertModel(BertConfig(**bert_kwargs)).save_pretrained(tmp_path)
    config = GamlBertForSequenceClassification.from_pretrained(tmp_path, **POLICIES["entropy"]).config
    assert (config.exit_strategy, config.exit_threshold) == ("entropy", 0.4)


def test_more_than_the_checkpoint_holds_is_an_error(make, bert_kwargs, tmp_path):
    make(exit_layers=[2, 4]).save_pretrained(tmp_path / "gaml")
    for wrong in ({"exit_layers": [1, 2, 4]}, {"exit_pooler": "shared"}, {"exit_pooler": "per_exit"}):
        with raises(ValueError, match="weights that the config names"):
            GamlBertForSequenceClassification.from_pretrained(tmp_path / "gaml", **wrong)
    BertModel(BertConfig(**bert_kwargs)).save_pretrained(tmp_path / "bert")
    with raises(ValueError, match=r"lacks 32 weights .* `bert\.encoder\.layer\.4\.attention"):  # 16 tensors in a layer
        GamlBertForSequenceClassification.from_pretrained(tmp_path / "bert", num_hidden_layers=6)


@mark.parametrize(("field", "trained", "other"), [("exit_pooling", "mean", "cls"), ("exit_norm", "layer", "none")])
def test_exits_that_read_something_else_than_they_learned(make, bert_kwargs, tmp_path, caplog, field, trained, other):
    make(**{field: trained}).save_pretrained(tmp_path / "gaml")
    BertModel(BertConfig(**bert_kwargs)).save_pretrained(tmp_path / "bert")
    for name, value in (("gaml", trained), ("bert", other), ("bert", trained)):
        GamlBertForSequenceClassification.from_pretrained(tmp_path / name, **{field: value})
    assert "learned with" not in caplog.text
    GamlBertForSequenceClassification.from_pretrained(tmp_path / "gaml", **{field: other})
    assert f"The exits of this checkpoint learned with `{field}={trained!r}`" in caplog.text
    assert f"Got `{field}={other!r}`" in caplog.text


def test_save_pretrained_takes_its_arguments_by_position_too(make, tmp_path):
    make().save_pretrained(tmp_path / "main", True)
    assert GamlBertForSequenceClassification.from_pretrained(tmp_path / "main")
    make().save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / "config.json").exists()


def test_a_training_drops_the_temperatures_of_the_weights_before_it(make, caplog):
    model = make(exit_temperatures=[2.0, 1.0, 0.5, 1.5])
    model.eval()
    assert model.config.exit_temperatures
    model.train()
    assert model.config.exit_temperatures is None
    assert "`exit_temperatures` were fitted to the weights as they were before this training" in caplog.text


@each_exit
@mark.parametrize(
    ("policy", "asked"), [(FullDepth(), [4]), (Budgeted(2), [2]), (Budgeted(9), [4])], ids=["none", "2", "9"]
)
def test_where_the_depth_is_fixed_one_exit_is_asked(make, batch, exits, policy, asked):
    model, calls = make(**EXITS[exits]).eval(), []
    expected = model(**batch, exit_policy=policy, output_exit_logits=True)
    for m, classifier in model.exit_classifiers.items():
        classifier.register_forward_hook(lambda *_, m=m: calls.append(int(m)))
    assert_same(model(**batch, exit_policy=policy), expected)
    assert calls == asked


def test_what_from_pretrained_refuses(make, tmp_path):
    make().save_pretrained(tmp_path / "gaml")
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    load = GamlBertForSequenceClassification.from_pretrained
    with raises(ValueError, match="`patiense` is not a field of GamlBertConfig. Did you mean `patience`?"):
        load(tmp_path / "gaml", patiense=2)
    with raises(TypeError, match="unexpected keyword argument 'speed'"):
        load(tmp_path / "gaml", speed=2)
    with raises(ValueError, match="holds a model of type `roberta`"):
        load(tmp_path / "roberta")
    with raises(Exception, match="`num_labels` must be at least 2"):
        load(tmp_path / "gaml", num_labels=1)


@each_attention
@mark.parametrize("exit_pooler", ["none", "shared", "per_exit"])
def test_truncate(attention, exit_pooler, make, batch, tmp_path):
    model = make(
        attn_implementation=attention,
        exit_pooler=exit_pooler,
        exit_temperatures=[2.0, 1.0, 0.5, 1.5],
        distillation=[[4, 1], [1, 3]],
        **POLICIES["budgeted"] | {"budgeted_exit": 3},
    ).to(torch.float64)
    smaller = model.truncate(3)
    assert_same(smaller(**batch), model(**batch))
    patient, full = smaller(**batch, exit_policy=Patience(1)), model(**batch, exit_policy=Patience(1))
    assert patient.exit_layer.equal(full.exit_layer.clamp(max=3))
    assert (smaller.dtype, smaller.config._attn_implementation) == (torch.float64, attention)
    assert smaller.config.distillation == [[1, 3]]
    assert len(smaller.bert.encoder.layer) == 3
    gone = [model.bert.encoder.layer[3], model.exit_classifiers["4"]]
    gone += [model.exit_poolers["4"]] if exit_pooler == "per_exit" else []
    assert smaller.num_parameters() == model.num_parameters() - sum(p.numel() for x in gone for p in x.parameters())
    before = smaller(**batch).logits
    torch.nn.init.zeros_(model.exit_classifiers["3"].weight)
    assert smaller(**batch).logits.equal(before)  # a copy: it shares no weight
    smaller.save_pretrained(tmp_path)
    assert_same(GamlBertForSequenceClassification.from_pretrained(tmp_path)(**batch), smaller(**batch))


def test_truncated_exits_are_as_new_as_they_were(make, tmp_path):
    """A GamlTrainer starts new ones at a regression, and would throw trained ones away."""
    new = make()
    assert new.truncate(2).exits_are_new
    new.save_pretrained(tmp_path)
    trained = GamlBertForSequenceClassification.from_pretrained(tmp_path)
    assert not trained.truncate(2).exits_are_new
    trained.new_exit_weights = {"exit_classifiers.1.weight", "exit_classifiers.4.weight"}
    assert trained.truncate(2).new_exit_weights == {"exit_classifiers.1.weight"}


def test_layers_whose_weights_are_not_all_there_is(make, tmp_path):
    """An adapter's, or those that PyTorch has quantized: left out, the answers would be other ones."""

    class Quantized(torch.nn.Module):  # as `torch.ao.quantization` makes them
        def weight(self):
            return torch.zeros(1)

    adapted = make()
    adapted.add_adapter(LoraConfig(target_modules=["query"]))
    quantized = make()
    quantized.bert.encoder.layer[0].output.dense = Quantized()
    for model, message in ((adapted, "has an adapter beside its own. Merge it"), (quantized, "are quantized")):
        for do in (lambda m: m.truncate(2), lambda m: m.prepack(), lambda m: export_onnx(m, tmp_path / "export")):
            with raises(ValueError, match=message):
                do(model)


@mark.parametrize("temperatures", [[1.0], [0.0] * 4, [1.0, -1.0, 1.0, 1.0], [2.0] * 5])
def test_temperatures_set_on_a_model(make, batch, temperatures):
    model = make()
    model.config.exit_temperatures = temperatures
    with raises(ValueError, match="`exit_temperatures` must hold one finite number above 0 for each of the 4 exits"):
        model(**batch)


@mark.parametrize("exit_layers", [[], [2, 3], [4, 3, 2, 1], [1, 2, 3, 4, 9]])
def test_exits_set_on_a_model(make, batch, exit_layers):
    model = make()
    model.config.exit_layers = exit_layers
    with raises(ValueError, match="`exit_layers` must be rising layer numbers between 1 and 4"):
        model(**batch)
    model = make(exit_layers=[2, 4])
    model.config.exit_layers = [1, 4]
    with raises(ValueError, match=r"`exit_layers` must be among those the model was made with, \[2, 4\]. Got .*1, 4"):
        model(**batch)


def test_truncate_where_there_is_no_exit(make):
    message = "`exit_layer` must be one of the exits of this model, [2, 4]; the first layer is 1. Got `exit_layer=3`."
    with raises(ValueError, match=re.escape(message)):
        make(exit_layers=[2, 4]).truncate(3)
    assert make(exit_layers=[2, 4], budgeted_exit=2).truncate(2).config.exit_layers == [2]


# ----------------------------------------------------------------------------------------------------------- bad input


IDS = torch.full((2, 6), 7)


@mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Give exactly one of `input_ids` and `inputs_embeds`."),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 32)}, "Give exactly one of"),
        (
            {"input_ids": IDS[0]},
            "`input_ids` must have 2 dimensions, at least one row and at least one token. Got shape (6,)",
        ),
        ({"input_ids": IDS[:0]}, "Got shape (0, 6)"),
        ({"input_ids": IDS[:, :0]}, "Got shape (2, 0)"),
        ({"inputs_embeds": torch.zeros(6, 32)}, "`inputs_embeds` must have 3 dimensions"),
        (
            {"input_ids": IDS.repeat(1, 11)},
            "`input_ids` must be at most 64 tokens long, what the model can read. Got 66; tokenize with "
            "`truncation=True`.",
        ),
        (
            {"input_ids": IDS + 99},
            "`input_ids` must lie between 0 and 48 (`vocab_size` of the model is 49). Row 0 holds 106.",
        ),
        ({"input_ids": IDS * tensor([[1], [-1]])}, "Row 1 holds -7."),
        ({"input_ids": IDS.tolist()}, "`input_ids` must be a tensor. Got list."),
        ({"input_ids": IDS, "labels": [0, 1]}, "`labels` must be a tensor. Got list."),
        ({"input_ids": IDS.float()}, "`input_ids` must be of type torch.int64 or torch.int32. Got torch.float32."),
        ({"input_ids": IDS, "token_type_ids": IDS * 0.0}, "`token_type_ids` must be of type torch.int64"),
        ({"input_ids": IDS, "position_ids": IDS[:, :5]}, "`position_ids` must have shape (2, 6), as `input_ids`."),
        (
            {"input_ids": IDS, "position_ids": IDS * 10},
            "`position_ids` must lie between 0 and 63 (`max_position_embeddings` of the model is 64). Row 0 holds 70.",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 6, 31)},
            "`inputs_embeds` must have 32 numbers for each token, as the model's embeddings. Got 31.",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
            "`attention_mask` must have shape (2, 6), as `input_ids`.",
        ),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, "Got (2, 1, 6, 6)"),
        (
            {"input_ids": IDS, "attention_mask": tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])},
            "`attention_mask` must be 1 at the first position of every row, where its text begins. Row 1 starts with "
            'padding; pad on the right (`padding_side="right"`).',
        ),
        (
            {"input_ids": IDS, "token_type_ids": IDS},
            "`token_type_ids` must lie between 0 and 1 (the number of token types of the model",
        ),
        (
            {"input_ids": IDS, "token_type_ids": IDS[:, :5]},
            "`token_type_ids` must have shape (2, 6), as `input_ids`. Got (2, 5)",
        ),
        (
            {"input_ids": IDS, "labels": tensor([0, 3])},
            "`labels` must lie between 0 and 2 (`num_labels` of the model is 3). Row 1 holds 3.",
        ),
        ({"input_ids": IDS, "labels": tensor([-100, -100])}, "Row 0 holds -100."),  # a loss of NaN or 0 otherwise
        ({"input_ids": IDS, "labels": tensor([0.0, 1.0])}, "`labels` must have shape (2,) and type torch.int64"),
        ({"input_ids": IDS, "labels": tensor([0, 1], dtype=torch.int32)}, "Got shape (2,), torch.int32."),
        ({"input_ids": IDS, "labels": tensor([[0], [1]])}, "one class for each row of `input_ids`. Got shape (2, 1)"),
        ({"input_ids": IDS, "labels": tensor([0])}, "Got shape (1,)"),
        (
            {"input_ids": IDS, "output_attentions": True},
            'loaded with `attn_implementation="eager"`. Got `attn_implementation=',
        ),
    ],
)
@mark.parametrize("training", [False, True])
def test_bad_inputs(inputs, message, training, make):
    with raises(ValueError, match=re.escape(message)):
        make(vocab_size=49, attn_implementation="sdpa").train(training)(**inputs)


@mark.parametrize("outputs", [{}, {"output_exit_logits": True}])
def test_a_policy_that_is_a_name(make, outputs):
    with raises(ValueError, match=r"`exit_policy` must be an ExitPolicy, such as `Patience\(6\)`;.* Got 'patience'"):
        make()(input_ids=IDS, exit_policy="patience", **outputs)


def test_an_unknown_keyword_is_refused(make):
    with raises(TypeError, match="unexpected keyword argument 'exit_threshold'"):
        make()(IDS, exit_threshold=0.5)
