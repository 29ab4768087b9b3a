"""What an exit reads, how it is scaled, where it starts and how fast it learns."""

import json
import logging
import math

import torch
from pytest import approx, fixture, mark, raises
from sklearn.linear_model import LogisticRegression
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig, BertModel, EarlyStoppingCallback, TrainerCallback

from gaml_hf import PAPER_LETTER, GamlBertConfig, GamlBertForSequenceClassification
from gaml_hf.evaluation import one_class_exits, warn_of_one_class
from gaml_hf.models.exits_gaml import mean_over_tokens
from gaml_hf.training.exit_start import INVERSE_REGULARIZATION, input_variation, warm_start
from test_trainer import ALPHA, EXIT_WEIGHTS, LAYERS, LEARNING, LEARNING_RATE, ROWS, Rows, make_model, make_trainer


# ------------------------------------------------------------------------------------------------------------- pooling


def test_a_mean_by_hand_without_what_padding_holds():
    hidden_states = tensor([[[1.0, 2.0], [3.0, 6.0], [math.nan, math.inf]], [[5.0, -1.0], [9.0, 9.0], [7.0, 2.0]]])
    mask = tensor([[1, 1, 0], [1, 0, 1]])
    assert mean_over_tokens(hidden_states, mask).tolist() == [[2.0, 4.0], [6.0, 0.5]]
    assert mean_over_tokens(hidden_states[1:], None).tolist() == [[7.0, approx(10 / 3)]]


def test_half_precision_is_summed_in_float32():
    """In float16, 2048 + 1 is 2048, and a sum over 4096 ones would stop there."""
    ones = torch.ones(1, 4096, 1, dtype=torch.float16)
    assert mean_over_tokens(ones, torch.ones(1, 4096)).tolist() == [[1.0]]
    assert mean_over_tokens(ones, None).dtype == torch.float16


# --------------------------------------------------------------------------------------------------------- what varies


def test_how_much_an_input_varies_by_hand():
    states = tensor([[[3.0, 4.0], [1.0, 0.0]], [[3.0, 4.0], [-1.0, 0.0]], [[3.0, 4.2], [1.0, 0.0]]])
    last = [sum(column) / 3 for column in ([1, -1, 1], [0, 0, 0])]
    deviation = math.sqrt(sum((x - last[0]) ** 2 for x in (1, -1, 1)) / 3)
    means = (3.0, (4 + 4 + 4.2) / 3)
    first = math.sqrt((2 * (means[1] - 4) ** 2 + (4.2 - means[1]) ** 2) / 3) / math.hypot(*means)
    assert input_variation(states) == [approx(first, rel=1e-4), approx(deviation / abs(last[0]))]


def test_it_is_told_before_the_first_step_and_blind_exits_are_named(tmp_path, caplog):
    """An encoder whose layers do next to nothing to [CLS]: there, the state is the same for every text."""
    model = make_model(ga_mode="none")
    with torch.no_grad():
        for layer in model.bert.encoder.layer[:2]:
            layer.attention.output.dense.weight.mul_(1e-4)
    caplog.set_level(logging.INFO, logger="gaml_hf")
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.train_dataset.input_ids[:, 0] = 1  # [CLS]
    trainer.train()
    assert "How much an exit's input varies" in caplog.text
    assert "The inputs of exits 1, 2 vary by less than 5%" in caplog.text
    assert '`exit_pooling="mean"`' in caplog.text


# ---------------------------------------------------------------------------------------------------------- warm start


@mark.parametrize("num_labels", [2, 3])
@mark.parametrize("norm", ["layer", "none"])
def test_exits_start_at_the_regression_of_scikit_learn(norm, num_labels):
    model = make_model(num_labels=num_labels, exit_norm=norm, exit_pooling="mean").eval()
    torch.manual_seed(2)
    labels = torch.arange(60) % num_labels
    centres = torch.randn(num_labels, LAYERS, 16)
    states = 5 + centres[labels] + torch.randn(60, LAYERS, 16)
    warm_start(model, states, labels)
    for i in range(LAYERS):
        x = states[:, i]
        if norm == "layer":
            x = F.layer_norm(x, (16,))
        x = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-30)
        fit = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=500).fit(x.numpy(), labels.numpy())
        ours = model._classify(i + 1, states[:, i]).softmax(-1)
        assert_close(ours.double(), torch.tensor(fit.predict_proba(x.numpy())).double(), atol=2e-3, rtol=0)
        assert (ours.argmax(-1) == labels).float().mean() > 0.9


