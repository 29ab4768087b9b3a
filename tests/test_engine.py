"""The exit engine against stock layers in float64, row by row; and what makes it faster leaves the answers alone."""

import copy
import pickle
import time

import torch
from pytest import fixture, mark, raises
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification, GamlTextClassificationPipeline
from gaml_hf.models.engine_gaml import (
    EncoderHooks,
    Layout,
    PrepackedLinear,
    bfloat16_cost,
    prepacking_gain,
    run_cls,
    run_layer,
    run_rest,
)
from gaml_hf.models.exiting_gaml import MIN_ROWS_TO_GUESS, Budgeted, Entropy, FullDepth, MaxProb, Patience


POLICIES = [FullDepth(), Budgeted(2), Patience(1), Patience(2), Entropy(0.4), MaxProb(0.8)]
each_policy = mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}-{vars(policy)}")


@fixture
def model(bert_kwargs):
    """A tiny model whose exits disagree and are sure of themselves now and then."""
    config = GamlBertConfig(**bert_kwargs | {"num_labels": 3, "initializer_range": 0.3})
    return GamlBertForSequenceClassification(config).eval()


def texts(num_rows, length):
    """Token ids of rows of 1 to `length` tokens, padded on the right."""
    lengths = torch.randint(1, length + 1, (num_rows,))
    lengths[-1] = length
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(5, 60, (num_rows, length)) * attention_mask,
        "attention_mask": attention_mask,
    }


# --------------------------------------------------------------------------------------------------------- one layer


# Rows of different lengths; one with a hole, as no tokenizer makes it; rows of [CLS] alone; a single row; no padding.
MASKS = {
    "lengths": [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "a hole": [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]],
    "[CLS] alone": [[1], [1]],
    "one row": [[1, 1, 1, 0]],
    "one row with a hole": [[1, 1, 0, 1]],
    "no padding": [[1, 1, 1], [1, 1, 1]],
}


@fixture
def layer(bert_kwargs):
    config = BertConfig(**bert_kwargs | {"initializer_range": 0.3, "attn_implementation": "eager"})
    return BertLayer(config).double().eval()


@fixture
def hooks(bert_kwargs):
    """What a model tells the engine of its layers."""
    hooks = EncoderHooks()
    hooks.config = BertConfig(**bert_kwargs)
    return hooks


@mark.parametrize("name", MASKS)
def test_a_layer_is_the_stock_layer_on_each_row_alone(name, layer, hooks):
    mask = torch.tensor(MASKS[name]).bool()
    hidden_states = torch.randn(*mask.shape, 32, dtype=torch.float64)
    layout = Layout(mask, torch.device("cpu"))
    tokens = layout.pack(hidden_states)
    assert tokens.shape == (mask.sum(), 32)
    assert tokens[: len(mask)].equal(hidden_states[:, 0])
    alone = [layer(hidden_states[row : row + 1, mask[row]])[0] for row in range(len(mask))]  # no mask, no padding
    expected = torch.cat([torch.stack([row[0] for row in alone]), *[row[1:] for row in alone]])
    assert_close(run_layer(hooks, layer, tokens, layout.rows), expected, rtol=1e-12, atol=1e-12)

    cls, key, value = run_cls(hooks, layer, tokens, layout.rows)
    assert_close(cls, expected[: len(mask)], rtol=1e-12, atol=1e-12)
    if layout.length > 1:
        rest = run_rest(hooks, layer, tokens[len(mask) :], key, value, layout.rows)
        assert_close(rest, expected[len(mask) :], rtol=1e-12, atol=1e-12)


def test_a_layout_without_some_rows_is_that_of_the_others():
    mask = torch.tensor(MASKS["lengths"]).bool()
    hidden_states = torch.randn(4, 5, 32)
    layout = Layout(mask, torch.device("cpu"))
    for kept in ([0, 3], [1, 2], [2], [0, 1, 2, 3]):
        smaller, numbers = layout.keep(torch.tensor(kept))
        expected = Layout(mask[kept], torch.device("cpu"))
        assert smaller.length == expected.length == int(mask[kept].sum(dim=1).max())
        assert smaller.rows.grid.equal(expected.rows.grid)
        assert layout.pack(hidden_states)[numbers].equal(expected.pack(hidden_states[kept]))


# -------------------------------------------------------------------------------------------------- whether to split


@each_policy
def test_what_may_exit_is_never_less_than_what_does(policy):
    """A strategy that knows its next step says so; one that does not has to guess, by the size of the batch alone."""
    exit_logits = torch.randn(200, 5, 3)
    for run in range(5):
        leave, may = policy(exit_logits[:, : run + 1]), policy.may_exit(exit_logits[:, :run])
        assert not (leave & ~may).any()
        few = policy.may_exit(exit_logits[: MIN_ROWS_TO_GUESS - 1, :run])
        if policy.name in ("entropy", "max_prob"):
            assert may.all()
            assert not few.any()
        else:
            assert few.equal(may[: len(few)])
    assert Patience(2).may_exit(torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])).tolist() == [True, False]
    assert [bool(Budgeted(3).may_exit(torch.zeros(1, run, 2))) for run in range(4)] == [False, False, True, True]


