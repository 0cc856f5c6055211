"""What a user would otherwise run: whole models first, then attention alone.

Models have the same sizes and dropout sites. They take padded batches, input_ids (B, L), and most
take their weights from a fasttx model, so that they can be verified before they are timed.
Each says why it cannot run where it cannot.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.encoder import sinusoidal_positions


class _Peer(nn.Module):
    """Embedding, positions, masked mean pooling and head: what the peers have in common."""

    note = ""

    @classmethod
    def unavailable_reasons(cls, precision: str) -> list[str]:
        return []

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier:
        """The fasttx model that this peer can equal."""
        return model

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, d, padding_idx=0)
        self.register_buffer("positions", sinusoidal_positions(config.max_len, d))
        self.head = nn.Sequential(
            nn.Linear(d, d), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(d, config.num_classes)
        )

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        real = input_ids != 0
        h = self.embedding(input_ids) * self.config.d_model**0.5
        h = h + self.positions[: input_ids.shape[1]]
        h = self.encode(F.dropout(h, self.config.dropout, self.training), real)
        weight = real[..., None].to(h.dtype)
        return self.head((h * weight).sum(1) / weight.sum(1).clamp(min=1))

    def copy_shared(self, model: TransformerClassifier) -> None:
        self.embedding.weight.data.copy_(model.embedding)
        for mine, theirs in ((self.head[0], model.head.dense), (self.head[3], model.head.classify)):
            mine.load_state_dict(theirs.state_dict())


class TorchEncoder(_Peer):
    """torch.nn.TransformerEncoder with a padding mask; in eval mode its layers' fast path runs.

    Its own conversion to nested tensors is for post-norm layers only (torch 2.13).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        c = config
        layer = nn.TransformerEncoderLayer(
            c.d_model, c.num_heads, c.d_ff, c.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, c.num_layers, norm=nn.LayerNorm(c.d_model), enable_nested_tensor=False
        )

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        return self.encoder(h, src_key_padding_mask=~real)

    def copy_from(self, model: TransformerClassifier) -> None:
        self.copy_shared(model)
        self.encoder.norm.load_state_dict(model.norm.state_dict())
        for mine, theirs in zip(self.encoder.layers, model.blocks, strict=True):
            mine.self_attn.in_proj_weight.data.copy_(theirs.qkv.weight)
            mine.self_attn.in_proj_bias.data.copy_(theirs.qkv.bias)
            for a, b in (
                (mine.self_attn.out_proj, theirs.out),
                (mine.linear1, theirs.up),
                (mine.linear2, theirs.down),
                (mine.norm1, theirs.norm1),
                (mine.norm2, theirs.norm2),
            ):
                a.load_state_dict(b.state_dict())


class TorchEncoderNested(TorchEncoder):
    """The same in eval mode on a nested tensor, which its fast path takes: no padded work."""

    note = "fed a nested tensor"

    @classmethod
    def unavailable_reasons(cls, precision: str) -> list[str]:
        if precision in ("fp32", "tf32"):
            return []
        return [f"precision {precision}: the fast path does not run under autocast"]

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():  # nested tensors have no backward here
            return super().encode(h, real)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the API is a prototype"
            nested = torch.nested.nested_tensor(
                [row[:n] for row, n in zip(h, real.sum(1).tolist(), strict=True)]
            )
        return torch.nested.to_padded_tensor(self.encoder(nested), 0.0, h.shape)


class TorchEncoderSlowPath(TorchEncoder):
    """The same with the fast path switched off: SDPA, which has a flash kernel, runs instead."""

    note = "fast path switched off"

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().encode(h, real)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)