def test_a_feature_that_hardly_varies_is_not_blown_up():
    """Some features of a pre-trained encoder are constant but for rounding."""
    model = make_model(num_labels=2, exit_norm="none").eval()
    torch.manual_seed(2)
    labels = torch.arange(60) % 2
    states = torch.randn(60, LAYERS, 16) + labels[:, None, None]
    states[..., 3] = 1e-30 * (labels[:, None] * 2.0 - 1)
    warm_start(model, states, labels)
    assert max(exit_.weight.abs().max() for exit_ in model.exit_classifiers.values()) < 100


def test_a_class_that_no_row_has_is_unlikely_and_one_class_alone_starts_nothing():
    model = make_model(num_labels=3, exit_norm="none").eval()
    torch.manual_seed(2)
    labels = torch.arange(40) % 2 * 2  # 0 and 2
    states = torch.randn(40, LAYERS, 16) + labels[:, None, None]
    warm_start(model, states, labels)
    answers = model._classify(2, states[:, 1]).argmax(-1)
    assert answers.equal(labels)
    before = model.exit_classifiers["1"].weight.clone()
    warm_start(model, states, torch.zeros(40, dtype=torch.long))
    assert model.exit_classifiers["1"].weight.equal(before)


def save_bert(folder, config):
    """A plain checkpoint, whose exits are then new."""
    sizes = {key: value for key, value in config.to_dict().items() if key in BertConfig().to_dict()}
    BertModel(BertConfig(**sizes | {"model_type": "bert"}), add_pooling_layer=False).save_pretrained(folder)


