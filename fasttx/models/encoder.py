"""The encoder: packed rows from the token ids to the last norm, whatever head comes after it.

Shapes: B texts, T rows (tokens of the batch), L padded length, d d_model, e embedding width, H
heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.layers import add, add_norm, drop, feed_forward, linear, product_and_bias
from fasttx.models.module import Model
from fasttx.ops import registry
from fasttx.ops.arguments import check_integers, kind
from fasttx.ops.contract import Operations, Spans, check_cu_seqlens
from fasttx.ops.dropout import NO_DROPOUT, Dropout, require_seed, site_seeds
from fasttx.text.packing import positions, unpad


def sinusoidal_positions(max_len: int, d_model: int, dtype: torch.dtype | None = None) -> Tensor:
    """(max_len, d_model): sine in even columns, cosine in odd ones (Vaswani et al., 2017, 3.5).

    In torch's default dtype, unless one is given. On the CPU, whatever the default device is: that
    may be one without values or without float64.
    """
    with torch.device("cpu"):
        position = torch.arange(max_len, dtype=torch.float64)[:, None]
        column = torch.arange(0, d_model, 2, dtype=torch.float64)
        table = torch.empty(max_len, d_model, dtype=torch.float64)
    rate = torch.exp(column * (-math.log(1e4) / d_model))
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table.to(dtype or torch.get_default_dtype())


class EncoderBlock(nn.Module):
    """One pre-norm block. It takes and hands on (h, n): the residual stream, and its LayerNorm by
    the norm of whoever comes next, since a fused residual + norm crosses the blocks' border.
    Without a next norm n is None, and the next block calls its own: one that is wrapped (by FSDP,
    by activation checkpointing) has its weights there, in its own call, and nowhere else.
    """

    SITES = 4  # dropout sites: attention, after attention, inside the MLP, after the MLP

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.num_heads = config.num_heads
        self.head_dim = d // config.num_heads
        self.activation = config.activation
        self.dropout = config.dropout
        own = config.attention_dropout
        self.attention_dropout = config.dropout if own is None else own
        self.norm1 = nn.LayerNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, config.norm_eps)
        self.up = nn.Linear(d, config.d_ff)
        self.down = nn.Linear(config.d_ff, d)

    def project(self, n: Tensor, ops: Operations) -> Tensor:
        """(T, d) -> packed queries, keys and values (T, 3, H, D)."""
        return linear(ops, self.qkv, n).view(n.shape[0], 3, self.num_heads, self.head_dim)

    def forward(
        self,
        h: Tensor,
        n: Tensor | None,
        next_norm: nn.Module | None,
        ops: Operations,
        spans: Spans,
        dropouts: Sequence[Dropout],
    ) -> tuple[Tensor, Tensor | None]:
        if n is None:
            n = self.norm1(h)
        at_attention, after_attention, in_mlp, after_mlp = dropouts
        mixed = ops.attention(self.project(n, ops), spans, at_attention)
        y, bias = product_and_bias(ops, self.out, mixed.flatten(1))
        h, n = add_norm(ops, h, y, bias, self.norm2, after_attention)
        y, bias = feed_forward(ops, self.up, self.down, n, in_mlp, self.activation)
        if next_norm is None:
            return add(ops, h, y, bias, after_mlp), None
        return add_norm(ops, h, y, bias, next_norm, after_mlp)

    def dropouts(self, seeds: Sequence[Tensor]) -> tuple[Dropout, ...]:
        """The block's dropout sites, from their seeds."""
        at_attention, *others = seeds
        p = self.dropout
        return (
            Dropout.of(self.attention_dropout, at_attention),
            *(Dropout.of(p, seed) for seed in others),
        )


class PostNormBlock(EncoderBlock):
    """The block of Vaswani et al. (2017) and BERT: a norm after each addition, so that the residual
    stream is normed itself, h = n. No norm crosses the blocks' border."""

    def forward(
        self,
        h: Tensor,
        n: Tensor | None,
        next_norm: nn.Module | None,
        ops: Operations,
        spans: Spans,
        dropouts: Sequence[Dropout],
    ) -> tuple[Tensor, Tensor | None]:
        at_attention, after_attention, in_mlp, after_mlp = dropouts
        mixed = ops.attention(self.project(h, ops), spans, at_attention)
        y, bias = product_and_bias(ops, self.out, mixed.flatten(1))
        _, h = add_norm(ops, h, y, bias, self.norm1, after_attention)
        y, bias = feed_forward(ops, self.up, self.down, h, in_mlp, self.activation)
        _, h = add_norm(ops, h, y, bias, self.norm2, after_mlp)
        return h, h


class Encoded(NamedTuple):
    """What `Encoder.encode` hands to a head."""

    n: Tensor  # (T, d): the rows, normed
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    dropout: Dropout  # of the head
    attention: tuple[Tensor, ...]  # for each layer (B, H, max_seqlen, max_seqlen), if asked for


