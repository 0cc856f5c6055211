"""What the PTX machine complains about, what it counts, and how it reads PTX."""

from __future__ import annotations

import pytest
import torch

from tests.ptx import machine
from tests.ptx.assembly import entry, run
from tests.ptx.machine import Fault, Kernel
from tests.ptx.parser import Unsupported

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))

OWN = "mad.lo.s32 %w3, %w0, 4, %w2;\n"  # the thread's word of shared memory
NEIGHBOUR = "xor.b32 %w4, %w0, {0};\nmad.lo.s32 %w4, %w4, 4, %w2;\n"
PLACE = "mul.wide.u32 %d10, %w0, 4;\nadd.s64 %d5, %d0, %d10;\n"

# name -> (PTX that is right, threads, what to replace, by what, what the machine says then)
FAULTS = {
    "a missing bar.sync": (
        OWN + NEIGHBOUR.format(32)
        + "st.shared.b32 [%w3], %w0;\nbar.sync 0;\nld.shared.b32 %w5, [%w4];\n",
        64, "bar.sync 0;", "",
        "race: warp 1 lane 0 writes shared byte 128 that another warp read, no bar.sync",
    ),
    "a missing bar.warp.sync": (
        OWN + NEIGHBOUR.format(1)
        + "st.shared.b32 [%w3], %w0;\nbar.warp.sync -1;\nld.shared.b32 %w5, [%w4];\n",
        32, "bar.warp.sync -1;", "",
        "race in a warp: warp 0 lane 0 reads shared byte 4 that lane 1 wrote",
    ),
    "written after a read": (
        OWN + NEIGHBOUR.format(32)
        + "ld.shared.b32 %w5, [%w4];\nbar.sync 0;\nst.shared.b32 [%w3], %w0;\n",
        64, "bar.sync 0;", "",
        "race: warp 1 lane 0 reads shared byte 0 that warp 0 wrote, no bar.sync between",
    ),
    "different bits to one place of shared memory": (
        "and.b32 %w5, %w0, 0;\nst.shared.b32 [%w2], %w5;\n",
        32, "%w0, 0", "%w0, 1", "unsettled: warp 0 lane 1 and warp 0 lane 0 store different bits",
    ),
    "different bits to one place of global memory": (
        "and.b32 %w5, %w0, 0;\nst.global.b32 [%d0], %w5;\n",
        64, "%w0, 0", "%w0, 32", "unsettled: warp 1 lane 0 and warp 0 lane 31 store different bits",
    ),
    "global memory without a barrier": (
        PLACE + "st.global.b32 [%d5], %w0;\nbar.sync 0;\nld.global.b32 %w5, [%d0];\n",
        64, "bar.sync 0;", "", "race: warp 0 lane 1 reads global memory that warp 0 lane 0 wrote",
    ),
    "beyond a tensor": (
        PLACE + "ld.global.b32 %w5, [%d5 + 0];\n",
        64, "+ 0", "+ 4", "4 bytes outside every buffer (+4 bytes beyond buffer 0)",
    ),
    "before a tensor": (
        PLACE + "ld.global.b32 %w5, [%d5 + 0];\n",
        32, "+ 0", "+ -4", "outside every buffer (-4",
    ),
    "misaligned": (
        PLACE + "ld.global.b32 %w5, [%d5 + 0];\n",
        32, "+ 0", "+ 2", "misaligned access of 4 bytes",
    ),
    "misaligned in shared memory": (
        OWN + "st.shared.b32 [%w3 + 0], %w0;\n",
        32, "+ 0", "+ 1", "misaligned access to shared memory",
    ),
    "beyond shared memory": (
        OWN + "st.shared.b32 [%w3 + 0], %w0;\n",
        64, "+ 0", "+ 4", "4 bytes at offset 256 of 256 bytes",
    ),
    "a barrier that some lanes miss": (
        "setp.lt.u32 %p1, %w0, 64;\n@%p1 bar.sync 0;\n",
        64, "%w0, 64", "%w0, 20", "only lanes 000fffff reach bar.sync",
    ),
    "a barrier that some warps miss": (
        "setp.lt.u32 %p1, %w0, 64;\n@!%p1 bra $L;\nbar.sync 0;\n$L:\n",
        64, "%w0, 64", "%w0, 32", "1 of 2 warps wait at bar.sync, the others have ended",
    ),
    "a shuffle that some lanes miss": (
        "setp.lt.u32 %p1, %w0, 64;\n@%p1 shfl.sync.bfly.b32 %w5, %w0, 1, 31, -1;\n",
        32, "%w0, 64", "%w0, 9", "only lanes 000001ff reach an instruction of the whole warp",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, seed):
    right, threads, old, new, complaint = FAULTS[name]
    tensor = torch.zeros(64, dtype=torch.int32)
    run(right, tensor, threads=threads, shared=256, seed=seed)
    assert right.count(old) == 1
    with pytest.raises(Fault) as fault:
        run(right.replace(old, new), tensor, threads=threads, shared=256, seed=seed)
    if not seed:  # which thread is the first to be seen, the schedule decides
        assert complaint in str(fault.value)
        assert "probe, program 0" in str(fault.value) and "(PTX line " in str(fault.value)


def test_programs_share_no_memory_that_one_writes():
    out = torch.zeros(64, dtype=torch.int32)
    own = "mad.lo.s32 %w3, %w1, 32, %w0;\nmul.wide.u32 %d10, %w3, 4;\nadd.s64 %d5, %d0, %d10;\n"
    run(own + "st.global.b32 [%d5], %w3;\n", out, programs=2)
    assert out.tolist() == list(range(64))
    with pytest.raises(Fault, match="writes global memory that program 0 writes too"):
        run(PLACE + "st.global.b32 [%d5], %w1;\n", out, programs=2)
    with pytest.raises(Fault, match="reads global memory that program 0 writes"):
        run(
            own + "st.global.b32 [%d5], %w3;\nbar.sync 0;\nld.global.b32 %w4, [%d0];\n",
            out,
            programs=2,
        )


def test_an_endless_loop(monkeypatch):
    monkeypatch.setattr(machine, "LIMIT", 1000)
    with pytest.raises(Fault, match="more than 1000 instructions of a warp"):
        run("$L:\nbra $L;\n", torch.zeros(1))


def test_what_nobody_wrote_is_nan_of_the_seed():
    found = []
    for seed in (0, 0, 1):
        out = torch.zeros(2, 32)
        store = (
            PLACE
            + "st.global.b32 [%d5], %w50;\nld.shared.b32 %w51, [%w2];\n"
            + "st.global.b32 [%d5 + 128], %w51;\n"
        )
        run(store, out, shared=64, seed=seed)
        assert out.isnan().all()
        found.append(out.view(torch.int32))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_lanes_that_part_meet_again():
    """Each lane loops as often as its number says; then they shuffle."""
    out = torch.zeros(32, dtype=torch.int32)
    run(
        "mov.b32 %w5, 0;\nmov.b32 %w6, 0;\n$LOOP:\nsetp.ge.u32 %p1, %w5, %w0;\n@%p1 bra $END;\n"
        "add.s32 %w6, %w6, %w5;\nadd.s32 %w5, %w5, 1;\nbra.uni $LOOP;\n$END:\n"
        "shfl.sync.bfly.b32 %w7, %w6, 1, 31, -1;\n" + PLACE + "st.global.b32 [%d5], %w7;\n",
        out,
    )  # fmt: skip
    sums = [sum(range(lane)) for lane in range(32)]
    assert out.tolist() == [sums[lane ^ 1] for lane in range(32)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("tanh.approx.f32 %w5, %w6;", "tanh.approx.f32: no such opcode (2 times)"),
        ("add.s32 %w5, %w6;", "add.s32: 2 operands, where 3 are expected"),
        ("add.s32 %w5, %w6, %d1;", "add.s32: %d1 of 8 bytes, where 4 are expected"),
        ("add.s32 %w5, %w6, %q1;", "add.s32: register %q1"),
        ("bar.sync 1;", "bar.sync: a barrier other than 0"),
        ("ld.global.b8 %h5, [%d1];", "accesses of one byte of global memory"),
    ],
)
def test_what_the_machine_does_not_know_is_named(line, complaint):
    with pytest.raises(Unsupported) as error:
        Kernel(entry(f"{line}\n{line}\n", 0))
    assert "probe: the PTX machine does not know" in str(error.value)
    assert complaint in str(error.value)


