"""The native classifier against the model that it was packed from."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttx import native
from fasttx.errors import ConfigError
from fasttx.models.classifier import TransformerClassifier
from fasttx.native import NativeClassifier
from fasttx.ops.registry import BACKENDS
from fasttx.text.packing import RaggedIds
from tests.models.test_choices import BERT

if BACKENDS["cpu"].unavailable_reasons("cpu", torch.float32, 32):
    pytest.skip("the C++ library was not built", allow_module_level=True)

from fasttx.kernels.cpu import encoder, library

LENGTHS = (5, 0, 33, 1, 70, 0)

CONFIGS: list[dict[str, Any]] = [
    {"d_model": 32, "num_heads": 2, "d_ff": 64, "num_layers": 2},
    {"d_model": 18, "num_heads": 3, "d_ff": 7, "num_layers": 2, "activation": "gelu"},
    {"d_model": 40, "num_heads": 1, "d_ff": 33, "num_classes": 1},
    {"d_model": 6, "num_heads": 6, "d_ff": 1, "num_classes": 40, "activation": "gelu"},
    {"d_model": 130, "num_heads": 2, "d_ff": 100, "num_classes": 17},
    {"d_model": 128, "num_heads": 1, "d_ff": 64},
    {"d_model": 64, "num_heads": 4, "d_ff": 512, "num_layers": 0},
    BERT | {"d_model": 36, "num_heads": 3, "d_ff": 70, "num_layers": 2},
    BERT | {"d_model": 34, "num_heads": 2, "d_ff": 65, "embedding_size": 50, "pooling": "mean"},
    BERT
    | {
        "d_model": 64,
        "num_heads": 2,
        "d_ff": 64,
        "embedding_size": 9,
        "head_activation": "relu",
        "num_layers": 2,
    },
    {"d_model": 16, "num_heads": 2, "d_ff": 8, "positions": "learned", "pooling": "cls"},
]


@pytest.fixture(autouse=True)
def _as_before():
    threads, best = torch.get_num_threads(), library.instruction_sets()[0]
    yield
    torch.set_num_threads(threads)
    library.use_instruction_set(best)


def a_model(seed: int = 0, **config: Any) -> TransformerClassifier:
    torch.manual_seed(seed)
    settings = {"vocab_size": 50, "max_len": 80, "num_layers": 1, "attn_backend": "cpu"} | config
    model = TransformerClassifier(**settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases of 0 and gains of 1 would hide a mistake
                p.add_(0.2 * torch.randn_like(p))
    return model


def some_texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> RaggedIds:
    rng = np.random.default_rng(seed)
    return RaggedIds.from_lists([rng.integers(0, 50, n).tolist() for n in lengths])


def reference(model: TransformerClassifier, ids: RaggedIds) -> Tensor:
    settings = dict(vars(model.config)) | {"attn_backend": "reference"}
    plain = TransformerClassifier(**settings).eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return plain(torch.from_numpy(ids.values), cu_seqlens=torch.from_numpy(ids.offsets).int())


def logits_of(classifier: NativeClassifier, ids: RaggedIds, **options: Any) -> Tensor:
    logits = classifier.logits(ids, **options)
    assert logits is not None, classifier.unavailable_reasons()
    return logits


def error_of(precision: str, got: Tensor, expected: Tensor) -> None:
    off = (got - expected).abs().max().item()
    assert off <= {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03}[precision], off


OFFERED = [p for p in native.PRECISIONS if encoder.offers(encoder.Precision[p.upper()])]


@pytest.mark.parametrize("precision", OFFERED)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("instruction_set", library.instruction_sets())
def test_the_function_of_the_reference(instruction_set, config, precision) -> None:
    """However a call is cut up, and whatever else is in it: the same bits."""
    library.use_instruction_set(instruction_set)
    if not encoder.offers(encoder.Precision[precision.upper()]):
        pytest.skip(f"{instruction_set} has no {precision}")
    model, ids = a_model(**config), some_texts()
    packed = encoder.Encoder(native._weights(model), encoder.Precision[precision.upper()])

    def logits(first: int, last: int, threads: int, split: encoder.Split) -> Tensor:
        out = torch.full((last - first, model.config.num_classes), float("nan"))
        assert packed.forward(ids.values, ids.offsets, first, last, out, threads, split) == 0
        return out

    whole = logits(0, len(ids), 1, encoder.Split.ROWS)
    error_of(precision, whole, reference(model, ids))
    for threads in (1, 2, 3):
        for split in encoder.Split:
            assert torch.equal(logits(0, len(ids), threads, split), whole)
            assert torch.equal(logits(2, 3, threads, split), whole[2:3])


def test_of_a_run_as_it_is_used() -> None:
    model, ids = a_model(d_model=32, num_heads=2), some_texts((40,) * 20)
    torch.set_num_threads(2)
    got = logits_of(NativeClassifier(model), ids)
    error_of("fp32", got, reference(model, ids))
    assert torch.equal(logits_of(NativeClassifier(model), ids, batch_size=7), got)


def test_no_texts_and_empty_texts() -> None:
    model = a_model(num_classes=3)
    classifier = NativeClassifier(model)
    assert logits_of(classifier, some_texts(())).shape == (0, 3)
    empty = some_texts((0, 0))
    error_of("fp32", logits_of(classifier, empty), reference(model, empty))


def test_a_part_of_a_corpus() -> None:
    """Offsets that do not begin with 0, as windows have them."""
    model, ids = a_model(), some_texts()
    part = RaggedIds(ids.values, ids.offsets[2:])
    classifier = NativeClassifier(model)
    assert torch.equal(logits_of(classifier, part), logits_of(classifier, ids)[2:])


@pytest.mark.parametrize("wrong", [-1, 50, 2**31 - 1])
def test_ids_outside_the_table(wrong: int) -> None:
    ids = some_texts((3, 4))
    ids.values[5] = wrong
    with pytest.raises(IndexError, match=rf"ids holds {wrong} in row 5; expected 0 to 49"):
        NativeClassifier(a_model()).logits(ids)


def test_a_text_that_is_too_long() -> None:
    for batch_size in (1, 64):
        with pytest.raises(ValueError, match=r"for 81 tokens; expected at most max_len = 80"):
            NativeClassifier(a_model()).logits(some_texts((3, 80, 81)), batch_size=batch_size)


# --- what it is packed from -----------------------------------------------------------------------


def _train(model: TransformerClassifier) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.arange(1, 5), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)).sum()
    loss.backward()
    optimizer.step()
    model.eval()


def _in_place(model: TransformerClassifier) -> None:
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(1.5)


def _through_data(model: TransformerClassifier) -> None:
    for p in model.blocks[0].up.parameters():
        p.data.mul_(1.5)


def _exchange(model: TransformerClassifier) -> None:
    model.head.dense.weight.data = model.head.dense.weight.data * 1.5


def _load(model: TransformerClassifier) -> None:
    model.load_state_dict(a_model(1).state_dict())


def _assign(model: TransformerClassifier) -> None:
    model.load_state_dict(a_model(1).state_dict(), assign=True)


def _replace(model: TransformerClassifier) -> None:
    model.blocks[0].qkv = copy.deepcopy(a_model(1).blocks[0].qkv)


def _replace_a_parameter(model: TransformerClassifier) -> None:
    model.embedding = nn.Parameter(model.embedding.detach() * 2)


def _drop_a_block(model: TransformerClassifier) -> None:
    model.blocks = nn.ModuleList()


def _without_bias(model: TransformerClassifier) -> None:
    model.blocks[0].down.bias = None


def _eps(model: TransformerClassifier) -> None:
    model.norm.eps = 0.5


CHANGES = [
    _train, _in_place, _through_data, _exchange, _load, _assign, _replace, _replace_a_parameter,
    _drop_a_block, _without_bias, _eps,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_are_packed_again(change) -> None:
    model, ids = a_model(), some_texts()
    classifier = NativeClassifier(model)
    before = logits_of(classifier, ids)
    change(model)
    after = logits_of(classifier, ids)
    cu_seqlens = torch.from_numpy(ids.offsets).int()
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids.values), cu_seqlens=cu_seqlens)
    error_of("fp32", after, expected)
    assert not torch.equal(after, before)


def _hook(model: TransformerClassifier) -> None:
    model.blocks[0].up.register_forward_hook(lambda *_: None)


def _hook_on_all(model: TransformerClassifier) -> None:
    model.register_forward_pre_hook(lambda *_: None)


def _wrap(model: TransformerClassifier) -> None:
    model.blocks[0].up = nn.Sequential(model.blocks[0].up)  # type: ignore[assignment]


def _forward(model: TransformerClassifier) -> None:
    model.head.forward = lambda x, *_: x  # type: ignore[method-assign]


def _wide(model: TransformerClassifier) -> None:
    model.double()


def _training(model: TransformerClassifier) -> None:
    model.train()


@pytest.mark.parametrize("change", [_hook, _hook_on_all, _wrap, _forward, _wide, _training])
def test_where_the_model_itself_must_be_asked(change) -> None:
    model, ids = a_model(), some_texts()
    classifier = NativeClassifier(model)
    assert classifier.logits(ids) is not None
    change(model)
    assert classifier.logits(ids) is None


def test_a_replaced_forward_of_the_class(monkeypatch) -> None:
    classifier, ids = NativeClassifier(a_model()), some_texts()
    assert classifier.logits(ids) is not None
    monkeypatch.setattr(TransformerClassifier, "forward", lambda *_, **__: None)
    assert classifier.logits(ids) is None
    assert NativeClassifier(a_model()).logits(ids) is None


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert NativeClassifier(a_model()).logits(some_texts()) is None


def test_other_backends_keep_their_own_way() -> None:
    classifier = NativeClassifier(a_model(attn_backend="reference"), "int8")
    assert classifier.logits(some_texts()) is None
    with pytest.raises(ConfigError, match="precision int8 cannot be had here") as error:
        classifier.require()
    assert "part of backend cpu" in str(error.value)


def test_a_precision_that_is_none() -> None:
    with pytest.raises(ConfigError, match="precision is 'fp8'; expected one of fp32, bf16, int8"):
        NativeClassifier(a_model(), "fp8")


@pytest.mark.parametrize("precision", OFFERED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(precision: str, value: float) -> None:
    """8-bit numbers have no NaN, so their scales carry it."""
    for name in ("blocks.0.up.weight", "blocks.0.norm1.weight", "blocks.0.qkv.bias", "embedding"):
        model = a_model()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        ids = RaggedIds.from_lists([[49] * 5])
        assert not logits_of(NativeClassifier(model, precision), ids).isfinite().all()


def test_copies() -> None:
    classifier, ids = NativeClassifier(a_model(), "int8"), some_texts()
    before = logits_of(classifier, ids)
    for other in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert other.model is not classifier.model
        assert torch.equal(logits_of(other, ids), before)


# --- threads --------------------------------------------------------------------------------------


def test_several_threads_and_models_at_a_time() -> None:
    torch.set_num_threads(2)
    classifiers = [NativeClassifier(a_model(seed, d_model=64), "fp32") for seed in range(2)]
    batches = [some_texts(lengths) for lengths in ((1,), (70,) * 3, LENGTHS)]
    expected = [[logits_of(c, ids) for ids in batches] for c in classifiers]
    wrong: list[int] = []

    def ask(which: int) -> None:
        for i in range(60):
            got = logits_of(classifiers[which], batches[i % 3])
            if not torch.equal(got, expected[which][i % 3]):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    """The child has none of the parent's threads, and makes its own."""
    classifier, ids = NativeClassifier(a_model(d_model=64)), some_texts((70,) * 4)
    torch.set_num_threads(2)
    before = logits_of(classifier, ids)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if torch.equal(logits_of(classifier, ids), before) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(logits_of(classifier, ids), before)
