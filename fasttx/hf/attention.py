"""Our attention in the models of transformers: `attn_implementation="fasttx"`, or
`"fasttx:<backend>"`.

transformers asks two functions by that name. `spans_of_batch` is asked once a forward pass and says
where the real tokens stand; what it returns goes to `attention` in each layer in place of a mask.
Without the first, transformers drops the padding mask silently. What cannot be computed is refused.

B texts, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fasttx.errors import UnsupportedError
from fasttx.ops import registry
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.functional import padded_spans, seed_of_generator
from fasttx.ops.local import local_attention

NAME = "fasttx"
_INSTEAD = "use attn_implementation='sdpa' or 'eager' for this model"


class Mask(NamedTuple):
    """Which tokens see one another: those of one span, less than `window` places apart."""

    spans: Spans
    causal: bool = False
    window: int | None = None


def spans_of_batch(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None, *, local_size: int | None = None, use_vmap: bool = False,
    device: torch.device | str = "cpu", **rest: Any,
) -> Mask:  # fmt: skip
    """As transformers' mask functions. attention_mask (B, L) bool: True where a token is real.

    Raises UnsupportedError for queries and keys of different texts, and for masks other than full,
    causal, or a window; ValueError for padding in the middle of a text.
    """
    if q_length != kv_length:
        raise UnsupportedError(
            f"{NAME} attention: {q_length} queries and {kv_length} keys; expected as many (no key "
            f"and value cache, no cross attention): pass use_cache=False, or {_INSTEAD}"
        )
    causal, window = mask_function is causal_mask_function, None
    if not use_vmap and local_size is not None and _is_window(mask_function, q_length, local_size):
        window = local_size + 1
    elif use_vmap or not (causal or mask_function is bidirectional_mask_function):
        raise UnsupportedError(
            f"{NAME} attention: the model asks for a mask of its own (packed position_ids, an "
            "overlay, chunks); expected full, causal or windowed attention. For packed texts pass "
            f"cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k; else {_INSTEAD}"
        )
    spans = padded_spans(attention_mask, batch_size, q_length, torch.device(device))
    return Mask(spans, causal, window)


def _is_window(mask_function: Callable[..., Any], length: int, size: int) -> bool:
    """Whether a token sees all that are at most `size` places away, before and after it."""
    zero, keys = torch.zeros((), dtype=torch.int64), torch.arange(length)
    for place in {0, length // 2, length - 1}:
        seen = mask_function(zero, zero, torch.tensor(place), keys)
        if not torch.equal(seen.expand(length), (keys - place).abs() <= size):
            return False
    return True


# What transformers' models may pass and no backend computes.
_REFUSED = {
    "softcap": "a cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
    "head_mask": "a mask of heads",
    "past_key_values": "a key and value cache",
    "output_attentions": "the attention weights",
}


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Mask | Tensor | None, *, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None, max_length_k: int | None = None, backend: str = "auto",
    **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers' attention functions: query, key, value (B, H, L, D) -> ((B, L, H, D), None).

    With `cu_seq_lens_q` and `_k` (B' + 1,) int32 the rows of a batch (1, L) are packed texts that
    do not see one another. The rows of padding come out 0. Dropout draws its seed from torch's
    default generator, and its masks are the same on every backend but `sdpa`. Raises
    UnsupportedError for what it cannot compute, and as a backend does.
    """
    _refuse(module, query, key, value, rest)
    batch, heads, length, head_dim = query.shape
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        spans = _packed(batch, length, cu_seq_lens_q, cu_seq_lens_k, max_length_q, attention_mask)
        mask = Mask(spans, is_causal, getattr(attention_mask, "window", None) or sliding_window)
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
    elif attention_mask is None or attention_mask.dim() == 2:
        spans = padded_spans(attention_mask, batch, length, query.device)
        mask = Mask(spans, is_causal, sliding_window)
    else:
        shape = tuple(attention_mask.shape)
        raise UnsupportedError(
            f"{NAME} attention: attention_mask has shape {shape}; expected (B, L) with 1 for real "
            f"tokens. For a mask of pairs of tokens {_INSTEAD}"
        )
    if mask.window != sliding_window:
        raise UnsupportedError(
            f"{NAME} attention: the layer's window is {sliding_window} and its mask's "
            f"{mask.window}; expected the same. {_INSTEAD.capitalize()}"
        )
    q, k, v = (
        x.transpose(1, 2).reshape(batch * length, heads, head_dim) for x in (query, key, value)
    )
    site = Dropout.of(dropout, seed_of_generator(q.device)) if dropout else NO_DROPOUT
    spans, causal, window = mask
    if window is not None and window < spans.max_seqlen:
        if causal:
            raise UnsupportedError(f"{NAME} attention: a causal window; {_INSTEAD}")
        out = local_attention(q, k, v, spans, window, site, scale=scaling)
    else:
        operations = registry.resolve(backend, q.device, q.dtype, head_dim)
        out = operations.attention_qkv(q, k, v, spans, site, causal=causal, scale=scaling)
    return out.view(batch, length, heads, head_dim), None


