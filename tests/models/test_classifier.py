"""The classifier: its fixed numbers, what its logits may not depend on, and PyTorch's own encoder.

B texts, T rows, L padded length, d d_model, H heads.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx import ModelConfig, TransformerClassifier, pack
from fasttx.errors import ConfigError
from fasttx.models.encoder import sinusoidal_positions
from fasttx.models.mean_pool import mean_pool
from fasttx.ops import dropout, registry
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import BACKENDS
from fasttx.text.packing import RaggedIds
from tests import backends
from tests.backends import HALVES, over_backends

pytestmark = backends.POISONED

VOCABULARY, MAX_LEN = 50, 12
TEXTS = [[3, 4, 5, 6, 7], [8], [9, 1, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [], [19, 20, 21]]
NAMES = ("reference", "sdpa")
over_names = pytest.mark.parametrize("name", NAMES)


def small(
    backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any
) -> TransformerClassifier:
    """Every parameter random, also those that start as 0 or 1: the logits depend on all of them."""
    settings = {
        "d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "max_len": MAX_LEN,
        "num_classes": 3, **settings,
    }  # fmt: skip
    model = TransformerClassifier(VOCABULARY, attn_backend=backend, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return model.to(device, dtype)


def padded(texts: list[list[int]], length: int | None = None, side: str = "right") -> Tensor:
    length = max(map(len, texts), default=0) if length is None else length
    rows = [[0] * (length - len(t)) for t in texts]
    rows = [t + r if side == "right" else r + t for t, r in zip(texts, rows, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(len(texts), length)


def packed(texts: list[list[int]], device: str = "cpu", tail: int = 0) -> dict[str, Any]:
    inputs = pack(RaggedIds.from_lists(texts)).to(device).model_inputs()
    ids, at = inputs["input_ids"], inputs["position_ids"]
    inputs["input_ids"] = torch.cat([ids, torch.randint(2, VOCABULARY, (tail,), device=device)])
    inputs["position_ids"] = torch.cat([at, torch.randint(0, MAX_LEN, (tail,)).to(at)])
    return inputs


def seed_on(device: str, seed: int = 17) -> Tensor:
    return torch.tensor(seed, dtype=torch.int64, device=device)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- the fixed numbers


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    model = TransformerClassifier()
    assert count(model) == 5_785_858
    assert model.embedding.numel() == 2_560_000
    assert [count(block) for block in model.blocks] == [789_760] * 4
    assert count(model.norm) == 512
    assert count(model.head) == 66_306
    assert all(p.requires_grad for p in model.parameters())


def test_signatures():
    parameters = inspect.signature(TransformerClassifier).parameters
    assert {k: p.default for k, p in list(parameters.items())[:9]} == {
        "vocab_size": 10_000, "num_classes": 2, "d_model": 256, "num_heads": 8, "num_layers": 4,
        "d_ff": 1024, "max_len": 256, "dropout": 0.1, "attn_backend": "auto",
    }  # fmt: skip
    forward = inspect.signature(TransformerClassifier.forward).parameters
    keywords = ["cu_seqlens", "position_ids", "max_seqlen", "seed", "return_attention"]
    assert list(forward) == ["self", "input_ids", "attention_mask", *keywords]
    assert all(forward[k].kind == inspect.Parameter.KEYWORD_ONLY for k in keywords)
    assert [forward[k].default for k in ("attention_mask", *keywords)] == [None] * 5 + [False]


def test_the_config_is_the_arguments():
    config = ModelConfig(100, 3, 16, 4, 1, 8, 9, 0.3, "reference", "gelu", 0.2)
    model = TransformerClassifier.from_config(config)
    assert model.config == config
    assert TransformerClassifier().config == ModelConfig()


def test_the_saved_state(tmp_path):
    model = TransformerClassifier(attn_backend="reference").eval()
    path = tmp_path / "best_model.pt"
    torch.save(model.state_dict(), path)
    assert 23.0e6 < path.stat().st_size < 23.4e6
    assert not any("position" in key for key in model.state_dict())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other = TransformerClassifier(attn_backend="sdpa").eval()
    other.load_state_dict(torch.load(path, weights_only=True))
    ids = torch.randint(1, 10_000, (2, 30))
    assert_same(other(ids), model(ids))


def test_the_start():
    """<PAD> is 0; embeddings scaled by sqrt(d) are about as large as sqrt(d) * 0.02."""
    torch.manual_seed(0)
    model = TransformerClassifier(2000)
    assert (model.embedding[0] == 0).all()
    assert abs(model.embedding[1:].std().item() - 0.02) < 1e-3
    assert abs(model.embedding[1:].mean().item()) < 1e-3
    assert (model.norm.weight == 1).all()
    assert (model.norm.bias == 0).all()
    before = model.head.dense.weight.clone()
    torch.manual_seed(1)
    model.reset_parameters()
    assert not torch.equal(model.head.dense.weight, before)
    torch.manual_seed(0)
    assert torch.equal(TransformerClassifier(2000).head.dense.weight, before)


def test_positions_are_sines_and_cosines():
    table = sinusoidal_positions(7, 6)
    assert table.dtype == torch.get_default_dtype()
    for position in range(7):
        for column in range(6):
            angle = position / 10_000 ** ((column - column % 2) / 6)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-6)


def test_mean_pool():
    n = torch.randn(9, 4)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32)
    expected = torch.stack([n[:3].mean(0), torch.zeros(4), n[3:7].mean(0), torch.zeros(4)])
    assert_same(mean_pool(n, cu_seqlens), expected)
    assert mean_pool(n[:0], cu_seqlens[:1]).shape == (0, 4)


# ------------------------------------------------------- what logits may and may not depend on


@over_backends()
def test_logits_do_not_depend_on_padding_packing_or_company(target):
    model = small(target.name, target.device).eval()

    def logits(ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return model(
            ids.to(target.device), None if mask is None else mask.to(target.device), **options
        ).cpu()

    ids = padded(TEXTS)
    mask = ids != 0
    expected = logits(ids)
    assert expected.shape == (5, 3)
    assert (expected.std(0) > 0.02).all()  # else nothing that follows would say anything
    assert_same(logits(ids, mask), expected)
    assert_same(logits(ids, mask.long()), expected)
    assert_same(logits(ids, mask.float()), expected)
    # side and amount of padding, also past max_len
    for length in (12, 13, 40):
        for side in ("left", "right"):
            assert_same(logits(padded(TEXTS, length, side)), expected)
    # garbage under the padding
    garbage = torch.where(mask, ids, torch.randint(2, VOCABULARY, ids.shape))
    assert_same(logits(garbage, mask), expected)
    # holes
    holes = torch.zeros(5, 24, dtype=torch.int64)
    holes[:, 1::2] = ids
    assert_same(logits(holes), expected)
    # order and company
    order = [4, 2, 0, 3, 1]
    assert_same(logits(ids[order]), expected[order])
    for i in range(5):
        assert_same(logits(padded([TEXTS[i]], 12)), expected[i : i + 1])
    # packed; with a dead tail of garbage; with the optional arguments given, loosely, or not
    for tail in (0, 7):
        inputs = packed(TEXTS, target.device, tail)
        assert_same(model(**inputs).cpu(), expected)
        assert_same(model(inputs["input_ids"], cu_seqlens=inputs["cu_seqlens"]).cpu(), expected)
        del inputs["position_ids"]
        assert_same(model(**inputs).cpu(), expected)
    inputs = packed([TEXTS[1], TEXTS[4]], target.device)
    inputs["max_seqlen"] = MAX_LEN
    assert_same(model(**inputs).cpu(), expected[[1, 4]])


@over_names
def test_logits_depend_on_words_and_their_order(name):
    model = small(name).eval()
    one, other, third = (model(padded([t])) for t in ([3, 4, 5], [4, 3, 5], [3, 4, 6]))
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, third, atol=1e-3)


def test_a_zero_that_the_mask_calls_real_counts():
    model = small("reference").eval()
    ids = torch.tensor([[3, 0, 4]])
    assert not torch.allclose(model(ids), model(ids, torch.ones(1, 3)), atol=1e-3)


def gradients(model: TransformerClassifier, logits: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weight).sum(), parameters), strict=True))


@over_backends(p=(0.0, 0.3))
def test_backends_agree(target, p):
    """In training, dropout included: the same logits and gradients as the reference in float64."""
    inputs = packed(TEXTS, tail=3)
    exact = small("reference", dtype=torch.float64, dropout=p).train()
    model = small(target.name, target.device, dropout=p).train()
    expected = exact(**inputs, seed=seed_on("cpu"))
    inputs = {k: x.to(target.device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    logits = model(**inputs, seed=seed_on(target.device))
    assert_same(logits.cpu().double(), expected)
    into, theirs = gradients(model, logits), gradients(exact, expected)
    for name, x in into.items():
        torch.testing.assert_close(x.cpu().double(), theirs[name], rtol=1e-4, atol=2e-5, msg=name)
    model.eval()
    assert_same(model(**inputs).cpu().double(), exact.eval()(**packed(TEXTS)))


@over_backends(dropout="shared")
def test_dropout_does_not_depend_on_padding(target):
    model = small(target.name, target.device, dropout=0.4).train()

    def logits(ids: Tensor, **options: Any) -> Tensor:
        return model(ids.to(target.device), seed=seed_on(target.device), **options).cpu()

    expected = logits(padded(TEXTS))
    for side, length in (("left", 12), ("left", 15), ("right", 30)):
        assert_same(logits(padded(TEXTS, length, side)), expected)
    for tail in (0, 9):
        assert_same(
            model(**packed(TEXTS, target.device, tail), seed=seed_on(target.device)).cpu(), expected
        )
    # The rows of a text, and so its masks, follow from the texts before it, not from those after.
    assert_same(logits(padded(TEXTS[:3])), expected[:3])


@over_names
def test_empty_and_unknown_texts(name):
    """Finite logits and gradients; an empty text gets what the head makes of 0."""
    for texts in ([[], [1, 1, 1], [1]], [[]], [[], []]):
        model = small(name, dropout=0.2).train()
        for inputs in ({"input_ids": padded(texts, 4)}, packed(texts), packed(texts, tail=4)):
            logits = model(**inputs)
            assert logits.shape == (len(texts), 3)
            assert logits.isfinite().all()
            assert all(x.isfinite().all() for x in gradients(model, logits).values())
        model.eval()
        expected = model.head.classify(F.gelu(model.head.dense.bias))
        assert_same(model(padded(texts, 4))[0], expected)


@over_names
def test_no_text_at_all(name):
    model = small(name).train()
    for inputs in (
        {"input_ids": padded([], 5)},
        {"input_ids": padded([], 0)},
        packed([]),
        packed([], tail=3),
    ):
        logits = model(**inputs)
        assert logits.shape == (0, 3)
        assert all((x == 0).all() for x in gradients(model, logits).values())


@over_names
def test_words_that_do_not_occur_get_no_gradient(name):
    """Not those of the dead tail either."""
    model = small(name, dropout=0.2).train()
    inputs = packed(TEXTS)
    tail = torch.tensor([40, 41, 40])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail])
    inputs["position_ids"] = torch.cat([inputs["position_ids"], torch.zeros(3).int()])
    rows = gradients(model, model(**inputs))["embedding"].abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == sorted({i for t in TEXTS for i in t})


# ------------------------------------------------------------------------------------- the seeds


def test_seeds_decide_dropout():
    model = small("reference", dropout=0.4).train()
    ids = padded(TEXTS)
    first = model(ids, seed=seed_on("cpu", 1))
    assert torch.equal(model(ids, seed=seed_on("cpu", 1)), first)
    assert not torch.allclose(model(ids, seed=seed_on("cpu", 2)), first, atol=1e-3)
    model.eval()
    assert torch.equal(model(ids, seed=seed_on("cpu", 1)), model(ids))


@over_names
def test_without_a_seed_torch_s_generator_decides(name):
    model = small(name, dropout=0.4).train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs += [model(padded(TEXTS)), model(padded(TEXTS))]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.allclose(outs[0], outs[4], atol=1e-3)


@over_names
def test_eval_draws_nothing(name):
    model = small(name, dropout=0.4).eval()
    state = torch.get_rng_state()
    assert torch.equal(model(padded(TEXTS)), model(padded(TEXTS)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="seed is 3"):
        small("reference", dropout=0.4).train()(padded(TEXTS), seed=3)


class Recorder(ReferenceOperations):
    """Notes the site and the dropout of every call. Sites differ by their seed."""

    def __init__(self) -> None:
        self.sites: list[tuple[str, float, int | None]] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("attention", "embed", "add_norm", "feed_forward", "bias_act"):
            return found

        def noted(*args: Any) -> Any:
            (site,) = (x for x in args if isinstance(x, Dropout))
            self.sites.append((name, site.p, None if site.seed is None else int(site.seed)))
            return found(*args)

        return noted


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p_attention", [None, 0.0, 0.25])
def test_every_site_has_its_dropout_and_its_seed(monkeypatch, training, p_attention):
    recorder = Recorder()
    monkeypatch.setattr(registry, "resolve", lambda *where: recorder)
    model = small("reference", dropout=0.5, attention_dropout=p_attention).train(training)
    model(padded(TEXTS), seed=seed_on("cpu", 5))
    block = ["attention", "add_norm", "feed_forward", "add_norm"]
    names = ["embed", *block, *block, "bias_act"]
    assert [name for name, _, _ in recorder.sites] == names
    if training:
        p = {"attention": 0.5 if p_attention is None else p_attention}
        seeds = dropout.site_seeds(seed_on("cpu", 5), len(names)).tolist()
        assert recorder.sites == [
            (name, p.get(name, 0.5), seed if p.get(name, 0.5) else None)
            for name, seed in zip(names, seeds, strict=True)
        ]
    else:
        assert recorder.sites == [(name, 0.0, None) for name in names]


# ----------------------------------------------------------------------- gradients by differences


@pytest.mark.parametrize(
    ("name", "p", "settings"),
    [
        ("reference", 0.3, {"num_layers": 2}),
        ("reference", 0.3, {"num_layers": 1, "activation": "gelu", "attention_dropout": 0.0}),
        ("sdpa", 0.0, {"num_layers": 1}),
    ],
)
def test_gradcheck_of_every_parameter(name, p, settings):
    settings = {"d_model": 8, "num_heads": 2, "d_ff": 8, "dropout": p, **settings}
    model = small(name, dtype=torch.float64, **settings).train()
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs = packed([[3, 4, 3], [], [5, 6]], tail=1)

    def logits(*parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, values, (), {**inputs, "seed": seed_on("cpu")})

    assert torch.autograd.gradcheck(logits, parameters, fast_mode=True)


# -------------------------------------------------------------------------- attention on request


@over_names
@pytest.mark.parametrize("training", [False, True])
def test_attention_weights(name, training):
    """By hand from the projections; rows of real tokens sum to 1, all else is 0."""
    model = small(name, dropout=0.0).train(training)
    captured = []
    for block in model.blocks:
        block.qkv.register_forward_hook(lambda module, args, out: captured.append(out))
    ids = padded(TEXTS)
    logits, weights = model(ids, return_attention=True)
    assert_same(logits, model(ids))
    assert len(weights) == 2
    lens = [len(t) for t in TEXTS]
    for layer, w in enumerate(weights):
        assert w.shape == (5, 2, 12, 12)
        qkv = captured[2 * layer].view(-1, 3, 2, 8)
        start = 0
        for b, n in enumerate(lens):
            q, k, _ = qkv[start : start + n].unbind(1)
            expected = torch.einsum("ihd,jhd->hij", q, k).div(math.sqrt(8)).softmax(-1)
            assert_same(w[b, :, :n, :n], expected)
            assert_same(w[b, :, :n].sum(-1), torch.ones(2, n))
            assert (w[b, :, n:] == 0).all()
            assert (w[b, :, :, n:] == 0).all()
            start += n


def test_attention_weights_of_packed_rows():
    model = small("reference").eval()
    padded_weights = model(padded(TEXTS), return_attention=True)[1]
    packed_weights = model(**packed(TEXTS, tail=2), return_attention=True)[1]
    for a, b in zip(padded_weights, packed_weights, strict=True):
        assert_same(a, b)
    loose = packed(TEXTS[:2])
    loose["max_seqlen"] = 9
    logits, weights = model(**loose, return_attention=True)
    assert weights[0].shape == (2, 2, 9, 9)
    assert_same(logits, model(padded(TEXTS[:2])))


# ------------------------------------------------------------------------------------ wrong inputs


def test_too_long():
    model = small("reference").eval()
    texts = [[5] * (MAX_LEN + 1), [4]]
    for inputs in ({"input_ids": padded(texts)}, packed(texts)):
        with pytest.raises(ValueError, match=r"13 tokens; expected at most max_len = 12.*larger"):
            model(**inputs)


def test_wrong_shapes():
    model = small("reference").eval()
    ids = padded(TEXTS)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"input_ids has shape \(12,\).*packed \(T,\).*cu_seqlens"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask \(5, 11\)"):
        model(ids, torch.ones(5, 11))
    with pytest.raises(ValueError, match=r"attention_mask \(12,\)"):
        model(ids, torch.ones(12))
    with pytest.raises(ValueError, match=r"shape \(5, 12\) beside cu_seqlens"):
        model(ids, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(ids[0], torch.ones(12), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="expected"):
        model(ids[None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 30, "num_heads": 4}, "d_model is 30 and num_heads is 4.*divides"),
        ({"d_model": 15, "num_heads": 3}, "d_model is 15; expected an even number"),
        ({"d_model": 0}, "d_model is 0; expected at least 1"),
        ({"d_model": "256"}, "d_model is '256'; expected int"),
        ({"d_model": 256.0}, "d_model is 256.0; expected int"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": True}, "num_heads is True; expected int"),
        ({"num_layers": -1}, "num_layers is -1; expected at least 0"),
        ({"d_ff": 0}, "d_ff is 0"),
        ({"max_len": 0}, "max_len is 0"),
        ({"vocab_size": 1}, "vocab_size is 1; expected at least 2"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"dropout": -0.1}, "dropout is -0.1; expected between 0 and 1"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"dropout": math.nan}, "dropout is nan; expected a finite number"),
        ({"attention_dropout": 2.0}, "attention_dropout is 2.0"),
        ({"activation": "swish"}, "activation is 'swish'; expected one of relu, gelu"),
        ({"attn_backend": "flash"}, "unknown attention backend 'flash'; expected auto, .*sdpa"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TransformerClassifier(**settings)


def test_no_layers_at_all():
    model = small("reference", num_layers=0).eval()
    n = model.norm(model.embedding[padded([TEXTS[0]])[0]] * 4 + model.positions[:5])
    assert_same(
        model(padded([TEXTS[0]])), model.head(n.mean(0, keepdim=True), model._ops, NO_DROPOUT)
    )


@pytest.mark.parametrize("p", [0.0, 1.0])
@over_names
def test_extreme_dropout(name, p):
    model = small(name, dropout=p).train()
    logits = model(padded(TEXTS))
    assert logits.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(model, logits).values())
    if p:  # the head sees nothing
        assert_same(logits, model.head.classify.bias.expand_as(logits))


# -------------------------------------------------------------------- copies, dtypes, compilation


@over_names
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, how):
    model = small(name).eval()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(padded(TEXTS)), model(padded(TEXTS)))
    with torch.no_grad():
        other.norm.bias.add_(1.0)
    assert not torch.equal(other.norm.bias, model.norm.bias)
    assert other.double()(padded(TEXTS)).dtype == torch.float64
    assert model(padded(TEXTS)).dtype == torch.float32


@over_backends(torch.float64, *HALVES)
def test_moved_to_another_dtype(target, dtype):
    model = small(target.name, target.device, dropout=0.1)
    expected = model.eval()(padded(TEXTS).to(target.device))
    model.to(dtype)
    assert model.positions.dtype == dtype
    logits = model(padded(TEXTS).to(target.device))
    assert logits.dtype == dtype
    atol = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    torch.testing.assert_close(logits, expected.to(dtype), rtol=0, atol=atol)
    logits = model.train()(padded(TEXTS).to(target.device))
    assert all(x.isfinite().all() for x in gradients(model, logits).values())


@over_backends(*HALVES, p=(0.0, 0.2))
def test_autocast(target, dtype, p):
    model = small(target.name, target.device, dropout=p).train()
    options = {"seed": seed_on(target.device)}
    ids = padded(TEXTS).to(target.device)
    expected = model(ids, **options)
    with torch.autocast(target.device, dtype=dtype):
        logits = model(ids, **options)
    atol = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=atol)
    for x in gradients(model, logits).values():
        assert x.dtype == torch.float32
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_weights_under_autocast(dtype):
    model = small("reference").eval()
    expected = model(padded(TEXTS), return_attention=True)[1]
    with torch.autocast("cpu", dtype=dtype):
        weights = model(padded(TEXTS), return_attention=True)[1]
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=5e-2)


@pytest.mark.parametrize("form", ["padded", "packed"])
@over_names
def test_compiled(name, form):
    torch._dynamo.reset()
    model = small(name, dropout=0.3).eval()
    inputs = packed(TEXTS, tail=2) if form == "packed" else {"input_ids": padded(TEXTS, 13, "left")}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(**inputs), model(**inputs))
    if name == "reference":
        model.train()
        inputs["seed"] = seed_on("cpu")
        assert_same(compiled(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_exported(name):
    """For any number of rows."""
    if BACKENDS[name].unavailable_reasons("cpu", torch.float32, 8):
        pytest.skip(f"backend {name} does not run here")
    model = small(name).eval()
    rows = {0: torch.export.Dim("T", min=2, max=64)}
    shapes = {"input_ids": rows, "position_ids": rows, "cu_seqlens": None, "max_seqlen": None}
    inputs = [{**packed(texts), "max_seqlen": 12} for texts in (TEXTS, [[3], *TEXTS[:4]])]
    program = torch.export.export(model, (), inputs[0], dynamic_shapes=shapes, strict=False)
    for given in inputs:
        assert_same(program.module()(**given), model(**given))


# ---------------------------------------------------------------------- PyTorch's own encoder


def torch_logits(model: TransformerClassifier, ids: Tensor) -> Tensor:
    """The same weights in nn.TransformerEncoder, pre-norm."""
    c = model.config
    layer = nn.TransformerEncoderLayer(
        c.d_model, c.num_heads, c.d_ff, c.dropout, c.activation, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(
        layer, c.num_layers, nn.LayerNorm(c.d_model), enable_nested_tensor=False
    )
    names = {
        "self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "up.",
        "linear2.": "down.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    state = {f"norm.{k}": x for k, x in model.norm.state_dict().items()}
    for i, block in enumerate(model.blocks):
        mine = block.state_dict()
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                state[f"layers.{i}.{theirs}{kind}"] = mine[ours + kind]
    encoder.load_state_dict(state)
    encoder.to(model.embedding.dtype).eval()
    real = ids != 0
    h = F.embedding(ids, model.embedding) * math.sqrt(c.d_model) + model.positions[: ids.shape[1]]
    n = encoder(h, src_key_padding_mask=~real)
    pooled = (n * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    head = model.head
    return head.classify(F.gelu(head.dense(pooled)))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@over_names
def test_agrees_with_torch_s_encoder(name, activation):
    model = small(name, activation=activation, num_layers=3).eval()
    ids = padded([t for t in TEXTS if t])
    assert_same(model(ids), torch_logits(model, ids))


def test_agrees_with_torch_s_encoder_at_full_size():
    model = TransformerClassifier(attn_backend="reference").eval()
    ids = torch.randint(1, 10_000, (3, 200))
    ids[1, 150:] = 0
    ids[2, 3:] = 0
    assert_same(model(ids), torch_logits(model, ids))
