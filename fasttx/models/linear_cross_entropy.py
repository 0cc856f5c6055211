"""Cross-entropy over a vocabulary without its (rows, vocabulary) logits in float32.

The loss is taken in chunks of rows that stay in the cache, and its gradient takes the place of the
logits: it is known as soon as they are, as in the Cut Cross-Entropy of Wijmans et al.
(2024) and the fused linear cross-entropy of Liger-Kernel (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttx.ops.arguments import check_floats, row_numbers

# Logits of a chunk: on a CPU as many as stay in its cache, elsewhere as many as keep it busy.
CPU_CHUNK, CHUNK = 2**20, 2**25


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum over rows of -log softmax(x @ weight.T + bias)[label], and how many rows have
    their label on top.

    x (M, d), weight (V, d), bias (V,), floating; labels (M,) int64 -> () float32 (float64 for
    float64 inputs), () int64. linear: what multiplies, such as a backend's. Under autocast the
    products are in its dtype, the loss in float32.
    Differentiable once in x, weight and bias. Raises ValueError and TypeError for inputs that do
    not fit together, IndexError for a label that is no word where it can be read without a wait.
    """
    if x.dim() != 2 or weight.shape[1:] != x.shape[1:] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(
            f"x, weight and bias have shapes {shapes}; expected (M, d), (V, d) and (V,)"
        )
    check_floats("x, weight and bias", x, weight, bias)
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {(len(x),)}")
    labels = row_numbers("labels", labels, len(weight), "the vocabulary").long()
    if torch.compiler.is_compiling():  # which cannot follow the loop over chunks
        from fasttx.models import outside_graph

        return outside_graph.call(_summed, x, weight, bias, labels, linear)
    return _summed(x, weight, bias, labels, linear)


def _summed(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, linear: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` of arguments that have been checked."""
    training = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(x, weight, bias, labels, linear, training)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
        linear: Callable[..., Tensor], training: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        precise = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        step = max(1, (CPU_CHUNK if x.device.type == "cpu" else CHUNK) // len(weight))
        if training:
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            with torch.enable_grad():
                product = linear(*leaves)
            dlogits = product.detach()
        for i in range(0, len(x), step):
            label = labels[i : i + step, None]
            logits = dlogits[i : i + step] if training else linear(x[i : i + step], weight, bias)
            log_p = F.log_softmax(logits, -1, dtype=precise)
            loss -= log_p.gather(1, label).sum()
            correct += (log_p.argmax(1, keepdim=True) == label).sum()
            if training:  # softmax(logits) - one_hot(label)
                p = log_p.exp_()
                p.scatter_add_(1, label, p.new_full(label.shape, -1))
                dlogits[i : i + step] = p
        if training:
            ctx.save_for_backward(*torch.autograd.grad(product, leaves, dlogits))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None)
