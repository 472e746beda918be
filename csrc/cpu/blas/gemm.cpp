// Products of whole matrices. Each thread computes a block of the result.
#include "gemm.h"

#include <torch/csrc/stable/ops.h>

#include "../simd/dispatch.h"

namespace lcw_ops {
namespace {

// Cuts the result into a grid of blocks, one per thread, so that each thread copies as little of the operands as
// possible.
template <typename Part>
void for_each_block(int64_t rows, int64_t columns, int64_t depth, const Part& part) {
  // About 50 microseconds of arithmetic on one thread.
  constexpr int64_t least_operations = 1 << 21;
  // The columns of a block are a multiple of this: whole panels, for most instruction sets and types.
  constexpr int64_t panel = 16;
  const int64_t worthwhile = std::max<int64_t>(1, 2 * rows * columns * depth / least_operations);
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), worthwhile);
  int64_t down = 1;
  for (int64_t d = 1; d <= most; ++d)
    if (most % d == 0 && rows / d + columns * d / most < rows / down + columns * down / most) down = d;
  const int64_t across = most / down;
  const auto cut = [](int64_t size, int64_t index, int64_t parts, int64_t multiple) {
    return index == parts ? size : size * index / parts / multiple * multiple;
  };
  for_each_part(most, 1, [&, down, across](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = cut(rows, t / across, down, 1), last_row = cut(rows, t / across + 1, down, 1);
      const int64_t column = cut(columns, t % across, across, panel);
      const int64_t last_column = cut(columns, t % across + 1, across, panel);
      if (row < last_row && column < last_column) part(isa, row, last_row - row, column, last_column - column);
    }
  });
}

}  // namespace

template <typename E>
void multiply_on_threads(
    const Operand<E>& a, const Operand<E>& b, int64_t rows, int64_t columns, int64_t depth, const Computed<E>* bias,
    Computed<E>* c, int64_t ldc) {
  for_each_block(
      rows, columns, depth,
      [&](auto isa, int64_t i, int64_t row_count, int64_t j, int64_t column_count) LCW_LAMBDA_INLINE {
        Gemm<decltype(isa), E>::multiply(
            a.at(i, 0), b.at(0, j), row_count, column_count, depth, bias ? bias + j : nullptr, c + i * ldc + j, ldc);
      });
}

#define LCW_MULTIPLY(E)              \
  template void multiply_on_threads( \
      const Operand<E>&, const Operand<E>&, int64_t, int64_t, int64_t, const Computed<E>*, Computed<E>*, int64_t);
LCW_MULTIPLY(float)
LCW_MULTIPLY(double)
LCW_MULTIPLY(BFloat16)
LCW_MULTIPLY(Half)

}  // namespace lcw_ops
