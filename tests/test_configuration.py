"""The config: what it holds, what it refuses and how it says so, and what comes back from JSON."""

import json
import re
from dataclasses import fields

from huggingface_hub.errors import StrictDataclassError
from pytest import mark, raises
from transformers import AutoConfig, BertConfig, RobertaConfig

from gaml_hf import GamlBertConfig
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from test_trainer import IS_OLD_TRANSFORMERS


DEFAULTS = {field.name: field.default for field in fields(GamlBertConfig)}
OWN = DEFAULTS.keys() - {field.name for field in fields(BertConfig)}

EVERYTHING = {
    "num_hidden_layers": 6,
    "id2label": {0: "no", 1: "maybe", 2: "yes"},
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "exit_layers": [2, 4, 6],
    "exit_pooler": "per_exit",
    "exit_loss_weights": "uniform",
    "class_weights": [0.5, 1, 2.5],
    "distillation": [[6, 2], [2, 4]],
    "kd_reduction": "sum",
    "kd_temperature": 2.0,
    "alpha": 0.5,
    "ga_mode": "hard",
    "ga_granularity": "tensor",
    "exit_strategy": "max_prob",
    "budgeted_exit": 4,
    "patience": 3,
    "exit_threshold": 0.9,
    "exit_temperatures": [1.5, 1.0, 0.5],
    "text_columns": ["premise", "hypothesis"],
}


def refused(**wrong):
    """The sentence with which the config refuses `wrong`."""
    with raises(Exception) as caught:  # noqa: PT011  # a `ValueError`, or one that `strict` wraps in a class of its own
        GamlBertConfig(**{"num_hidden_layers": 4} | wrong)
    return str(caught.value)


def test_the_docstring_tells_the_truth():
    """Each field has its entry, and the default in the entry is the default of the field."""
    entry = r"^ {8}(\w+) \(.*\*optional\*(?:, defaults to `?(.*?)`?)?\):$"
    documented = dict(re.findall(entry, GamlConfigMixin.__doc__, flags=re.MULTILINE))
    quoted = {name: f'"{DEFAULTS[name]}"' if isinstance(DEFAULTS[name], str) else str(DEFAULTS[name]) for name in OWN}
    assert documented == {name: "" if default == "None" else default for name, default in quoted.items()}


def test_defaults():
    assert GamlBertConfig().exit_layers == list(range(1, 13))
    assert GamlBertConfig(num_hidden_layers=3).exit_layers == [1, 2, 3]
    assert GamlBertConfig(exit_layers=[6, 12]).num_exits == 2
    bert = {name: value for name, value in BertConfig().to_dict().items() if name != "model_type"}
    assert bert.items() <= GamlBertConfig().to_dict().items()  # a BERT in all else


@mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_json_round_trip(values, tmp_path):
    config = GamlBertConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = GamlBertConfig.from_pretrained(tmp_path)
    saved = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in saved} == {
        k: v for k, v in config.to_dict().items() if k not in saved
    }
    assert {name: getattr(loaded, name) for name in values} == values
    assert type(AutoConfig.from_pretrained(tmp_path)) is GamlBertConfig