@each_policy
def test_splitting_a_layer_changes_no_answer(policy, model):
    for num_rows, length in ((1, 9), (7, 12), (24, 6), (3, 1)):
        batch = texts(num_rows, length)
        expected = model(**batch, exit_policy=policy, output_exit_logits=True)
        for split in (True, False):
            trial = copy.copy(policy)
            trial.may_exit = lambda history, split=split: torch.full(history.shape[:1], split)
            found = model(**batch, exit_policy=trial)
            assert found.exit_layer.equal(expected.exit_layer)
            assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- half precision


@mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_near_float32_row_by_row(dtype, tolerance, model):
    """A batch against one row alone in float32, at one exit for both: near a threshold, rounding decides."""
    batch = texts(24, 12)
    half = copy.deepcopy(model).to(dtype)
    for m in (1, 3, 4):
        logits = half(**batch, exit_policy=Budgeted(m)).logits
        assert logits.dtype == dtype
        for row in range(24):
            mask = batch["attention_mask"][row].bool()
            alone = model(batch["input_ids"][row : row + 1, mask], exit_policy=Budgeted(m)).logits
            scale = alone.abs().max()
            assert_close(logits[row].float() / scale, alone[0] / scale, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- prepacked


@fixture
def prepacked(model, monkeypatch):
    """Whether or not that is faster here; for a model as small as this one it is not."""
    monkeypatch.setattr("gaml_hf.models.exits_gaml.prepacking_gain", lambda linears: 2.0)
    return copy.deepcopy(model).prepack()


def test_prepack_does_what_is_faster(model, monkeypatch, caplog):
    weights, timed = model.state_dict(), []
    for gain in (0.4, 1.0, 1.4):
        monkeypatch.setattr("gaml_hf.models.exits_gaml.prepacking_gain", lambda ls, g=gain: timed.append(ls) or g)
        found = copy.deepcopy(model).prepack()
        assert any(isinstance(module, PrepackedLinear) for module in found.modules()) == (gain > 1)
        assert f"Not prepacked: that is {gain:.2f} times as fast" in caplog.text or gain > 1
        if gain <= 1:
            found.train().double()  # nothing was done to it
            assert all(weight.equal(weights[name].double()) for name, weight in found.state_dict().items())
    assert [len(linears) for linears in timed] == [3 * 6] * 3
    assert found.prepack() is found
    assert len(timed) == 3  # a second call has nothing to do


def test_prepack_without_onednn_leaves_the_model(model, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model.prepack()
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())
    with raises(ValueError, match="`prepack` needs a model in evaluation mode, on the CPU"):
        model.to(torch.bfloat16).prepack()


@mark.parametrize("slower", [False, True])
def test_the_gain_is_own_time_over_prepacked_time(slower, monkeypatch):
    """With two milliseconds of work put into one of the two, and all but nothing to multiply."""

    def work(*_):
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass

    def register(module):
        module.register_forward_hook(work)

    linears = [torch.nn.Linear(4, 4)]
    init = PrepackedLinear.__init__
    if slower:
        monkeypatch.setattr(PrepackedLinear, "__init__", lambda self, linear: init(self, linear) or register(self))
    else:
        register(linears[0])
    gain = prepacking_gain(linears)
    assert gain < 0.5 if slower else gain > 2


def test_timing_uses_up_no_random_number_and_tells_bfloat16():
    linears, state = [torch.nn.Linear(8, 8)], torch.get_rng_state()
    cost = bfloat16_cost()
    assert prepacking_gain(linears) > 0
    assert torch.get_rng_state().equal(state)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        assert (cost < 1.5) == native, cost


@each_policy
def test_prepacked_answers_are_the_same(policy, model, prepacked):
    assert sum(isinstance(module, PrepackedLinear) for module in prepacked.modules()) == 6 * 4
    for num_rows, length in ((1, 9), (24, 12), (3, 1)):
        batch = texts(num_rows, length)
        found, expected = prepacked(**batch, exit_policy=policy), model(**batch, exit_policy=policy)
        assert found.exit_layer.equal(expected.exit_layer)
        assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    every = prepacked(**batch, output_exit_logits=True).exit_logits
    assert_close(every, model(**batch, output_exit_logits=True).exit_logits, rtol=1e-5, atol=1e-5)


def test_prepacked_weights_are_not_there_twice(model, prepacked):
    def size(part):
        return sum(parameter.numel() for parameter in part.parameters())

    linear = [module for module in model.bert.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert size(model) - size(prepacked) == sum(size(module) for module in linear) > 0


def test_a_prepacked_model_is_copied_pickled_saved_and_truncated_whole(model, prepacked, tmp_path):
    batch, expected = texts(5, 9), model.state_dict()
    prepacked.save_pretrained(tmp_path / "saved")
    twins = [
        copy.deepcopy(prepacked),
        pickle.loads(pickle.dumps(prepacked)),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"),
    ]
    for twin in twins:
        assert twin.state_dict().keys() == expected.keys()
        for name, weight in twin.state_dict().items():
            assert weight.equal(expected[name]), name
        assert_close(twin(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    smaller = prepacked.truncate(2)
    assert_close(smaller(**batch).logits, model(**batch, exit_policy=Budgeted(2)).logits, rtol=1e-5, atol=1e-5)


def test_what_a_prepacked_model_refuses_leaves_it_as_it_was(prepacked):
    batch = texts(5, 9)
    prepacked.config.exit_temperatures = [1.0, 1.0, 1.0, 2.0]
    expected = prepacked(**batch).logits
    for cast in (prepacked.half, prepacked.double, lambda: prepacked.to("meta")):
        with raises(ValueError, match="A prepacked model stays on the CPU, in torch.float32. Got"):
            cast()
    with raises(ValueError, match="A prepacked model cannot be trained"):
        prepacked.train()
    with torch.autocast("cpu", torch.bfloat16), raises(ValueError, match="leave `torch.autocast`"):
        prepacked(**batch)
    assert not prepacked.training
    assert prepacked(**batch).logits.equal(expected)


def test_one_of_prepack_and_compile(model, prepacked):
    with raises(ValueError, match="A prepacked model cannot be compiled"):
        prepacked.compile()
    model.compile(backend="eager")
    with raises(
        ValueError, match=r"A compiled model cannot be prepacked: take one of `compile\(\)` and `prepack\(\)`"
    ):
        model.prepack()


def test_a_prepacked_model_has_no_gradients(model, prepacked):
    """They would be those of the residual connections alone, without a word."""
    batch = texts(5, 9)
    states = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    for candidate in (model, prepacked):
        logits = candidate(inputs_embeds=states, attention_mask=batch["attention_mask"]).logits
        if candidate is model:
            logits.sum().backward()
        else:
            with raises(ValueError, match=r"A prepacked model has no gradients: .* take them before `prepack\(\)`"):
                logits.sum().backward()
    assert states.grad.abs().sum() > 0


def test_a_prepacked_model_in_the_pipeline(prepacked, model, tokenizer):
    rows = ["a good film", "the plot is dull and the actor is not good"]
    found = GamlTextClassificationPipeline(model=prepacked, tokenizer=tokenizer)(rows, patience=1, batch_size=2)
    expected = GamlTextClassificationPipeline(model=model, tokenizer=tokenizer)(rows, patience=1, batch_size=2)
    assert [row["exit_layer"] for row in found] == [row["exit_layer"] for row in expected]
    assert_close(*[torch.tensor([row["score"] for row in answers]) for answers in (found, expected)])


@mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a processor with AVX-512 at least")
def test_prepacked_bfloat16(model, monkeypatch, caplog):
    monkeypatch.setattr("gaml_hf.models.exits_gaml.prepacking_gain", lambda linears: 2.0)
    monkeypatch.setattr("gaml_hf.models.exits_gaml.bfloat16_cost", lambda: 5.8)
    model.to(torch.bfloat16)
    batch = texts(24, 12)
    with torch.no_grad():
        expected = model(**batch, output_exit_logits=True).exit_logits.float()
        found = model.prepack()(**batch, output_exit_logits=True).exit_logits
    assert "bfloat16 takes 5.8 times as long as float32 on this processor" in caplog.text
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


@mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model.train(), "A prepacked model cannot be trained"),
        (lambda model: model.half(), r"stays on the CPU, in torch.float32. Got cpu, torch.float16"),
        (lambda model: model.to("meta"), r"stays on the CPU, in torch.float32. Got meta"),
    ],
)
def test_what_a_prepacked_model_refuses(change, sentence, prepacked):
    with raises(ValueError, match=sentence):
        change(prepacked)


@mark.parametrize(
    ("change", "got"), [(lambda m: m.train(), "training mode, cpu"), (lambda m: m.double(), "cpu, torch.float64")]
)
def test_what_prepack_refuses(change, got, model):
    change(model)
    with raises(ValueError, match=f"`prepack` needs a model in evaluation mode, on the CPU.*Got .*{got}"):
        model.prepack()


# ----------------------------------------------------------------------------------------------------------- compiled


def test_compiled_once_for_all_batches_and_lengths(model):
    """After the first shapes of each kind (one row or many, padding or none), no new graph is made."""
    torch._dynamo.reset()
    compiled, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    compiled.compile(backend=counter)
    kinds = [(4, 7), (1, 9), (2, 2), (3, 1), (1, 1), (1, 2), (17, 3), (24, 12), (24, 2), (2, 33)]
    graphs = []
    with torch.inference_mode():
        for num_rows, length in [*kinds, (32, 9), (5, 20), (1, 30), (19, 6), (9, 17), (1, 5), (40, 4)]:
            batch = texts(num_rows, length)
            for policy in POLICIES:
                found, expected = compiled(**batch, exit_policy=policy), model(**batch, exit_policy=policy)
                assert found.exit_layer.equal(expected.exit_layer)
                assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
            graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[len(kinds) - 1] <= 3 * torch._dynamo.config.recompile_limit, graphs
    with torch.inference_mode():  # compiled code stays behind
        assert_close(pickle.loads(pickle.dumps(compiled))(**batch).logits, model(**batch).logits)
    torch._dynamo.reset()
