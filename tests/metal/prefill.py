"""PyTorch's own Metal attention kernel, out of the installed wheel, made ready for the emulator.

It runs on Macs every day. That the emulator computes the same from it as torch does anchors the
emulator itself: lane layout, matrix products, barriers, shared memory.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

from tests.metal.emulator import ShaderLibrary

HEADER = Path(torch.__file__).parent / "include/ATen/native/mps/kernels/PrefillAttention.h"

# What the header expects of the Metal standard library, and our kernels do not use.
PRELUDE = """
#include <type_traits>
#define METAL_FUNC inline
#define IF_CONSTEXPR constexpr
using std::integral_constant;
using std::is_same_v;
using std::remove_cv_t;
typedef vec<int, 2> int2;
typedef vec<half, 4> half4;
typedef vec<float, 4> float4;
namespace metal {
using ::vec;
using std::conditional_t;
using std::is_same_v;
using std::tanh;
template <class T> struct numeric_limits {
  static constexpr T infinity() { return T(INFINITY); }
  static constexpr T lowest() { return T(-3.4e38f); }
};
namespace fast { inline float tanh(float x) { return std::tanh(x); } }
namespace precise { inline float tanh(float x) { return std::tanh(x); } }
}
namespace fast = metal::fast;
namespace precise = metal::precise;
namespace c10 { namespace metal {
template <class T> using accum_t = float;
template <class T> T ceil_div(T a, T b) { return (a + b - 1) / b; }
} }
inline short2 operator-(short2 a, short2 b) { return short2(a.x - b.x, a.y - b.y); }
"""

ENTRY = """
kernel void calibration(
    const device float* q [[buffer(0)]], const device float* k [[buffer(1)]],
    const device float* v [[buffer(2)]], device float* out [[buffer(3)]],
    const device uchar* params [[buffer(4)]], const device uchar* mask_params [[buffer(5)]],
    const device float* mask [[buffer(6)]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_index [[thread_position_in_threadgroup]]) {
  prefill_attention<float, 32, 32, 32, 4, 1, false, false, float>(
      q, k, v, out, (const PrefillAttnParams*)params, (const PrefillAttnMaskParams*)mask_params,
      mask, lane, simdgroup, group, thread_index);
}
"""


def source() -> str:
    text = HEADER.read_text()
    text = text[text.index("#define PREFILL_CONST") :]
    text = text[: text.index("#define instantiate_kernel")]
    text = re.sub(r"#else\s*#error.*?#endif.*", "", text, flags=re.S)
    # Without address spaces these three would all be the first.
    spaces = r"struct pointer_element<(device|constant|threadgroup) T\*> \{.*?\};"
    text = re.sub(rf"template <typename T>\s*{spaces}", "", text, flags=re.S)
    text = text.replace("constant constexpr const", "constexpr const")
    text = text.replace("const constant", "const")
    return re.sub(r"\[\[kernel[^\]]*\]\]\s*void", "static void", text) + ENTRY


def attention(q: Tensor, k: Tensor, v: Tensor, text: str, order: int) -> Tensor:
    """softmax(q k^T / sqrt(32)) v of (B, H, L, 32) by that kernel in the emulator."""
    b, h, n, d = q.shape
    out = torch.full_like(q, math.nan)
    wide = "int64_t" in text[text.index("struct PrefillAttnParams") :][:500]
    numbers = struct.pack(
        "iiiiiiff" + ("12q" if wide else "12i"),
        b, h, d, n, n, 1, d**-0.5, 1.0, *((h * n * d, n * d, d) * 4),
    )  # fmt: skip
    params = torch.frombuffer(bytearray(numbers), dtype=torch.uint8)
    nothing = torch.zeros(64, dtype=torch.uint8)
    launch = ShaderLibrary(text, checked=False, prelude=PRELUDE).calibration
    launch.order = order
    launch(
        q, k, v, out, params, nothing, nothing.float(),
        threads=(-(-n // 32) * 32, 4 * h, b), group_size=(32, 4, 1),
    )  # fmt: skip
    return out
