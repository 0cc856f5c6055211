"""A layer that is hooked, wrapped, replaced, parametrised or quantised is honoured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fasttx import ModelConfig, TransformerClassifier
from fasttx.models.lstm import LSTMClassifier
from fasttx.models.masked_lm import MaskedLanguageModel

BACKENDS = ("cpu", "reference", "sdpa")
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
LINEAR = (
    "blocks.0.qkv", "blocks.0.out", "blocks.0.up", "blocks.0.down", "blocks.1.qkv", "blocks.1.out",
    "blocks.1.up", "blocks.1.down", "head.dense", "head.classify",
)  # fmt: skip
NORMS = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_layers = pytest.mark.parametrize("name", [*LINEAR, *NORMS])


def tiny(backend: str, **settings: Any) -> TransformerClassifier:
    """Whose logits depend on every layer: classify starts small, so it is drawn anew."""
    torch.manual_seed(1)
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "max_len": 8}
    model = TransformerClassifier(20, attn_backend=backend, **sizes | settings).eval()
    assert {name for name, x in model.named_modules() if isinstance(x, nn.Linear)} == set(LINEAR)
    assert {name for name, x in model.named_modules() if isinstance(x, nn.LayerNorm)} == set(NORMS)
    return model


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def step(model: nn.Module) -> list[Tensor]:
    """The logits, and the gradient of each parameter."""
    logits = model(IDS)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


def assert_changed(model: nn.Module, before: Tensor) -> None:
    assert (model(IDS) - before).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------- hooks


@over_layers
@over_backends
def test_forward_hooks_fire_once_and_may_change_the_output(backend, name):
    model = tiny(backend)
    before, seen = model(IDS), []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append(tuple(out.shape))
        return out * 1.5

    handle = model.get_submodule(name).register_forward_hook(note)
    assert_changed(model, before)
    assert len(seen) == 1
    handle.remove()
    assert torch.equal(model(IDS), before)


@over_layers
@over_backends
def test_pre_hooks_may_change_the_input(backend, name):
    model = tiny(backend)
    before = model(IDS)
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].sin() * 2,))
    assert_changed(model, before)


@over_layers
@over_backends
def test_backward_hooks_fire(backend, name):
    model, seen = tiny(backend), []
    layer = model.get_submodule(name)
    layer.register_full_backward_hook(lambda module, given, taken: seen.append("after"))
    layer.register_full_backward_pre_hook(lambda module, taken: seen.append("before"))
    step(model)
    assert seen == ["before", "after"]


@over_backends
def test_hooks_of_all_modules_fire(backend):
    model, seen = tiny(backend), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    try:
        model(IDS)
    finally:
        handle.remove()
    for name in (*LINEAR, *NORMS):
        assert model.get_submodule(name) in seen, name


@over_backends
def test_hooks_that_change_nothing_change_nothing(backend):
    """Neither logits nor gradients, beyond the rounding of another order of sums."""
    plain, hooked = tiny(backend), tiny(backend)
    for name in (*LINEAR, *NORMS):
        hooked.get_submodule(name).register_forward_hook(lambda module, args, out: None)
    for x, y in zip(step(plain), step(hooked), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@over_backends
def test_hooks_that_change_nothing_change_nothing_in_training(backend):
    """The masks are drawn for places in the rows, whatever way a layer is called."""
    losses = []
    for is_hooked in (False, True):
        model = tiny(backend, dropout=0.3).train()
        for name in (*LINEAR, *NORMS) if is_hooked else ():
            model.get_submodule(name).register_forward_hook(lambda module, args, out: None)
        torch.manual_seed(5)
        losses.append(model(IDS, seed=torch.tensor(3)))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["", "blocks", "blocks.0", "blocks.1", "head"])
@over_backends
def test_hooks_of_larger_parts_fire(backend, name):
    model, seen = tiny(backend), []
    before = step(model)
    part = model.get_submodule(name)
    part.register_forward_pre_hook(lambda module, args: seen.append("before"))
    part.register_forward_hook(lambda module, args, out: seen.append("after"))
    part.register_full_backward_pre_hook(lambda module, taken: seen.append("back"))
    part.register_full_backward_hook(lambda module, given, taken: seen.append("done"))
    for x, y in zip(step(model), before, strict=True):
        torch.testing.assert_close(x, y)
    # A list of modules is not called.
    assert sorted(seen) == ([] if name == "blocks" else ["after", "back", "before", "done"])


@pytest.mark.parametrize("name", ["head", "head.dense", "head.norm"])
@over_backends
def test_hooks_of_the_masked_model_s_head_fire(backend, name):
    config = ModelConfig(
        20, d_model=16, num_heads=2, num_layers=1, d_ff=8, max_len=8, attn_backend=backend
    )
    torch.manual_seed(0)
    model = MaskedLanguageModel(config).eval()
    inputs = {"cu_seqlens": torch.tensor([0, 4]), "rows": torch.tensor([1, 3])}
    before = model(IDS[0], **inputs)
    model.get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)
    assert (model(IDS[0], **inputs) - before).abs().max() > 1e-3
    loss, _ = model(IDS[0], **inputs, labels=torch.tensor([4, 5]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["onward", "from_end", "classify"])
def test_hooks_of_an_lstm_fire(name):
    torch.manual_seed(0)
    model = LSTMClassifier(ModelConfig(20, d_model=16, num_heads=2, num_layers=1, d_ff=8)).eval()
    seen = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(name))
    model(IDS[0], cu_seqlens=torch.tensor([0, 4]))
    assert seen == [name]


# ------------------------------------------------------------------------------------ replacements


class Wrapped(nn.Module):
    """LoRA in the small: the layer, and a correction of low rank."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        wide = layer.weight.shape[-1]
        out = layer.weight.shape[0]
        self.a = nn.Parameter(torch.randn(wide, 2) / 4)
        self.b = nn.Parameter(torch.randn(2, out) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a @ self.b


class LouderLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class LouderNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@over_layers
@over_backends
def test_a_wrapper_is_called_and_trained(backend, name):
    model = tiny(backend)
    before, wrapper = model(IDS), Wrapped(model.get_submodule(name))
    replace(model, name, wrapper)
    assert_changed(model, before)
    model(IDS).square().sum().backward()
    for p in (wrapper.a, wrapper.b, *wrapper.layer.parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0


@over_layers
@over_backends
def test_a_subclass_is_called(backend, name):
    model = tiny(backend)
    before, old = model(IDS), model.get_submodule(name)
    new = (
        LouderLinear(old.in_features, old.out_features)
        if name in LINEAR
        else LouderNorm(old.normalized_shape)
    )
    new.load_state_dict(old.state_dict())
    replace(model, name, new)
    assert_changed(model, before)


@over_layers
@over_backends
def test_a_forward_of_an_instance_is_called(backend, name):
    model = tiny(backend)
    before, layer = model(IDS), model.get_submodule(name)
    forward: Callable[[Tensor], Tensor] = layer.forward
    layer.forward = lambda x: forward(x) * 1.5
    assert_changed(model, before)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
@over_backends
def test_a_forward_of_the_class_is_called(backend, kind, monkeypatch):
    """As profilers and tools for quantisation put it there."""
    model = tiny(backend)
    before, forward, seen = model(IDS), kind.forward, []

    def counted(layer: nn.Module, x: Tensor) -> Tensor:
        seen.append(layer)
        return forward(layer, x)

    monkeypatch.setattr(kind, "forward", counted)
    torch.testing.assert_close(model(IDS), before, rtol=1e-5, atol=1e-6)
    assert len(seen) == len(LINEAR if kind is nn.Linear else NORMS)


class Passing(nn.Module):
    """Around a whole part, as FSDP and activation checkpointing wrap it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.module(*args, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1", "head", "norm"])
@over_backends
def test_a_wrapper_of_a_whole_part(backend, name):
    model = tiny(backend)
    before, wrapper = step(model), Passing(model.get_submodule(name))
    replace(model, name, wrapper)
    for x, y in zip(step(model), before, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert wrapper.calls == 1


@pytest.mark.filterwarnings("ignore")  # of a process group on the CPU
@over_backends
def test_fully_sharded(backend, tmp_path):
    """By FSDP: a block has its weights only while it is called, its first norm's too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = tiny(backend)(IDS)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, mesh = tiny(backend), init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        logits = model(IDS)
        logits.sum().backward()
        torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-6)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@over_layers
@over_backends
def test_frozen_weights(backend, name):
    """Their layer gets no gradient, the others get what they got before."""
    model = tiny(backend)
    before = dict(zip(dict(model.named_parameters()), step(model)[1:], strict=True))
    layer = model.get_submodule(name)
    for frozen in ([layer.weight], [layer.bias], [layer.weight, layer.bias]):
        for p in model.parameters():
            p.requires_grad_(not any(p is x for x in frozen))
            p.grad = None
        logits = model(IDS)
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * weights).sum().backward()
        for key, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, before[key])
            else:
                assert p.grad is None


