"""`fasttx doctor`: it reports every backend, finds a broken one, and never ends in an exception."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch

from fasttx.commands import cli, doctor
from fasttx.ops import registry
from fasttx.ops.reference import Reference, ReferenceOperations
from fasttx.ops.registry import BACKENDS
from fasttx.testing import Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "SHAPE", Shape((7, 3), heads=2))


def row_of(monkeypatch, backend: str, operations: ReferenceOperations) -> dict[str, Any]:
    """The row of a backend that has other operations."""
    adapter = Reference()
    adapter.operations = operations
    module, load = BACKENDS[backend].module, registry.importlib.import_module
    monkeypatch.setattr(
        registry.importlib,
        "import_module",
        lambda name: types.SimpleNamespace(adapter=adapter) if name == module else load(name),
    )
    found = doctor.examine(CPU)
    assert found["sound"] is not any(row.get("failures") for row in found["backends"])
    (row,) = (row for row in found["backends"] if row["backend"] == backend)
    return row


def test_every_backend_is_reported():
    found = doctor.examine(CPU)
    assert [row["backend"] for row in found["backends"]] == list(BACKENDS)
    assert found["auto"] == registry.resolve_name("auto", CPU, torch.float32, 32)
    assert found["sound"]
    assert found["versions"]["torch"] == torch.__version__
    for row in found["backends"]:
        if row["unavailable"]:
            assert "milliseconds" not in row
        else:
            assert row["failures"] == [] and row["milliseconds"] > 0
            assert 0 <= row["largest_error"] < 1e-5
    text = doctor.text(found)
    assert "not here: device cpu: needs mps" in text
    assert "right: largest error" in text


def test_a_wrong_gradient_is_found_and_not_timed(monkeypatch):
    class Wrong(ReferenceOperations):
        def attention(self, *args: Any, **options: Any) -> torch.Tensor:
            out = super().attention(*args, **options)
            return out + (out - out.detach()) * 0.1

    row = row_of(monkeypatch, "sdpa", Wrong())
    assert all("out" not in failure.split(":")[1] for failure in row["failures"])
    assert any("dq" in failure for failure in row["failures"])
    assert "milliseconds" not in row


@pytest.mark.parametrize("op", ["embed", "add_norm", "bias_act", "linear"])
def test_a_wrong_row_operation_is_found(monkeypatch, op):
    def wrong(self, *args: Any, **options: Any) -> Any:
        out = getattr(ReferenceOperations, op)(self, *args, **options)
        return tuple(x * 1.01 for x in out) if isinstance(out, tuple) else out * 1.01

    row = row_of(monkeypatch, "sdpa", type("Wrong", (ReferenceOperations,), {op: wrong})())
    name = "relu" if op == "bias_act" else op
    assert any(name in failure for failure in row["failures"])


def test_an_exception_is_a_line_of_the_report(monkeypatch, capsys):
    class Broken(ReferenceOperations):
        def attention(self, *args: Any, **options: Any) -> torch.Tensor:
            raise RuntimeError("the driver\nis gone")

    row = row_of(monkeypatch, "sdpa", Broken())
    assert row["failures"] == ["RuntimeError: the driver is gone"]
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: RuntimeError: the driver is gone" in said
    assert "please report this output" in said


def test_the_command(capsys):
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in found["backends"]} == set(BACKENDS)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "auto on cpu" in said and "WRONG" not in said
    assert cli.main(["doctor", "--device", "tpu"]) == 2


def test_choices_of_mps_are_shown():
    found = doctor.examine(CPU)
    reason = "the Metal kernels failed their check: dq is 3 off"
    found["mps"] = {"attention float32 head_dim 32": {"path": "lean", "reason": reason}}
    assert f"mps: attention float32 head_dim 32: lean ({reason})" in doctor.text(found)


@pytest.mark.parametrize("name", ["cpu", "sdpa"])
def test_a_backend_that_cannot_be_imported(monkeypatch, capsys, name: str) -> None:
    """It is a row of both tables, and the others are reported all the same."""
    load = registry.importlib.import_module

    def broken(module: str) -> Any:
        if module == BACKENDS[name].module:
            raise OSError("a library is\x1b[2J missing")
        return load(module)

    registry._auto.cache_clear()
    monkeypatch.setattr(registry.importlib, "import_module", broken)
    found = doctor.examine(CPU)
    registry._auto.cache_clear()
    (row,) = (row for row in found["backends"] if row["backend"] == name)
    assert row["failures"] == ["OSError: a library is\x1b[2J missing"] and not found["sound"]
    assert len(found["backends"]) == len(BACKENDS)
    assert "WRONG: OSError" in doctor.text(found)
    assert cli.main(["backends", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    registry._auto.cache_clear()
    assert "it is broken: OSError: a library is\\x1b[2J missing" in said


def test_without_a_home_and_with_a_cache_that_is_a_file(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "cache").touch()
    for cache in (str(tmp_path / "cache"), "~nobody/cache", ""):
        monkeypatch.setenv("FASTTX_CACHE", cache)
        monkeypatch.delenv("HOME", raising=False)
        assert cli.main(["backends", "--device", "cpu"]) == 0
        assert "auto on cpu" in capsys.readouterr().out
    assert doctor.examine(CPU)["sound"]


def test_numbers_that_are_not_finite_are_null_in_json(monkeypatch, capsys) -> None:
    rows = {"sound": True, "errors": {"out": float("nan"), "dq": float("inf")}, "n": [1.5]}
    monkeypatch.setattr(doctor, "examine", lambda device: rows)
    assert cli.main(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"sound": True, "errors": {"out": None, "dq": None}, "n": [1.5]}
