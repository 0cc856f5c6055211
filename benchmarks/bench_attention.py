"""How fast is attention alone? One layer of it, over lengths, passes, dropout and dtypes."""

from __future__ import annotations

import functools
from typing import Any

import attention_level
import pytest
import torch
from contest import Unavailable

TOKENS = 8192  # of a batch of texts of one length
INPUTS = 3


def one_layer(
    batch: int, length: int | None, backward: bool, p: float, dtype: torch.dtype, setting: Any
) -> Any:
    """length None: those of real reviews."""
    if dtype == torch.float16 and setting.device.type == "cpu":
        raise Unavailable("float16 is timed on GPUs only")
    scale = setting.scale
    batch = scale.of(batch)
    if length is None:
        ids, what = setting.ids(INPUTS * batch)
        lengths = ids.lengths.reshape(INPUTS, batch).tolist()
    else:
        lengths = [[scale.of(length)] * batch] * INPUTS
        what = f"{scale.of(length)} tokens each"
    return attention_level.attention(
        lengths, scale.config, setting.device, dtype=dtype, p=p, backward=backward, what=what
    )


def _case(length: int | None, backward: bool, p: float, dtype: torch.dtype = torch.float32) -> Any:
    batch = TOKENS // length if length else 32
    passes = "forward+backward" if backward else "forward"
    name = f"batch{batch}-{length or 'real'}-{passes}-p{p:g}-{str(dtype).removeprefix('torch.')}"
    return pytest.param(functools.partial(one_layer, batch, length, backward, p, dtype), id=name)


CONTESTS = [
    *(_case(length, b, p) for length in (256, None) for b in (False, True) for p in (0.0, 0.1)),
    *(_case(length, True, 0.1) for length in (64, 128, 512, 1024)),
    *(_case(None, True, p, dtype) for dtype in (torch.bfloat16, torch.float16) for p in (0.0, 0.1)),
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", attention_level.attention_names())
def test_attention(compete, name):
    compete(name)
