"""Backend `sm_80` of the tests: the Triton kernels as an A100 would get them."""

from tests.ptx.adapter import Executed

adapter = Executed(80)
