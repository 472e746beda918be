// The instruction sets that every kernel is compiled for, and the one that this processor runs.
#pragma once

#include <cstdlib>
#include <string>

#include "../../attributes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LCW_X86_DISPATCH 1
#define LCW_AVX2 __attribute__((target("avx2,fma")))
// For tests on processors without AVX-512: the tiles of AVX-512, run as pairs of AVX2 instructions.
#ifdef LCW_AVX512_BY_AVX2
#define LCW_AVX512 LCW_AVX2
#else
#define LCW_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#endif
#endif

namespace lcw_ops {

// `accumulators` is the number of vectors that a tile's sums take (tiles.h), and `dot_rows` the number of rows in a
// tile of dot products. 16 of the 32 registers are accumulators. Two multiply-adds per cycle with a latency of four
// cycles need 8 accumulators; the other 8 accumulators are slack.
struct Avx512 {
  static constexpr int vector_bytes = 64, accumulators = 16, dot_rows = 4;
  static constexpr bool has_multiply_add = true;
};

// 12 accumulators, two vectors of the second operand and one number of the first take 15 of the 16 registers.
struct Avx2 {
  static constexpr int vector_bytes = 32, accumulators = 12, dot_rows = 2;
  static constexpr bool has_multiply_add = true;
};

struct Portable {
  static constexpr int vector_bytes = 16, accumulators = 8, dot_rows = 2;
  static constexpr bool has_multiply_add = false;
};

// compiled<Isa, function>(arguments...) calls `function`, which is LCW_INLINE, as a separate function that is compiled
// for the instruction set. If such functions were inlined at every call, the kernels would have megabytes of code.
template <class Isa, auto function>
struct Compiled;

#define LCW_COMPILE_FOR(Isa, attributes)                                                                  \
  template <typename Result, typename... Arguments, Result (*function)(Arguments...)>                     \
  struct Compiled<Isa, function> {                                                                        \
    attributes LCW_NOINLINE static Result call(Arguments... arguments) { return function(arguments...); } \
  };

LCW_COMPILE_FOR(Portable, )
#ifdef LCW_X86_DISPATCH
LCW_COMPILE_FOR(Avx2, LCW_AVX2)
LCW_COMPILE_FOR(Avx512, LCW_AVX512)
#endif

template <class Isa, auto function>
constexpr auto compiled = &Compiled<Isa, function>::call;

enum class InstructionSet { portable, avx2, avx512 };

// The fastest set that this processor has. For tests, LCW_OPS_CPU_CAPABILITY=avx2 or portable limits the choice.
inline InstructionSet instruction_set() {
#ifdef LCW_X86_DISPATCH
  static const InstructionSet fastest = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef LCW_AVX512_BY_AVX2
    const bool avx512 = avx2;
#else
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    const char* limit = std::getenv("LCW_OPS_CPU_CAPABILITY");
    const bool portable_only = limit && std::string(limit) == "portable";
    const bool avx2_only = limit && std::string(limit) == "avx2";
    if (avx2 && avx512 && !avx2_only && !portable_only) return InstructionSet::avx512;
    return avx2 && !portable_only ? InstructionSet::avx2 : InstructionSet::portable;
  }();
  return fastest;
#else
  return InstructionSet::portable;
#endif
}

// Calls f(Isa{}) for the instruction set of this processor. A build with CXXFLAGS=-DLCW_ONLY_ISA=Avx512 compiles the
// kernels for AVX-512 alone. Such a build takes a third of the time, and its kernels run only on processors that have
// AVX-512.
template <typename F>
auto with_instruction_set(const F& f) {
#ifdef LCW_ONLY_ISA
  return f(LCW_ONLY_ISA{});
#else
  switch (instruction_set()) {
#ifdef LCW_X86_DISPATCH
    case InstructionSet::avx512: return f(Avx512{});
    case InstructionSet::avx2: return f(Avx2{});
#endif
    default: return f(Portable{});
  }
#endif
}

}  // namespace lcw_ops
