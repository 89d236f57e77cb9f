// The kernels for processors with AVX2 and FMA; ops.cpp calls them where the processor says so. Nothing of the standard library is instantiated below
// the pragma: such code would be shared with the portable part.

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "ops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define OPS_AVX2 1
#define OPS_LANES 8
#define OPS_NAMESPACE avx2
#define OPS_TABLE avx2_kernels
#include "ops_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