@over_backends
def test_everything_but_the_head_frozen(backend):
    model = tiny(backend)
    model.requires_grad_(False)
    model.head.classify.requires_grad_(True)
    model(IDS).sum().backward()
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradients == {"head.classify.weight", "head.classify.bias"}


@over_backends
def test_tied_weights(backend):
    """Of layers in two blocks: one gradient, the sum of both."""
    model = tiny(backend)
    for name in ("qkv", "out", "up", "down", "norm1", "norm2"):
        theirs = getattr(model.blocks[0], name)
        setattr(model.blocks[1], name, theirs)
    tied = copy.deepcopy(model)
    apart = tiny(backend)
    apart.load_state_dict(model.state_dict())
    names = [name for name, _ in tied.named_parameters()]
    assert "blocks.1.up.weight" not in names
    logits, *gradients = step(tied)
    expected, *theirs = step(apart)
    assert torch.equal(logits, expected)
    by_name = dict(zip(dict(apart.named_parameters()), theirs, strict=True))
    for name, gradient in zip(names, gradients, strict=True):
        total = by_name[name]
        if name.startswith("blocks.0."):
            total = total + by_name[name.replace("blocks.0.", "blocks.1.")]
        torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
@over_backends
def test_a_layer_made_without_initial_values(backend, name):
    """By torch.nn.utils.skip_init: a plain layer, whose weights come later."""
    model = tiny(backend)
    before, old = model(IDS), model.get_submodule(name)
    new = nn.utils.skip_init(nn.Linear, old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    replace(model, name, new)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("name", LINEAR)
@over_backends
def test_a_linear_layer_without_a_bias(backend, name):
    model = tiny(backend)
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    nn.init.zeros_(old.bias)
    expected = model(IDS)
    replace(model, name, new)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}, {"eps": 0.5}])
