"""A pool of classifiers: their logits as one, with weights fitted on labelled texts.

Shapes: M members, n texts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Pool:
    """A logarithmic opinion pool: softmax of `bias` (C,) and the members' centred logits, times
    `weights` (M,).

    Source: Genest, Zidek, "Combining Probability Distributions: A Critique and an Annotated
    Bibliography", Statistical Science 1(1), 1986; weights fitted on texts that no member was
    trained on: Wolpert, "Stacked Generalization", Neural Networks 5(2), 1992.
    """

    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, members: np.ndarray, labels: np.ndarray) -> Pool:
        """The pool of the least negative log-likelihood: members (M, n, C) logits, labels (n,).

        Half the squared weights are added to it, of members scaled to a deviation of 1. Without
        that the weights would be infinite where the members tell all texts apart.
        """
        logits = torch.from_numpy(_centred(members))
        scale = logits.square().mean((1, 2)).sqrt().clamp(min=1e-12)
        logits = logits / scale[:, None, None]
        truth = torch.from_numpy(labels)
        weights = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(logits.shape[2], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weights, bias],
            max_iter=500,
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def objective() -> torch.Tensor:
            solver.zero_grad()
            pooled = torch.einsum("m,mnc->nc", weights, logits) + bias
            value = F.cross_entropy(pooled, truth) + 0.5 * weights.square().sum() / len(truth)
            value.backward()
            return value

        solver.step(objective)
        fitted = (weights.detach() / scale).numpy()
        return cls(fitted, (bias - bias.mean()).detach().numpy())

    def __call__(self, members: np.ndarray) -> np.ndarray:
        """(M, n, C) logits -> (n, C) logits of the pool."""
        pooled: np.ndarray = np.einsum("m,mnc->nc", self.weights, _centred(members)) + self.bias
        return pooled


def _centred(members: np.ndarray) -> np.ndarray:
    values = np.asarray(members, dtype=np.float64)
    centred: np.ndarray = values - values.mean(2, keepdims=True)
    return centred
