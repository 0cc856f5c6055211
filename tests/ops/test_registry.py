"""How a name becomes a backend: what is refused, what `auto` picks, when it is decided again."""

from __future__ import annotations

import ast
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttx
from fasttx import TransformerClassifier
from fasttx.errors import BackendUnavailableError, ConfigError
from fasttx.ops import registry
from fasttx.ops.contract import Adapter
from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import BACKENDS, Backend

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = torch.tensor([[3, 4, 5], [6, 0, 0]])


@pytest.fixture(autouse=True)
def _forget_choices() -> Iterator[None]:
    registry._auto.cache_clear()
    yield
    registry._auto.cache_clear()


@pytest.fixture
def fake(monkeypatch) -> Callable[..., Backend]:
    """Adds a backend to the table: the reference in disguise, that runs where it is told to."""

    def add(
        name: str = "fake",
        *,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        devices: tuple[str, ...] = (),
        reasons: Callable[..., list[str]] = lambda device, dtype, head_dim: [],
        first: bool = False,
    ) -> Backend:
        module = types.ModuleType(f"adapter_{name}")
        module.calls = []

        class Operations(ReferenceOperations):
            def attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                module.calls.append(args)
                return super().attention(*args, **kwargs)

        class FakeAdapter(Adapter):
            operations = Operations()

            def unavailable_reasons(self, *where: Any) -> list[str]:
                return reasons(*where)

        module.adapter = FakeAdapter()
        backend = Backend(name, module.__name__, "a fake", devices, dtypes, "shared")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        table = registry.BACKENDS
        table = {name: backend, **table} if first else {**table, name: backend}
        monkeypatch.setattr(registry, "BACKENDS", table)
        return backend

    return add


def tiny(backend: str, **settings: Any) -> TransformerClassifier:
    settings = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 8} | settings
    return TransformerClassifier(20, attn_backend=backend, **settings).eval()


# ------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3", "mps", "xpu"])
def test_the_reference_runs_everywhere(device, dtype):
    for head_dim in (1, 8, 20, 32, 512):
        assert BACKENDS["reference"].unavailable_reasons(device, dtype, head_dim) == []


def test_the_reference_is_the_last_resort():
    assert list(BACKENDS)[-1] == "reference"


def test_adapters_never_import_one_another():
    modules = {backend.module for backend in BACKENDS.values()}
    for module in modules:
        path = Path(fasttx.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
                imported.add(node.module)
        assert not imported & (modules - {module}), f"{path} imports another adapter"


# --------------------------------------------------------------------------------- asked by name


@pytest.mark.parametrize("name", ["flash", "", "SDPA", "auto ", None])
def test_an_unknown_name_lists_the_known(name):
    known = r"expected auto, .*sdpa, reference"
    for ask in (
        lambda: registry.check_name(name),
        lambda: registry.resolve(name, "cpu", torch.float32, 32),
        lambda: registry.resolve_name(name, "cpu", torch.float32, 32),
        lambda: tiny(name),
    ):
        with pytest.raises(ConfigError, match=f"unknown attention backend {name!r}; {known}"):
            ask()


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_name_is_that_backend(name):
    assert registry.resolve(name, "cpu", torch.float32, 32) is BACKENDS[name].operations
    assert registry.resolve_name(name, "cpu", torch.float32, 32) == name


def test_an_explicit_name_never_falls_back(fake):
    fake(reasons=lambda *where: ["it is Tuesday: wait a day", "no compiler: install gcc"])
    with pytest.raises(BackendUnavailableError) as refusal:
        registry.resolve("fake", "cpu", torch.float32, 24)
    message = str(refusal.value)
    for part in (
        "'fake'", "cpu", "float32", "head_dim 24", "it is Tuesday: wait a day",
        "no compiler: install gcc", "auto", "fasttx backends",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(BackendUnavailableError, match="Tuesday"):
        fasttx.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 8), backend="fake")


def test_device_and_dtype_are_refused_together_and_before_the_adapter_is_imported(fake):
    def explode(*where: Any) -> list[str]:
        raise AssertionError("the adapter was asked")

    backend = fake(devices=("cuda", "mps"), dtypes=(torch.float16,), reasons=explode)
    reasons = backend.unavailable_reasons("cpu", torch.float32, 32)
    assert len(reasons) == 2
    assert "cpu" in reasons[0]
    assert "cuda or mps" in reasons[0]
    assert "float32" in reasons[1]
    assert "float16" in reasons[1]