class _SdpaBlock(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d = c.d_model
        self.heads, self.p = c.num_heads, c.dropout
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, c.d_ff), nn.Linear(c.d_ff, d)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        batch, length, d = h.shape
        qkv = self.qkv(self.norm1(h)).view(batch, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        a = self.out(a.transpose(1, 2).reshape(batch, length, d))
        h = h + F.dropout(a, self.p, self.training)
        u = F.dropout(F.relu(self.up(self.norm2(h))), self.p, self.training)
        return h + F.dropout(self.down(u), self.p, self.training)


class PaddedSdpa(_Peer):
    """A hand-written padded encoder on F.scaled_dot_product_attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(_SdpaBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        mask = real[:, None, None, :]
        for block in self.blocks:
            h = block(h, mask)
        return self.norm(h)

    def copy_from(self, model: TransformerClassifier) -> None:
        self.copy_shared(model)
        self.norm.load_state_dict(model.norm.state_dict())
        for mine, theirs in zip(self.blocks, model.blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())


def missing(package: str, install: str) -> list[str]:
    if importlib.util.find_spec(package):
        return []
    return [f"{package} is not installed: pip install {install}"]


class XTransformers(_Peer):
    """x-transformers' pre-norm Encoder: no biases in its attention projections and norms."""

    note = "no biases in projections and norms"

    @classmethod
    def unavailable_reasons(cls, precision: str) -> list[str]:
        return missing("x_transformers", "x-transformers")

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier:
        model = copy.deepcopy(model)
        norms = [norm for b in model.blocks for norm in (b.norm1, b.norm2)]
        for layer in (*(x for b in model.blocks for x in (b.qkv, b.out)), *norms, model.norm):
            nn.init.zeros_(layer.bias)
        return model

    def __init__(self, config: ModelConfig) -> None:
        from x_transformers import Encoder

        super().__init__(config)
        c = config
        self.encoder = Encoder(
            dim=c.d_model, depth=c.num_layers, heads=c.num_heads, attn_flash=True,
            attn_dim_head=c.d_model // c.num_heads, attn_dropout=c.dropout,
            attn_sublayer_dropout=c.dropout, ff_mult=c.d_ff / c.d_model, ff_dropout=c.dropout,
            ff_sublayer_dropout=c.dropout, ff_custom_activation=nn.ReLU(),
        )  # fmt: skip

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        return self.encoder(h, mask=real)

    def copy_from(self, model: TransformerClassifier) -> None:
        self.copy_shared(model)
        self._copy_norm(self.encoder.final_norm, model.norm)
        layers = iter(self.encoder.layers)
        for theirs in model.blocks:
            norms, attention, _ = next(layers)
            self._copy_norm(norms[0], theirs.norm1)
            projections = (attention.to_q, attention.to_k, attention.to_v)
            for mine, weight in zip(projections, theirs.qkv.weight.chunk(3), strict=True):
                mine.weight.data.copy_(weight)
            attention.to_out.weight.data.copy_(theirs.out.weight)
            norms, mlp, _ = next(layers)
            self._copy_norm(norms[0], theirs.norm2)
            mlp.ff[0][0].load_state_dict(theirs.up.state_dict())
            mlp.ff[2].load_state_dict(theirs.down.state_dict())

    @staticmethod
    def _copy_norm(mine: Any, theirs: nn.LayerNorm) -> None:
        mine.gamma.data.copy_(theirs.weight - float(mine.unit_offset))


class HuggingFaceBert(nn.Module):
    """BertForSequenceClassification: post-norm, learned positions, token types, a pooler."""

    note = "same widths, another function"
    attention = "sdpa"

    @classmethod
    def unavailable_reasons(cls, precision: str) -> list[str]:
        return missing("transformers", "transformers")

    def __init__(self, config: ModelConfig) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        c = config
        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.num_layers,
                num_attention_heads=c.num_heads, intermediate_size=c.d_ff, hidden_act="relu",
                hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
                max_position_embeddings=c.max_len, num_labels=c.num_classes, pad_token_id=0,
                attn_implementation=self.attention,
            )
        )  # fmt: skip
        assert self.bert.config._attn_implementation == self.attention

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=(input_ids != 0).long()).logits


class HuggingFaceBertEager(HuggingFaceBert):
    """The same, its attention in plain products and a softmax."""

    attention = "eager"


TRAINING_PEERS: dict[str, Any] = {
    "nn.TransformerEncoder": TorchEncoder,
    "padded-sdpa": PaddedSdpa,
    "x-transformers": XTransformers,
    "hf-bert-sdpa": HuggingFaceBert,
    "hf-bert-eager": HuggingFaceBertEager,
}
INFERENCE_PEERS: dict[str, Any] = {
    "nn.TransformerEncoder": TorchEncoder,
    "nn.TransformerEncoder-nested": TorchEncoderNested,
    "nn.TransformerEncoder-slow-path": TorchEncoderSlowPath,
    **{name: peer for name, peer in TRAINING_PEERS.items() if peer is not TorchEncoder},
}

# -------------------------------------------------------------------------------- attention alone


