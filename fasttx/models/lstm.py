"""A bidirectional LSTM classifier, as large as the Transformer it is compared with.

One layer of `torch.nn.LSTM` a direction, between an embedding of the same width and the same mean
pooling: what differs from `TransformerClassifier` is how the words of a text get to see each other.

Shapes: B texts, T rows (tokens of the batch), L longest text, d width of the embedding, H hidden
size of a direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.module import Model, room_for
from fasttx.ops.arguments import row_numbers
from fasttx.ops.contract import Spans, check_cu_seqlens
from fasttx.ops.dropout import Dropout, require_seed, row_dropout, site_seeds


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


class LSTMClassifier(Model):
    """Embedding - dropout - bidirectional LSTM - mean over real tokens - dropout - Linear.

    Source: Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; both
    directions: Graves, Schmidhuber, "Framewise Phoneme Classification with Bidirectional LSTM",
    Neural Networks 18(5-6), 2005. `config` is that of the Transformer which it is as large as:
    `vocab_size`, `num_classes`, `d_model` (width of the embedding) and `dropout` hold here too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        with room_for(config):  # it is as large as that Transformer
            self.hidden_size = equal_hidden_size(config)
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
            self.onward = nn.LSTM(config.d_model, self.hidden_size, batch_first=True)
            self.from_end = nn.LSTM(config.d_model, self.hidden_size, batch_first=True)
            self.classify = nn.Linear(2 * self.hidden_size, config.num_classes)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's defaults, an embedding of unit variance included; the forget gates start open
        (Jozefowicz, Zaremba, Sutskever, ICML 2015), in one of torch's two bias vectors."""
        nn.init.normal_(self.embedding)
        self.classify.reset_parameters()
        forget = slice(self.hidden_size, 2 * self.hidden_size)  # gates: input, forget, cell, output
        for lstm in (self.onward, self.from_end):
            lstm.reset_parameters()
            with torch.no_grad():
                lstm.get_parameter("bias_ih_l0")[forget] = 1.0

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

        max_seqlen, any upper bound on the lengths, saves a wait for the device when given.
        seed: () int64 tensor on the device, the forward seed of both dropout masks, required in
        training. position_ids is what any model of `Trainer` is given; an LSTM needs none.
        Raises TypeError, ValueError and IndexError as the Transformer does.
        """
        ids = row_numbers("input_ids", input_ids, len(self.embedding), "the embedding table")
        if ids.dim() != 1:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; expected packed (T,) ids")
        check_cu_seqlens(cu_seqlens)
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().clamp(min=0).max()) if len(cu_seqlens) > 1 else 0
        Spans.from_cu_seqlens(cu_seqlens, max_seqlen, len(ids))
        if seed is not None:
            require_seed(seed)
        p = self.config.dropout if self.training else 0.0
        at_words, at_text = site_seeds(require_seed(seed), 2).unbind() if p else (None, None)
        x = row_dropout(F.embedding(ids, self.embedding), Dropout.of(p, at_words))
        pooled = self._pool_states(x, cu_seqlens, max_seqlen)
        pooled = row_dropout(pooled, Dropout.of(p, at_text))
        logits: Tensor = self.classify(pooled)
        return logits

    def _pool_states(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, d) -> (B, 2 H): the mean over each text of the states of both directions.

        Each direction reads texts padded at the end that it comes to last, so no padding reaches a
        real state. On the CPU that is many times faster than torch's `PackedSequence`: the gradient
        of each time step would there be a tensor as large as the whole batch.
        """
        starts, lens = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
        if not len(lens):  # torch's LSTM takes no batch of none
            return x.new_zeros(0, 2 * self.hidden_size)
        step = torch.arange(max(max_seqlen, 1), device=x.device)
        real = step < lens
        rows = torch.cat([x, x.new_zeros(1, x.shape[1])])  # the last one is padding
        pooled = []
        for lstm, row in ((self.onward, starts + step), (self.from_end, starts + lens - 1 - step)):
            states, _ = lstm(rows[torch.where(real, row, len(x))])
            pooled.append((states * real[:, :, None]).sum(1))
        return torch.cat(pooled, 1) / lens.clamp(min=1)
