"""How fast is attention alone? One layer of it, over lengths, passes, dropout and dtypes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import attention_level
import pytest
from contest import Contest, require
from workload import DTYPES, Setting

TOKENS = 8192  # of a batch of texts of one length
INPUTS = 3


def one_layer(
    length: int | None, backward: bool, p: float, precision: str, setting: Setting
) -> Contest:
    """length None: those of real reviews."""
    if precision == "fp16" and setting.device.type == "cpu":
        require(["float16 is timed on GPUs only"])
    setting = replace(setting, precision=precision)
    if length is None:
        return attention_level.on_reviews(setting, 32, inputs=INPUTS, p=p, backward=backward)
    batch, length = setting.of(TOKENS // length), setting.of(length)
    lengths, what = [[length] * batch] * INPUTS, f"{length} tokens each"
    return attention_level.attention(setting, lengths, what, p=p, backward=backward)


def _case(length: int | None, backward: bool, p: float, precision: str = "fp32") -> Any:
    batch = TOKENS // length if length else 32
    passes = "forward+backward" if backward else "forward"
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    return pytest.param(
        functools.partial(one_layer, length, backward, p, precision),
        id=f"batch{batch}-{length or 'real'}-{passes}-p{p:g}-{dtype}",
    )


CONTESTS = [
    *(_case(length, b, p) for length in (256, None) for b in (False, True) for p in (0.0, 0.1)),
    *(_case(length, True, 0.1) for length in (64, 128, 512, 1024)),
    *(_case(None, True, p, precision) for precision in ("bf16", "fp16") for p in (0.0, 0.1)),
]


@pytest.mark.parametrize("contest", CONTESTS, indirect=True)
@pytest.mark.parametrize("name", attention_level.attention_names())
def test_attention(compete, name):
    compete(name)
