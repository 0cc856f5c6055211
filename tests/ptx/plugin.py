"""Which tests go to the PTX machine, under which schedule; conftest.py takes its hooks from here.

FASTTX_PTX=all        every test of every backend, on sm_80 and sm_90; else those of CHOSEN
FASTTX_PTX=none       no test of a backend
FASTTX_PTX_SEED=each  every test under a schedule of its own
FASTTX_PTX_SEED=7     all under this one; without it all in order (0)
"""

from __future__ import annotations

import fnmatch
import os
import zlib

import pytest

from tests.ptx.settings import Settings

TARGETS = ("sm_80-cpu", "sm_90-cpu")

# Of each target, in the ordinary run: a case of each kind of kernel, since to compile one takes
# seconds. `*` stands for the target.
CHOSEN = {
    "test_attention.py": (
        "test_float32[*-gaps-full]",
        "test_float32[*-40 sequences-causal]",
        "test_float32_with_dropout[*-wide-full]",
        "test_float32_with_dropout[*-300 sequences-full]",
        "test_half_precision[*-bfloat16-0.1-long-full]",
        "test_half_precision[*-bfloat16-0.1-odd-causal]",
        "test_half_precision[*-bfloat16-0.0-gapped views-full]",
        "test_half_precision[*-float16-0.1-infinite-full]",
        "test_half_precision[*-float16-0.0-wide-full]",
        "test_nothing_to_attend_to[*-empty sequences]",
    ),
    "test_add_norm.py": (
        "test_values_and_gradients[*-float32-add_norm 33x256]",
        "test_values_and_gradients[*-float32-add_norm 7x20]",
        "test_half_precision[*-bfloat16-add_norm 33x64 mixed]",
    ),
    "test_bias_act.py": (
        "test_values_and_gradients[*-float32-gelu 33x256]",
        "test_values_and_gradients[*-float32-relu 7x20]",
        "test_half_precision[*-bfloat16-relu 33x256]",
    ),
    "test_embed.py": (
        "test_values_and_gradients[*-float32-embed 33x256]",
        "test_half_precision[*-float16-embed 33x256 strided]",
    ),
    "test_fused.py": ("test_operators_keep_torch_s_rules[*-attention_qkv-torch.bfloat16]",),
    "test_triton_kernels.py": (
        "test_masks_bit_for_bit[*-33-True-dtype1]",
        "test_row_masks_bit_for_bit[*-20]",
        "test_logarithms_are_natural_and_moments_those_of_the_sum[*]",
        "test_a_training_step_equals_the_reference_s[*]",
        "test_more_sequences_than_a_program_looks_at_together[*]",
    ),
}


def target_of(item: pytest.Item) -> str | None:
    """The target in a test's name."""
    return next((target for target in TARGETS if f"[{target}" in item.name), None)


def is_chosen(item: pytest.Item, target: str) -> bool:
    name = item.name.replace(target, "*", 1)
    patterns = CHOSEN.get(item.path.name, ())
    return any(fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = os.environ.get("FASTTX_PTX", "")
    if wanted == "all":
        return
    kept, dropped = [], []
    for item in items:
        target = target_of(item)
        keep = target is None or (wanted != "none" and is_chosen(item, target))
        (kept if keep else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _schedule(request: pytest.FixtureRequest) -> None:
    chosen = os.environ.get("FASTTX_PTX_SEED", "0")
    name = request.node.nodeid.encode()
    Settings.seed = zlib.crc32(name) >> 1 if chosen == "each" else int(chosen)
