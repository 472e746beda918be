// Function attributes, for nvcc and for the compilers of the CPU kernels.
#pragma once

#ifdef __CUDACC__
#define LCW_HOST_DEVICE __host__ __device__
#else
#define LCW_HOST_DEVICE
#endif

// A function that is compiled for an instruction set (cpu/simd/instruction_sets.h) must inline everything that it
// calls: a function that is not inlined is compiled for the oldest processor.
#define LCW_INLINE inline __attribute__((always_inline))
#define LCW_NOINLINE __attribute__((noinline))
#define LCW_LAMBDA_INLINE __attribute__((always_inline))
