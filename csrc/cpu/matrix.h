// Small matrix products on row-major data, the inner loop of every recurrence here:
//
//   out[r][j] (+)= sum_k a[r * a_row + k * a_k] * b[k * ldb + j]
//
// The sum over k runs in order for every element, whatever tile it falls in, so the result does not depend on how the
// rows are divided among threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector_math.h"

namespace lcw_ops {

// 64 bytes: one AVX-512 register, two of AVX2, four of SSE or NEON. The compiler splits it where it must.
template <typename T>
struct Wide {
  typedef T type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 64 / sizeof(T);
};

// 4 rows x 2 vectors = 8 accumulators: two fused multiply-adds per cycle with a latency of four.
constexpr int tile_rows = 4, tile_vectors = 2;

template <typename T, int rows, int vectors>
LCW_INLINE void multiply_tile(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, bool add) {
  using Vector = typename Wide<T>::type;
  constexpr int64_t lanes = Wide<T>::lanes;
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = Vector{};
      if (add) std::memcpy(&sum[r][v], out + r * ldo + v * lanes, sizeof(Vector));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) std::memcpy(&column[v], b + k * ldb + v * lanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const T scale = a[r * a_row + k * a_k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += scale * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) std::memcpy(out + r * ldo + v * lanes, &sum[r][v], sizeof(Vector));
  }
}

template <typename T, int rows>
LCW_INLINE void multiply_rows(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t columns,
    bool add) {
  constexpr int64_t lanes = Wide<T>::lanes;
  int64_t j = 0;
  for (; j + tile_vectors * lanes <= columns; j += tile_vectors * lanes)
    multiply_tile<T, rows, tile_vectors>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo, add);
  for (; j + lanes <= columns; j += lanes)
    multiply_tile<T, rows, 1>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo, add);
  for (; j < columns; ++j) {
    for (int r = 0; r < rows; ++r) {
      T sum = add ? out[r * ldo + j] : T(0);
      for (int64_t k = 0; k < depth; ++k) sum += a[r * a_row + k * a_k] * b[k * ldb + j];
      out[r * ldo + j] = sum;
    }
  }
}

template <typename T>
LCW_INLINE void multiply(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t rows,
    int64_t columns, bool add) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    multiply_rows<T, tile_rows>(a + r * a_row, a_row, a_k, b, ldb, depth, out + r * ldo, ldo, columns, add);
  for (; r < rows; ++r)
    multiply_rows<T, 1>(a + r * a_row, a_row, a_k, b, ldb, depth, out + r * ldo, ldo, columns, add);
}

// out = in^T, both n x n, in blocks that stay in the first-level cache.
template <typename T>
LCW_INLINE void transpose(const T* in, T* out, int64_t n) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < n; i0 += block)
    for (int64_t j0 = 0; j0 < n; j0 += block)
      for (int64_t j = j0; j < (j0 + block < n ? j0 + block : n); ++j)
        for (int64_t i = i0; i < (i0 + block < n ? i0 + block : n); ++i) out[j * n + i] = in[i * n + j];
}

}  // namespace lcw_ops
