"""Backend `sm_90` of the tests: the Triton kernels as an H100 would get them."""

from tests.ptx.adapter import Executed

adapter = Executed(90)
