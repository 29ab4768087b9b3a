"""Each policy against a plain Python rule that walks through the exits of one row, as the papers tell it."""

import math

import torch
from pytest import approx, fixture, mark, raises
from scipy.stats import entropy
from torch import tensor

from gaml_hf import ExitPolicy, GamlBertConfig, GamlBertForSequenceClassification, policy_from_config
from gaml_hf.models import exiting_gaml
from gaml_hf.models.exiting_gaml import Budgeted, Entropy, FullDepth, MaxProb, Patience, normalized_entropy, register


def probabilities(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [e / sum(exponentials) for e in exponentials]


def pabee(row, patience):
    """Zhou et al. (2020): a counter that goes up when two neighbouring exits agree, and back to 0 when they do not."""
    counter, previous = 0, None
    for position, logits in enumerate(row):
        prediction = logits.index(max(logits))
        counter = counter + 1 if prediction == previous else 0
        previous = prediction
        if counter == patience:
            return position
    return len(row) - 1


def first_exit(row, leaves):
    return next((position for position, logits in enumerate(row) if leaves(logits)), len(row) - 1)


def uncertainty(logits):
    return float(entropy(probabilities(logits))) / math.log(len(logits))


RULES = [
    (FullDepth(), lambda row: len(row) - 1),
    (Budgeted(3), lambda row: 2),
    *[(Patience(patience), lambda row, patience=patience: pabee(row, patience)) for patience in (1, 2, 5, 12)],
    *[(Entropy(t), lambda row, t=t: first_exit(row, lambda x: uncertainty(x) < t)) for t in (0.1, 0.5, 0.9)],
    *[(MaxProb(t), lambda row, t=t: first_exit(row, lambda x: max(probabilities(x)) > t)) for t in (0.5, 0.8, 0.99)],
]
each_policy = mark.parametrize("policy", [policy for policy, _ in RULES], ids=lambda policy: f"{vars(policy)}")


@mark.parametrize("num_labels", [2, 5])
@mark.parametrize(("policy", "rule"), RULES, ids=lambda policy: f"{vars(policy)}")
def test_replay_agrees_with_the_rule(policy, rule, num_labels):
    exit_logits = 2 * torch.randn(100, 12, num_labels)
    assert policy.replay(exit_logits).tolist() == [rule(row) for row in exit_logits.tolist()]
    of_one_depth = isinstance(policy, FullDepth | Budgeted)
    assert policy.fixed_exit(12) == (rule(exit_logits[0].tolist()) if of_one_depth else None)


@each_policy
def test_replay_is_what_happens_step_by_step(policy):
    exit_logits = torch.randn(50, 12, 2)
    position = torch.full((50,), 11)
    rows = torch.arange(50)  # still there
    for step in range(11):
        leave = policy(exit_logits[rows, : step + 1])
        assert leave.dtype == torch.bool
        position[rows[leave]] = step
        rows = rows[~leave]
    assert policy.replay(exit_logits).equal(position)


@each_policy
def test_a_row_knows_no_neighbours_and_a_policy_no_past(policy):
    exit_logits, before = torch.randn(50, 12, 3), dict(vars(policy))
    position, order = policy.replay(exit_logits), torch.randperm(50)
    assert policy.replay(exit_logits[order]).equal(position[order])
    assert policy.replay(exit_logits[:1]).equal(position[:1])
    assert vars(policy) == before


@each_policy
@mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_leave_at_once(policy, bad):
    """`NaN < threshold` is False: a row whose numbers are broken would run to the last exit, and be taken for sure."""
    exit_logits = torch.zeros(2, 12, 2)  # never sure
    exit_logits[0, 0, 1] = bad
    assert policy.replay(exit_logits)[0] == 0
    assert policy(exit_logits[:, :1])[0]


def test_broken_logits_leave_where_they_break():
    exit_logits = torch.zeros(1, 12, 2)
    exit_logits[0, 5:] = math.nan
    assert Entropy(0.5).replay(exit_logits).tolist() == [5]


@mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@mark.parametrize("size", [20, 100, 1000])
def test_the_most_confident_row_of_all_leaves(size, dtype):
    """Entropy as `log sum e^x - sum x e^x / sum e^x` gives NaN here, and the surest rows never leave."""
    sure = tensor([[[size, -size], [size, -size]]], dtype=dtype)
    assert normalized_entropy(sure)[0].tolist() == approx([0.0, 0.0], abs=1e-12)
    assert Entropy(1e-6).replay(sure).tolist() == [0]
    assert MaxProb(0.999).replay(sure).tolist() == [0]


@mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalized_entropy(dtype):
    logits = (3 * torch.randn(50, 7)).to(dtype)
    expected = [uncertainty(row) for row in logits.tolist()]
    assert normalized_entropy(logits).tolist() == approx(expected, abs=1e-6)
    assert normalized_entropy(torch.zeros(1, 7)).tolist() == approx([1.0])  # ln 7 / ln 7
    assert normalized_entropy(tensor([[math.log(3), 0.0]])).tolist() == approx([0.811278])  # H(3/4, 1/4) in bits


def test_thresholds_at_their_edges():
    exit_logits = torch.cat([torch.randn(20, 4, 3), torch.full((1, 4, 3), 7.0), tensor([[[1e3, 0, -1e3]] * 4])])
    last, first = [3] * 22, [0] * 22
    assert Entropy(0).replay(exit_logits).tolist() == last  # no entropy is below 0
    assert MaxProb(1).replay(exit_logits).tolist() == last  # no probability is above 1
    assert MaxProb(0).replay(exit_logits).tolist() == first
    assert Entropy(1).replay(exit_logits[:20]).tolist() == first[:20]  # all but the uniform row


def test_patience_longer_than_the_model():
    assert Patience(12).replay(torch.ones(2, 12, 2)).tolist() == [11, 11]  # 11 comparisons are all there are
    assert Patience(11).replay(torch.ones(2, 12, 2)).tolist() == [11, 11]
    assert Patience(10).replay(torch.ones(2, 12, 2)).tolist() == [10, 10]


@mark.parametrize(
    ("exit_layers", "budgeted_exit", "position"),
    [(None, 3, 2), ([3, 6, 12], 6, 1), ([3, 6, 12], 12, 2), ([12], 12, 0)],
)
def test_a_budgeted_exit_is_a_layer(exit_layers, budgeted_exit, position):
    config = GamlBertConfig(exit_layers=exit_layers, exit_strategy="budgeted", budgeted_exit=budgeted_exit)
    assert policy_from_config(config).replay(torch.randn(4, config.num_exits, 2)).tolist() == [position] * 4


@mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Patience(0), "`patience` must be a whole number of at least 1"),
        (lambda: Budgeted(0), "`num_exits` must be a whole number of at least 1: how many exits to run. Got 0"),
        (lambda: Budgeted("2"), "`num_exits` must be a whole number of at least 1: how many exits to run. Got '2'"),
        (lambda: Patience(1.5), "Got `patience=1.5`"),
        (lambda: Patience(True), "Got `patience=True`"),
        (lambda: Entropy(-0.1), r"`exit_threshold` must lie in \[0, 1\]. Got `exit_threshold=-0.1`"),
        (lambda: Entropy(math.nan), r"must lie in \[0, 1\]. Got `exit_threshold=nan`"),
        (lambda: MaxProb(1.1), r"must lie in \[0, 1\]. Got `exit_threshold=1.1`"),
        (lambda: MaxProb("0.5"), r"`exit_threshold` must be a number in \[0, 1\]. Got `exit_threshold='0.5'`"),
    ],
)
def test_bad_parameters(wrong, message):
    with raises(ValueError, match=message):
        wrong()


