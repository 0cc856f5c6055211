"""What the launchers share on the host's side."""

import torch
import triton

# Under TRITON_INTERPRET=1 the kernels run as numpy on tensors of the CPU.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Said aloud, because what Triton does by default changes between its versions.
LAUNCH = {"enable_fp_fusion": True}

# Programs along the rows where a gradient sums over all of them, each with a sum of its own. Not
# the device's size: bits must not follow it.
PARTIAL_SUMS = 256


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by, for a threshold of 0 ... 65536."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32, unless torch.set_float32_matmul_precision allows
    TF32 for torch's own."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"
