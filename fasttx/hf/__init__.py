"""fasttx and Hugging Face's transformers: `import fasttx.hf` registers our attention there.

    model = AutoModel.from_pretrained(name, attn_implementation="fasttx")
    model.set_attn_implementation("fasttx:reference")        # a backend by name
    fasttx.hf.accelerate(model)                              # its other layers too

docs/huggingface.md shows the rest.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fasttx.hf needs transformers ({error}): pip install 'fasttx[hf]'"
    ) from error

from fasttx.hf import attention, model
from fasttx.hf.accelerate import Replaced, accelerate
from fasttx.hf.model import (
    FasttxConfig,
    FasttxForSequenceClassification,
    PackingCollator,
    from_run,
    push_run,
    save_run,
)

__all__ = [
    "FasttxConfig",
    "FasttxForSequenceClassification",
    "PackingCollator",
    "Replaced",
    "accelerate",
    "from_run",
    "push_run",
    "save_run",
]

attention.register()
model.register()
