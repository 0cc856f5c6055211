"""Triton kernels: fused variable-length attention and row operations, forward and backward.

`attention` and `rowops` hold the operators; `tiles` says which tile each kernel runs with, `aot`
compiles every configuration without a GPU, `tune` measures tiles on one. Importing this package
imports no Triton.
"""