class Encoder(Model):
    """Embedding, blocks and final norm: what every head stands on.

    The backend is checked here and resolved for the parameters' device and dtype, again whenever
    the module moves: a model built on the CPU and moved to a GPU works, and `auto` follows.
    A sinusoidal position table is no weight, so no state dict holds it: it is filled again whenever
    the module moves, which may have left it without values (`to_empty`).
    A subclass adds its head, then calls `reset_parameters`.
    """

    positions: Tensor
    _table_dtype = torch.float32  # that the table is rounded to before it moves

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        registry.check_name(config.attn_backend)
        self.config = config
        d, e, eps = config.d_model, config.embedding_width, config.norm_eps
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, e))
        table = torch.empty(config.max_len, e)
        self._table_dtype = table.dtype
        if config.positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.embedding_norm = nn.LayerNorm(e, eps) if config.embedding_norm else None
        self.embedding_projection = None if config.embedding_size is None else nn.Linear(e, d)
        kind = EncoderBlock if config.norm_first else PostNormBlock
        blocks = [kind(config) for _ in range(config.num_layers)]
        self.blocks: Sequence[EncoderBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(d, eps) if config.norm_first else None
        self._fill_positions()
        self._resolve_backend()

    def reset_parameters(self) -> None:
        """Embeddings of size 0.32 once they are scaled by sqrt(d) (so N(0, 0.02^2) at d_model 256):
        beside positions of size 0.7, which must not drown them. Beside learned positions both are
        N(0, 0.02^2), as BERT's. <PAD> 0; torch's defaults elsewhere."""
        learned = self.config.positions == "learned"
        std = 0.02 if learned else 0.32 / math.sqrt(self.config.d_model)
        nn.init.normal_(self.embedding, std=std)
        with torch.no_grad():
            self.embedding[self.config.pad_id].zero_()
            if learned:
                self.positions.normal_(std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()

    def _resolve_backend(self) -> None:
        weight = self.embedding
        head_dim = self.config.d_model // self.config.num_heads
        self._ops: Operations = registry.resolve_later(
            self.config.attn_backend, weight.device, weight.dtype, head_dim
        )
        self._resolved_for = weight.device, weight.dtype

    def _fill_positions(self) -> None:
        held = self.positions
        if held.is_meta or isinstance(held, nn.Parameter):
            return
        c = self.config
        table = sinusoidal_positions(c.max_len, c.embedding_width, self._table_dtype)
        if held.is_inference() and not torch.is_inference_mode_enabled():
            self.positions = table.to(held.device, held.dtype)  # it takes no values any more
        else:
            with torch.no_grad():
                held.copy_(table)  # in place: it may be shared, or part of a CUDA graph

    def _follow_embedding(self) -> None:
        """To where its weights are now, which somebody put there one by one."""
        device, dtype = self.embedding.device, self.positions.dtype
        if self.positions.device != device and not isinstance(self.positions, nn.Parameter):
            self.positions = torch.empty(self.positions.shape, dtype=dtype, device=device)
            self._fill_positions()
        self._resolve_backend()

    def _apply(self, fn: Any, recurse: bool = True) -> Encoder:
        super()._apply(fn, recurse)
        self._fill_positions()
        self._resolve_backend()
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        before = self.embedding.dtype
        super()._load_from_state_dict(*args, **options)
        # With assign=True weights bring their dtype.
        if self.embedding.dtype != before and not isinstance(self.positions, nn.Parameter):
            self.positions = self.positions.to(self.embedding.dtype)
        self._follow_embedding()

    def __getstate__(self) -> dict[str, Any]:
        # Functions of a backend are not part of a copy, which may wake up on another machine.
        return {k: v for k, v in self.__dict__.items() if k not in ("_ops", "_resolved_for")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._resolve_backend()

    @property
    def backend(self) -> str:
        """The attention backend in use; raises BackendUnavailableError if it cannot run here."""
        weight, c = self.embedding, self.config
        return registry.resolve_name(
            c.attn_backend, weight.device, weight.dtype, c.d_model // c.num_heads
        )

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: Tensor | None = None,
        return_attention: bool = False,
    ) -> Encoded:
        """The rows after the last norm; the arguments are those of `TransformerClassifier`."""
        check_integers("input_ids", input_ids)
        if seed is not None:
            require_seed(seed)
        if self._resolved_for != (self.embedding.device, self.embedding.dtype):
            self._follow_embedding()
        if cu_seqlens is None:
            input_ids, cu_seqlens = self._unpad(input_ids, attention_mask)
            position_ids = max_seqlen = None
        elif attention_mask is not None or input_ids.dim() != 1:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} beside cu_seqlens; expected packed "
                "(T,) ids and no attention_mask, or padded (B, L) ids without cu_seqlens"
            )
        check_cu_seqlens(cu_seqlens)
        if max_seqlen is None:
            max_seqlen = self._longest(cu_seqlens)
        spans = Spans.from_cu_seqlens(cu_seqlens, max_seqlen, input_ids.shape[0])
        if max_seqlen > self.config.max_len:
            raise ValueError(
                f"max_seqlen allows for {max_seqlen} tokens; expected at most max_len = "
                f"{self.config.max_len}. Truncate the texts, or build a model with a larger max_len"
            )
        if position_ids is None:
            position_ids = positions(cu_seqlens, input_ids.shape[0])
        check_integers("position_ids", position_ids)

        at_embedding, *in_blocks, at_head = self._dropouts(seed)
        ops = self._ops
        h = self._embed(input_ids, position_ids, at_embedding)
        norms: list[nn.Module | None] = [
            block.norm1 if type(block) is EncoderBlock else None for block in self.blocks
        ]
        norms.append(self.norm)
        n: Tensor | None = h  # after a norm h is normed
        if self.config.norm_first:
            n = None if norms[0] is None else norms[0](h)
        weights = []
        for i, block in enumerate(self.blocks):
            if return_attention:
                seen = block.norm1(h) if n is None else n
                weights.append(_weights(block.project(seen, ops), spans))
            sites = in_blocks[EncoderBlock.SITES * i : EncoderBlock.SITES * (i + 1)]
            h, n = block(h, n, norms[i + 1], ops, spans, sites)
        assert n is not None  # by `self.norm`
        return Encoded(n, cu_seqlens, max_seqlen, at_head, tuple(weights))

    def _embed(self, ids: Tensor, position_ids: Tensor, dropout: Dropout) -> Tensor:
        """The residual stream (T, d) that the first block takes."""
        ops, norm, projection = self._ops, self.embedding_norm, self.embedding_projection
        if self.config.positions == "sinusoidal":
            is_all = norm is None and projection is None
            at_once, scale = dropout if is_all else NO_DROPOUT, math.sqrt(self.config.d_model)
            x = ops.embed(ids, position_ids, self.embedding, self.positions, at_once, scale)
            if is_all:
                return x
            x = x if norm is None else norm(x)
        else:
            # `ops.embed` has no gradient for its positions: learned ones are a second table.
            words = self._rows(self.embedding, ids)
            places = self._rows(self.positions, position_ids)
            zeros = places.new_zeros(places.shape[1])
            if norm is None:
                x = words + places
            else:
                _, x = add_norm(ops, words, places, zeros, norm, NO_DROPOUT)
        x = drop(ops, x, dropout)
        return x if projection is None else linear(ops, projection, x)

    def _rows(self, table: Tensor, ids: Tensor) -> Tensor:
        """table[ids]: (V, e), (T,) -> (T, e)."""
        nowhere = table.new_zeros(1, table.shape[1])
        return self._ops.embed(ids, torch.zeros_like(ids), table, nowhere, NO_DROPOUT, 1.0)

    def _unpad(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask is {kind(mask)}; expected a tensor of bool, or 0/1")
        if input_ids.dim() != 2 or (mask is not None and mask.shape != input_ids.shape):
            shape = "none" if mask is None else tuple(mask.shape)
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and attention_mask {shape}; "
                "expected two equal (B, L), or packed (T,) ids with cu_seqlens"
            )
        return unpad(input_ids, mask, self.config.pad_id)

    def _longest(self, cu_seqlens: Tensor) -> int:
        # Reading a size is free on the CPU; elsewhere it would stall, so the bound is max_len.
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            return max(0, int(cu_seqlens.diff().max())) if len(cu_seqlens) > 1 else 0
        return self.config.max_len

    def _dropouts(self, seed: Tensor | None) -> list[Dropout]:
        """Every dropout site in the order of the forward pass: embedding, blocks, head."""
        count = 2 + EncoderBlock.SITES * len(self.blocks)
        if not self.training:
            return [NO_DROPOUT] * count
        if seed is None:
            device = self.embedding.device
            seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
        first, *seeds = site_seeds(seed, count).unbind()
        p, sites = self.config.dropout, EncoderBlock.SITES
        dropouts = [Dropout.of(p, first)]
        for i, block in enumerate(self.blocks):
            dropouts += block.dropouts(seeds[sites * i : sites * (i + 1)])
        return [*dropouts, Dropout.of(p, seeds[-1])]


def _weights(qkv: Tensor, spans: Spans) -> Tensor:
    from fasttx.ops import padded, reference

    index = padded.padded_rows(spans, len(qkv))
    q, k, _ = (padded.gather_rows(x, index) for x in qkv.unbind(1))
    weights = reference.attention_weights(q, k, spans.lens, False, q.shape[-1] ** -0.5)
    real = (index < len(qkv))[:, None, :, None]
    return torch.where(real, weights, 0.0)
