"""A bidirectional LSTM classifier, as large as the Transformer it is compared with.

One layer of `torch.nn.LSTM` between the same embedding width and the same mean pooling: what
differs from `TransformerClassifier` is how the words of a text get to see each other.

Shapes: B texts, T rows (tokens of the batch), d width of the embedding, H hidden size a direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fasttx.attention.dropout import require_seed, row_dropout, site_seeds
from fasttx.config import ModelConfig
from fasttx.model import TransformerClassifier, mean_pool
from fasttx.packing import positions, sequence_ids


def equal_hidden_size(config: ModelConfig) -> int:
    """H, a multiple of 4, for which the LSTM's parameters come closest to the Transformer's."""
    with torch.device("meta"):
        transformer = TransformerClassifier(**{**vars(config), "attn_backend": "reference"})
    wanted = sum(p.numel() for p in transformer.parameters())

    def count(hidden: int) -> int:
        d, classes = config.d_model, config.num_classes
        one_direction = 4 * hidden * (d + hidden + 2)  # four gates, two bias vectors
        return config.vocab_size * d + 2 * one_direction + classes * (2 * hidden + 1)

    hidden = 4
    while abs(count(hidden + 4) - wanted) < abs(count(hidden) - wanted):
        hidden += 4
    return hidden


class TimeMajor(NamedTuple):
    """How packed rows are ordered for `PackedSequence`: all first words, all second words, ...

    rows: (live rows,) int64, for each place of that order the packed row it holds;
    batch_sizes (longest,) int64 on the CPU, as torch wants it: texts that have a word there.
    """

    rows: Tensor
    batch_sizes: Tensor


def time_major(cu_seqlens: Tensor) -> TimeMajor:
    """The order of `cu_seqlens` (B + 1,), longest texts first; empty texts and a dead tail are left
    out. Waits for the device, since the batch sizes are needed on the host."""
    cu = cu_seqlens.cpu()
    lens, live = cu.diff().long(), int(cu[-1])
    rank = torch.empty_like(lens)
    rank[lens.argsort(descending=True, stable=True)] = torch.arange(len(lens))
    rows = (positions(cu, live) * len(lens) + rank[sequence_ids(cu, live)]).argsort()
    longest = int(lens.max()) if len(lens) else 0
    batch_sizes = (lens > torch.arange(longest)[:, None]).sum(1)
    return TimeMajor(rows.to(cu_seqlens.device), batch_sizes)


class LSTMClassifier(nn.Module):
    """Embedding - dropout - bidirectional LSTM - mean over real tokens - dropout - Linear.

    Source: Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; both
    directions: Graves, Schmidhuber, "Framewise Phoneme Classification with Bidirectional LSTM",
    Neural Networks 18(5-6), 2005. `config` is that of the Transformer which it is as large as:
    `vocab_size`, `num_classes`, `d_model` (width of the embedding) and `dropout` hold here too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = equal_hidden_size(config)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.lstm = nn.LSTM(config.d_model, self.hidden_size, bidirectional=True)
        self.classify = nn.Linear(2 * self.hidden_size, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's defaults, an embedding of unit variance included; the forget gates start open
        (Jozefowicz, Zaremba, Sutskever, ICML 2015), in one of torch's two bias vectors."""
        nn.init.normal_(self.embedding)
        self.lstm.reset_parameters()
        self.classify.reset_parameters()
        forget = slice(self.hidden_size, 2 * self.hidden_size)  # gates: input, forget, cell, output
        with torch.no_grad():
            for name, weight in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    weight[forget] = 1.0

    def forward(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor,
        position_ids: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, num_classes) of packed rows: input_ids (T,), T >= cu_seqlens[-1], cu_seqlens
        (B + 1,) int32. An empty text is pooled to 0.

        seed: () int64 tensor on the device, the forward seed of both dropout masks, required in
        training. position_ids and max_seqlen are what any model of `Trainer` is given; an LSTM
        needs neither.
        """
        p = self.config.dropout if self.training else 0.0
        at_words, at_text = site_seeds(require_seed(seed), 2).unbind() if p else (None, None)
        x = row_dropout(F.embedding(input_ids, self.embedding), p, at_words)
        pooled = mean_pool(self._states(x, cu_seqlens), cu_seqlens)
        logits: Tensor = self.classify(row_dropout(pooled, p, at_text))
        return logits

    def _states(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T, d) -> (T, 2 H): the states of both directions at each row, 0 in a dead tail."""
        order = time_major(cu_seqlens)
        states = x.new_zeros(len(x), 2 * self.hidden_size)
        if not len(order.rows):
            return states
        out, _ = self.lstm(PackedSequence(x[order.rows], order.batch_sizes))
        return states.to(out.data.dtype).index_copy(0, order.rows, out.data)
