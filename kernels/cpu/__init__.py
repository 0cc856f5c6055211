"""The C++ kernels of the CPU: `library` finds what was built, a module an operation calls it."""