@mark.parametrize(
    ("wrong", "message"),
    [
        # the exits
        (
            {"exit_layers": [1, 2]},
            "between 1 and 4 (`num_hidden_layers`), the last of them 4. Got `exit_layers=[1, 2]`",
        ),
        ({"exit_layers": [2, 1, 4]}, "`exit_layers` must be rising layer numbers between 1 and 4"),
        ({"exit_layers": [2, 2, 4]}, "Got `exit_layers=[2, 2, 4]`"),
        ({"exit_layers": [0, 4]}, "Got `exit_layers=[0, 4]`"),
        ({"exit_layers": [4, 5]}, "Got `exit_layers=[4, 5]`"),
        ({"exit_layers": []}, "Got `exit_layers=[]`"),
        ({"exit_layers": "all"}, "Field 'exit_layers' expected a list, got str"),
        ({"exit_pooler": "mean"}, "Field 'exit_pooler' expected one of ('none', 'shared', 'per_exit'), got mean"),
        (
            {"exit_temperatures": [1.0]},
            "one finite number above 0 for each of the 4 exits. Got `exit_temperatures=[1.0]`",
        ),
        ({"exit_temperatures": [1, 1, 0, 1]}, "Got `exit_temperatures=[1, 1, 0, 1]`"),
        ({"exit_temperatures": [1.0, 1.0, 1.0, float("nan")]}, "one finite number above 0"),
        ({"text_columns": []}, "`text_columns` must name one column, or two for pairs. Got `text_columns=[]`"),
        ({"text_columns": ["a", "b", "c"]}, "Got `text_columns=['a', 'b', 'c']`"),
        ({"text_columns": "text"}, "Field 'text_columns' expected a list, got str"),
        # the policy
        (
            {"exit_strategy": "patient"},
            "`exit_strategy` must be one of ['budgeted', 'entropy', 'max_prob', 'none', 'patience'], or one of "
            "your own that is registered by then. Got `exit_strategy='patient'`",
        ),
        ({"exit_strategy": "patience"}, "`patience` must be a whole number of at least 1"),
        ({"exit_strategy": "patience", "patience": 0}, "Got `patience=0`"),
        ({"exit_strategy": "patience", "patience": 2.0}, "Field 'patience' expected int, got float"),
        ({"exit_strategy": "entropy"}, "`exit_threshold` must be a number in [0, 1]. Got `exit_threshold=None`"),
        ({"exit_strategy": "entropy", "exit_threshold": -0.1}, "must lie in [0, 1]. Got `exit_threshold=-0.1`"),
        ({"exit_strategy": "max_prob", "exit_threshold": 90}, "must lie in [0, 1]. Got `exit_threshold=90`"),
        (
            {"exit_strategy": "budgeted"},
            "`budgeted_exit` must be one of the exits of this model, [1, 2, 3, 4] (the first layer is 1), when "
            '`exit_strategy="budgeted"`. Got `budgeted_exit=None`',
        ),
        ({"exit_strategy": "budgeted", "budgeted_exit": 0}, "Got `budgeted_exit=0`"),
        ({"exit_strategy": "budgeted", "budgeted_exit": 3, "exit_layers": [2, 4]}, "of this model, [2, 4]"),
        # training
        ({"alpha": 1.5}, "`alpha` must lie in [0, 1]. Got `alpha=1.5`"),
        ({"alpha": -0.1}, "Got `alpha=-0.1`"),
        ({"alpha": "0.2"}, "Field 'alpha' expected float, got str (value: '0.2')"),
        ({"kd_temperature": 0}, "`kd_temperature` must be a finite number above 0. Got `kd_temperature=0`"),
        ({"kd_temperature": float("inf")}, "Got `kd_temperature=inf`"),
        ({"kd_reduction": "batchmean"}, "Field 'kd_reduction' expected one of ('sum', 'mean'), got batchmean"),
        ({"ga_mode": "firm"}, "Field 'ga_mode' expected one of ('none', 'soft', 'hard'), got firm"),
        ({"ga_granularity": "row"}, "Field 'ga_granularity' expected one of ('global', 'layer', 'tensor'), got row"),
        (
            {"exit_loss_weights": "log"},
            "Field 'exit_loss_weights' expected one of ('linear', 'uniform', 'last', 'shallow_deep'), got log",
        ),
        ({"distillation": "all"}, "Field 'distillation' expected one of ('mutual', 'last_to_all', 'none'), got all"),
        (
            {"distillation": [[4, 5]]},
            "`distillation` must hold pairs [teacher, student] of two different exits out of [1, 2, 3, 4]. "
            "Got the pair [4, 5]",
        ),
        ({"distillation": [[3, 3]]}, "Got the pair [3, 3]"),
        ({"distillation": [[4, 1, 2]]}, "Got the pair [4, 1, 2]"),
        (
            {"class_weights": [1.0]},
            "`class_weights` must hold one finite number from 0 for each of the 2 classes, not all of them 0, or be "
            "None. Got `class_weights=[1.0]`",
        ),
        ({"class_weights": [1.0, -1.0]}, "Got `class_weights=[1.0, -1.0]`"),
        ({"class_weights": [1.0, float("nan")]}, "one finite number from 0"),
        ({"class_weights": [0, 0]}, "not all of them 0"),
        ({"class_weights": "balanced"}, "Field 'class_weights' expected a list, got str"),
        # the task
        ({"num_labels": 1}, "`num_labels` must be at least 2: with one label every exit is certain of it"),
        ({"problem_type": "regression"}, "Got `problem_type='regression'`"),
        ({"problem_type": "multi_label_classification"}, "Exits need one class per text"),
        ({"id2label": {0: "yes", 1: "yes"}}, "`id2label` must name each class differently. Got {0: 'yes', 1: 'yes'}"),
        (
            {"id2label": {0: "yes", 1: "no", 5: "maybe"}},
            "`id2label` must name the classes 0 to 2 (`num_labels` is 3), each with a `str`. Got {0: 'yes', 1:",
        ),
        ({"id2label": {0: "yes", 1: None}}, "`id2label` must name the classes 0 to 1"),
        ({"id2label": ["yes", "no"]}, "`id2label` must be a dict from class numbers to names"),
        ({"id2label": {"yes": 0, "no": 1}}, "Got {'yes': 0, 'no': 1}"),
        ({"is_decoder": True}, "Exits are for encoders"),
        # a name nobody knows, but nearly one of ours
        ({"patiense": 2}, "`patiense` is not a field of GamlBertConfig. Did you mean `patience`?"),
        ({"exit_treshold": 0.5}, "Did you mean `exit_threshold`?"),
    ],
    ids=str,
)
def test_refusals(wrong, message):
    refusal = refused(**wrong)
    assert message in refusal or (IS_OLD_TRANSFORMERS and "Validation error for field 'id2label'" in refusal)