@dataclass(frozen=True)
class Batch:
    """One input of an attention contest in both forms; q, k, v are views of `packed` or `padded`.

    packed (T, 3, H, D), cu_seqlens (B + 1,) int32, padded (3, B, H, L, D), real (B, L) bool.
    """

    packed: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    padded: Tensor
    real: Tensor

    @functools.cached_property
    def block_mask(self) -> Any:
        """FlexAttention's: which keys a packed row may see, those of its own text."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, device = len(self.packed), self.packed.device
        row = torch.arange(rows, device=device)
        text = torch.searchsorted(self.cu_seqlens[1:].contiguous(), row, right=True)

        def same_text(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return text[i] == text[j]

        return create_block_mask(same_text, None, None, rows, rows, device=str(device))


@dataclass(frozen=True)
class AttentionPeer:
    """attend(batch, p) -> output, (T, H, D) or, where `padded`, (B, H, L, D).

    unavailable(device, dtype, p, backward) -> reasons. Padded ones are given padded tensors.
    """

    attend: Callable[[Batch, float], Tensor]
    unavailable: Callable[[torch.device, torch.dtype, float, bool], list[str]]
    padded: bool = True
    note: str = ""


def _anywhere(device: torch.device, dtype: torch.dtype, p: float, backward: bool) -> list[str]:
    return []


def _naive(batch: Batch, p: float) -> Tensor:
    """What textbooks write: two products, a softmax, a dropout, all weights in memory."""
    q, k, v = batch.padded
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~batch.real[:, None, None, :], torch.finfo(q.dtype).min)
    return F.dropout(scores.softmax(-1), p) @ v


def _sdpa(batch: Batch, p: float) -> Tensor:
    q, k, v = batch.padded
    mask = batch.real[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def _sdpa_without_dropout(batch: Batch, p: float) -> Tensor:
    return _sdpa(batch, 0.0)


def _where_dropout_is_asked(
    device: torch.device, dtype: torch.dtype, p: float, backward: bool
) -> list[str]:
    return [] if p else ["at p = 0 this is padded-sdpa"]


def _sdpa_on(backend: str) -> AttentionPeer:
    """SDPA held to one of CUDA's kernels, mask and dropout included where it takes them."""

    def attend(batch: Batch, p: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _sdpa(batch, p)

    return AttentionPeer(attend, functools.partial(_refused_by_cuda, backend))


def _refused_by_cuda(
    backend: str, device: torch.device, dtype: torch.dtype, p: float, backward: bool
) -> list[str]:
    if device.type != "cuda":
        return [f"device {device.type}: SDPA's kernels are chosen by name on cuda only"]
    q = torch.randn(2, 2, 16, 32, device=device, dtype=dtype, requires_grad=backward)
    real = torch.ones(2, 16, dtype=torch.bool, device=device)
    tiny = Batch(q, q, 16, torch.stack([q, q, q]), real)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _sdpa_on(backend).attend(tiny, p)
        except RuntimeError as error:
            return [str(w.message).split(". ")[0] for w in said] or [str(error)]
    return []


def _varlen(batch: Batch, p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = batch.cu_seqlens, batch.max_seqlen
    return varlen_attn(*batch.packed.unbind(1), cu, cu, longest, longest)


def _flash_only(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if device.type != "cuda":
        reasons.append(f"device {device.type}: torch's flash kernels need cuda")
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {dtype}: torch's flash kernels take float16 and bfloat16")
    return reasons


def _no_varlen(device: torch.device, dtype: torch.dtype, p: float, backward: bool) -> list[str]:
    reasons = _flash_only(device, dtype)
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        reasons.append(f"torch {torch.__version__} has no varlen_attn: it needs 2.10 or newer")
    return [*reasons, *(["it has no dropout"] if p else [])]


class _Flash(torch.autograd.Function):
    """torch's own FlashAttention-2, raw: the only one of its kernels with lengths and dropout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, n: int, p: float) -> Tensor:
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, n, n, p, False, False
        )
        ctx.save_for_backward(q, k, v, out, lse, cu, seed, offset)
        ctx.options = n, p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu, seed, offset = ctx.saved_tensors
        n, p = ctx.options
        gradients = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu, cu, n, n, p, False, seed, offset
        )
        return (*gradients, None, None, None)


def _flash(batch: Batch, p: float) -> Tensor:
    return _Flash.apply(*batch.packed.unbind(1), batch.cu_seqlens, batch.max_seqlen, p)


def _no_flash(device: torch.device, dtype: torch.dtype, p: float, backward: bool) -> list[str]:
    return _flash_only(device, dtype)


@functools.cache
def _compiled_flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # What inductor writes for the CPU does not compile with dynamic shapes (torch 2.13).
    return torch.compile(flex_attention, dynamic=False if device_type == "cpu" else None)


def _flex(batch: Batch, p: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in batch.packed.unbind(1))
    return _compiled_flex(q.device.type)(q, k, v, block_mask=batch.block_mask)[0].transpose(0, 1)


def _no_flex(device: torch.device, dtype: torch.dtype, p: float, backward: bool) -> list[str]:
    reasons = ["it has no dropout"] if p else []
    if device.type not in ("cpu", "cuda"):
        reasons.append(f"device {device.type}: FlexAttention's fused kernels are for cpu and cuda")
    if device.type == "cpu" and backward:
        reasons.append("on the CPU it has no backward pass")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++"))):
        reasons.append("torch.compile needs a C++ compiler: install g++, or name one in $CXX")
    return reasons


ATTENTION_PEERS: dict[str, AttentionPeer] = {
    "padded-sdpa": AttentionPeer(_sdpa, _anywhere),
    "padded-sdpa-no-dropout": AttentionPeer(
        _sdpa_without_dropout, _where_dropout_is_asked, note="no dropout: another function"
    ),
    "naive": AttentionPeer(_naive, _anywhere),
    "flex-attention": AttentionPeer(_flex, _no_flex, padded=False),
    "varlen_attn": AttentionPeer(_varlen, _no_varlen, padded=False),
    "aten-flash-varlen": AttentionPeer(_flash, _no_flash, padded=False),
    "sdpa-math": _sdpa_on("MATH"),
    "sdpa-efficient": _sdpa_on("EFFICIENT_ATTENTION"),
    "sdpa-flash": _sdpa_on("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa_on("CUDNN_ATTENTION"),
}