def _packed(
    batch: int, length: int, cu_q: Tensor | None, cu_k: Tensor | None, longest: int | None,
    attention_mask: Any,
) -> Spans:  # fmt: skip
    """The spans of packed texts, in a batch of one row."""
    if cu_q is None or cu_k is None or cu_q.shape != cu_k.shape:
        raise UnsupportedError(
            f"{NAME} attention: cu_seq_lens_q and cu_seq_lens_k differ; expected the same borders "
            "in both (self-attention)"
        )
    if batch != 1:
        raise UnsupportedError(
            f"{NAME} attention: cu_seq_lens_q comes with a batch of {batch}; expected packed texts "
            "in one row, input_ids (1, T)"
        )
    if isinstance(attention_mask, Mask) and int(attention_mask.spans.lens[0]) != length:
        raise UnsupportedError(
            f"{NAME} attention: cu_seq_lens_q comes with an attention_mask that hides tokens; "
            "expected one of the two: leave attention_mask away"
        )
    # Checked anew by the backend, in each layer; here only that they begin with 0.
    bound = length if longest is None else int(longest)
    return Spans.from_cu_seqlens(cu_q, bound, length)


def _refuse(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, rest: dict[str, Any]
) -> None:
    name = type(module).__name__
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in name:
        raise UnsupportedError(f"{NAME} attention: {name} attends to another text; {_INSTEAD}")
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise UnsupportedError(
            f"{NAME} attention: query, key, value have shapes {shapes}; expected three equal "
            "(B, H, L, D): no key and value cache (use_cache=False), no cross attention, as many "
            f"heads for keys as for queries. Else {_INSTEAD}"
        )
    for option, what in _REFUSED.items():
        value_given = rest.get(option)
        if value_given is not None and value_given is not False:
            raise UnsupportedError(f"{NAME} attention: no {what} ({option}); {_INSTEAD}")


def register() -> None:
    """Makes the names known to transformers; a second call changes nothing."""
    for name in (NAME, *(f"{NAME}:{backend}" for backend in registry.BACKENDS)):
        backend = name.partition(":")[2] or "auto"
        AttentionInterface.register(name, functools.partial(attention, backend=backend))
        AttentionMaskInterface.register(name, spans_of_batch)
    if not hasattr(PreTrainedModel.get_correct_attn_implementation, "fasttx"):
        _refuse_models_that_would_ignore_it()


def _refuse_models_that_would_ignore_it() -> None:
    """transformers accepts any registered name for a model whose attention never asks for it."""
    unchanged = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(unchanged)
    def checked(self: PreTrainedModel, requested: str | None, *args: Any, **options: Any) -> str:
        ours = requested is not None and requested.partition(":")[0] == NAME
        if ours and not self._supports_attention_backend:
            raise UnsupportedError(
                f"attn_implementation={requested!r}: {type(self).__name__} computes its attention "
                "itself and would ignore it; choose another model, or leave attn_implementation "
                "away"
            )
        return unchanged(self, requested, *args, **options)

    vars(checked)["fasttx"] = True
    setattr(PreTrainedModel, unchanged.__name__, checked)