def test_new_exits_start_warm_and_trained_ones_are_left_alone(tmp_path):
    def first_loss(model):
        trainer = make_trainer(tmp_path / "out", model, max_steps=1, learning_rate=1e-8)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    config = make_model(ga_mode="none", distillation="none", **LEARNING).config
    save_bert(tmp_path / "bert", config)
    losses = []
    for warm in (True, False):
        config.exit_warm_start = warm
        torch.manual_seed(3)
        model = GamlBertForSequenceClassification.from_pretrained(tmp_path / "bert", config=config)
        assert model.exits_are_new
        losses.append(first_loss(model))
    assert losses[0] < losses[1] - 0.02
    config.exit_warm_start = True
    model.save_pretrained(tmp_path / "gaml")
    again = GamlBertForSequenceClassification.from_pretrained(tmp_path / "gaml", config=config)
    assert not again.exits_are_new
    assert first_loss(again) == approx(losses[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------------- learning rate


def test_exits_learn_at_their_own_rate_and_everything_else_is_the_optimizers(tmp_path):
    model = make_model(exit_learning_rate_multiplier=7.0, exit_pooler="per_exit", ga_mode="none")
    trainer = make_trainer(tmp_path, model, weight_decay=0.1, max_steps=2, lr_scheduler_type="linear")
    trainer.create_optimizer_and_scheduler(2)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            rates[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert rates.keys() == set(names.values())
    for name, (rate, decay) in rates.items():
        assert rate == approx(LEARNING_RATE * (7 if name.startswith("exit_") else 1)), name
        assert decay == (0.0 if "bias" in name or "LayerNorm" in name else 0.1), name
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    plain = make_model(exit_learning_rate_multiplier=1.0, exit_pooler="per_exit", ga_mode="none")
    make_trainer(tmp_path, plain, max_steps=1).train()
    one = make_model(exit_learning_rate_multiplier=7.0, exit_pooler="per_exit", ga_mode="none")
    make_trainer(tmp_path, one, max_steps=1).train()
    for (name, p), q in zip(one.named_parameters(), plain.parameters(), strict=True):
        factor = 7 if name.startswith("exit_") else 1
        assert_close(p - before[name], factor * (q - before[name]), atol=1e-6, rtol=1e-3)


def test_an_optimizer_that_the_caller_made_is_left_as_it_is(tmp_path):
    model = make_model(exit_learning_rate_multiplier=7.0)
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = make_trainer(tmp_path, model, more={"optimizers": (own, None)})
    trainer.create_optimizer_and_scheduler(2)
    assert [group["lr"] for group in own.param_groups] == [0.5]


# ---------------------------------------------------------------------------------------------------- who teaches whom


def test_without_gradients_between_exits_a_layer_learns_from_the_next_exit_alone():
    model = make_model(stop_gradient_between_exits=True, distillation="none").train()
    batch = vars(Rows())
    model(**batch).loss.backward()
    logits = model(**batch).exit_logits
    for m in range(1, LAYERS + 1):
        alone = EXIT_WEIGHTS[m - 1] * F.cross_entropy(logits[:, m - 1], batch["labels"])
        parameters = list(model.bert.encoder.layer[m - 1].parameters())
        expected = torch.autograd.grad(alone, parameters, retain_graph=True)
        for p, g in zip(parameters, expected, strict=True):
            assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    joint = make_model(distillation="none").train()
    joint(**batch).loss.backward()
    first = [next(net.bert.encoder.layer[0].parameters()).grad for net in (joint, model)]
    assert not torch.allclose(*first, rtol=1e-2)
    assert_close(joint(**batch).exit_logits, logits)


@mark.parametrize("mode", ["none", "soft"])
def test_mixed_training_begins_with_the_last_exit_alone(tmp_path, mode):
    """Of 6 steps, half: the loss is the last exit's cross-entropy, and no other exit moves."""
    model = make_model(ga_mode=mode, mixed_training=0.5)
    trainer = make_trainer(tmp_path, model, max_steps=6)
    states = []

    def remember(module, args, inputs, output):
        if module.training:
            states.append((weights(model), output.exit_logits.detach(), inputs["labels"], output.kd_loss.item()))

    def weights(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    model.register_forward_hook(remember, with_kwargs=True)
    trainer.train()
    states.append((weights(model),))
    losses = [entry["loss"] for entry in trainer.state.log_history[:-1]]
    for step in range(6):
        before, logits, labels, kd = states[step]
        after = states[step + 1][0]
        moved = {name for name in before if not before[name].equal(after[name])}
        exits = {m for m in range(1, LAYERS + 1) if f"exit_classifiers.{m}.weight" in moved}
        assert "bert.encoder.layer.0.output.dense.weight" in moved
        ce = [F.cross_entropy(logits[:, m], labels).item() for m in range(LAYERS)]
        if step < 3:
            assert exits == {LAYERS}
            assert losses[step] == approx(ce[-1], rel=1e-4)
        else:
            assert exits == set(range(1, LAYERS + 1))
            expected = sum(w * x for w, x in zip(EXIT_WEIGHTS, ce, strict=True))
            assert losses[step] == approx((1 - ALPHA) * expected + ALPHA * kd, rel=1e-4)


def test_mixed_training_leaves_a_step_to_every_exit(tmp_path):
    """Nine tenths of four steps, rounded up, would be all of them."""
    model = make_model(ga_mode="none", mixed_training=0.9)
    before = model.exit_classifiers["1"].weight.clone()
    make_trainer(tmp_path, model, max_steps=4).train()
    assert not model.last_exit_alone
    assert not model.exit_classifiers["1"].weight.equal(before)


def test_while_the_last_exit_learns_alone_nothing_is_best_and_nobody_loses_patience(tmp_path):
    """A score that falls with each evaluation: what came before the other exits learned is not looked at."""
    scores = iter(range(100, 0, -1))
    more = {
        "eval_dataset": Rows(),
        "compute_metrics": lambda prediction: {"score": next(scores)},
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
    }
    every_step = {
        f"{kind}_{name}": value for kind in ("eval", "save") for name, value in (("strategy", "steps"), ("steps", 1))
    }
    best = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    model = make_model(ga_mode="none", mixed_training=0.5)
    before = model.exit_classifiers["1"].weight.clone()
    trainer = make_trainer(tmp_path, model, more=more, max_steps=12, **every_step, **best)
    trainer.train()
    # Six evaluations alone, the best at once, and two more that are no better.
    assert (trainer.state.best_global_step, trainer.state.best_metric, trainer.state.global_step) == (7, 94, 9)
    assert not model.exit_classifiers["1"].weight.equal(before)


def test_a_training_that_ends_before_all_exits_learned_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(tmp_path, make_model(ga_mode="none", mixed_training=0.5), max_steps=6)
    trainer.add_callback(Stop())
    trainer.train()
    assert "ended at step 2 of 6, where `mixed_training=0.5` still had the last exit learn alone" in caplog.text


def test_the_first_aligned_step_of_mixed_training_weighs_its_rows(tmp_path):
    """Rows in micro-batches of 4 and 1: in each step with alignment, the first too, 4/5 and 1/5 of the sum."""
    trainer = make_trainer(
        tmp_path,
        make_model(mixed_training=0.5),
        rows=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    given, take = [], trainer.get_batch_samples

    def remember(*args):
        batches = take(*args)
        given.append([float(weight) for weight in trainer._row_weights])
        return batches

    trainer.get_batch_samples = remember
    trainer.train()
    assert given == [[], [], [approx(1.6), approx(0.4)], [approx(1.6), approx(0.4)]]


def test_what_the_layers_make_of_broken_weights_is_named(tmp_path):
    model = make_model(ga_mode="none", **LEARNING)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] = math.nan
    with raises(FloatingPointError, match="Training did not start: layer 2 of the model makes numbers that are not"):
        make_trainer(tmp_path, model).train()


@mark.parametrize("new", [True, False])
def test_mixed_training_starts_new_exits_anew_and_leaves_trained_ones(tmp_path, new):
    """When the others begin to learn: what they were trained to be is not made a regression."""
    model = make_model(ga_mode="none", mixed_training=0.5, **LEARNING)
    model.exits_are_new = new
    trainer = make_trainer(tmp_path, model, max_steps=2, learning_rate=1e-9)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(module.exit_classifiers["1"].weight.clone()) if module.training else None
    )
    before = model.exit_classifiers["1"].weight.clone()
    trainer.train()
    first, second = seen
    assert first.equal(before)  # alone, the last exit is the only one that starts
    assert_close(second, before, atol=1e-6, rtol=0) if not new else None
    assert new == ((second - before).abs().max() > 1e-3)
    assert not model.exits_are_new


def test_an_exit_that_is_frozen_is_not_started(tmp_path):
    model = make_model(ga_mode="none", **LEARNING)
    model.exit_classifiers["2"].requires_grad_(False)
    before = {m: exit_.weight.clone() for m, exit_ in model.exit_classifiers.items()}
    make_trainer(tmp_path, model, max_steps=1).train()
    moved = [m for m, exit_ in model.exit_classifiers.items() if not exit_.weight.equal(before[m])]
    assert moved == ["1", "3"]


# ----------------------------------------------------------------------------------------------------- what is noticed


def test_exits_of_one_class_are_found_and_a_policy_on_them_is_told(caplog):
    logits = torch.zeros(4, 3, 2)
    logits[:, 0, 1] = 1.0  # exit 1: always class 1
    logits[:, 1, 0] = tensor([1.0, 1.0, 1.0, -1.0])
    logits[:, 2, 0] = 3.0
    assert one_class_exits(logits, [1, 2, 4]) == [1, 4]
    assert one_class_exits(logits[:1], [1, 2, 4]) == []
    caplog.set_level(logging.WARNING, logger="gaml_hf")
    config = GamlBertConfig(num_hidden_layers=4, exit_layers=[1, 2, 4], exit_strategy="budgeted", budgeted_exit=2)
    warn_of_one_class(logits, config)
    assert not caplog.text
    config.budgeted_exit = 1
    warn_of_one_class(logits, config)
    assert "100% of the rows leave at the exits 1, 4, which answer every row with one class" in caplog.text


# ------------------------------------------------------------------------------------------------------- configuration


@fixture
def old_folder(bert_kwargs, tmp_path):
    """A checkpoint of a time when every exit read [CLS], and its model."""
    config = GamlBertConfig(**bert_kwargs | PAPER_LETTER | {"num_labels": 3, "initializer_range": 0.3})
    model = GamlBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    new = [
        name for name in (*PAPER_LETTER, "stop_gradient_between_exits", "mixed_training") if name.startswith("exit")
    ]
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in new}))
    return tmp_path, model


