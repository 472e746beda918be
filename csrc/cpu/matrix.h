// Small matrix products on row-major data, the inner loop of every recurrence here:
//
//   out[r][j] = sum_k a[r * a_row + k * a_k] * b[k * ldb + j]
//
// Written with the compiler's vectors, so that one source serves every instruction set: `Isa` says how wide they are and
// how many accumulators the register file holds. The sum over k runs in the same order for every element, whatever
// tile it falls in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_math.h"

namespace lcw_ops {

// 16 accumulators of 32 registers: two multiply-adds per cycle with a latency of four need 8, the rest is slack.
struct Avx512 {
  static constexpr int vector_bytes = 64, tile_rows = 8, tile_vectors = 2;
};

// 8 accumulators of 16 registers.
struct Avx2 {
  static constexpr int vector_bytes = 32, tile_rows = 4, tile_vectors = 2;
};

struct Portable {
  static constexpr int vector_bytes = 16, tile_rows = 4, tile_vectors = 2;
};

template <typename T, int bytes>
struct Vector {
  typedef T type __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(T);
};

// Partial sums of so many terms: rounding grows like sqrt(32) + sqrt(depth / 32) instead of sqrt(depth).
constexpr int64_t chunk_terms = 32;

template <class Isa, typename T, int rows, int vectors>
LCW_INLINE void multiply_tile(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo) {
  using Lanes = Vector<T, Isa::vector_bytes>;
  using Wide = typename Lanes::type;
  Wide total[rows][vectors] = {};
  for (int64_t chunk = 0; chunk < depth; chunk += chunk_terms) {
    const int64_t end = chunk + chunk_terms < depth ? chunk + chunk_terms : depth;
    Wide sum[rows][vectors] = {};
    for (int64_t k = chunk; k < end; ++k) {
      Wide column[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) std::memcpy(&column[v], b + k * ldb + v * Lanes::lanes, sizeof(Wide));
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
    for (int v = 0; v < vectors; ++v) std::memcpy(out + r * ldo + v * Lanes::lanes, &total[r][v], sizeof(Wide));
}

// From column j on: as many tiles of `vectors` vectors as fit, then the rest in tiles of half of that.
template <class Isa, typename T, int rows, int vectors>
LCW_INLINE void multiply_columns(
    int64_t j, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,
    int64_t columns) {
  constexpr int64_t lanes = Vector<T, Isa::vector_bytes>::lanes;
  for (; j + vectors * lanes <= columns; j += vectors * lanes)
    multiply_tile<Isa, T, rows, vectors>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo);
  if constexpr (vectors > 1) {
    multiply_columns<Isa, T, rows, vectors / 2>(j, a, a_row, a_k, b, ldb, depth, out, ldo, columns);
  } else if (j < columns) {
    // The columns left over share a tile with some that are done already.
    j = columns - lanes;
    multiply_tile<Isa, T, rows, 1>(a, a_row, a_k, b + j, ldb, depth, out + j, ldo);
  }
}

template <class Isa, typename T, int rows>
LCW_INLINE void multiply_rows(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t columns) {
  // Fewer rows, wider tiles: a single row needs as many sums in flight as eight.
  constexpr int accumulators = Isa::tile_rows * Isa::tile_vectors, vectors = accumulators / rows;
  multiply_columns<Isa, T, rows, vectors < 8 ? vectors : 8>(0, a, a_row, a_k, b, ldb, depth, out, ldo, columns);
}

// As many tiles of `rows` rows as fit, then the rest in tiles of half of that.
template <class Isa, typename T, int rows>
LCW_INLINE void multiply_from(
    int64_t r, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,
    int64_t all_rows, int64_t columns) {
  for (; r + rows <= all_rows; r += rows)
    multiply_rows<Isa, T, rows>(a + r * a_row, a_row, a_k, b, ldb, depth, out + r * ldo, ldo, columns);
  if constexpr (rows > 1)
    multiply_from<Isa, T, rows / 2>(r, a, a_row, a_k, b, ldb, depth, out, ldo, all_rows, columns);
}

// Fewer columns than one vector has lanes.
template <class Isa, typename T>
LCW_INLINE void multiply_narrow(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t rows,
    int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    constexpr int lanes = Vector<T, Isa::vector_bytes>::lanes;
    T total[lanes] = {};
    for (int64_t chunk = 0; chunk < depth; chunk += chunk_terms) {
      T sum[lanes] = {};
      for (int64_t k = chunk; k < depth && k < chunk + chunk_terms; ++k) {
        const T scale = a[r * a_row + k * a_k];
        for (int64_t j = 0; j < columns; ++j) sum[j] += scale * b[k * ldb + j];
      }
      for (int64_t j = 0; j < columns; ++j) total[j] += sum[j];
    }
    std::memcpy(out + r * ldo, total, columns * sizeof(T));
  }
}

template <class Isa, typename T>
LCW_INLINE void multiply(
    const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo, int64_t rows,
    int64_t columns) {
  if (columns < Vector<T, Isa::vector_bytes>::lanes)
    multiply_narrow<Isa>(a, a_row, a_k, b, ldb, depth, out, ldo, rows, columns);
  else
    multiply_from<Isa, T, Isa::tile_rows>(0, a, a_row, a_k, b, ldb, depth, out, ldo, rows, columns);
}

// GCC's name for a shuffle of two vectors; elsewhere, and where registers are narrower, elements move one by one.
#if defined(__GNUC__) && !defined(__clang__)
#define LCW_SHUFFLES 1

// Swaps the off-diagonal blocks of every 2 distance x 2 distance block: all distances together transpose.
template <typename T, int distance, int lanes>
LCW_INLINE void swap_blocks(typename Vector<T, lanes * sizeof(T)>::type (&row)[lanes]) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
  typename Vector<Index, lanes * sizeof(T)>::type upper, lower;
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) {
    upper[i] = i & distance ? lanes + i - distance : i;
    lower[i] = i & distance ? lanes + i : i + distance;
  }
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) {
    if (i & distance) continue;
    const auto top = row[i], bottom = row[i + distance];
    row[i] = __builtin_shuffle(top, bottom, upper);
    row[i + distance] = __builtin_shuffle(top, bottom, lower);
  }
}

template <typename T, int lanes>
LCW_INLINE void transpose_block(const T* in, T* out, int64_t n) {
  typename Vector<T, lanes * sizeof(T)>::type row[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) std::memcpy(&row[i], in + i * n, sizeof(row[i]));
  swap_blocks<T, 1, lanes>(row);
  swap_blocks<T, 2, lanes>(row);
  if constexpr (lanes == 8) swap_blocks<T, 4, lanes>(row);
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) std::memcpy(out + i * n, &row[i], sizeof(row[i]));
}
#else
#define LCW_SHUFFLES 0
template <typename T, int lanes>
LCW_INLINE void transpose_block(const T*, T*, int64_t) {}
#endif

// out = in^T, both n x n.
template <class Isa, typename T>
LCW_INLINE void transpose(const T* in, T* out, int64_t n) {
  // 32 bytes are what AVX2 and AVX-512 shuffle in registers alike.
  constexpr int lanes = 32 / sizeof(T);
  int64_t whole = 0;
  if constexpr (LCW_SHUFFLES && Isa::vector_bytes >= 32) {
    whole = n - n % lanes;
    for (int64_t i = 0; i < whole; i += lanes)
      for (int64_t j = 0; j < whole; j += lanes) transpose_block<T, lanes>(in + i * n + j, out + j * n + i, n);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i < whole ? whole : 0; j < n; ++j) out[j * n + i] = in[i * n + j];
}

}  // namespace lcw_ops
