// A loop of multiply-adds on numbers in registers, on all threads. Its rate is the ceiling of every kernel here.
//
// There are as many independent sums as a tile has (simd/instruction_sets.h), which is enough to keep the units busy.

#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "simd/dispatch.h"
#include "simd/vectors.h"

namespace lcw_ops {
namespace {

// Returns the number of operations: two for every multiply-add.
int64_t multiply_adds(torch::stable::Tensor factors, int64_t rounds) {
  STD_TORCH_CHECK(
      factors.numel() == 2 && factors.scalar_type() == torch::headeronly::ScalarType::Float && rounds >= 0,
      "multiply_adds: factors must be two float32 numbers, and rounds at least 0");
  const float* numbers = factors.const_data_ptr<float>();
  const float scale = numbers[0], shift = numbers[1];
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t sums = with_instruction_set([](auto isa) {
    using Isa = decltype(isa);
    return int64_t(Isa::accumulators) * Vector<float, Isa::vector_bytes>::lanes;
  });
  for_each_part(threads, 1, [&](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    using Isa = decltype(isa);
    using Wide = typename Vector<float, Isa::vector_bytes>::type;
    Wide sum[Isa::accumulators];
    for (int i = 0; i < Isa::accumulators; ++i) sum[i] = Wide{} + shift * float(i);
    for (int64_t round = 0; round < (end - begin) * rounds; ++round) {
#pragma GCC unroll 16
      for (int i = 0; i < Isa::accumulators; ++i) sum[i] = sum[i] * scale + shift;
    }
    Wide total{};
    for (int i = 0; i < Isa::accumulators; ++i) total += sum[i];
    // The compiler must not leave the loop out.
    volatile float kept = total[0];
    (void)kept;
  });
  return 2 * sums * rounds * threads;
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) { m.impl("multiply_adds.cpp", TORCH_BOX(&lcw_ops::multiply_adds)); }
