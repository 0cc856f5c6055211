"""`fasttx doctor`: it reports every backend, finds a broken one, and never ends in an exception."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch

from fasttx.commands import cli, doctor
from fasttx.ops import reference, registry
from fasttx.ops.registry import BACKENDS
from fasttx.ops.rows import RowOps
from fasttx.testing.selfcheck import Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "SHAPE", Shape((7, 3), heads=2))


def adapter(**changes: Any) -> types.SimpleNamespace:
    """The reference's, with changes."""
    same = {name: getattr(reference, name) for name in ("attention", "attention_qkv", "rowops")}
    return types.SimpleNamespace(**same | changes)


def rows_of(monkeypatch, backend: str, replacement: Any) -> dict[str, Any]:
    """The row of a backend whose adapter is another."""
    module = BACKENDS[backend].module
    load = registry.importlib.import_module
    monkeypatch.setattr(
        registry.importlib, "import_module",
        lambda name: replacement if name == module else load(name),
    )  # fmt: skip
    replacement.unavailable_reasons = lambda *args: []
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
    def attention(qkv: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        out = reference.attention(qkv, *args, **options)
        return out + (out - out.detach()) * 0.1

    row = rows_of(monkeypatch, "sdpa", adapter(attention=attention))
    assert "dqkv is 0.1 off, 0.0001 allowed" in row["failures"][0]
    assert "milliseconds" not in row


@pytest.mark.parametrize("op", RowOps._fields)
def test_a_wrong_row_operation_is_found(monkeypatch, op):
    def wrong(*args: Any, **options: Any) -> Any:
        out = getattr(reference.rowops, op)(*args, **options)
        return tuple(x * 1.01 for x in out) if isinstance(out, tuple) else out * 1.01

    row = rows_of(monkeypatch, "sdpa", adapter(rowops=reference.rowops._replace(**{op: wrong})))
    assert any("off, 0.0001 allowed" in failure for failure in row["failures"])


def test_an_exception_is_a_line_of_the_report(monkeypatch, capsys):
    def attention(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("the driver\nis gone")

    row = rows_of(monkeypatch, "sdpa", adapter(attention=attention))
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
