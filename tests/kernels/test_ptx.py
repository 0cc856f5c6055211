"""What the PTX machine says of the Triton kernels beside their results: that it sees what is broken
in them, and what they take, in counts."""

from __future__ import annotations

import importlib.util

import pytest

from tests.ptx import machine

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]

# Of `make ptx`'s mutations those of one batch, one place of each kind in each kernel; without the
# kinds whose places may be without effect: a bound that is checked twice, a fence or a wait
# before another.
SURE = {
    "sm_80": (
        "mma: a1 and a2 exchanged", "mma: b0 and b1 exchanged", "mma: d0 and d1 exchanged",
        "ldmatrix: transposed, or not", "shuffle: another lane", "half words exchanged",
        "no bar.sync", "a store to shared memory 16 bytes on",
    ),
    "sm_90": ("half words exchanged", "no bar.sync"),
}  # fmt: skip


@pytest.mark.parametrize("target", SURE)
def test_what_is_broken_is_seen(target):
    from tests.ptx.mutations import CHECKS, count

    table, unseen = count(target, CHECKS[:1], SURE[target], sites=1)
    assert not unseen, "\n".join(map(str, unseen))
    assert {*table} == {*SURE[target]}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_count_has_doubled(target):
    """Bank conflicts, sectors, instructions: counts, not times. Meant: python -m tests.ptx.counts
    --write."""
    import triton

    from tests.ptx import counts

    if triton.__version__ != counts.version():
        pytest.skip(
            f"tests/ptx/counts.json is of Triton {counts.version()}, this is {triton.__version__}"
        )
    then, now = counts.kept()[target], counts.measure([target])[target]
    assert now.keys() == then.keys()
    found = [f"{name}: {what}" for name in now for what in counts.worse(now[name], then[name])]
    assert not found, "\n".join(found)


def test_a_doubled_count_is_seen():
    from tests.ptx import counts

    then = machine.Counts(1000, 500, 400, 300, 200)
    assert counts.worse(then, then) == []
    assert counts.worse(then + then, then) == []  # exactly twice, and few conflicts: not yet
    now = machine.Counts(1000, 500, 400, 300, 465)
    assert counts.worse(now, then) == ["conflicts 465, was 200"]
