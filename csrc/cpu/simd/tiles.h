// Tiles of small matrix products on row-major data, the inner loops of every recurrence and of blas/.
//
// `Isa` gives the width of vectors and the number of accumulators that the registers hold. The terms of every element
// of a product are added in the same order, whichever tile the element is in.
#pragma once

#include <algorithm>

#include "instruction_sets.h"
#include "vectors.h"

namespace lcw_ops {

// out[r * ldo + j] = sum_{k < depth} a[r * a_row + k * a_k] b[k * ldb + j], plus the old value if `accumulate`.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_k;
  const T* b;
  int64_t ldb;
  T* out;
  int64_t ldo, rows, columns, depth;
  bool accumulate = false;
  const T* shift = nullptr;         // one number per row, added to every column at the end, or nullptr
  const T* ahead = nullptr;         // the `a` of the next product, of the same size, to be prefetched; or nullptr
  bool is_near = false;             // `a` is in the nearest cache already
  const T* column_shift = nullptr;  // like `shift`, one number per column; whole tiles only

  LCW_INLINE Product at(int64_t r, int64_t j) const {
    Product part = *this;
    part.a += r * a_row, part.b += j, part.out += r * ldo + j, part.rows -= r, part.columns -= j;
    if (shift) part.shift += r;
    return part;
  }
};

// The numbers in a cache line.
template <typename T>
constexpr int64_t line = 64 / sizeof(T);

// The memory that a tile fetches early: one line of each per term. A processor keeps track of few fetches (24 on Zen
// 4), and with more of them at once it waits. When all lines were fetched before the tile, the forward pass of 32 rows
// of 64 units took 1.2 times as long with a dense filter, and 1.4 times with a permutation.
template <typename T>
struct Fetch {
  const T* rows;  // the rows of `a` of the next tile, `stride` apart, or nullptr
  int64_t stride;
  const T* ahead;  // a part of the next product's `a`, or nullptr
};

template <class Isa, int rows, int vectors, typename T>
LCW_INLINE void multiply_tile(const Product<T> p, const Fetch<T> fetch = {}) {
  using L = WholeVector<Isa, T>;
  using Wide = typename L::Wide;
  Wide sum[rows][vectors] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    if (fetch.rows) __builtin_prefetch(fetch.rows + k % line<T> * fetch.stride + k / line<T> * line<T>);
    if (fetch.ahead) __builtin_prefetch(fetch.ahead + k * rows);
    Wide column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) std::memcpy(&column[v], p.b + k * p.ldb + v * L::count, sizeof(Wide));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const T scale = p.a[r * p.a_row + k * p.a_k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += scale * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* out = p.out + r * p.ldo + v * L::count;
      if (p.accumulate) {
        Wide before;
        std::memcpy(&before, out, sizeof(Wide));
        sum[r][v] += before;
      }
      if (p.shift) sum[r][v] += p.shift[r];
      if (p.column_shift) {
        Wide shift;
        std::memcpy(&shift, p.column_shift + v * L::count, sizeof(Wide));
        sum[r][v] += shift;
      }
      std::memcpy(out, &sum[r][v], sizeof(Wide));
    }
}

// Multiplies one tile of all rows of the product, or of its first `rows` rows if it has more.
template <class Isa, int rows, int vectors, typename T>
LCW_INLINE void multiply_rest(const Product<T> p) {
  if (p.rows >= rows) return multiply_tile<Isa, rows, vectors>(p);
  if constexpr (rows > 1) multiply_rest<Isa, rows - 1, vectors>(p);
}

// Multiplies all rows, for the first `vectors` vectors of columns.
template <class Isa, int rows, int vectors, typename T>
LCW_INLINE void multiply_columns(const Product<T> p) {
  int64_t r = 0;
  for (; r + rows <= p.rows; r += rows) {
    // The next tile's rows of `a` are too short for the processor to see a pattern in time.
    const bool fetches_rows = p.a_k == 1 && !p.is_near && r + rows < p.rows;
    multiply_tile<Isa, rows, vectors>(
        p.at(r, 0),
        {fetches_rows ? p.a + (r + rows) * p.a_row : nullptr, p.a_row, p.ahead ? p.ahead + r * p.depth : nullptr});
  }
  if constexpr (rows > 1)
    if (r < p.rows) multiply_rest<Isa, rows - 1, vectors>(p.at(r, 0));
}

