"""Metal kernels for Apple GPUs: fused variable-length attention and row operations.

`shaders` compiles them, specialised; `attention` and `rowops` launch them, as operators of torch.
They have been executed by emulation (tests/metal) and type-checked, never on Apple hardware.
"""
