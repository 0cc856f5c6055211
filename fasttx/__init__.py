"""fasttx: fast Transformer text classifiers on interchangeable attention backends.

What it offers is imported when it is first asked for: torch takes seconds, `fasttx --help` none.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from fasttx.version import __version__

if TYPE_CHECKING:
    from fasttx.config import ModelConfig, TrainConfig
    from fasttx.errors import FasttxError
    from fasttx.load import load
    from fasttx.models.classifier import TransformerClassifier
    from fasttx.ops import scaled_dot_product_attention
    from fasttx.text.packing import PackedBatch, pack
    from fasttx.text.tokenizer import Tokenizer
    from fasttx.train import train

__all__ = [
    "FasttxError",
    "ModelConfig",
    "PackedBatch",
    "Tokenizer",
    "TrainConfig",
    "TransformerClassifier",
    "__version__",
    "load",
    "pack",
    "scaled_dot_product_attention",
    "train",
]

# The module of each name; and the modules that are there without an import of their own.
_HOMES = {
    "FasttxError": "errors",
    "ModelConfig": "config",
    "PackedBatch": "text.packing",
    "Tokenizer": "text.tokenizer",
    "TrainConfig": "config",
    "TransformerClassifier": "models.classifier",
    "load": "load",
    "pack": "text.packing",
    "scaled_dot_product_attention": "ops",
    "train": "train",
}
_MODULES = ("config", "device", "errors", "files", "models", "ops", "tasks", "text", "training")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"fasttx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fasttx.{name}")
    raise AttributeError(f"module 'fasttx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(types.ModuleType):
    """`fasttx.load` and `fasttx.train` are functions, though Python sets each to the module of its
    name when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("load", "train") and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