// Multiplies a product that has fewer columns than a vector has lanes.
template <class Isa, typename T>
LCW_INLINE void multiply_narrow(const Product<T> p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    T sum[Vector<T, Isa::vector_bytes>::lanes] = {};
    for (int64_t k = 0; k < p.depth; ++k) {
      const T scale = p.a[r * p.a_row + k * p.a_k];
      for (int64_t j = 0; j < p.columns; ++j) sum[j] += scale * p.b[k * p.ldb + j];
    }
    T* out = p.out + r * p.ldo;
    const T shift = p.shift ? p.shift[r] : T(0);
    for (int64_t j = 0; j < p.columns; ++j) out[j] = (p.accumulate ? out[j] + sum[j] : sum[j]) + shift;
  }
}

// Multiplies the columns that do not fill a vector: computes the last whole vector of columns, and stores only its last
// `kept` columns.
template <class Isa, typename T>
LCW_INLINE void multiply_last(const Product<T> p, int64_t kept) {
  constexpr int64_t lanes = Vector<T, Isa::vector_bytes>::lanes;
  T last[Isa::accumulators * lanes];
  for (int64_t r = 0; r < p.rows; r += Isa::accumulators) {
    Product<T> part = p.at(r, 0);
    part.rows = part.rows < Isa::accumulators ? part.rows : Isa::accumulators;
    part.out = last, part.ldo = lanes, part.accumulate = false, part.shift = nullptr, part.ahead = nullptr;
    multiply_rest<Isa, Isa::accumulators, 1>(part);
    for (int64_t i = 0; i < part.rows; ++i)
      for (int64_t j = lanes - kept; j < lanes; ++j) {
        T& out = p.out[(r + i) * p.ldo + j];
        const T shift = p.shift ? p.shift[r + i] : T(0);
        out = (p.accumulate ? out + last[i * lanes + j] : last[i * lanes + j]) + shift;
      }
  }
}

template <class Isa, typename T>
LCW_INLINE void multiply(Product<T> p) {
  constexpr int64_t lanes = Vector<T, Isa::vector_bytes>::lanes;
  if (p.columns < lanes) return multiply_narrow<Isa>(p);
  int64_t j = 0;
  // With fewer rows, tiles are wider: a single row needs as many sums in flight as eight rows do.
  if (p.rows == 1)
    for (; j + 8 * lanes <= p.columns; j += 8 * lanes) multiply_tile<Isa, 1, 8>(p.at(0, j));
  if (p.rows <= 2)
    for (; j + 4 * lanes <= p.columns; j += 4 * lanes) multiply_columns<Isa, 2, 4>(p.at(0, j));
  for (; j + 2 * lanes <= p.columns; j += 2 * lanes) {
    multiply_columns<Isa, Isa::accumulators / 2, 2>(p.at(0, j));
    p.ahead = nullptr;
  }
  for (; j + lanes <= p.columns; j += lanes) {
    multiply_columns<Isa, Isa::accumulators, 1>(p.at(0, j));
    p.ahead = nullptr;
  }
  if (j < p.columns) multiply_last<Isa>(p.at(0, p.columns - lanes), p.columns - j);
}

#if LCW_SHUFFLES
// Replaces `first` by the elements of both vectors that `low` chooses, and `second` by those that `high` chooses. An
// index below the number of lanes chooses from `first`, any other from `second`. Every choice below compiles to one
// instruction.
template <typename Wide, typename Index>
LCW_INLINE void shuffle_pair(Wide& first, Wide& second, Index low, Index high) {
  const Wide a = first, b = second;
  first = __builtin_shuffle(a, b, low);
  second = __builtin_shuffle(a, b, high);
}

