"""
The CPU runtime: a trained model as ONNX segments, one per layer with its exit, run by ONNX Runtime in fp32 or int8.

A graph cannot be left in its middle, so the model is cut where rows may leave: the policy decides between two
segments, and the next one is given only the rows that stay. Needs `pip install gaml_hf[onnx]`.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from gaml_hf.hub.folders import SEAL, save_tokenizer, staging_folder, why_unsealed, write_seal
from gaml_hf.models.auto import GamlAutoConfig
from gaml_hf.models.configuration_gaml import GamlConfigMixin
from gaml_hf.models.engine_gaml import PrepackedLinear
from gaml_hf.models.exiting_gaml import ExitPolicy, policy_for_call
from gaml_hf.models.exits_base_gaml import GamlSequenceClassifierOutput, check_plain_weights
from gaml_hf.models.exits_gaml import ExitsMixin


logger = logging.get_logger(__name__)

OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8  # what every ONNX Runtime that knows OPSET can read
ACTIVATIONS = {"gelu": "Gelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu", "relu": "Relu"}
# ONNX Runtime's own operators, among them those that its optimizer would otherwise have to find.
CONTRIB = {"Gelu", "FastGelu", "MatMulIntegerToFloat", "SkipLayerNormalization", "MultiHeadAttention"}
# An option of a session: weights of signed bytes become unsigned ones with zero point 128, for the same sums.
UNSIGNED_WEIGHTS = "session.x64quantprecision"


def segment_files(config: GamlConfigMixin) -> list[str]:
    """Names of an export's graphs: embeddings, layers, and exits where they are not in the graph of their layer."""
    exits = [f"exit_{m}.onnx" for m in config.exit_layers] if config.shares_layers else []
    return ["embeddings.onnx", *(f"layer_{m}.onnx" for m in dict.fromkeys(config.layer_of_depth)), *exits]


# Export