@fixture
def registry(monkeypatch):
    """A registry of our own, so that nothing stays behind."""
    monkeypatch.setattr(exiting_gaml, "EXIT_POLICIES", dict(exiting_gaml.EXIT_POLICIES))


@mark.usefixtures("registry")
def test_a_new_strategy_is_one_class(bert_kwargs, tmp_path, caplog):
    @register
    class FirstClass(ExitPolicy):
        """Leave as soon as the prediction is class 0."""

        name = "first_class"

        def should_exit(self, exit_logits):
            return exit_logits[:, -1].argmax(dim=-1) == 0

    model = GamlBertForSequenceClassification(GamlBertConfig(**bert_kwargs, exit_strategy="first_class")).eval()
    for m in range(1, 4):  # each row comes to another answer
        torch.nn.init.normal_(model.exit_classifiers[str(m)].weight)
    input_ids = torch.randint(5, 20, (16, 6))
    model.save_pretrained(tmp_path)
    assert "`exit_strategy='first_class'` is a class of your own (test_exiting), which does not go" in caplog.text
    GamlBertForSequenceClassification.from_pretrained(tmp_path)  # registered here
    live, replayed = model(input_ids), model(input_ids, output_exit_logits=True)
    predictions = replayed.exit_logits.argmax(dim=-1).tolist()
    expected = [next((m for m, k in enumerate(row, start=1) if k == 0), 4) for row in predictions]
    assert live.exit_layer.tolist() == replayed.exit_layer.tolist() == expected
    assert len(set(expected)) > 1


def test_a_strategy_decides_with_one_bool_for_each_row():
    class Odd(ExitPolicy):
        name = "odd"

        def __init__(self, answer):
            self.answer = answer

        def should_exit(self, exit_logits):
            return self.answer

    for answer, got in (
        (torch.zeros(3), r"torch.float32, \(3,\)"),
        (torch.zeros(3, 1, dtype=torch.bool), r"torch.bool, \(3, 1\)"),
        (True, "True"),
    ):
        with raises(TypeError, match=rf"`Odd.should_exit` must return a bool tensor of shape \(3,\). Got {got}."):
            Odd(answer)(torch.zeros(3, 1, 2))


def test_a_strategy_must_decide():
    class Undecided(ExitPolicy):
        name = "undecided"

    with raises(TypeError, match="Undecided must implement `should_exit`"):
        Undecided()(torch.zeros(1, 1, 2))