# ----------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("address", "width", "wavefronts", "conflicts"),
    [
        ("mul.lo.s32 %w3, %w0, 4;", "b32", 1, 0),  # a bank each
        ("mul.lo.s32 %w3, %w0, 8;", "b32", 2, 1),  # every other bank
        ("mul.lo.s32 %w3, %w0, 128;", "b32", 32, 31),  # one bank
        ("mul.lo.s32 %w3, %w0, 132;", "b32", 1, 0),  # padded rows
        ("and.b32 %w3, %w0, 0;", "b32", 1, 0),  # one word for all
        ("mul.lo.s32 %w3, %w0, 2;", "b16", 1, 0),  # two lanes a word
        ("mul.lo.s32 %w3, %w0, 16;", "v4.b32", 4, 0),  # eight lanes at a time
        ("mul.lo.s32 %w3, %w0, 64;", "v4.b32", 16, 12),  # of eight lanes four meet in each bank
        ("mul.lo.s32 %w3, %w0, 8;", "v2.b32", 2, 0),
    ],
)
def test_bank_conflicts(address, width, wavefronts, conflicts):
    registers = {"v4.b32": "{%w5, %w6, %w7, %w8}", "v2.b32": "{%w5, %w6}", "b16": "%h5"}.get(
        width, "%w5"
    )
    body = f"{address}\nadd.s32 %w3, %w3, %w2;\nld.shared.{width} {registers}, [%w3];\n"
    counts = run(body, shared=8192)
    assert (counts.wavefronts, counts.conflicts) == (wavefronts, conflicts)
    assert counts.sectors == 0 and counts.instructions == 7


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "needed"),
    [
        (4, "b32", 4, 4),
        (32, "b32", 32, 4),
        (0, "b32", 1, 1),
        (2, "b16", 2, 2),
        (16, "v4.b32", 16, 16),
    ],
)
def test_sectors(stride, width, sectors, needed):
    registers = {"v4.b32": "{%w5, %w6, %w7, %w8}", "b16": "%h5"}.get(width, "%w5")
    storage = torch.zeros(32 * 32 + 8, dtype=torch.int32)
    tensor = storage[-storage.data_ptr() % 32 // 4 :][: 32 * 32]  # begins with a sector
    body = f"mul.wide.u32 %d10, %w0, {stride};\nadd.s64 %d5, %d0, %d10;\n"
    body += f"ld.global.{width} {registers}, [%d5];\n"
    counts = run(body, tensor)
    assert (counts.sectors, counts.sectors_needed) == (sectors, needed)


# ------------------------------------------------------------------------------------- compiling


def test_a_compiler_that_is_missing_or_too_old_is_a_reason(monkeypatch, tmp_path):
    machine.missing.cache_clear()
    try:
        old = tmp_path / "g++"
        old.write_text("#!/bin/sh\necho 11.4.0\n")
        old.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert machine.missing() == "g++ 11.4.0: the PTX machine needs g++ 12"
        machine.missing.cache_clear()
        old.unlink()
        assert machine.missing() == "no g++: the PTX machine needs g++ 12"
    finally:
        machine.missing.cache_clear()