def export_onnx(
    model: ExitsMixin,
    folder: str | os.PathLike,
    *,
    precision: Literal["fp32", "int8"] = "fp32",
    tokenizer: Any = None,
) -> Path:
    """
    Write a model as ONNX segments: the embeddings, and each layer with its exit. Of ALBERT, whose layers share their
    weights, the one layer (or one per group), and each exit on its own.

    With `"int8"` the matrices of the layers become 8-bit integers, one scale per output channel, and activations are
    quantized as they come (dynamic quantization). Embeddings, LayerNorm, softmax and the exits stay in fp32. The same
    folder serves every processor: which kernels sum these products exactly is found when it is loaded.

    Args:
        model ([`GamlBertForSequenceClassification`] or another family's): trained; read in fp32, and left as it was.
        folder (`str` or `os.PathLike`): where to, a new folder; it appears whole, in one rename.
        precision (`str`, *optional*, defaults to `"fp32"`): `"fp32"` or `"int8"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): saved beside the model.

    Returns:
        `Path`: the folder, for [`GamlOrtModelForSequenceClassification.from_pretrained`].

    Raises:
        ValueError: the folder exists, or `precision`, the model's family or its activation is not one of those known.
        ImportError: the packages `onnx` and `onnxruntime` are not installed.
    """
    onnx, _ = _import_onnx()
    folder = Path(folder)
    if precision not in ("fp32", "int8"):
        raise ValueError(f"`precision` must be 'fp32' or 'int8'. Got `precision={precision!r}`.")
    if not hasattr(getattr(model, "config", None), "exit_layers"):
        raise ValueError(f"`model` must be a model with exits. Got a {type(model).__name__}.")
    if getattr(model, "layer_parts", None) is None:  # an encoder of images has no such field
        raise ValueError(
            f"{type(model).__name__} cannot be exported: its layers are not built of BERT's parts. Run it in PyTorch."
        )
    check_plain_weights(model, "export_onnx")
    if any(isinstance(module, PrepackedLinear) for module in model.modules()):
        raise ValueError(
            "`model` must have its weights in their usual order, and those of this one are prepacked for PyTorch. "
            "Export it before `prepack()`, or load it anew."
        )
    if _activation(model.config) not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_act` of the model must be one of {sorted(ACTIVATIONS)} to be exported. "
            f"Got {_activation(model.config)!r}."
        )
    with _new_folder(folder) as stage:
        config = copy.deepcopy(model.config)
        if precision == "int8" and config.exit_certificate is not None:
            config.exit_certificate = None
            logger.warning(
                "`exit_certificate` was made for the logits of the model itself. The int8 export has others, and none."
            )
        config.to_json_file(stage / "config.json")
        if tokenizer is not None:
            save_tokenizer(tokenizer, stage)
        for name in segment_files(model.config):
            kind, _, depth = Path(name).stem.partition("_")
            if kind == "embeddings":
                graph = _embeddings_graph(model)
            elif kind == "layer":
                graph = _layer_graph(model, int(depth), precision)
            else:
                graph = _exit_graph(model, int(depth))
            segment = _to_model(graph)
            onnx.helper.set_model_props(segment, {"precision": precision, "exits": json.dumps(_exits_of(config))})
            onnx.save(segment, stage / name)
        write_seal(stage, "*.onnx")  # not the config, which may be edited
    return folder


def _exits_of(config: GamlConfigMixin) -> dict[str, Any]:
    """What of a config is in the graphs: edited in `config.json`, it would no longer be what they do."""
    names = ("num_hidden_layers", "num_labels", "exit_layers", "exit_pooling", "exit_pooler", "exit_norm")
    return {name: getattr(config, name) for name in names}


def _to_model(graph: Any) -> Any:
    import onnx

    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gaml_hf")


class _Graph:
    """Collects the nodes and weights of one segment."""

    def __init__(self, precision: str = "fp32"):
        self.precision = precision
        self.nodes, self.weights = [], []

    def weight(self, name: str, value: Tensor | np.ndarray) -> str:
        import onnx

        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float32).numpy()
        self.weights.append(onnx.numpy_helper.from_array(value.copy(order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes) -> str:
        import onnx

        domain = "com.microsoft" if op in CONTRIB else ""
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(self, name: str, layer: torch.nn.Linear, x: str, bias: bool = True) -> str:
        """`x @ W.T + b`, and without `bias` the product alone. In int8, W has a scale for each row."""
        bias_input = [self.weight(f"{name}.bias", layer.bias)] if bias else []
        if self.precision == "fp32":
            product = f"{name}.product" if bias else name
            self.node("MatMul", [x, self.weight(f"{name}.weight", layer.weight.T)], product)
            return self.node("Add", [product, *bias_input], name) if bias else product
        quantized = [f"{x}.quantized", f"{x}.scale", f"{x}.zero_point"]
        if not any(quantized[0] in node.output for node in self.nodes):  # keys and values share it
            self.node("DynamicQuantizeLinear", [x], *quantized)
        weight = layer.weight.detach().to("cpu", torch.float32)
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        integers = (weight / scale[:, None]).round().to(torch.int8).T.contiguous().numpy()
        inputs = [quantized[0], self.weight(f"{name}.weight", integers), quantized[1]]
        inputs += [self.weight(f"{name}.weight_scale", scale), quantized[2]]
        # It may be left out, but then ONNX Runtime 1.21 ignores UNSIGNED_WEIGHTS, or ends the process.
        inputs += [self.weight(f"{name}.weight_zero_point", np.int8(0)), *bias_input]
        return self.node("MatMulIntegerToFloat", inputs, name)

    def build(self, name: str, inputs: dict[str, tuple], outputs: dict[str, list]) -> Any:
        import onnx

        def info(values):
            return [onnx.helper.make_tensor_value_info(key, *value) for key, value in values.items()]

        outputs = {key: (onnx.TensorProto.FLOAT, shape) for key, shape in outputs.items()}
        return onnx.helper.make_graph(self.nodes, name, info(inputs), info(outputs), self.weights)


def _activation(config: GamlConfigMixin) -> str:
    return getattr(config, "hidden_act", None) or config.activation  # DistilBERT's name for it


def _has_bias(model: ExitsMixin) -> bool:
    return model.embedding_parts().distance_bias is not None


def _embeddings_graph(model: ExitsMixin) -> Any:
    """Hidden states of the tokens, and, where attention has a bias by distance, that of all layers at this length."""
    import onnx

    parts, graph = model.embedding_parts(), _Graph()
    total = graph.node("Gather", [graph.weight("word_embeddings", parts.word.weight), "input_ids"], "word")
    inputs = ["input_ids"]
    if parts.token_type is not None:
        inputs.append("token_type_ids")
        table = graph.weight("token_type_embeddings", parts.token_type.weight)
        token_type = graph.node("Gather", [table, "token_type_ids"], "token_type")
        total = graph.node("Add", [total, token_type], "word_and_type")
    length = graph.node("Shape", ["input_ids"], "length", start=1, end=2)  # (1,)
    table = graph.weight("position_embeddings", parts.position.weight)
    if parts.first_position == 0:
        start = graph.weight("first_position", np.array([0]))
        position = graph.node("Slice", [table, start, length], "position")  # (sequence_length, embedding_size)
    else:  # RoBERTa's way: a padding token, in a text too, has the place before the first one and is not counted
        axis, padding = graph.weight("axis", np.array(1)), graph.weight("padding", np.array(parts.first_position - 1))
        is_token = graph.node("Not", [graph.node("Equal", ["input_ids", padding], "is_padding")], "is_token")
        counts = graph.node("Cast", [is_token], "counts", to=onnx.TensorProto.INT64)
        number = graph.node("CumSum", [counts, axis], "token_number")
        place = graph.node("Add", [graph.node("Mul", [number, counts], "number_or_0"), padding], "position_place")
        position = graph.node("Gather", [table, place], "position")  # (batch_size, sequence_length, embedding_size)
    total = graph.node("Add", [total, position], "sum")
    norm = [graph.weight("norm.weight", parts.norm.weight), graph.weight("norm.bias", parts.norm.bias)]
    last = "hidden_states" if parts.projection is None else "normalized"
    graph.node("LayerNormalization", [total, *norm], last, epsilon=parts.norm.eps)
    if parts.projection is not None:
        graph.linear("hidden_states", parts.projection, last)
    outputs = {"hidden_states": ["batch_size", "length", model.config.hidden_size]}
    if parts.distance_bias is not None:  # (num_heads, 2 * longest - 1), by the key's place less the query's
        num_heads, num_distances = parts.distance_bias.shape
        scalars = {"zero": 0, "step": 1, "middle": num_distances // 2}
        for name, value in scalars.items():
            graph.weight(name, np.array(value))
        place = graph.node("Range", ["zero", graph.node("Squeeze", [length], "count"), "step"], "place")
        row = graph.node("Unsqueeze", [place, graph.weight("axis_0", np.array([0]))], "key_place")
        column = graph.node("Unsqueeze", [place, graph.weight("axis_1", np.array([1]))], "query_place")
        distance = graph.node("Add", [graph.node("Sub", [row, column], "distance"), "middle"], "number")
        table = graph.weight("distance_bias", parts.distance_bias)
        bias = graph.node("Gather", [table, distance], "bias_by_head", axis=1)  # (num_heads, length, length)
        graph.node("Unsqueeze", [bias, "axis_0"], "attention_bias")
        outputs["attention_bias"] = [1, num_heads, "length", "length"]
    ids = (onnx.TensorProto.INT64, ["batch_size", "length"])
    return graph.build("embeddings", dict.fromkeys(inputs, ids), outputs)


def _layer_graph(model: ExitsMixin, m: int, precision: str) -> Any:
    """
    Layer m and, if it has one and layers do not share their weights, its exit.

    `num_queries` says for how many tokens, from the left, the layer is computed: all of them, or 1 where only [CLS] is
    needed any more. Keys and values are of all tokens in any case.
    """
    import onnx

    config, graph = model.config, _Graph(precision)
    parts, size = model.layer_parts(model.encoder_layers[m - 1]), model.config.hidden_size
    from_the_left = [graph.weight("zero", np.array([0])), "num_queries"]
    queried = graph.node(
        "Slice", ["hidden_states", *from_the_left, graph.weight("one", np.array([1]))], "queried"
    )  # (batch_size, num_queries, hidden_size)
    inputs = {
        "hidden_states": (onnx.TensorProto.FLOAT, ["batch_size", "length", size]),
        "attention_mask": (onnx.TensorProto.INT32, ["batch_size", "length"]),
        "num_queries": (onnx.TensorProto.INT64, [1]),
    }
    attention = [
        graph.linear("query", parts.query, queried),
        graph.linear("key", parts.key, "hidden_states"),
        graph.linear("value", parts.value, "hidden_states"),
        "",
        "attention_mask",
    ]
    if _has_bias(model):
        inputs["attention_bias"] = (onnx.TensorProto.FLOAT, [1, config.num_attention_heads, "length", "length"])
        axis = graph.weight("two", np.array([2]))
        attention.append(graph.node("Slice", ["attention_bias", *from_the_left, axis], "bias_of_queries"))
    context = graph.node(
        "MultiHeadAttention",
        attention,
        "context",
        num_heads=config.num_attention_heads,
        mask_filter_value=float(torch.finfo(torch.float32).min),
    )

    def add_and_norm(name: str, linear: Any, norm: Any, x: str, residual: str) -> str:
        product = graph.linear(f"{name}.product", linear, x, bias=False)
        weights = [
            graph.weight(f"{name}.norm.weight", norm.weight),
            graph.weight(f"{name}.norm.bias", norm.bias),
            graph.weight(f"{name}.bias", linear.bias),
        ]
        return graph.node("SkipLayerNormalization", [product, residual, *weights], name, epsilon=norm.eps)

    attended = add_and_norm("attended", parts.attention_output, parts.attention_norm, context, queried)
    inner = graph.linear("inner", parts.intermediate, attended)
    inner = graph.node(ACTIVATIONS[_activation(config)], [inner], "activated")
    output = add_and_norm("output", parts.output, parts.output_norm, inner, attended)
    outputs = {output: ["batch_size", "num_queries_run", size]}
    if m in config.exit_layers and not config.shares_layers:
        _add_exit(graph, model, m, output)
        outputs["exit_logits"] = ["batch_size", config.num_labels]
    return graph.build(f"layer_{m}", inputs, outputs)


def _exit_graph(model: ExitsMixin, m: int) -> Any:
    """Exit m alone."""
    import onnx

    graph = _Graph()
    _add_exit(graph, model, m, "hidden_states")
    inputs = {"hidden_states": (onnx.TensorProto.FLOAT, ["batch_size", "num_queries", model.config.hidden_size])}
    if model.config.exit_pooling == "mean":
        inputs["attention_mask"] = (onnx.TensorProto.INT32, ["batch_size", "num_queries"])
    return graph.build(f"exit_{m}", inputs, {"exit_logits": ["batch_size", model.config.num_labels]})


def _add_exit(graph: _Graph, model: ExitsMixin, m: int, output: str) -> None:
    """
    Exit m behind `output`, in fp32 at either precision. A shared pooler is in every layer's graph, for a session holds
    its own weights.
    """
    import onnx

    config = model.config
    if config.exit_pooling == "cls":
        state = graph.node("Gather", [output, graph.weight("first", np.array(0))], "cls", axis=1)
    else:  # the mask, divided by its sum, times the tokens
        mask = graph.node("Cast", ["attention_mask"], "mask", to=onnx.TensorProto.FLOAT)
        count = graph.node("ReduceSum", [mask, graph.weight("last", np.array([1]))], "token_count", keepdims=1)
        share = graph.node("Unsqueeze", [graph.node("Div", [mask, count], "share"), "last"], "shares")
        state = graph.node("Squeeze", [graph.node("MatMul", [share, output], "means"), "last"], "mean")
    if config.exit_pooler != "none":
        pooler = (model.base_model.pooler if config.exit_pooler == "shared" else model.exit_poolers[str(m)]).dense
        pooler_weights = [graph.weight("pooler.weight", pooler.weight), graph.weight("pooler.bias", pooler.bias)]
        state = graph.node("Tanh", [graph.node("Gemm", [state, *pooler_weights], "pooler", transB=1)], "pooled")
    if config.exit_norm == "layer":
        ones = graph.weight("exit_norm.weight", np.ones(config.hidden_size, dtype=np.float32))
        state = graph.node("LayerNormalization", [state, ones], "scaled", epsilon=1e-5)
    exit_ = model.exit_classifiers[str(m)]
    exit_weights = [graph.weight("exit.weight", exit_.weight), graph.weight("exit.bias", exit_.bias)]
    graph.node("Gemm", [state, *exit_weights], "exit_logits", transB=1)


# Run


@cache
def exact_weight_type() -> Literal["int8", "uint8"]:
    """
    The type of weights whose products ONNX Runtime sums exactly on this processor, found by multiplying.

    Its kernels for processors without a dot product of bytes (on x86, without VNNI) add two products of an unsigned
    and a signed byte in 16 bits, which cuts off what is beyond 32767. Unsigned weights have other kernels, which do
    not, but take longer; with a dot product, several times as long. So signed ones are used wherever they are exact.

    Raises:
        RuntimeError: neither is exact.
    """
    _, onnxruntime = _import_onnx()
    for weight_type in ("int8", "uint8"):
        if _is_exact(weight_type):
            return weight_type
    raise RuntimeError(
        f"ONNX Runtime {onnxruntime.__version__} does not multiply 8-bit integers exactly on this processor. Take "
        'another version of it, or export with `precision="fp32"`.'
    )


def _is_exact(weight_type: str) -> bool:
    """Whether products at the end of the bytes' range have their sum, alone in a row and in several."""
    onnx, onnxruntime = _import_onnx()
    graph, depth = _Graph(), 64
    weight = np.full((depth, 32), 127, dtype=np.int8)
    weight[:, ::2] *= -1
    values = {"weight": weight, "scale": np.float32(1), "weight_scale": np.ones(32, dtype=np.float32)}
    values |= {"zero_point": np.uint8(0), "weight_zero_point": np.int8(0)}
    graph.node("MatMulIntegerToFloat", ["x", *(graph.weight(name, value) for name, value in values.items())], "sum")
    x = {"x": (onnx.TensorProto.UINT8, ["rows", depth])}
    model = _to_model(graph.build("exactness", x, {"sum": ["rows", 32]}))
    options = _session_options(num_threads=1, weight_type=weight_type)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bytes_ = [np.full((rows, depth), 255, dtype=np.uint8) for rows in (1, 8)]
    return all(np.array_equal(session.run(None, {"x": x})[0], x.astype(int) @ weight.astype(int)) for x in bytes_)


def _session_options(num_threads: int, weight_type: str) -> Any:
    _, onnxruntime = _import_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Each session has threads of its own. They must not wait busily while another session has its turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weight_type == "uint8":
        options.add_session_config_entry(UNSIGNED_WEIGHTS, "1")
    return options


class GamlOrtModelForSequenceClassification:
    """
    A model with exits that runs in ONNX Runtime on a CPU: the calls, outputs and exits of
    [`GamlBertForSequenceClassification`] or another family's in evaluation mode, for inference alone.

    Works as the `model` of [`GamlTextClassificationPipeline`]. Threads may share one; a pickle of it holds the path of
    the export, not the weights.

    In fp32, rows that leave are dropped between layers, and the padding that none of the others needs is cut. In int8,
    rows run one by one without their padding: activations are quantized with one scale for all that runs together, so
    a row's answer would depend on its neighbours. A layer behind which no row goes on (the last one, or the budgeted
    exit) is computed for [CLS] alone, where exits read nothing else.

    Make one with `from_pretrained`.

    Attributes:
        precision (`str`): `"fp32"` or `"int8"`, of the export.
        weight_type (`str`): what the matrices of the layers are here: `"float32"`; `"int8"`, as an int8 export holds
            them; or `"uint8"`, where the products of signed ones are not exact ([`exact_weight_type`]).
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    training = False
    device = torch.device("cpu")
    dtype = torch.float32  # of hidden states and logits, in int8 too

    # The same errors for the same input.
    _check_inputs = ExitsMixin._check_inputs
    _check_range = staticmethod(ExitsMixin._check_range)

    def __init__(self, folder: Path, config: GamlConfigMixin, num_threads: int):
        _, onnxruntime = _import_onnx()
        self.folder, self.config, self.num_threads = folder, config, num_threads
        self._segments, self.weight_type = {}, "float32"
        for name in segment_files(config):
            options = _session_options(num_threads, self.weight_type)
            session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            self._segments[Path(name).stem] = session
            if len(self._segments) == 1:  # the embeddings, which are float32 at either precision
                about = session.get_modelmeta().custom_metadata_map
                self.precision = about["precision"]
                for name, exported in json.loads(about.get("exits", "{}")).items():  # not of older ones
                    if exported != getattr(config, name):
                        raise ValueError(
                            f"`{name}` of the config in `{folder}` must be that of the export, {exported}. Got "
                            f"{getattr(config, name)}. Export again with `gaml_hf.runtime.ort.export_onnx`."
                        )
                self.weight_type = "float32" if self.precision == "fp32" else exact_weight_type()
        self._input_names = [value.name for value in self._segments["embeddings"].get_inputs()]
        logger.info(f"`{folder}` runs with weights of type {self.weight_type}.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, num_threads: int | None = None, **config_changes
    ) -> "GamlOrtModelForSequenceClassification":
        """
        Load what [`export_onnx`] wrote.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): the folder of an export.
            num_threads (`int`, *optional*): of one layer; defaults to `torch.get_num_threads()`.
            config_changes (*optional*): another exit policy, labels or `exit_temperatures` than the config's.

        Raises:
            ValueError: the folder is no export, a graph in it is damaged, a change is one that needs a new export, or
                `num_threads` is below 1.
            RuntimeError: int8, and ONNX Runtime cannot multiply it exactly on this processor.
            ImportError: the packages `onnx` and `onnxruntime` are not installed.
        """
        folder = Path(pretrained_model_name_or_path)
        if wrong := sorted(config_changes.keys() - CONFIG_CHANGES):
            raise ValueError(
                f"`{wrong[0]}` is not among what an export can change when it is loaded: {', '.join(CONFIG_CHANGES)}. "
                "Export again with `gaml_hf.runtime.ort.export_onnx`."
            )
        if not is_export(folder):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder written by `gaml_hf.runtime.ort.export_onnx`. "
                f"Got `{folder}`, without `config.json` or `embeddings.onnx`."
            )
        num_threads = torch.get_num_threads() if num_threads is None else num_threads
        if type(num_threads) is not int or num_threads < 1:
            raise ValueError(f"`num_threads` must be a whole number of at least 1. Got `num_threads={num_threads!r}`.")
        config = GamlAutoConfig.from_pretrained(folder, local_files_only=True, **config_changes)
        if missing := [name for name in segment_files(config) if not (folder / name).is_file()]:
            raise ValueError(f"The export in `{folder}` is not complete: `{missing[0]}` is missing.")
        if (folder / SEAL).is_file() and (reason := why_unsealed(folder)) is not None:
            raise ValueError(
                f"The export in `{folder}` is not what was written: {reason}. Take another copy, or export again with "
                "`gaml_hf.runtime.ort.export_onnx`."
            )
        return cls(folder, config, num_threads)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Copy the export, with the config as it now is, into a new folder, which appears whole."""
        folder = Path(save_directory)
        with _new_folder(folder) as stage:
            for path in self.folder.iterdir():
                if path.is_file():
                    shutil.copyfile(path, stage / path.name)
            self.config.to_json_file(stage / "config.json")

    def __reduce__(self):
        return type(self), (self.folder, self.config, self.num_threads)

    # What a pipeline asks of a model.

    def to(self, device: Any = "cpu") -> "GamlOrtModelForSequenceClassification":
        if torch.device(device).type != "cpu":
            raise ValueError(f'This model runs on a CPU alone: give the pipeline `device="cpu"`. Got `{device}`.')
        return self

    def eval(self) -> "GamlOrtModelForSequenceClassification":
        return self

    def can_generate(self) -> bool:
        return False

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        exit_policy: ExitPolicy | None = None,
        output_exit_logits: bool = False,
        return_dict: bool = True,
    ) -> GamlSequenceClassifierOutput | tuple[Tensor, ...]:
        """As [`ExitsMixin.forward`], for these inputs, which lie on the CPU."""
        self._check_inputs(input_ids, None, attention_mask, token_type_ids, None, None, False)
        policy = policy_for_call(exit_policy, self.config)
        self.config.validate_exits()
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        run = self._run_all_exits if output_exit_logits else self._exit_early
        inputs = (input_ids, token_type_ids, attention_mask)
        inputs = [tensor.to(dtype).numpy() for tensor, dtype in zip(inputs, INPUT_TYPES, strict=True)]
        if self.precision == "int8" and len(input_ids) > 1:
            rows = [run(*(x[row : row + 1] for x in inputs), policy) for row in range(len(input_ids))]
            columns = [None if column[0] is None else np.concatenate(column) for column in zip(*rows, strict=True)]
        else:
            columns = run(*inputs, policy)
        logits, exit_layer, exit_logits = (None if x is None else torch.from_numpy(x) for x in columns)
        output = GamlSequenceClassifierOutput(logits=logits, exit_layer=exit_layer, exit_logits=exit_logits)
        return output if return_dict else output.to_tuple()

    def _embed(self, input_ids, token_type_ids, mask) -> tuple[list[np.ndarray], np.ndarray]:
        """
        Hidden states (and the bias of attention, where there is one) and mask, without the columns that are padding in
        every row.
        """
        longest = _longest(mask)
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        feeds = {name: np.ascontiguousarray(inputs[name][:, :longest]) for name in self._input_names}
        return self._segments["embeddings"].run(None, feeds), np.ascontiguousarray(mask[:, :longest])

    def _run_layer(self, m: int, states: list[np.ndarray], mask, is_last: bool) -> np.ndarray | None:
        """Puts the hidden states behind layer m into `states`; logits of its exit, `(batch_size, num_labels)`."""
        config = self.config
        cls_only = is_last and config.exit_pooling == "cls"  # which nothing else reads any more
        if self.precision == "int8" and m < config.num_hidden_layers:
            cls_only = False  # one scale for what runs together: [CLS] alone would get another answer than with all
        num_queries = np.array([1 if cls_only else states[0].shape[1]])
        feeds = {"hidden_states": states[0], "attention_mask": mask, "num_queries": num_queries}
        if len(states) > 1:
            feeds["attention_bias"] = states[1]
        states[0], *exit_logits = self._segments[f"layer_{config.layer_of_depth[m - 1]}"].run(None, feeds)
        if config.shares_layers and m in config.exit_layers:
            feeds = {"hidden_states": states[0], "attention_mask": mask}
            if config.exit_pooling == "cls":
                del feeds["attention_mask"]
            exit_logits = self._segments[f"exit_{m}"].run(None, feeds)
        if not exit_logits:
            return None
        if config.exit_temperatures is not None:
            exit_logits[0] /= np.float32(config.exit_temperatures[config.exit_layers.index(m)])
        return exit_logits[0]

    def _run_all_exits(self, input_ids, token_type_ids, mask, policy) -> tuple[np.ndarray, ...]:
        states, mask = self._embed(input_ids, token_type_ids, mask)
        last, answers = self.config.num_hidden_layers, []
        for m in range(1, last + 1):
            answer = self._run_layer(m, states, mask, is_last=m == last)
            if answer is not None:
                answers.append(answer)
        exit_logits = np.stack(answers, axis=1)  # (batch_size, num_exits, num_labels)
        position = policy.replay(torch.from_numpy(exit_logits)).numpy()
        logits = exit_logits[np.arange(len(position)), position]
        return logits, np.asarray(self.config.exit_layers)[position], exit_logits

    def _exit_early(self, input_ids, token_type_ids, mask, policy) -> tuple[np.ndarray, np.ndarray, None]:
        config = self.config
        states, mask = self._embed(input_ids, token_type_ids, mask)
        rows = np.arange(len(mask))  # of the batch, for the rows still there
        logits = np.empty((len(mask), config.num_labels), dtype=np.float32)
        exit_layer = np.empty(len(mask), dtype=np.int64)
        history: list[np.ndarray] = []
        last = config.num_hidden_layers
        if (position := policy.fixed_exit(config.num_exits)) is not None:  # all rows leave there: nothing is decided
            last = config.exit_layers[position]
        for m in range(1, last + 1):
            answer = self._run_layer(m, states, mask, is_last=m == last)
            if answer is None:
                continue
            # Written for every row still there; a row that stays writes again at a later exit.
            logits[rows], exit_layer[rows] = answer, m
            if m == last:
                break
            if position is not None:
                continue
            history.append(answer)
            stay = ~policy(torch.from_numpy(np.stack(history, axis=1))).numpy()
            if not stay.any():
                break
            if not stay.all():
                rows, mask, history = rows[stay], mask[stay], [past[stay] for past in history]
                longest = _longest(mask)
                states[0] = np.ascontiguousarray(states[0][stay, :longest])
                states[1:] = [np.ascontiguousarray(bias[:, :, :longest, :longest]) for bias in states[1:]]
                mask = np.ascontiguousarray(mask[:, :longest])
        return logits, exit_layer, None


INPUT_TYPES = (torch.int64, torch.int64, torch.int32)  # of the graphs

# Read in Python, between the graphs.
CONFIG_CHANGES = ("exit_strategy", "patience", "budgeted_exit", "exit_threshold", "exit_temperatures", "id2label")
CONFIG_CHANGES += ("label2id",)


def is_export(folder: str | os.PathLike) -> bool:
    """Whether `folder` is what [`export_onnx`] writes."""
    return all((Path(folder) / name).is_file() for name in ("config.json", "embeddings.onnx"))


def _longest(mask: np.ndarray) -> int:
    """Tokens of the longest row."""
    return int(np.flatnonzero(mask.any(axis=0))[-1]) + 1


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then becomes `folder` in one rename."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"The folder must be new: an export replaces nothing. Got `{folder}`, which exists.")
    with staging_folder(folder.parent) as stage:
        yield stage
        if folder.exists():  # an empty one, which a pipeline makes before it saves its model
            folder.rmdir()
        stage.rename(folder)


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "The CPU runtime needs the packages onnx and onnxruntime: `pip install gaml_hf[onnx]`."
        ) from error
    return onnx, onnxruntime


__all__ = ["GamlOrtModelForSequenceClassification", "export_onnx"]
