"""The position table, which no state dict holds, and the backend: right however a model came to its
weights.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttx import TransformerClassifier
from fasttx.models.encoder import sinusoidal_positions
from fasttx.ops import registry

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "max_len": 8}
State = dict[str, Tensor]


def tiny(backend: str) -> TransformerClassifier:
    torch.manual_seed(1)
    return TransformerClassifier(20, attn_backend=backend, **SIZES).eval()


def on_meta(backend: str) -> TransformerClassifier:
    with torch.device("meta"):
        model = tiny(backend)
    assert model.positions.is_meta and model.embedding.is_meta
    return model


def emptied(model: nn.Module, device: str = "cpu") -> None:
    """`to_empty`, and no luck with what the memory held before."""
    model.to_empty(device=device)
    assert not any(x.is_meta for x in model.parameters())


def from_meta(backend: str, state: State) -> nn.Module:
    model = on_meta(backend)
    emptied(model)
    model.load_state_dict(state)
    return model


def emptied_where_it_was(backend: str, state: State) -> nn.Module:
    model = tiny(backend)
    emptied(model)
    model.load_state_dict(state)
    return model


def assigned(backend: str, state: State) -> nn.Module:
    model = on_meta(backend)
    model.load_state_dict(state, assign=True)
    return model


def through_a_parent(backend: str, state: State) -> nn.Module:
    parent = nn.ModuleDict({"inner": on_meta(backend)})
    emptied(parent)
    parent.load_state_dict({f"inner.{name}": x for name, x in state.items()})
    return parent["inner"]


def assigned_through_a_parent(backend: str, state: State) -> nn.Module:
    parent = nn.ModuleDict({"inner": on_meta(backend)})
    parent.load_state_dict({f"inner.{name}": x for name, x in state.items()}, assign=True)
    return parent["inner"]


def copied(backend: str, state: State) -> nn.Module:
    model = copy.deepcopy(on_meta(backend))
    emptied(model)
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model


def pickled(backend: str, state: State) -> nn.Module:
    model = pickle.loads(pickle.dumps(on_meta(backend)))
    emptied(model)
    model = pickle.loads(pickle.dumps(model))
    model.load_state_dict(state)
    return model


def loaded_onto_meta(backend: str, state: State) -> nn.Module:
    file = io.BytesIO()
    torch.save(tiny(backend), file)
    file.seek(0)
    model = torch.load(file, weights_only=False, map_location="meta")
    model.load_state_dict(state, assign=True)
    return model


def one_by_one(backend: str, state: State) -> nn.Module:
    """As `accelerate` puts them in: no method of the model is called."""
    model = on_meta(backend)
    for name, x in state.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = nn.Parameter(x)
    return model


WAYS = (
    from_meta, emptied_where_it_was, assigned, through_a_parent, assigned_through_a_parent, copied,
    pickled, loaded_onto_meta, one_by_one,
)  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "sdpa"])
def test_the_logits_are_those_of_the_weights(backend: str, way: Callable[..., nn.Module]) -> None:
    model = tiny(backend)
    other: Any = way(backend, model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
    assert torch.equal(other.positions, sinusoidal_positions(8, 16))
    assert other.backend == model.backend
    assert not any("positions" in name for name in other.state_dict())


@pytest.mark.parametrize("how", ["to", "assign"])
def test_another_dtype_on_the_way(how: str) -> None:
    """As after an ordinary move: the table in float32, then rounded."""
    model = tiny("reference").bfloat16()
    state = model.state_dict()
    other = on_meta("reference")
    if how == "to":
        other = other.to(torch.bfloat16)
        emptied(other)
    other.load_state_dict(state, assign=how == "assign")
    assert other.positions.dtype == torch.bfloat16
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_ordinary_moves_round_the_table_once(dtype: torch.dtype) -> None:
    model, table = tiny("reference"), sinusoidal_positions(8, 16)
    assert torch.equal(model.to(dtype).positions, table.to(dtype))
    assert torch.equal(model.float().positions, table)


def test_a_model_of_float64_keeps_its_table(monkeypatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, table = tiny("reference"), sinusoidal_positions(8, 16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float64
    assert torch.equal(model.to("cpu").positions, table)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny("reference")
        expected = model(IDS)
    model.to("cpu")  # its buffers take no values here
    with torch.no_grad():
        assert torch.equal(model(IDS), expected)
    with torch.inference_mode():
        emptied(model)
        model.load_state_dict(tiny("reference").state_dict())
        assert torch.equal(model(IDS), expected)


def test_a_move_fills_the_table_in_place() -> None:
    """It may be shared with other processes, or be part of a CUDA graph."""
    model = tiny("reference")
    where = model.positions.data_ptr()
    model.to("cpu").share_memory()
    shared = model.positions.data_ptr()
    model.to("cpu")
    assert model.positions.data_ptr() == shared
    assert model.positions.is_shared() or where == shared


def test_the_backend_follows_weights_that_are_passed_in() -> None:
    """torch.func's way to run many models by one that has no weights."""
    models = [tiny("cpu"), tiny("cpu")]
    with torch.no_grad():
        models[1].head.dense.weight.mul_(2)
    base = on_meta("cpu")
    for model in models:
        state = dict(model.named_parameters())
        assert torch.equal(torch.func.functional_call(base, state, IDS), model(IDS))


def test_many_models_at_once() -> None:
    models = [tiny("reference") for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.head.dense.weight.mul_(i)
    parameters, _ = torch.func.stack_module_state(models)
    base = on_meta("reference")
    cu_seqlens, ids = torch.tensor([0, 3, 5]), torch.tensor([3, 4, 5, 6, 7])
    inputs = {"cu_seqlens": cu_seqlens, "max_seqlen": 3}

    def logits(state: State) -> Tensor:
        return torch.func.functional_call(base, state, ids, inputs)

    expected = torch.stack([model(ids, **inputs) for model in models])
    torch.testing.assert_close(torch.vmap(logits)(parameters), expected)


def test_a_backend_that_is_elsewhere_says_so_until_then(monkeypatch) -> None:
    model = on_meta("cpu")
    with pytest.raises(registry.BackendUnavailableError, match="device meta: needs cpu"):
        assert model.backend