LCW_INLINE void transpose_lanes(Vector<float, 32>::type (&row)[8]) {
  typedef int32_t Index __attribute__((vector_size(32)));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2)
    shuffle_pair(row[i], row[i + 1], Index{0, 8, 1, 9, 4, 12, 5, 13}, Index{2, 10, 3, 11, 6, 14, 7, 15});
  // Now a row holds columns of a pair of rows: columns 0, 1, 4, 5 in the even rows, and 2, 3, 6, 7 in the odd ones.
#pragma GCC unroll 4
  for (int i = 0; i < 8; i = i % 2 ? i + 3 : i + 1)
    shuffle_pair(row[i], row[i + 2], Index{0, 1, 8, 9, 4, 5, 12, 13}, Index{2, 3, 10, 11, 6, 7, 14, 15});
  // Now a row holds two columns of four rows: columns 0 and 4, 2 and 6, 1 and 5, 3 and 7.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    shuffle_pair(row[i], row[i + 4], Index{0, 1, 2, 3, 8, 9, 10, 11}, Index{4, 5, 6, 7, 12, 13, 14, 15});
  std::swap(row[1], row[2]);
  std::swap(row[5], row[6]);
}

LCW_INLINE void transpose_lanes(Vector<double, 32>::type (&row)[4]) {
  typedef int64_t Index __attribute__((vector_size(32)));
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) shuffle_pair(row[i], row[i + 1], Index{0, 4, 2, 6}, Index{1, 5, 3, 7});
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) shuffle_pair(row[i], row[i + 2], Index{0, 1, 4, 5}, Index{2, 3, 6, 7});
}

template <typename T, int lanes>
LCW_INLINE void transpose_block(const T* in, int64_t in_row, T* out, int64_t out_row) {
  typename Vector<T, lanes * sizeof(T)>::type row[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) std::memcpy(&row[i], in + i * in_row, sizeof(row[i]));
  transpose_lanes(row);
#pragma GCC unroll 8
  for (int i = 0; i < lanes; ++i) std::memcpy(out + i * out_row, &row[i], sizeof(row[i]));
}
#else
template <typename T, int lanes>
LCW_INLINE void transpose_block(const T*, int64_t, T*, int64_t) {}
#endif

// Whether blocks are transposed in registers, as vectors of 32 bytes: AVX2 and AVX-512 have shuffles for them.
template <class Isa>
constexpr bool shuffles = LCW_SHUFFLES && Isa::vector_bytes >= 32;

// out[c * out_row + r] = in[r * in_row + c]
template <class Isa, typename T>
LCW_INLINE void transpose(const T* in, int64_t in_row, T* out, int64_t out_row, int64_t rows, int64_t columns) {
  constexpr int lanes = 32 / sizeof(T);
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (shuffles<Isa>) {
    whole_rows = rows - rows % lanes, whole_columns = columns - columns % lanes;
    for (int64_t r = 0; r < whole_rows; r += lanes)
      for (int64_t c = 0; c < whole_columns; c += lanes)
        transpose_block<T, lanes>(in + r * in_row + c, in_row, out + c * out_row + r, out_row);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) out[c * out_row + r] = in[r * in_row + c];
}

// totals[i] = the sum of the lanes of sum[i].
template <class Isa, int count, typename T>
LCW_INLINE void sum_lanes(const typename Vector<T, Isa::vector_bytes>::type (&sum)[count], T* totals) {
  constexpr int lanes = 32 / sizeof(T);
  if constexpr (shuffles<Isa>) {
    using Block = typename Vector<T, 32>::type;
#pragma GCC unroll 4
    for (int first = 0; first < count; first += lanes) {
      Block row[lanes];
#pragma GCC unroll 8
      for (int i = 0; i < lanes; ++i) {
        const char* bytes = reinterpret_cast<const char*>(&sum[first + i]);
        std::memcpy(&row[i], bytes, sizeof(Block));
        if constexpr (Isa::vector_bytes == 64) {
          Block upper;
          std::memcpy(&upper, bytes + sizeof(Block), sizeof(Block));
          row[i] += upper;
        }
      }
      transpose_lanes(row);
#pragma GCC unroll 8
      for (int i = 1; i < lanes; ++i) row[0] += row[i];
      std::memcpy(totals + first, &row[0], sizeof(Block));
    }
  } else {
    for (int i = 0; i < count; ++i) {
      totals[i] = sum[i][0];
      for (int lane = 1; lane < int(Isa::vector_bytes / sizeof(T)); ++lane) totals[i] += sum[i][lane];
    }
  }
}

