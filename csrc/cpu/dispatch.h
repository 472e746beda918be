// Which vector instructions the kernels of this directory run on: decided once, by the processor.
//
// Every kernel is compiled for each instruction set in functions with that set's attribute; what they call is inlined.
#pragma once

#include <cstdlib>
#include <string>

#include <torch/csrc/stable/ops.h>

#include "matrix.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LCW_X86_DISPATCH 1
#define LCW_AVX2 __attribute__((target("avx2,fma")))
// For tests on processors without AVX-512: its tiles, carried out by pairs of AVX2 instructions.
#ifdef LCW_AVX512_BY_AVX2
#define LCW_AVX512 LCW_AVX2
#else
#define LCW_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#endif
#endif

namespace lcw_ops {

enum class InstructionSet { portable, avx2, avx512 };

// The fastest this processor has; for tests LCW_OPS_CPU_CAPABILITY=avx2 or portable asks for less.
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

// task(Isa{}, begin, end), compiled for each instruction set: whatever it calls must be inlined into it.
template <class Task>
LCW_NOINLINE void run_portable(const Task& task, int64_t begin, int64_t end) {
  task(Portable{}, begin, end);
}
#ifdef LCW_X86_DISPATCH
template <class Task>
LCW_AVX2 LCW_NOINLINE void run_avx2(const Task& task, int64_t begin, int64_t end) {
  task(Avx2{}, begin, end);
}
template <class Task>
LCW_AVX512 LCW_NOINLINE void run_avx512(const Task& task, int64_t begin, int64_t end) {
  task(Avx512{}, begin, end);
}
#endif

// The task on all threads of torch's pool, for 0..count-1 in parts of at least `grain`.
template <class Task>
void for_each_part(int64_t count, int64_t grain, const Task& task) {
  const auto run = [] {
    switch (instruction_set()) {
#ifdef LCW_X86_DISPATCH
      case InstructionSet::avx512: return run_avx512<Task>;
      case InstructionSet::avx2: return run_avx2<Task>;
#endif
      default: return run_portable<Task>;
    }
  }();
  if (count <= grain)
    run(task, 0, count);
  else
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(task, begin, end); });
}

}  // namespace lcw_ops
