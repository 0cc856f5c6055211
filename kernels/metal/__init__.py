"""Metal kernels for Apple GPUs: fused variable-length attention and row operations.

`shaders` compiles them, specialised, and launches them; a module an operation says with what.
They have been executed by emulation (tests/metal) and type-checked, never on Apple hardware.
"""
