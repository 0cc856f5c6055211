"""What a warp or a warpgroup of the PTX machine does together, against the layouts that the PTX ISA
draws: fragments of mma and wgmma, ldmatrix, stmatrix, shuffles, reductions; loads, stores and
copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ptx import machine
from tests.ptx.assembly import run

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))

LANE = torch.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4  # groupID, threadID_in_group of the ISA's figures
# Each thread's own part of a tensor: its address in %d{to}, `bytes` a thread.
PLACE = "mul.wide.u32 %d10, %w0, {bytes};\nadd.s64 %d{to}, %d{tensor}, %d10;\n"


def place(tensor: int, to: int, size: int) -> str:
    return PLACE.format(tensor=tensor, to=to, bytes=size)


def loads(address: int, first: int, count: int) -> str:
    return "".join(f"ld.global.b32 %w{first + i}, [%d{address} + {4 * i}];\n" for i in range(count))


def stores(address: int, first: int, count: int) -> str:
    return "".join(f"st.global.b32 [%d{address} + {4 * i}], %w{first + i};\n" for i in range(count))


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%w{first + i}" for i in range(count)) + "}"


def words(x: Tensor) -> Tensor:
    """Pairs of 16-bit values, or float32, as int32."""
    return x.contiguous().view(torch.int32)


# ------------------------------------------------------------------------------------------- mma


def a_places(i: int, halves: bool) -> tuple[Tensor, Tensor]:
    """(row, column) of element i of A's fragment, of each lane."""
    if halves:
        row = GROUP if i < 2 or 4 <= i < 6 else GROUP + 8
        return row, THREAD * 2 + i % 2 + (8 if i >= 4 else 0)
    return (GROUP if i in (0, 2) else GROUP + 8), THREAD + (4 if i >= 2 else 0)


def b_places(i: int, halves: bool) -> tuple[Tensor, Tensor]:
    if halves:
        return THREAD * 2 + i % 2 + (8 if i >= 2 else 0), GROUP
    return THREAD + 4 * i, GROUP


def c_places(i: int) -> tuple[Tensor, Tensor]:
    return (GROUP if i < 2 else GROUP + 8), THREAD * 2 + i % 2


def fragment(matrix: Tensor, places: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(32, elements): what each lane holds."""
    return torch.stack([matrix[row, column] for row, column in places], 1)


def tf32(x: Tensor) -> Tensor:
    """The low 13 bits are not looked at."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mma(dtype):
    halves = dtype != torch.float32
    k, kind = (
        (16, {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype)) if halves else (8, "tf32")
    )
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    parts = (
        words(fragment(a, [a_places(i, halves) for i in range(8 if halves else 4)])),
        words(fragment(b, [b_places(i, halves) for i in range(4 if halves else 2)])),
        words(fragment(c, [c_places(i) for i in range(4)])),
    )
    given, out = torch.cat(parts, 1), torch.zeros(32, 4)
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
    run(
        place(0, 5, 40) + loads(5, 20, 10)
        + f"{opcode} {names(10, 4)}, {names(20, 4)}, {names(24, 2)}, {names(26, 4)};\n"
        + place(1, 6, 16) + stores(6, 10, 4),
        given, out,
    )  # fmt: skip
    wide = (x.double() if halves else tf32(x).double() for x in (a, b))
    exact = torch.matmul(*wide) + c
    expected = fragment(exact.float(), [c_places(i) for i in range(4)])
    torch.testing.assert_close(out, expected, rtol=2**-23, atol=1e-7)


# --------------------------------------------------------------------------- ldmatrix, stmatrix


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_shared_memory(count, transposed):
    """Lane 8 m + r points to row r of matrix m; lane l receives row l // 4, columns 2 (l % 4) and +
    1."""
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    order = torch.randperm(8 * count)  # where each row lies, in 16 bytes
    memory = torch.zeros(8 * count, 8, dtype=torch.int16)
    memory[order] = matrices.view(-1, 8)
    trans, shared = ".trans" if transposed else "", 128 * count
    at = torch.zeros(32, dtype=torch.int32)
    at[: 8 * count] = order * 16
    fill = place(0, 5, 4 * count) + loads(5, 20, count)
    fill += f"mad.lo.s32 %w3, %w0, {4 * count}, %w2;\n"
    fill += "".join(f"st.shared.b32 [%w3 + {4 * i}], %w{20 + i};\n" for i in range(count))
    address = place(1, 6, 4) + loads(6, 4, 1) + "add.s32 %w5, %w4, %w2;\n"
    out = torch.zeros(32, count, dtype=torch.int32)
    read = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(10, count)}, [%w5];\n"
    run(
        fill + "bar.sync 0;\n" + address + read + place(2, 7, 4 * count) + stores(7, 10, count),
        words(memory).view(32, -1), at, out, shared=shared,
    )  # fmt: skip
    seen = matrices.mT if transposed else matrices
    expected = seen.reshape(count, 8, 4, 2)[:, GROUP, THREAD].transpose(0, 1)  # (32, count, 2)
    assert torch.equal(out, words(expected).view(32, count))

    # And back: stmatrix of these registers makes the same memory.
    again = torch.zeros(32, count, dtype=torch.int32)
    write = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%w5], {names(10, count)};\n"
    copy = "".join(f"ld.shared.b32 %w{20 + i}, [%w3 + {4 * i}];\n" for i in range(count))
    run(
        place(0, 5, 4 * count) + loads(5, 10, count) + address + write + "bar.sync 0;\n"
        + f"mad.lo.s32 %w3, %w0, {4 * count}, %w2;\n" + copy
        + place(2, 7, 4 * count) + stores(7, 20, count),
        out, at, again, shared=shared,
    )  # fmt: skip
    assert torch.equal(again.view(-1), words(memory).view(-1))


