// The kernels for processors with AVX-512 (F, BW, DQ, VL), sixteen lanes at a time; otherwise as ops_avx2.cpp.

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "ops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define OPS_AVX2 1
#define OPS_AVX512 1
#define OPS_LANES 16
#define OPS_NAMESPACE avx512
#define OPS_TABLE avx512_kernels
#include "ops_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
