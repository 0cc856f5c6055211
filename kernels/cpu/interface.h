// What the files of the C interface share.
#pragma once
#include "kernels.h"

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

constexpr int64_t NO_MEMORY = -1;

// Those of the instruction set in use.
const Kernels& kernels_in_use();
