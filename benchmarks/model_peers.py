"""Whole models that a user would otherwise train: of the same sizes, with the same dropout sites.

A peer is one class and one line of PEERS. Peers take padded batches, input_ids (B, L). B texts,
L padded length, d d_model.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import Setting

from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.encoder import sinusoidal_positions


def missing(package: str, install: str) -> list[str]:
    if importlib.util.find_spec(package):
        return []
    return [f"{package} is not installed: pip install {install}"]


class Peer(nn.Module):
    """What a contest asks of a peer. note: how its function differs, for the tables.

    precision: of its own, whatever the contest's is. tolerance: how far its logits may be off,
    relative to their length; None: as far as `fasttx.testing` has it for the contest's precision.
    """

    note = ""
    inference_only = False
    precision: str | None = None
    tolerance: float | None = None

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        return []

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier | None:
        """The fasttx model whose weights `copy_from` takes and whose function this then is.

        None: the peer computes another function; only its size and its gradients are checked.
        """
        return None

    def copy_from(self, model: TransformerClassifier) -> None:
        raise NotImplementedError

    def answer_all(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The logits of several batches, which need not come one after another."""
        return [self(input_ids) for input_ids in batches]


class _SameFunction(Peer):
    """Embedding, positions, mean pooling and head; a subclass adds the encoder between them."""

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier | None:
        return model

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, d))
        self.register_buffer("positions", sinusoidal_positions(config.max_len, d))
        self.head = nn.Sequential(
            OrderedDict(
                dense=nn.Linear(d, d),
                activation=nn.GELU(),
                dropout=nn.Dropout(config.dropout),
                classify=nn.Linear(d, config.num_classes),
            )
        )

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        """h (B, L, d), real (B, L) bool, False at padding -> (B, L, d), normed."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        real = input_ids != 0
        h = F.embedding(input_ids, self.embedding, padding_idx=0) * self.config.d_model**0.5
        h = h + self.positions[: input_ids.shape[1]]
        h = self.encode(F.dropout(h, self.config.dropout, self.training), real)
        weight = real[..., None].to(h.dtype)
        return self.head((h * weight).sum(1) / weight.sum(1).clamp(min=1))

    def copy_from(self, model: TransformerClassifier) -> None:
        self.embedding.data.copy_(model.embedding)
        self.head.load_state_dict(model.head.state_dict())
        self.copy_encoder(model)

    def copy_encoder(self, model: TransformerClassifier) -> None:
        raise NotImplementedError


class TorchEncoder(_SameFunction):
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

    def copy_encoder(self, model: TransformerClassifier) -> None:
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
    inference_only = True

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        if setting.precision in ("fp32", "tf32"):
            return []
        return [f"precision {setting.precision}: the fast path does not run under autocast"]

    def encode(self, h: Tensor, real: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():  # nested tensors have no backward here
            return super().encode(h, real)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the API is a prototype"
            nested = torch.nested.nested_tensor(
                [text[:n] for text, n in zip(h, real.sum(1).tolist(), strict=True)]
            )
        return torch.nested.to_padded_tensor(self.encoder(nested), 0.0, h.shape)


class TorchEncoderSlowPath(TorchEncoder):
    """The same with the fast path switched off: SDPA, which has a flash kernel, runs instead."""

    note = "fast path switched off"
    inference_only = True

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


class PaddedSdpa(_SameFunction):
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

    def copy_encoder(self, model: TransformerClassifier) -> None:
        self.norm.load_state_dict(model.norm.state_dict())
        for mine, theirs in zip(self.blocks, model.blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())


class CompiledSdpa(PaddedSdpa):
    """The same, compiled once for all shapes."""

    note = "torch.compile"
    inference_only = True

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        return [] if setting.divisor == 1 else ["compiling takes a minute: at full size only"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.compiled = torch.compile(super().forward, dynamic=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.compiled(input_ids)


class XTransformers(_SameFunction):
    """x-transformers' pre-norm Encoder: no biases in its attention projections and norms."""

    note = "no biases in projections and norms"

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
        return missing("x_transformers", "x-transformers")

    @classmethod
    def comparable(cls, model: TransformerClassifier) -> TransformerClassifier | None:
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

    def copy_encoder(self, model: TransformerClassifier) -> None:
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


class HuggingFaceBert(Peer):
    """BertForSequenceClassification: post-norm, learned positions, token types, a pooler."""

    note = "same widths, another function"
    attention = "sdpa"

    @classmethod
    def unavailable_reasons(cls, setting: Setting) -> list[str]:
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


PEERS: dict[str, type[Peer]] = {
    "nn.TransformerEncoder": TorchEncoder,
    "nn.TransformerEncoder-nested": TorchEncoderNested,
    "nn.TransformerEncoder-slow-path": TorchEncoderSlowPath,
    "padded-sdpa": PaddedSdpa,
    "padded-sdpa-compiled": CompiledSdpa,
    "x-transformers": XTransformers,
    "hf-bert-sdpa": HuggingFaceBert,
    "hf-bert-eager": HuggingFaceBertEager,
}
