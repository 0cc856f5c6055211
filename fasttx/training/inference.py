"""Logits of many texts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.reading import by_length, mean_of_windows
from fasttx.training.task import Examples, Run


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    ids: RaggedIds,
    device: torch.device,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
) -> Tensor:
    """Logits (texts, num_classes) fp32 on the CPU, in the order of `ids`; leaves eval mode on."""
    model.eval()
    rows: list[tuple[np.ndarray, Tensor]] = []
    for indices in by_length(ids, batch_size):
        multiple = devices.token_multiple(device, precision)
        batch = pack(ids.select(indices), token_multiple=multiple).to(device)
        with devices.autocast(device, precision):
            rows.append((indices, model(**batch.model_inputs()).float()))
    if not rows:
        return torch.empty(0, 0)
    order = torch.from_numpy(np.concatenate([indices for indices, _ in rows]))
    logits = torch.cat([r for _, r in rows]).cpu()  # one wait for the device, at the end
    return torch.empty_like(logits).index_copy_(0, order, logits)


def predict_shared(run: Run, model: nn.Module, examples: Examples) -> np.ndarray:
    """Logits (n, num_classes) float32 in every process: each predicts a share of the texts."""
    config, ids = run.config.train, examples.ids
    mine = run.processes.share(np.arange(len(ids)))
    logits = torch.zeros(len(ids), config.model.num_classes)
    if len(mine):
        logits[torch.from_numpy(mine)] = predict_logits(
            model,
            ids if len(mine) == len(ids) else ids.select(mine),  # which would be a copy
            run.device,
            batch_size=config.batch_size,
            precision=config.precision,
        )
    return mean_of_windows(run.processes.sum(logits), examples.owner).numpy()