def test_adapters_hear_where_they_would_run(fake):
    heard = []
    fake(reasons=lambda *where: heard.append(where) or [])
    registry.resolve("fake", "cuda:1", torch.float16, 40)
    assert heard[-1] == (torch.device("cuda:1"), torch.float16, 40)


# ------------------------------------------------------------------------------- left to `auto`


def test_auto_takes_the_first_that_can_and_says_why(fake, caplog):
    fake("third", first=True)
    fake("second", first=True, reasons=lambda *where: ["no compiler", "and no disk"])
    fake("first", first=True, devices=("cuda",))
    with caplog.at_level(logging.INFO, logger="fasttx"):
        assert registry.resolve_name("auto", "cpu", torch.float32, 32) == "third"
    (record,) = caplog.records
    line = record.getMessage()
    assert "auto -> third on cpu" in line
    assert line.index("not first (device cpu") < line.index("not second (no compiler")
    assert "reference" not in line


def test_auto_says_so_once(fake, caplog):
    fake("best", first=True)
    with caplog.at_level(logging.INFO, logger="fasttx"):
        for _ in range(3):
            tiny("auto").double().float()
    float32, float64 = (record.getMessage() for record in caplog.records)
    assert "auto -> best" in float32
    assert "auto -> best" in float64


def test_an_explicit_name_is_not_announced(caplog):
    with caplog.at_level(logging.INFO, logger="fasttx"):
        tiny("reference")
    assert not caplog.records


def test_auto_follows_the_table_on_the_cpu():
    usable = [
        b.name for b in BACKENDS.values() if not b.unavailable_reasons("cpu", torch.float32, 32)
    ]
    assert registry.resolve_name("auto", "cpu", torch.float32, 32) == usable[0]


def test_auto_where_nothing_can_run():
    """As an explicit name: reasons, and for a module at its first call only."""
    with pytest.raises(BackendUnavailableError, match="float8"):
        registry.resolve("auto", "cpu", torch.float8_e4m3fn, 32)
    model = tiny("auto").to(torch.float8_e4m3fn)
    with pytest.raises(BackendUnavailableError, match="float8"):
        model(IDS)
    assert model.float().backend == registry.resolve_name("auto", "cpu", torch.float32, 8)


# -------------------------------------------------------------------------------- inside a model


def test_a_model_may_be_built_where_its_backend_cannot_run(fake):
    fake(dtypes=(torch.float64,))
    model = tiny("fake")
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=r"float32: takes float64"):
            model(IDS)
    with pytest.raises(BackendUnavailableError, match=r"float32: takes float64"):
        _ = model.backend
    model.double()
    assert model.backend == "fake"
    assert model(IDS).dtype == torch.float64
    model.float()
    with pytest.raises(BackendUnavailableError, match=r"float32: takes float64"):
        model(IDS)


def test_an_unavailable_backend_s_state_can_be_saved_and_loaded(fake):
    fake(dtypes=(torch.float64,))
    model, other = tiny("fake"), tiny("reference")
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert other(IDS).isfinite().all()


def test_auto_is_resolved_again_when_the_model_moves(fake):
    backend = fake("half", first=True, dtypes=(torch.float16, torch.bfloat16))
    model = tiny("auto")
    here, wide = (registry.resolve_name("auto", "cpu", d, 8) for d in (torch.float, torch.double))
    assert model.backend == here
    for move, name in (
        (model.half, "half"),
        (model.double, wide),
        (model.bfloat16, "half"),
        (model.float, here),
        (lambda: model.to(torch.float16), "half"),
        (lambda: model.to("cpu", torch.float64), wide),
    ):
        assert move() is model
        assert model.backend == name
    calls = sys.modules[backend.module].calls
    model(IDS)
    assert not calls
    model.half()
    model(IDS)
    assert len(calls) == 1  # one layer


def test_a_model_inside_another_module_follows_too(fake):
    fake("half", first=True, dtypes=(torch.float16,))
    model = tiny("auto")
    torch.nn.Sequential(model).half()
    assert model.backend == "half"


def test_head_dim_decides(fake):
    fake("narrow", first=True, reasons=lambda device, dtype, d: [] if d <= 8 else ["head_dim"])
    assert tiny("auto").backend == "narrow"
    assert tiny("auto", num_heads=1).backend != "narrow"
    with pytest.raises(BackendUnavailableError, match="head_dim"):
        tiny("narrow", num_heads=1)(IDS)
