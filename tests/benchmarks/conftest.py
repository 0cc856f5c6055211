"""The benchmarks are scripts beside one another: here their folder can be imported from."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import BACKENDS, Backend

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def fake_backend(monkeypatch):
    """Lists a backend `fake`: the reference, with these operations in place of its own."""

    def fake(*, reasons=(), dropout="shared", **operations):
        module = types.ModuleType("fasttx_fake")
        module.adapter = types.SimpleNamespace(
            operations=type("Fake", (ReferenceOperations,), operations)(),
            unavailable_reasons=lambda device, dtype, head_dim: list(reasons),
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        backend = Backend("fake", module.__name__, "", (), (torch.float32,), dropout)
        monkeypatch.setitem(BACKENDS, "fake", backend)
        return backend

    return fake
