// Small matrix products on row-major data, the inner loop of every recurrence here:
//
//   out[r][j] = sum_k a[r * a_row + k * a_k] * b[k * ldb + j]
//
// The sum over k runs in the same order for every element, whatever tile it falls in.
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

// Partial sums of so many terms: rounding grows like sqrt(32) + sqrt(depth / 32) instead of sqrt(depth).
constexpr int64_t chunk_terms = 32;

template <typename T, int rows, int vectors>
LCW_INLINE void multiply_tile(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo) {
  using Vector = typename Wide<T>::type;
  constexpr int64_t lanes = Wide<T>::lanes;
  Vector total[rows][vectors] = {};
  for (int64_t chunk = 0; chunk < depth; chunk += chunk_terms) {
    const int64_t end = chunk + chunk_terms < depth ? chunk + chunk_terms : depth;
    Vector sum[rows][vectors] = {};
    for (int64_t k = chunk; k < end; ++k) {
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
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) total[r][v] += sum[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) std::memcpy(out + r * ldo + v * lanes, &total[r][v], sizeof(Vector));
}

template <typename T, int rows>
LCW_INLINE void multiply_rows(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t columns) {
  constexpr int64_t lanes = Wide<T>::lanes;
  constexpr int64_t wide = tile_vectors * lanes;
  int64_t j = 0;
  for (; j + wide <= columns; j += wide)
    multiply_tile<T, rows, tile_vectors>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo);
  for (; j + lanes <= columns; j += lanes)
    multiply_tile<T, rows, 1>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo);
  // The columns left over share a tile with some that are done already.
  if (j < columns)
    multiply_tile<T, rows, 1>(a, a_row, a_k, b + columns - lanes, ldb, depth, out + columns - lanes, ldo);
}

// Fewer columns than one vector has lanes.
template <typename T>
LCW_INLINE void multiply_narrow(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t rows,
    int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    T sum[Wide<T>::lanes] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const T scale = a[r * a_row + k * a_k];
      for (int64_t j = 0; j < columns; ++j) sum[j] += scale * b[k * ldb + j];
    }
    std::memcpy(out + r * ldo, sum, columns * sizeof(T));
  }
}

template <typename T>
LCW_INLINE void multiply(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t rows,
    int64_t columns) {
  if (columns < Wide<T>::lanes) {
    multiply_narrow(a, a_row, a_k, b, ldb, depth, out, ldo, rows, columns);
    return;
  }
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    multiply_rows<T, tile_rows>(a + r * a_row, a_row, a_k, b, ldb, depth, out + r * ldo, ldo, columns);
  for (; r < rows; ++r) multiply_rows<T, 1>(a + r * a_row, a_row, a_k, b, ldb, depth, out + r * ldo, ldo, columns);
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
