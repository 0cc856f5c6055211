"""The formats: how each is written, read back and described. One literal table.

B texts, L padded length, C classes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttx.export.padded import PaddedClassifier
from fasttx.files import atomic_write

# input_ids and attention_mask (B, L) int64 -> logits (B, C) float32.
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """write: the model, or the run where `of_run`, to a path; read: what that path answers.

    file: the name of that path, empty for the whole folder. needs: modules, and the extra that has
    them. compiler: whether a C++ compiler is needed. about: for the README of the folder.
    """

    file: str
    write: Callable[[Any, Path], None]
    read: Callable[[Path], Answer]
    about: str
    needs: tuple[str, ...] = ()
    extra: str = "export"
    compiler: bool = False
    of_run: bool = False

    def unavailable_reasons(self) -> list[str]:
        """Why it cannot be written here; each reason says what to do."""
        install = f"pip install 'fasttx[{self.extra}]'"
        reasons = [
            f"the package {name} is not installed: {install}"
            for name in self.needs
            if importlib.util.find_spec(name) is None
        ]
        if self.compiler and not any(map(shutil.which, _compilers())):
            reasons.append(
                f"there is no C++ compiler ({' or '.join(_compilers())}): install one, or name it "
                "in the environment variable CXX"
            )
        return reasons


def _compilers() -> list[str]:
    """Those that torch looks for."""
    named = os.environ.get("CXX")
    return [named] if named else ["g++", "clang++"]


# --- ONNX -----------------------------------------------------------------------------------------

# The oldest that torch writes, which most programs read. ONNX Runtime 1.32 has an Attention for
# opset 23, and refuses masks that are the same for all queries there.
_OPSET = 18


def _write_onnx(model: PaddedClassifier, path: Path) -> None:
    with _quiet("torch.onnx", "onnxscript"):
        program = torch.onnx.export(
            model, _example(), dynamo=True, opset_version=_OPSET, dynamic_shapes=_dynamic(),
            input_names=["input_ids", "attention_mask"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path))  # weights of more than 2 GB beside it, in model.onnx.data


def _read_onnx(path: Path) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def answer(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits: np.ndarray = session.run(["logits"], inputs)[0]
        return logits

    return answer


def quantize(source: Path, path: Path) -> None:
    """The ONNX file `source` with products of 8-bit integers, in another folder: weights quantised
    by output channel, activations when the model runs (ONNX Runtime's dynamic quantisation).

    Weights take 7 bits: where a processor has no VNNI, sums of 8-bit products overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(None):
        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(source.name + ".data").exists(),
        )  # fmt: skip


# --- programs of torch ----------------------------------------------------------------------------


def _program(model: PaddedClassifier) -> torch.export.ExportedProgram:
    return torch.export.export(model, _example(), dynamic_shapes=_dynamic())


def _write_program(model: PaddedClassifier, path: Path) -> None:
    # To memory first: torch hides what the system says of a write that fails.
    content = BytesIO()
    with _quiet("torch"):
        torch.export.save(_program(model), content)
    with atomic_write(path) as f:
        f.write(content.getbuffer())


def _read_program(path: Path) -> Answer:
    return _answer(torch.export.load(path).module())


def _write_compiled(model: PaddedClassifier, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    content = BytesIO()
    with _quiet("torch"):
        aoti_compile_and_package(_program(model), package_path=content)
    with atomic_write(path) as f:
        f.write(content.getbuffer())


def _read_compiled(path: Path) -> Answer:
    from torch._inductor import aoti_load_package

    return _answer(aoti_load_package(str(path)))


def _example() -> tuple[Tensor, Tensor]:
    """Sizes of 0 and 1 would be taken for constants. One token, which every model reads."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    return ids, mask


def _dynamic() -> tuple[dict[int, Any], dict[int, Any]]:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    return sizes, sizes


def _answer(function: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    def answer(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = function(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))
        found: np.ndarray = logits.numpy()
        return found

    return answer


# --- Hugging Face ---------------------------------------------------------------------------------


def _write_hub_folder(run: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    import fasttx.hf

    try:
        fasttx.hf.save_run(run, folder, name=run.resolve().name)
    except SafetensorError as error:  # which hides what the system said
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


def _read_hub_folder(folder: Path) -> Answer:
    import fasttx.hf

    model = fasttx.hf.FasttxForSequenceClassification.from_pretrained(folder)
    return _answer(lambda input_ids, attention_mask: model(input_ids, attention_mask).logits)


FORMATS = {
    "onnx": Format(
        "model.onnx", _write_onnx, _read_onnx,
        "`model.onnx` (opset 18) runs in ONNX Runtime, OpenVINO and whatever else reads ONNX.",
        ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
    ),
    "torch-export": Format(
        "model.pt2", _write_program, _read_program,
        "`model.pt2` is read by `torch.export.load`, with plain torch.", ("tokenizers",),
    ),
    "aoti": Format(
        "model.pt2", _write_compiled, _read_compiled,
        "`model.pt2` holds machine code for processors like the one that it was made on, read by "
        "`torch._inductor.aoti_load_package` of the same version of torch.", ("tokenizers",),
        compiler=True,
    ),
    "safetensors": Format(
        "", _write_hub_folder, _read_hub_folder,
        "a folder that transformers reads once fasttx.hf is imported.",
        ("transformers", "tokenizers", "safetensors", "huggingface_hub"), "hf", of_run=True,
    ),
}  # fmt: skip


@contextmanager
def _quiet(*loggers: str | None) -> Iterator[None]:
    """Exporters warn of what is no concern of a user's: packages of images, their own old names."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
