// Loops on all threads, compiled for each instruction set and run on the fastest one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "instruction_sets.h"

namespace lcw_ops {

template <class Isa, class Task>
LCW_INLINE void run_task(const Task& task, int64_t begin, int64_t end) {
  task(Isa{}, begin, end);
}

// Calls task(isa, begin, end) on all threads of torch's pool, for parts of 0..count-1 of at least `grain` each. The
// task is compiled for each instruction set, so everything that it calls must be inlined.
template <class Task>
void for_each_part(int64_t count, int64_t grain, const Task& task) {
  const auto run = with_instruction_set(
      [](auto isa) { return compiled<decltype(isa), run_task<decltype(isa), Task>>; });
  if (count <= grain)
    run(task, 0, count);
  else
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(task, begin, end); });
}

}  // namespace lcw_ops
