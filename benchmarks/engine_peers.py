"""Inference engines that people deploy with, on the CPU: ONNX Runtime and OpenVINO.

They run the padded model of `model_peers.PaddedSdpa`, weights included, in a precision of their
own, which their names say, with as many threads as torch has. B texts, L padded length.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_peers import PaddedSdpa, Peer, missing
from torch import Tensor
from workload import Setting

from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier

Answer = Callable[[np.ndarray], np.ndarray]  # ids (B, L) int64 -> logits (B, num_classes) float32


class _Engine(Peer):
    inference_only = True
    precision = "fp32"
    tolerance = 1e-4
    packages: tuple[str, ...] = ()

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        if setting.device.type != "cpu":
            return [f"it is measured on the CPU, and the device is {setting.device}"]
        return [reason for name in cls.packages for reason in missing(name, name)]

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier:
        return model

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def copy_from(self, model: TransformerClassifier) -> None:
        padded = PaddedSdpa(self.config).eval()
        padded.copy_from(model)
        with torch.no_grad():
            self.answer = self.start(padded)

    def start(self, model: Any) -> Answer:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.from_numpy(self.answer(input_ids.numpy()))


# ------------------------------------------------------------------------------------ ONNX Runtime


def onnx_model(model: PaddedSdpa) -> Any:
    """input_ids (B, L) int64 -> logits (B, num_classes), of ONNX Runtime's fused operators.

    Its optimiser makes these of BERT's graph; of torch's export of this model it makes no Attention
    (onnxruntime 1.32), so they are put down at once: the best case of that engine.
    """
    from onnx import TensorProto, helper, numpy_helper

    c, own = model.config, "com.microsoft"
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(value: Any) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), f"w{len(weights)}"))
        return weights[-1].name

    def op(kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind}{len(nodes)}.{i}" for i in range(outputs)]
        nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def normed(h: str, y: str, bias: Tensor, norm: Any) -> tuple[str, str]:
        """h + y + bias, and its LayerNorm."""
        n, _, _, h = op(
            "SkipLayerNormalization", h, y, weight(norm.weight), weight(norm.bias), weight(bias),
            domain=own, outputs=4, epsilon=norm.eps,
        )  # fmt: skip
        return h, n

    def product(x: str, layer: Any) -> str:
        return op("MatMul", x, weight(layer.weight.T))

    real = op("Not", op("Equal", "input_ids", weight(np.int64(0))))
    mask = op("Cast", real, to=TensorProto.INT32)
    length = op("Shape", "input_ids", start=1, end=2)
    positions = op("Slice", weight(model.positions), weight([0]), length, weight([0]))
    table = weight(model.embedding * c.d_model**0.5)
    h = op("Add", op("Gather", table, "input_ids"), positions)
    first, *others = model.blocks
    norm = first.norm1
    n = op("LayerNormalization", h, weight(norm.weight), weight(norm.bias), epsilon=norm.eps)
    for block, next_norm in zip(
        model.blocks, [*(b.norm1 for b in others), model.norm], strict=True
    ):
        qkv = weight(block.qkv.weight.T), weight(block.qkv.bias)
        mixed = op("Attention", n, *qkv, mask, domain=own, num_heads=c.num_heads)
        h, n = normed(h, product(mixed, block.out), block.out.bias, block.norm2)
        u = op("Relu", op("Add", product(n, block.up), weight(block.up.bias)))
        h, n = normed(h, product(u, block.down), block.down.bias, next_norm)
    share = op("Unsqueeze", op("Cast", real, to=TensorProto.FLOAT), weight([2]))
    total = op("ReduceSum", op("Mul", n, share), weight([1]), keepdims=0)
    count = op("Max", op("ReduceSum", share, weight([1]), keepdims=0), weight(np.float32(1)))
    pooled = op("Div", total, count)
    dense, classify = model.head.dense, model.head.classify
    x = op("Gemm", pooled, weight(dense.weight), weight(dense.bias), transB=1)
    x = op("Gelu", x, domain=own)
    logits = op("Gemm", x, weight(classify.weight), weight(classify.bias), transB=1)
    graph = helper.make_graph(
        nodes, "classifier",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["B", c.num_classes])],
        weights,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(own, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class OnnxRuntime(_Engine):
    """Attention and residual + LayerNorm are fused operators."""

    packages = ("onnx", "onnxruntime")
    fused = staticmethod(onnx_model)

    def graph(self, model: Any) -> bytes:
        return self.fused(model).SerializeToString()

    def start(self, model: Any) -> Answer:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            self.graph(model), options, providers=["CPUExecutionProvider"]
        )
        return lambda ids: session.run(None, {"input_ids": ids})[0]


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic quantisation of all products of the encoder; weights by output channel.

    In 7 bits: where a processor has no VNNI, 8 overflow, and logits come out 35 % off.
    """

    note = "int8"
    precision = "int8"
    tolerance = 0.1

    def graph(self, model: Any) -> bytes:
        from onnx import TensorProto, helper
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = self.fused(model)
        helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})  # fused
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_dynamic(
                graph, path, op_types_to_quantize=["MatMul", "Attention"], per_channel=True,
                reduce_range=True, weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": TensorProto.FLOAT},
            )  # fmt: skip
            return path.read_bytes()


# ---------------------------------------------------------------------------------------- OpenVINO


class OpenVino(_Engine):
    """Converted from torch, so that its attention becomes one node.

    One request at a time takes all threads; of several, each runs on one thread.
    """

    packages = ("openvino",)
    hint = "f32"

    def start(self, model: Any) -> Answer:
        import openvino

        example = torch.ones(2, 3, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what a trace takes for constant
            self.converted = openvino.convert_model(model, example_input=example)
        request = self.compiled("LATENCY").create_infer_request()
        return lambda ids: request.infer({0: ids}, share_inputs=True)[0].copy()

    def compiled(self, goal: str) -> Any:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": self.hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": goal,
        }
        return openvino.compile_model(self.converted, "CPU", options)

    @functools.cached_property
    def requests(self) -> Any:
        import openvino

        return openvino.AsyncInferQueue(self.compiled("THROUGHPUT"), torch.get_num_threads())

    def answer_all(self, batches: Sequence[Tensor]) -> list[Tensor]:
        if len(batches) == 1:
            return super().answer_all(batches)
        found: list[Any] = [None] * len(batches)

        def keep(request: Any, i: int) -> None:
            found[i] = torch.from_numpy(request.get_output_tensor(0).data.copy())

        self.requests.set_callback(keep)
        for i, ids in enumerate(batches):
            self.requests.start_async({0: ids.numpy()}, i)
        self.requests.wait_all()
        return found


class OpenVinoBf16(OpenVino):
    note = "bf16, the residual stream too"
    precision = "bf16"
    tolerance = 0.05
    hint = "bf16"

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        if reasons := super().unavailable_reasons(setting):
            return reasons
        import openvino

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return [] if "BF16" in able else ["it has no bfloat16 on this processor"]


ENGINES: dict[str, type[Peer]] = {
    "onnxruntime-fp32": OnnxRuntime,
    "onnxruntime-int8": OnnxRuntimeInt8,
    "openvino-fp32": OpenVino,
    "openvino-bf16": OpenVinoBf16,
}
