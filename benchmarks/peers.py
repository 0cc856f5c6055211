"""What a user would otherwise train: the same sizes, parameters and dropout sites.

Padded batches: input_ids (B, L), labels (B,). Each peer's weights can be set from a fasttx model,
so that it can be verified before it is timed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.model import TransformerClassifier, sinusoidal_positions


class _Peer(nn.Module):
    """Embedding, positions, masked mean pooling and head: what the peers have in common."""

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
    """torch.nn.TransformerEncoder with a padding mask."""

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


PEERS = {"nn.TransformerEncoder": TorchEncoder, "padded SDPA": PaddedSdpa}