def test_an_old_checkpoint_answers_as_before(old_folder):
    folder, model = old_folder
    again = GamlBertForSequenceClassification.from_pretrained(folder)
    assert (again.config.exit_pooling, again.config.exit_norm) == ("cls", "none")
    input_ids = torch.randint(1, 60, (5, 7))
    assert_close(again(input_ids).logits, model(input_ids).logits)
    again.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["exit_pooling"] == "cls"


@mark.parametrize(
    ("field", "value", "message"),
    [
        ("exit_learning_rate_multiplier", 0, "a finite number above 0"),
        ("exit_learning_rate_multiplier", math.inf, "a finite number above 0"),
        ("mixed_training", 1.0, r"a share of the steps, in \[0, 1\)"),
        ("mixed_training", -0.1, r"a share of the steps, in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range(field, value, message):
    # A `ValueError`, or one that `strict` wraps in a class of its own.
    with raises(Exception, match=f"`{field}` must be {message}.*Got `{field}={value}`"):
        GamlBertConfig(**{field: value})


def test_rows_without_a_length_are_not_looked_at(tmp_path):
    """A stream is read by the training alone."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Rows()[i] for i in range(ROWS)])

    trainer = make_trainer(tmp_path, make_model(**LEARNING), max_steps=2)
    trainer.train_dataset = Stream()
    trainer.train()
    assert trainer.state.global_step == 2