@mark.parametrize("auto", [GamlBertConfig, AutoConfig])
def test_overrides_are_checked_like_any_other_value(tmp_path, auto):
    GamlBertConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    config = auto.from_pretrained(tmp_path, exit_strategy="patience", patience=2, num_labels=3, alpha=1)
    assert (config.exit_strategy, config.patience, config.num_labels, config.alpha) == ("patience", 2, 3, 1)
    for wrong, message in [
        ({"exit_strategy": "patience", "patience": 0}, "`patience` must be a whole number of at least 1"),
        ({"exit_strategy": "patience"}, "Got `patience=None`"),
        ({"exit_layers": [1, 2]}, "Got `exit_layers=[1, 2]`"),
        ({"num_labels": 1}, "`num_labels` must be at least 2"),
        ({"alpha": 2.0}, "Got `alpha=2.0`"),
        ({"patiense": 2}, "Did you mean `patience`?"),
    ]:
        with raises(Exception, match=re.escape(message)):
            auto.from_pretrained(tmp_path, **wrong)


def test_a_field_is_checked_when_it_is_set():
    with raises(Exception, match=re.escape("expected one of ('none', 'soft', 'hard'), got gentle")):
        GamlBertConfig().ga_mode = "gentle"


def test_a_bert_checkpoint_becomes_ours(tmp_path):
    BertConfig(num_hidden_layers=4, hidden_size=48, vocab_size=99).save_pretrained(tmp_path)
    config = GamlBertConfig.from_pretrained(tmp_path, num_labels=3)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("gaml_bert", 48, 99)
    assert config.exit_layers == [1, 2, 3, 4]
    assert config.to_dict()["model_type"] == "gaml_bert"


def test_another_encoder_is_refused(tmp_path):
    RobertaConfig().save_pretrained(tmp_path)
    message = (
        f"GamlBertConfig is for checkpoints of type bert or gaml_bert. `{tmp_path}` holds a model of type `roberta`; "
        "`GamlAutoModelForSequenceClassification` finds the class for it"
    )
    with raises(ValueError, match=re.escape(message)):
        GamlBertConfig.from_pretrained(tmp_path)


def test_the_hub_finds_the_code(tmp_path):
    """Whoever saves: a copy loaded from a Hub carries its repository's name, and two configs must not share a dict."""
    first, second = GamlBertConfig(), GamlBertConfig(auto_map={"AutoConfig": "me/repo--other.Config"})
    assert first.auto_map == second.auto_map
    assert first.auto_map is not second.auto_map
    first.custom_pipelines["text-classification"]["impl"] = "changed"
    assert second.custom_pipelines["text-classification"]["impl"] == "pipeline_gaml.GamlTextClassificationPipeline"
    second.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {
        "AutoConfig": "modeling_gaml_bert.GamlBertConfig",
        "AutoModel": "modeling_gaml_bert.GamlBertForSequenceClassification",
        "AutoModelForSequenceClassification": "modeling_gaml_bert.GamlBertForSequenceClassification",
    }


@mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_file_cannot_name_code_of_another_repository(key, tmp_path):
    GamlBertConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "somebody/kernel"}))
    with raises(ValueError, match=rf"`{key}` in a config must be a plain name.*'somebody/kernel'"):
        GamlBertConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "eager"}))
    assert GamlBertConfig.from_pretrained(tmp_path).num_exits == 12


def test_a_parameter_alone_implies_its_strategy_when_loaded(tmp_path):
    """As in a call of the pipeline; a threshold means opposite things to two strategies, and implies none."""
    GamlBertConfig(exit_strategy="entropy", exit_threshold=0.3).save_pretrained(tmp_path)
    load = GamlBertConfig.from_pretrained
    assert (load(tmp_path, patience=2).exit_strategy, load(tmp_path, patience=2).patience) == ("patience", 2)
    assert load(tmp_path, budgeted_exit=3).exit_strategy == "budgeted"
    assert (load(tmp_path, exit_threshold=0.1).exit_strategy, load(tmp_path).exit_strategy) == ("entropy", "entropy")
    GamlBertConfig().save_pretrained(tmp_path)
    with raises(ValueError, match="`exit_threshold` is read with .* alone; name the strategy you want"):
        load(tmp_path, exit_threshold=0.1)
    GamlBertConfig(exit_strategy="entropy", exit_threshold=0.3).save_pretrained(tmp_path)
    with raises(StrictDataclassError, match="`exit_threshold` must be a number in .* Got `exit_threshold=None`"):
        load(tmp_path, exit_strategy="max_prob")  # 0.3 was chosen for entropy
    with raises(ValueError, match='`patience` is read with `exit_strategy="patience"` alone'):
        load(tmp_path, patience=2, exit_strategy="entropy", exit_threshold=0.1)