@pytest.mark.parametrize("name", NORMS)
@over_backends
def test_other_layer_norms(backend, name, options):
    model, reference = tiny(backend), tiny("reference")
    replace(model, name, nn.LayerNorm(16, **options))
    norm = nn.LayerNorm(16, **options)
    norm.register_forward_hook(lambda module, args, out: None)  # so that it is called
    replace(reference, name, norm)
    torch.testing.assert_close(model(IDS), reference(IDS), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("name", LINEAR)
@over_backends
def test_parametrisations(backend, name):
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = tiny(backend)
    before, layer = model(IDS), model.get_submodule(name)
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    assert_changed(model, before)
    model(IDS).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0


@pytest.mark.parametrize("name", LINEAR)
@over_backends
def test_weight_norm(backend, name):
    model = tiny(backend)
    before, layer = model(IDS), model.get_submodule(name)
    nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(model(IDS), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)  # the lengths
    assert_changed(model, before)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("change", ["pruned", "weight_norm", "spectral_norm"])
@over_backends
def test_weights_that_a_hook_computes(backend, change, name):
    """Before each call: the older way of torch.nn.utils."""
    model = tiny(backend)
    before, layer = model(IDS), model.get_submodule(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight_norm is on its way out
        if change == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.5)
        else:
            getattr(nn.utils, change)(layer)
    if change == "weight_norm":
        with torch.no_grad():
            layer.weight_g.mul_(2)  # the lengths
    assert_changed(model, before)
    model(IDS).square().sum().backward()
    name_of = {"pruned": "weight_orig", "spectral_norm": "weight_orig", "weight_norm": "weight_v"}
    gradient = getattr(layer, name_of[change]).grad
    assert gradient.abs().max() > 0


@over_backends
def test_dynamic_quantization(backend):
    model = tiny(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way to a package of its own
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not any(type(x) is nn.Linear for x in quantized.modules())
    logits, exact = quantized(IDS), model(IDS)
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05)


@over_backends
def test_peft(backend):
    """LoRA on every kind of linear layer: nothing changes at first, then only it is trained."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = tiny(backend)
    before = model(IDS)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "out", "up", "down", "dense", "classify"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(IDS), before, rtol=1e-5, atol=1e-6)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(LINEAR)
    adam = torch.optim.Adam(trained, 0.05)
    for _ in range(2):  # the first gradient of A is 0, since B starts as 0
        adam.zero_grad()
        adapted(IDS)[:, 0].sum().backward()
        assert all(p.grad is not None for p in trained)
        adam.step()
    assert all(p.grad.abs().max() > 0 for p in trained)
    assert_changed(adapted, before)
    after = adapted(IDS)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS), after, rtol=1e-4, atol=1e-5)
