"""Triton kernels: fused variable-length attention and row operations, forward and backward.

`attention`, `embed`, `add_norm` and `bias_act` launch them; `tiles` says which tile attention runs
with, `aot` compiles every configuration without a GPU, `tune` measures tiles on one. Importing this
package imports no Triton.
"""
