"""The static baselines: each one is the method it names, and trains."""

import numpy as np
import torch
from pytest import approx, fixture, mark, raises
from torch import tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    TrainingArguments,
)

from benchmarks.baselines import BASELINES, Context, distilbert, head_pruning, layer_drop, pkd, theseus, truncated
from benchmarks.baselines.distillation import soft_target_loss
from gaml_hf import GamlBertConfig, GamlBertForSequenceClassification


ROWS, LAYERS = 16, 4


@fixture
def config(bert_kwargs) -> BertConfig:
    # Without dropout, so that a training pass can be compared with a plain one.
    sizes = bert_kwargs | {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return BertConfig(
        **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, initializer_range=0.2
    )


@fixture
def rows(config) -> list[dict]:
    ids = torch.randint(5, config.vocab_size, (ROWS, 6))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0  # half of the rows are padded
    types = (torch.arange(6) > 2).long()
    return [
        {"input_ids": ids[i], "attention_mask": mask[i], "token_type_ids": types, "labels": i % 3} for i in range(ROWS)
    ]


@fixture
def teacher(config) -> BertForSequenceClassification:
    return BertForSequenceClassification(config).eval()


@fixture
def plain(config) -> GamlBertForSequenceClassification:
    """A fine-tuned model with one exit, at the last layer."""
    sizes = {name: value for name, value in config.to_dict().items() if name in BertConfig().to_dict()}
    one_exit = {"exit_layers": [LAYERS], "exit_loss_weights": "last", "distillation": "none", "ga_mode": "none"}
    sizes |= {"model_type": "gaml_bert", "num_labels": 3}
    return GamlBertForSequenceClassification(GamlBertConfig(**sizes | one_exit)).eval()


@fixture
def make_context(tmp_path, config, rows, teacher, plain):
    BertModel(config).save_pretrained(tmp_path / "backbone")

    def make(layers: int = 2, student: str | None = None, **arguments) -> Context:
        defaults = {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        return Context(
            backbone=str(tmp_path / "backbone"),
            num_labels=3,
            arguments=TrainingArguments(str(tmp_path / "out"), **(defaults | arguments)),
            trainer_arguments={"train_dataset": rows, "eval_dataset": rows},
            teacher=lambda: teacher,
            plain=lambda: plain,
            layers=layers,
            student=student,
        )

    return make


@fixture
def batch(rows) -> dict:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def copy_of(state: dict) -> dict:
    return {key: value.clone() for key, value in state.items()}


def run_layers(model: BertForSequenceClassification, layers, batch) -> torch.Tensor:
    """Logits of `model` with these encoder layers, one after the other."""
    hidden = model.bert.embeddings(batch["input_ids"], token_type_ids=batch["token_type_ids"])
    mask = torch.zeros(ROWS, 1, 1, 6).masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
    for layer in layers:
        hidden = layer(hidden, mask)
    if isinstance(model, GamlBertForSequenceClassification):
        keep = batch["attention_mask"][..., None]
        return model.exit_classifiers[str(LAYERS)]((hidden * keep).sum(1) / keep.sum(1))
    return model.classifier(model.bert.pooler(hidden))


# All of them


@mark.parametrize("name", BASELINES)
def test_a_baseline_trains_and_is_used(name, make_context, batch, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    context = make_context(**steps, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer = BASELINES[name].make(context)
    before = copy_of(trainer.model.state_dict())
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint is not None
    after = trainer.model.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    if name == "theseus":
        assert moved
        assert all(key.startswith("bert.encoder.layer.") for key in moved)
    else:
        assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} < moved

    evaluated = trainer.predict(trainer.eval_dataset).predictions
    model = BASELINES[name].finish(trainer).eval()
    assert not any(isinstance(module, layer_drop.LayerDropEncoder) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    answers = model(**batch).logits
    assert answers.shape == (ROWS, 3)
    if name == "head_pruning":
        assert len(model.bert.encoder.layer) == LAYERS
        return
    # What was scored in training is what is used, and a saved copy of it is a plain BERT of that depth.
    assert_close(answers, tensor(evaluated))
    model.save_pretrained(tmp_path / "finished")
    kind = GamlBertForSequenceClassification if name == "theseus" else BertForSequenceClassification
    again = kind.from_pretrained(tmp_path / "finished")
    assert again.config.num_hidden_layers == len(again.bert.encoder.layer) == 2
    assert_close(again(**batch).logits, answers)


@mark.parametrize("name", ["truncated", "distilbert", "pkd", "theseus"])
def test_accumulation_gives_the_step_of_the_whole_batch(name, make_context):
    weights = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        context = make_context(
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0,
        )
        options = {"base_rate": 1.0} if name == "theseus" else {}
        trainer = BASELINES[name].make(context, **options)
        trainer.train()
        weights.append(copy_of(trainer.model.state_dict()))
    for key, value in weights[0].items():
        assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5, msg=key)


def test_all_start_from_the_same_classifier(make_context):
    names = [name for name in BASELINES if name != "theseus"]  # which keeps its teacher's
    torch.manual_seed(1)
    weights = []
    for name in names:
        torch.rand(3)
        weights.append(BASELINES[name].make(make_context()).model.classifier.weight.clone())
    assert all(torch.equal(weight, weights[0]) for weight in weights)


@mark.parametrize("name", ["pkd", "layer_drop", "theseus"])
def test_a_depth_that_does_not_divide(name, make_context):
    with raises(ValueError, match=r"`layers` must divide the 4 layers of the full model, as 2 does.* Got `layers=3`"):
        BASELINES[name].make(make_context(layers=3))


# BERT-kL


def test_truncated_is_the_first_layers(make_context):
    context = make_context(layers=3)
    model, backbone = truncated.make(context).model, BertModel.from_pretrained(context.backbone).state_dict()
    assert len(model.bert.encoder.layer) == 3
    assert all(torch.equal(value, backbone[key]) for key, value in model.bert.state_dict().items())


# DistilBERT


def test_soft_targets_by_hand():
    # Softened by 2, the student answers (1/2, 1/2) and the teacher (3/4, 1/4).
    student, teacher = tensor([[0.0, 0.0]]), tensor([[2 * np.log(3), 0.0]], dtype=torch.float)
    expected = 4 * (0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5))
    assert soft_target_loss(student, teacher, 2.0).item() == approx(expected, rel=1e-6)
    assert soft_target_loss(student.repeat(5, 1), teacher.repeat(5, 1), 2.0).item() == approx(expected, rel=1e-6)


def test_the_layers_of_a_distilled_student(make_context):
    assert distilbert.spaced_layers(12, 6) == [0, 2, 4, 7, 9, 11]  # as in the code of its authors
    assert distilbert.spaced_layers(6, 3) == [0, 2, 5]
    assert distilbert.spaced_layers(4, 2) == [0, 3]
    with raises(ValueError, match="`layers` must be between 2 and 4.*Got `layers=1`"):
        distilbert.make(make_context(layers=1))
    context = make_context()
    backbone = BertModel.from_pretrained(context.backbone).encoder.layer
    for options, kept in (({}, (0, 3)), ({"first_layers": True}, (0, 1))):
        for layer, i in zip(distilbert.make(context, **options).model.bert.encoder.layer, kept, strict=True):
            assert all(torch.equal(value, backbone[i].state_dict()[key]) for key, value in layer.state_dict().items())


def test_distilbert_learns_from_answers_and_labels(make_context, teacher, batch):
    trainer = distilbert.make(make_context(), temperature=3.0, alpha=0.25)
    model = trainer.model.train()
    ce = model(**batch).loss
    soft = soft_target_loss(model(**batch).logits, teacher(**batch).logits, 3.0)
    assert_close(trainer.compute_loss(model, batch), 0.25 * soft + 0.75 * ce)
    # An evaluation loss is the cross-entropy, as for every other method.
    assert_close(trainer.compute_loss(model.eval(), batch), ce)
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


def test_a_distilbert_checkpoint_as_student(make_context, config, batch, tmp_path, teacher):
    small = DistilBertConfig(vocab_size=config.vocab_size, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    small.dropout = small.attention_dropout = small.seq_classif_dropout = 0.0
    DistilBertModel(small).save_pretrained(tmp_path / "student")
    trainer = distilbert.make(make_context(student=str(tmp_path / "student")), alpha=1.0)
    trainer.train()
    model = distilbert.finish(trainer)
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    # The teacher still sees which text a token is of, though the student has no such input.
    seen = next(iter(trainer.get_train_dataloader()))
    assert "token_type_ids" in seen
    model.train()
    expected = soft_target_loss(
        model(batch["input_ids"], batch["attention_mask"]).logits, teacher(**batch).logits, 2.0
    )
    assert_close(trainer.compute_loss(model, batch), expected)

    DistilBertModel(DistilBertConfig(vocab_size=7, dim=32, n_layers=2, n_heads=4, hidden_dim=64)).save_pretrained(
        tmp_path / "other"
    )
    with raises(ValueError, match="`teacher` must have the student's vocabulary and classes: 7 tokens, 3 labels"):
        distilbert.make(make_context(student=str(tmp_path / "other")))


# BERT-PKD


def test_the_layers_that_teach(make_context):
    for layers, depth, skip, last in (
        (6, 12, [2, 4, 6, 8, 10], [7, 8, 9, 10, 11]),  # the paper's
        (3, 6, [2, 4], [4, 5]),
        (2, 4, [2], [3]),
    ):
        context = make_context(layers=layers)
        assert pkd.teacher_layers(context, depth, last=False) == skip
        assert pkd.teacher_layers(context, depth, last=True) == last


def test_patient_loss_by_hand():
    # Directions (3/5, 4/5) and (1, 0) differ by (-2/5, 4/5): a mean square of 0.4; the second layer not at all. What
    # is not [CLS] does not count.
    student = [tensor([[[3.0, 4.0], [9.0, 9.0]]]), tensor([[[0.0, 2.0], [9.0, 9.0]]])]
    teacher = [tensor([[[7.0, 0.0], [1.0, 9.0]]]), tensor([[[0.0, 5.0], [1.0, 9.0]]])]
    assert_close(pkd.patient_loss(student, teacher), tensor(0.2))


@mark.parametrize(("last", "taught_by"), [(False, 2), (True, 3)])
def test_pkd_loss_is_its_three_parts(make_context, teacher, batch, last, taught_by):
    trainer = pkd.make(make_context(), alpha=0.2, temperature=5.0, beta=10.0, last=last)
    model = trainer.model.train()
    own, wanted = model(**batch, output_hidden_states=True), teacher(**batch, output_hidden_states=True)
    patience = 0.0
    for row in range(ROWS):
        s, t = own.hidden_states[1][row, 0], wanted.hidden_states[taught_by][row, 0]
        patience += ((s / s.norm() - t / t.norm()) ** 2).mean() / ROWS
    kd = soft_target_loss(own.logits, wanted.logits, 5.0)
    ce = F.cross_entropy(own.logits, batch["labels"])
    assert_close(trainer.compute_loss(model, batch), 0.8 * ce + 0.2 * kd + 10 * patience)


def test_pkd_with_a_teacher_of_the_same_weights_has_nothing_to_be_patient_about(make_context, batch):
    context = make_context(layers=LAYERS)
    context.teacher = lambda: pkd.load_backbone(context)
    trainer = pkd.make(context, alpha=1.0, beta=1e6)
    assert_close(trainer.compute_loss(trainer.model.train(), batch), tensor(0.0), atol=1e-5, rtol=0)


# LayerDrop


def test_layer_drop_drops_whole_layers_in_training_only(make_context, batch):
    model = layer_drop.make(make_context(), drop_rate=0.3).model
    encoder, ran = model.bert.encoder, []
    for i, layer in enumerate(encoder.layer):
        layer.register_forward_hook(lambda *_, i=i: ran[-1].append(i))
    with torch.no_grad():
        for _ in range(300):
            ran.append([])
            model.train()(**batch)
        assert all(passed == sorted(passed) for passed in ran)
        for i in range(LAYERS):
            assert np.mean([i not in passed for passed in ran]) == approx(0.3, abs=0.1)
        assert len({tuple(passed) for passed in ran}) > 8  # layers are dropped independently: 16 subsets
        ran.append([])
        logits = model.eval()(**batch).logits
    assert ran[-1] == [0, 2]  # every other, from the first
    assert_close(logits, run_layers(model, [encoder.layer[0], encoder.layer[2]], batch))


def test_layer_drop_rate(make_context):
    assert layer_drop.make(make_context()).model.bert.encoder.drop_rate == 0.5  # 1 - 2 / 4
    assert layer_drop.make(make_context(layers=1)).model.bert.encoder.drop_rate == 0.75
    with raises(ValueError, match=r"`drop_rate` must lie in \[0, 1\). Got 1"):
        layer_drop.make(make_context(), drop_rate=1)


# BERT-of-Theseus


def test_theseus_replaces_modules(make_context, plain, batch):
    model = theseus.make(make_context()).model
    old, new = plain.bert.encoder.layer, model.bert.encoder.layer
    for successor, first in zip(new, old, strict=False):  # successors start from the first layers
        assert all(torch.equal(value, first.state_dict()[key]) for key, value in successor.state_dict().items())
    torch.nn.init.normal_(new[0].output.dense.bias)  # or the first successor and the first layer are the same
    torch.nn.init.normal_(new[1].output.dense.bias)
    with torch.no_grad():
        every = [[*old], [new[0], *old[2:]], [*old[:2], new[1]], [*new]]
        expected = [run_layers(plain, layers, batch) for layers in every]
        model.train()
        for rate, index in ((0.0, 0), (1.0, 3)):
            model.replacing_rate = rate
            assert_close(model(**batch).logits, expected[index])
        model.replacing_rate = 0.5
        counts = [0] * 4
        for _ in range(200):
            logits = model(**batch).logits
            (match,) = [i for i in range(4) if torch.allclose(logits, expected[i], atol=1e-5)]
            counts[match] += 1
        assert all(count == approx(50, abs=25) for count in counts)  # two independent coins
        model.replacing_rate = 0.0
        assert_close(model.eval()(**batch).logits, expected[3])  # an evaluation runs successors alone


def test_theseus_curriculum(make_context):
    trainer = theseus.make(make_context(max_steps=8), base_rate=0.2, replacing_share=0.5)
    model, rates = trainer.model, []
    model.register_forward_hook(lambda *_: rates.append(model.replacing_rate))
    trainer.train()
    assert rates == approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    with raises(ValueError, match="`base_rate` must lie in .* Got `base_rate=-1`, `replacing_share=0.5`"):
        theseus.make(make_context(), base_rate=-1)


def test_theseus_trains_successors_alone(make_context, plain, batch):
    before = copy_of(plain.state_dict())
    model = theseus.make(make_context()).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("bert.encoder.layer.")}
    model.replacing_rate = 0.0
    model.train()(**batch).loss.backward()  # nothing is replaced: a step without effect, but no failure
    assert all((parameter.grad == 0).all() for parameter in model.bert.encoder.layer.parameters())
    model.replacing_rate = 1.0
    model(**batch).loss.backward()
    assert all(layer.output.dense.weight.grad.norm() > 0 for layer in model.bert.encoder.layer)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert all(parameter.requires_grad for parameter in plain.parameters())  # and the teacher is left as it was


# Head pruning


def masked(model: BertForSequenceClassification, heads: dict[int, list[int]], batch) -> torch.Tensor:
    """Logits of the whole model, with these heads' outputs set to zero."""

    def mask(gone: list[int]):
        def hook(dense, args):
            states = args[0].unflatten(-1, (4, 8)).clone()
            states[:, :, gone] = 0
            return states.flatten(-2)

        return hook

    layers = model.bert.encoder.layer
    hooks = [layers[i].attention.output.dense.register_forward_pre_hook(mask(gone)) for i, gone in heads.items()]
    logits = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return logits


@mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_heads_are_masked_heads(config, batch, attention):
    config._attn_implementation = attention
    model = BertForSequenceClassification(config).eval()
    heads = {0: [1, 2], 1: [0], 3: [3, 0, 1]}
    whole = model(**batch).logits
    expected, weights = masked(model, heads, batch), sum(p.numel() for p in model.parameters())
    assert not torch.allclose(whole, expected, atol=1e-4)
    pruned = head_pruning.prune(model, heads)
    assert_close(pruned(**batch).logits, expected)
    # A head: 8 rows of 32 weights and a bias in query, key and value; 8 columns of 32 in the output.
    assert weights - sum(p.numel() for p in pruned.parameters()) == 6 * (3 * 8 * 33 + 8 * 32)


def test_head_importance_is_the_mean_absolute_slope(make_context, rows):
    trainer = head_pruning.make(make_context(per_device_eval_batch_size=5))  # the last batch is smaller
    model = trainer.model.double().eval()
    slopes = torch.zeros(LAYERS, 4, dtype=torch.double)
    step = 1e-4
    for row in rows:
        row = {key: torch.as_tensor(value)[None] for key, value in row.items()}
        for i in range(LAYERS):
            for head in range(4):
                losses = []
                for scale in (1 + step, 1 - step):  # of this head's output
                    hook = model.bert.encoder.layer[i].attention.output.dense.register_forward_pre_hook(
                        lambda _, args, head=head, scale=scale: (
                            args[0] * torch.where(torch.arange(32) // 8 == head, scale, 1.0)
                        )
                    )
                    with torch.no_grad():
                        losses.append(model(**row).loss)
                    hook.remove()
                slopes[i, head] += abs(losses[0] - losses[1]) / (2 * step)
    expected = slopes / slopes.norm(dim=1, keepdim=True)
    importance = head_pruning.head_importance(trainer)
    assert_close(importance.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_least_important_heads_go():
    importance = tensor([[0.1, 0.9, 0.3, 0.2], [0.6, 0.5, 0.4, 0.05]])
    assert head_pruning.heads_to_prune(importance, 0.5) == {0: [0, 3, 2], 1: [3]}
    assert head_pruning.heads_to_prune(importance, 0.0) == {}
    assert head_pruning.heads_to_prune(importance, 0.99) == {0: [0, 3, 2], 1: [3, 2, 1]}  # each layer keeps its best
    # A layer whose heads all count less than another layer's keeps one.
    assert head_pruning.heads_to_prune(tensor([[0.1, 0.2], [0.8, 0.9]]), 0.5) == {0: [0], 1: [0]}


def test_head_pruning_prunes_after_training(make_context, batch):
    trainer = head_pruning.make(make_context(), share=0.5)
    trainer.train()
    heads = head_pruning.heads_to_prune(head_pruning.head_importance(trainer), 0.5)
    expected = masked(trainer.model.eval(), heads, batch)
    model = head_pruning.finish(trainer)
    assert_close(model(**batch).logits, expected)
    assert_close(tensor(trainer.predict(trainer.eval_dataset).predictions), expected)
    assert sum(layer.attention.self.num_attention_heads for layer in model.bert.encoder.layer) == LAYERS * 4 // 2
    with raises(ValueError, match=r"`share` must lie in \[0, 1\).* Got 1"):
        head_pruning.make(make_context(), share=1)


# A real BERT


@mark.parametrize("name", BASELINES)
def test_with_minilm(name, minilm_folder, make_context, rows, batch):
    context = make_context(layers=3, max_steps=1)
    context.backbone = str(minilm_folder)
    context.teacher = lambda: truncated.load_backbone(context)
    context.plain = lambda: GamlBertForSequenceClassification.from_pretrained(
        context.backbone, num_labels=3, exit_layers=[6], exit_loss_weights="last", distillation="none"
    )
    trainer = BASELINES[name].make(context)
    trainer.train()
    model = BASELINES[name].finish(trainer).eval()
    layers = model.bert.encoder.layer
    heads = sum(layer.attention.self.num_attention_heads for layer in layers)
    assert (len(layers), heads) == ((6, 36) if name == "head_pruning" else (3, 36))
    assert model(**batch).logits.isfinite().all()
