"""fasttx: fast Transformer text classifiers on interchangeable attention backends."""

from fasttx.config import ModelConfig, TrainConfig
from fasttx.errors import FasttxError
from fasttx.load import load
from fasttx.models.classifier import TransformerClassifier
from fasttx.ops import scaled_dot_product_attention
from fasttx.text.packing import PackedBatch, pack
from fasttx.text.tokenizer import Tokenizer
from fasttx.version import __version__

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
]
