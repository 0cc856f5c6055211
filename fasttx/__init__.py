"""fasttx: fast Transformer text classifiers on interchangeable attention backends."""

from fasttx.attention import scaled_dot_product_attention
from fasttx.classifier import load
from fasttx.config import ModelConfig, TrainConfig
from fasttx.model import TransformerClassifier
from fasttx.packing import PackedBatch, pack
from fasttx.tokenizer import Tokenizer
from fasttx.version import __version__

__all__ = [
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