// Multiplies `rows` states by `units` rows of the matrix. Both are contiguous along k, so nothing is transposed.
template <class Isa, int rows, int units, typename T>
LCW_INLINE void dot_tile(const T* state, const T* matrix, int64_t depth, T* out, int64_t ldo) {
  using L = WholeVector<Isa, T>;
  using Wide = typename L::Wide;
  Wide sum[rows * units] = {};
  int64_t k = 0;
  for (; k + L::count <= depth; k += L::count) {
    Wide part[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) std::memcpy(&part[r], state + r * depth + k, sizeof(Wide));
#pragma GCC unroll 8
    for (int o = 0; o < units; ++o) {
      Wide weights;
      std::memcpy(&weights, matrix + o * depth + k, sizeof(Wide));
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r * units + o] += part[r] * weights;
    }
  }
  T totals[rows * units];
  if constexpr (units == 1) {
    for (int r = 0; r < rows; ++r) {
      totals[r] = T(0);
      for (int lane = 0; lane < L::count; ++lane) totals[r] += sum[r][lane];
    }
  } else {
    sum_lanes<Isa>(sum, totals);
  }
  for (; k < depth; ++k)
    for (int r = 0; r < rows; ++r)
      for (int o = 0; o < units; ++o) totals[r * units + o] += state[r * depth + k] * matrix[o * depth + k];
  for (int r = 0; r < rows; ++r) std::memcpy(out + r * ldo, totals + r * units, units * sizeof(T));
}

template <typename T>
LCW_INLINE void prefetch(const T* begin, int64_t count) {
  for (int64_t i = 0; i < count; i += line<T>) __builtin_prefetch(begin + i);
}

template <class Isa, int rows, int units, typename T>
LCW_INLINE void dot_rows(
    const T* state, const T* matrix, int64_t depth, T* out, int64_t ldo, int64_t all_units, const T* ahead) {
  if (all_units < units) {
    for (int64_t o = 0; o < all_units; ++o) dot_tile<Isa, rows, 1>(state, matrix + o * depth, depth, out + o, ldo);
    return;
  }
  int64_t o = 0;
  for (; o + units <= all_units; o += units) {
    if (ahead) prefetch(ahead + o * depth, units * depth);
    dot_tile<Isa, rows, units>(state, matrix + o * depth, depth, out + o, ldo);
  }
  // Units that do not fill a tile share their tile with some units that are computed a second time.
  if (o < all_units) {
    o = all_units - units;
    dot_tile<Isa, rows, units>(state, matrix + o * depth, depth, out + o, ldo);
  }
}

// out[r * ldo + o] = <row r of the state, row o of the matrix>, both of `depth` numbers. `ahead` as in Product.
template <class Isa, typename T>
LCW_INLINE void multiply_by_rows(
    const T* state, const T* matrix, int64_t depth, T* out, int64_t ldo, int64_t rows, int64_t units, const T* ahead) {
  int64_t r = 0;
  const auto next = [&](int64_t count)
                        LCW_LAMBDA_INLINE { state += count * depth, out += count * ldo, r += count, ahead = nullptr; };
  for (; r + Isa::dot_rows <= rows; next(Isa::dot_rows))
    dot_rows<Isa, Isa::dot_rows, 4>(state, matrix, depth, out, ldo, units, ahead);
  if constexpr (Isa::dot_rows > 2)
    for (; r + 2 <= rows; next(2)) dot_rows<Isa, 2, 4>(state, matrix, depth, out, ldo, units, ahead);
  if (r < rows) dot_rows<Isa, 1, 8>(state, matrix, depth, out, ldo, units, ahead);
}

}  // namespace lcw_ops
