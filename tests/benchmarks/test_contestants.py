"""Whom a contest lets in: what runs here and computes what it should, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import attention_level
import contest as contests
import data_level
import latency_level
import model_level
import model_peers
import operation_level
import pytest
import text_level
import torch
from attention_peers import ATTENTION_PEERS, AttentionPeer
from engine_peers import ENGINES, onnx_model
from workload import Setting, first_texts, make_batches, padded

from fasttx.ops.dropout import NO_DROPOUT
from fasttx.ops.reference import ReferenceOperations

CPU = torch.device("cpu")
SMALL = Setting.small(CPU)
LENGTHS = [[5, 16, 9], [16, 2, 11]]


def attention(**options):
    return attention_level.attention(SMALL, LENGTHS, "test", **options)


def training():
    return model_level.training(SMALL, 64)


def operation(timed="add_norm", **options):
    return operation_level.operation(timed, SMALL, 64, **options)


MAKERS = (attention, training, operation)
over_contests = pytest.mark.parametrize("make", MAKERS)


def test_a_listed_backend_takes_part(fake_backend):
    fake_backend()
    for names in (
        attention_level.attention_names,
        operation_level.operation_names,
        model_level.training_names,
        model_level.inference_names,
    ):
        assert "fasttx-fake" in names()
    for make in MAKERS:
        make().enter("fasttx-fake").step(0)


@over_contests
def test_an_unavailable_backend_gives_its_reasons(fake_backend, make):
    fake_backend(reasons=["no such chip: buy one", "too old: renew it"])
    with pytest.raises(contests.Unavailable, match=r"no such chip: buy one; too old: renew it"):
        make().enter("fasttx-fake")


def other_scale(self, q, k, v, how):
    return ReferenceOperations._attend(self, q, k, v, how._replace(scale=0.3))


def without_last_keys(self, q, k, v, how):
    """Each text of two rows or more loses its last one."""
    spans = how.spans._replace(lens=how.spans.lens - (how.spans.lens > 1).int())
    return ReferenceOperations._attend(self, q, k, v, how._replace(spans=spans))


def without_bias(self, h, y, bias, *args, **options):
    return ReferenceOperations.add_norm(self, h, y, 0 * bias, *args, **options)


def other_epsilon(self, h, y, bias, gamma, beta, dropout, eps):
    return ReferenceOperations.add_norm(self, h, y, bias, gamma, beta, dropout, 1e-3)


def other_activation(self, u, bias, dropout, activation):
    return ReferenceOperations._bias_act(self, u, bias, dropout, "gelu")


WRONG = (other_scale, without_last_keys, without_bias, other_epsilon, other_activation)
PLACES = dict(zip(WRONG, ("_attend", "_attend", "add_norm", "add_norm", "_bias_act"), strict=True))
over_wrong = pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)


@over_wrong
@pytest.mark.parametrize("make", [training, lambda: model_level.bulk(SMALL, 64)])
def test_a_model_of_a_wrong_operation_is_not_timed(fake_backend, make, wrong):
    fake_backend(**{PLACES[wrong]: wrong})
    with pytest.raises(AssertionError, match="fasttx-fake: logits is .* off"):
        make().enter("fasttx-fake")


@over_wrong
def test_a_wrong_operation_is_not_timed(fake_backend, wrong):
    place = PLACES[wrong]
    fake_backend(**{place: wrong})
    made = attention() if place == "_attend" else operation(place.removeprefix("_"))
    with pytest.raises(AssertionError, match="fasttx-fake: .* off"):
        made.enter("fasttx-fake")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def test_wrong_gradients_are_not_timed(fake_backend):
    def attend(self, *args):
        return WrongGradient.apply(ReferenceOperations._attend(self, *args))

    fake_backend(_attend=attend)
    with pytest.raises(AssertionError, match="fasttx-fake: dq is .* off"):
        attention().enter("fasttx-fake")
    with pytest.raises(AssertionError, match="fasttx-fake: dembedding is .* off"):
        training().enter("fasttx-fake")
    attention(backward=False).enter("fasttx-fake")


def drop_nothing(self, q, k, v, how):
    return ReferenceOperations._attend(self, q, k, v, how._replace(dropout=NO_DROPOUT))


@pytest.mark.parametrize("dropout", ["shared", "torch"])
def test_a_contestant_that_drops_nothing_is_not_timed(fake_backend, dropout):
    fake_backend(dropout=dropout, _attend=drop_nothing, drop=lambda self, x, dropout: x)
    attention(p=0.0).enter("fasttx-fake")
    for make in MAKERS:
        with pytest.raises(AssertionError, match="dropout is asked for and changes nothing"):
            make().enter("fasttx-fake")


def with_next_seed(dropout):
    return dropout if dropout.seed is None else dropout._replace(seed=dropout.seed + 1)


def test_shared_masks_have_to_be_the_contract_s(fake_backend):
    def attend(self, q, k, v, how):
        how = how._replace(dropout=with_next_seed(how.dropout))
        return ReferenceOperations._attend(self, q, k, v, how)

    def drop(self, x, dropout):
        return ReferenceOperations.drop(self, x, with_next_seed(dropout))

    fake_backend(_attend=attend, drop=drop)
    for make in (attention, operation):
        with pytest.raises(AssertionError, match="fasttx-fake, with dropout: out is"):
            make().enter("fasttx-fake")


# ------------------------------------------------------------------------------------------- peers


def test_an_attention_peer_without_its_mask_is_not_timed(monkeypatch):
    def unmasked(batch, p):
        return torch.nn.functional.scaled_dot_product_attention(*batch.padded, dropout_p=p)

    monkeypatch.setitem(ATTENTION_PEERS, "padded-sdpa", AttentionPeer(unmasked))
    with pytest.raises(AssertionError, match="padded-sdpa: out is .* off"):
        attention().enter("padded-sdpa")


def test_a_model_peer_without_its_mask_is_not_timed(monkeypatch):
    encode = model_peers.PaddedSdpa.encode
    monkeypatch.setattr(
        model_peers.PaddedSdpa, "encode", lambda self, h, real: encode(self, h, real | True)
    )
    for made in (training(), model_level.bulk(SMALL, 64)):
        with pytest.raises(AssertionError, match="padded-sdpa: logits is .* off"):
            made.enter("padded-sdpa")


@pytest.mark.parametrize("layer", ["qkv", "out", "up", "down", "norm1"])
def test_a_model_peer_with_a_missing_bias_is_not_timed(monkeypatch, layer):
    copy_encoder = model_peers.PaddedSdpa.copy_encoder

    def wrong(self, model):
        copy_encoder(self, model)
        getattr(self.blocks[1], layer).bias.data.zero_()

    monkeypatch.setattr(model_peers.PaddedSdpa, "copy_encoder", wrong)
    with pytest.raises(AssertionError, match="padded-sdpa: logits is .* off"):
        training().enter("padded-sdpa")


def test_what_half_precision_rounds_is_forgiven_and_a_wrong_mask_is_not(monkeypatch):
    half = replace(SMALL, precision="bf16")
    made = model_level.training(half, 64)
    for name in ("padded-sdpa", "nn.TransformerEncoder", "fasttx-sdpa"):
        made.enter(name)
    encode = model_peers.PaddedSdpa.encode
    monkeypatch.setattr(
        model_peers.PaddedSdpa, "encode", lambda self, h, real: encode(self, h, real | True)
    )
    with pytest.raises(AssertionError, match="padded-sdpa: .* off"):
        model_level.training(half, 64).enter("padded-sdpa")


@pytest.mark.parametrize("name", ["x-transformers", "hf-bert-sdpa"])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, name):
    monkeypatch.setattr(model_peers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(contests.Unavailable, match="is not installed: pip install"):
        training().enter(name)


def test_an_inference_peer_does_not_train():
    names = {*model_level.inference_names()} - {*model_level.training_names()}
    assert names == {
        "nn.TransformerEncoder-nested", "nn.TransformerEncoder-slow-path", "padded-sdpa-compiled",
        *ENGINES, *model_level.native_names(),
    }  # fmt: skip
    for made, names in (
        (training(), model_level.training_names()),
        (model_level.bulk(SMALL, 64), model_level.inference_names()),
        (text_level.bulk(SMALL, 64), text_level.names()),
    ):
        assert [*made.entrants] == names


# ----------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("name", [*ENGINES, *model_level.native_names()])
def test_an_engine_runs_the_reference_s_function(name):
    made = model_level.bulk(SMALL, 64)
    enter(made, name).step(0)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_with_other_weights_is_not_timed(monkeypatch, name):
    copy_encoder = model_peers.PaddedSdpa.copy_encoder

    def wrong(self, model):
        copy_encoder(self, model)
        self.norm.bias.data += 0.5

    monkeypatch.setattr(model_peers.PaddedSdpa, "copy_encoder", wrong)
    with pytest.raises(AssertionError, match=f"{name}: logits is .* off"):
        enter(model_level.bulk(SMALL, 64), name)


def enter(made, name):
    try:
        return made.enter(name)
    except contests.Unavailable as reasons:
        pytest.skip(str(reasons))


def test_an_engine_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(model_peers.importlib.util, "find_spec", lambda package: None)
    for name in ENGINES:
        with pytest.raises(contests.Unavailable, match="is not installed: pip install"):
            model_level.bulk(SMALL, 64).enter(name)


def test_onnx_runtime_gets_fused_operators():
    pytest.importorskip("onnx")
    model = model_peers.PaddedSdpa(SMALL.config)
    model.copy_from(training().entrants["fasttx-reference"].work.reference)
    kinds = Counter(node.op_type for node in onnx_model(model).graph.node)
    layers = SMALL.config.num_layers
    assert kinds["Attention"] == layers and kinds["SkipLayerNormalization"] == 2 * layers
    assert kinds["Softmax"] == 0 and kinds["LayerNormalization"] == 1


# -------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["padded-sdpa", "onnxruntime-fp32", *text_level.OURS])
def test_texts_get_the_labels_of_the_reference(name):
    made = text_level.bulk(SMALL, 64)
    contestant = enter(made, name)
    work = contestant.work
    ids = work.tokenizer.encode_batch(work.inputs[1]).truncate(SMALL.config.max_len)
    (batch,) = make_batches(ids, len(ids), CPU)
    best = work.model.reference(**batch.model_inputs()).argmax(-1).tolist()
    assert contestant.step(1) == [text_level.LABELS[i] for i in best]


@pytest.mark.parametrize("name", ["padded-sdpa", "fasttx-fp32"])
def test_texts_in_another_order_are_not_timed(monkeypatch, name):
    made = text_level.bulk(SMALL, 64)
    kind = type(made.entrants[name])
    right = kind.probabilities
    monkeypatch.setattr(kind, "probabilities", lambda self, texts: right(self, texts)[::-1])
    with pytest.raises(AssertionError, match=f"{name}: scores is .* off"):
        made.enter(name)


# ----------------------------------------------------------------------------------------- latency


class Pipe:
    """The other end of a process, which asks so much."""

    def __init__(self, *asked):
        self.asked, self.answers = [*asked], []

    def recv(self):
        if not self.asked:
            raise EOFError
        return self.asked.pop(0)

    def send(self, answer):
        self.answers.append(answer)


def test_a_process_of_a_contestant_verifies_and_answers(fake_backend):
    threads = torch.get_num_threads()
    for level in latency_level.NAMES:
        pipe = Pipe((0, 3, False), (1, 2, True))
        latency_level._serve(pipe, SMALL, level, "padded-sdpa", threads)
        note, first, second = pipe.answers
        assert note == "" and len(first) == 3 and len(second) == 2
    fake_backend(reasons=["no such chip"])
    for name, reason in (("fasttx-fake", "no such chip"), ("padded-sdpa-compiled", "full size")):
        pipe = Pipe()
        latency_level._serve(pipe, SMALL, "latency", name, threads)
        (refused,) = pipe.answers
        assert isinstance(refused, contests.Unavailable) and reason in str(refused)
    fake_backend(_attend=other_scale)
    latency_level._serve(pipe, SMALL, "latency", "fasttx-fake", threads)
    assert "fasttx-fake: logits is" in str(pipe.answers[-1])


# ------------------------------------------------------------------------------------------- inputs


def test_the_first_texts_are_those_of_the_batch():
    ids, _ = SMALL.texts(7)
    (batch,) = make_batches(ids, 7, CPU)
    assert torch.equal(padded(batch)[padded(batch) != 0], batch.input_ids)
    some = first_texts(batch, 3)
    assert len(some) == 3 and len(some.labels) == 3
    assert torch.equal(some.input_ids, batch.input_ids[: len(some.input_ids)])
    assert some.cu_seqlens.tolist() == batch.cu_seqlens[:4].tolist()


def test_the_verified_texts_fit_the_budget():
    assert contests.verified_texts([contests.VERIFIED_TOKENS + 1] * 3) == 1
    assert contests.verified_texts([contests.VERIFIED_TOKENS // 4] * 7) == 4
    assert contests.verified_texts([5, 16, 9]) == 3


def test_data_contests_check_their_ids():
    made = data_level.batching(SMALL, 64)
    for name in data_level.BATCHERS:
        made.enter(name)
    made.entrants["fasttx"].expected = lambda i: [0]
    made.entered.clear()
    with pytest.raises(AssertionError, match="fasttx: other ids"):
        made.enter("fasttx")