# ------------------------------------------------------------------------------------------ wgmma


def swizzled(matrix: Tensor, width: int, k_major: bool) -> tuple[Tensor, int, int]:
    """A (rows, k) matrix as wgmma reads it, bytes, and its leading and stride offsets.

    Atoms have 8 rows of `width` bytes, whose 16-byte pieces change places by the row: piece p of
    row r lies where p xor (r width / 128) is.
    """
    lines = matrix if k_major else matrix.T  # (across, along), along contiguous
    across, size = len(lines), matrix.element_size()
    pieces = lines.contiguous().view(torch.uint8).view(across, -1, 16)
    per_atom = width // 16
    atoms_along, atoms_across = -(-pieces.shape[1] // per_atom), across // 8
    stride, leading = 8 * width, 8 * width * atoms_across
    image = torch.zeros(atoms_along * leading, dtype=torch.uint8)
    for line in range(across):
        for piece in range(pieces.shape[1]):
            row, inside = line % 8, piece % per_atom
            turned = inside ^ (row * width // 128 % per_atom)
            at = line // 8 * stride + piece // per_atom * leading + row * width + 16 * turned
            image[at : at + 16] = pieces[line, piece]
    assert size * lines.shape[1] >= width or k_major
    return image, leading, stride


def descriptor(at: int, leading: int, stride: int, width: int) -> int:
    mode = {128: 1, 64: 2, 32: 3}[width]
    return (1024 + at) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


WGMMA = [
    (torch.bfloat16, 64, 128, True, True, False), (torch.float16, 32, 64, False, True, False),
    (torch.bfloat16, 16, 32, False, False, False), (torch.float16, 128, 128, False, False, True),
    (torch.bfloat16, 256, 128, True, False, False), (torch.bfloat16, 8, 32, False, True, False),
    (torch.float32, 32, 32, False, True, False), (torch.float32, 64, 128, True, True, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "n", "width", "in_registers", "b_k_major", "a_transposed"), WGMMA,
    ids=lambda x: str(x).removeprefix("torch."),
)  # fmt: skip
def test_wgmma(dtype, n, width, in_registers, b_k_major, a_transposed):
    size = torch.finfo(dtype).bits // 8
    k, halves = 32 // size, size == 2
    kind = {2: "bf16" if dtype == torch.bfloat16 else "f16", 4: "tf32"}[size]
    a, b, c = torch.randn(64, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(64, n)
    b_image, *b_offsets = swizzled(b, width if not b_k_major else max(32, width), b_k_major)
    a_image, *a_offsets = swizzled(a, 128 if a_transposed else 32, not a_transposed)
    gap = -len(b_image) % 1024
    image = torch.cat([b_image, torch.zeros(gap, dtype=torch.uint8), a_image])
    image = torch.cat([image, torch.zeros(-len(image) % 512, dtype=torch.uint8)])
    each = len(image) // 512  # words of a thread
    fill = place(0, 5, 4 * each) + loads(5, 20, each) + f"mad.lo.s32 %w3, %w0, {4 * each}, %w2;\n"
    fill += "".join(f"st.shared.b32 [%w3 + {4 * i}], %w{20 + i};\n" for i in range(each))
    fill += "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
    b_descriptor = descriptor(0, *b_offsets, width)
    a_descriptor = descriptor(len(b_image) + gap, *a_offsets, 128 if a_transposed else 32)
    fragments = [
        words(
            fragment(
                a[16 * w : 16 * w + 16], [a_places(i, halves) for i in range(8 if halves else 4)]
            )
        )
        for w in range(4)
    ]
    first = names(20, 4) if in_registers else "%d8"
    major = "" if not halves else f", {int(not b_k_major)}"
    major = f", {int(a_transposed)}{major}" if halves and not in_registers else major
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}"

    def d_places(i: int) -> tuple[Tensor, Tensor]:
        return GROUP + (8 if i % 4 >= 2 else 0), 8 * (i // 4) + 2 * THREAD + i % 2

    def spread(x: Tensor) -> Tensor:
        """(128, n / 2): what each thread holds of the accumulators."""
        places = [d_places(i) for i in range(n // 2)]
        return torch.cat([fragment(x[16 * w : 16 * w + 16], places) for w in range(4)])

    held, out = spread(c), torch.zeros(128, n // 2)
    body = (
        fill + place(1, 6, 16) + loads(6, 20, 4)
        + f"mov.b64 %d8, {a_descriptor};\nmov.b64 %d9, {b_descriptor};\nsetp.ne.b32 %p1, 1, 0;\n"
        + place(2, 7, 2 * n) + loads(7, 100, n // 2)
        + "wgmma.fence.sync.aligned;\n"
        + f"{opcode} {names(100, n // 2)}, {first}, %d9, %p1, 1, 1{major};\n"
        + "wgmma.commit_group.sync.aligned;\n{wait}" + place(3, 11, 2 * n) + stores(11, 100, n // 2)
    )  # fmt: skip
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    tensors = (image.view(torch.int32), torch.cat(fragments), held, out)
    options = {"threads": 128, "shared": len(image)}
    run(body.replace("{wait}", wait), *tensors, **options)
    wide = (x.double() if halves else tf32(x).double() for x in (a, b))
    x, y = wide
    expected = spread((x @ y.T + c).float())
    torch.testing.assert_close(out, expected, rtol=2**-22, atol=1e-6)
    if n != 32:
        return
    # Not waited for: NaN, and a fault. Not fenced: a fault.
    with pytest.raises(machine.Fault, match="ends before its wgmma was waited for"):
        run(body.replace("{wait}", ""), *tensors, **options)
    assert out.isnan().all()
    unfenced = body.replace("fence.proxy.async.shared::cta;\n", "")
    with pytest.raises(machine.Fault, match="no fence.proxy.async since it was written"):
        run(unfenced.replace("{wait}", wait), *tensors, **options)
    early = "add.s32 %w8, %w2, 0;\nst.shared.b32 [%w8], %w0;\n" + wait
    with pytest.raises(machine.Fault, match="a wgmma not waited for reads"):
        run(body.replace("{wait}", early), *tensors, **options)


def test_every_product_has_the_same_code_as_one_that_is_tested():
    """Sizes of wgmma are one template; here are the opcodes that this file stands for."""
    sizes = (8, 16, 32, 64, 128, 256)
    kinds = (("16", "bf16"), ("16", "f16"), ("8", "tf32"))
    products = {
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}"
        for n in sizes
        for k, kind in kinds
    }
    assert products == {name for name in machine.opcodes() if name.startswith("wgmma.mma")}


# -------------------------------------------------------------------------- shuffles, reductions


def of_lanes(body: str, x: Tensor) -> list[int]:
    """A thread's x in %w10; what it leaves in %w11."""
    out = torch.zeros(32, dtype=torch.int32)
    run(place(0, 5, 4) + loads(5, 10, 1) + body + place(1, 6, 4) + stores(6, 11, 1), x, out)
    return out.tolist()


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 1, 31, lambda lane: lane ^ 1),
        ("bfly", 16, 31, lambda lane: lane ^ 16),
        # c = 0x1807: segments of 8 lanes (segmask 24), clamp 7
        ("bfly", 4, 0x1807, lambda lane: lane ^ 4),
        ("bfly", 8, 0x1807, lambda lane: lane if (lane ^ 8) > (lane | 7) else lane ^ 8),
        ("idx", 3, 31, lambda lane: 3),
        ("idx", 5, 0x1807, lambda lane: lane & 24 | 5),
        ("idx", 30, 15, lambda lane: lane),  # beyond the clamp each lane keeps its own
    ],
)
def test_shuffles(mode, b, c, source):
    x = torch.randint(0, 1000, (32,), dtype=torch.int32)
    found = of_lanes(f"shfl.sync.{mode}.b32 %w11, %w10, {b}, {c}, -1;\n", x)
    assert found == [int(x[source(lane)]) for lane in range(32)]


def test_reductions():
    x = torch.randint(-1000, 1000, (32,), dtype=torch.int32)
    for name, expected in (("max", x.max()), ("min", x.min()), ("add", x.sum())):
        assert of_lanes(f"redux.sync.{name}.s32 %w11, %w10, -1;\n", x) == [int(expected)] * 32


# --------------------------------------------------------------------------------------- memory


def test_vectors_and_signs():
    """Elements of a vector lie one after another; a signed load fills a wider register."""
    x = torch.randint(-(2**31), 2**31, (32, 4), dtype=torch.int32)
    out = torch.zeros_like(x)
    run(
        place(0, 5, 16) + "ld.global.v4.b32 {%w10, %w11, %w12, %w13}, [%d5];\n" + place(1, 6, 16)
        + "st.global.v2.b32 [%d6 + 8], {%w10, %w11};\nst.global.v2.b32 [%d6], {%w12, %w13};\n",
        x, out,
    )  # fmt: skip
    assert torch.equal(out, x[:, [2, 3, 0, 1]])
    short = torch.randint(-(2**15), 2**15, (32,), dtype=torch.int16)
    wide = torch.zeros(32, 2, dtype=torch.int32)
    run(
        place(0, 5, 2) + "ld.global.s16 %w10, [%d5];\nld.global.u16 %w11, [%d5];\n" + place(1, 6, 8)
        + stores(6, 10, 2),
        short, wide,
    )  # fmt: skip
    assert torch.equal(wide[:, 0], short.int()) and torch.equal(wide[:, 1], short.int() & 0xFFFF)


def test_bytes_of_shared_memory():
    out = torch.zeros(32, dtype=torch.int32)
    run(
        "cvt.u16.u32 %h10, %w0;\nadd.s32 %w3, %w2, %w0;\nst.shared.b8 [%w3], %h10;\nbar.sync 0;\n"
        "xor.b32 %w4, %w0, 5;\nadd.s32 %w4, %w4, %w2;\nld.shared.b8 %h11, [%w4];\n"
        "cvt.u32.u16 %w11, %h11;\n" + place(0, 6, 4) + stores(6, 11, 1),
        out, shared=32,
    )  # fmt: skip
    assert out.tolist() == [lane ^ 5 for lane in range(32)]


COPY = (
    place(0, 5, 16) + "mad.lo.s32 %w3, %w0, 16, %w2;\nsetp.lt.u32 %p1, %w0, 20;\n"
    "selp.b32 %w4, 16, 0, %p1;\n"
    "cp.async.cg.shared.global [%w3], [%d5], 16, %w4;\ncp.async.commit_group;\n"
    "cp.async.cg.shared.global [%w3 + 512], [%d5], 16, 16;\ncp.async.commit_group;\n{wait}"
    "ld.shared.v4.b32 {%w10, %w11, %w12, %w13}, [%w3];\n" + place(1, 6, 16) + stores(6, 10, 4)
)  # fmt: skip


def test_asynchronous_copies():
    """Lanes that are given 0 bytes to read write zeros."""
    x = torch.randint(1, 2**31, (32, 4), dtype=torch.int32)
    out = torch.zeros_like(x)
    run(COPY.replace("{wait}", "cp.async.wait_group 1;\n"), x, out, shared=1024)
    assert torch.equal(out[:20], x[:20]) and not out[20:].any()
    for wait in ("", "cp.async.wait_group 2;\n"):
        with pytest.raises(machine.Fault, match="before its cp.async was waited for"):
            run(COPY.replace("{wait}", wait), x, out, shared=1024)
