"""The Metal kernels as operations; `adapter` decides whether to trust them.

They compute in float32 and read and write any of their dtypes.
"""

from __future__ import annotations

import torch

from fasttx.kernels.metal import add_norm, attention, bias_act, embed
from fasttx.ops.fused import FusedOperations, Launchers

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# For every device: `shaders.compiler` says where kernels can run.
operations = FusedOperations(
    "metal",
    Launchers(
        attention, embed, add_norm, bias_act, _DTYPES, _DTYPES, ("CompositeExplicitAutograd",)
    ),
)
