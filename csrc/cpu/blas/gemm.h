// C = A B for matrices of any size and strides.
//
// Both operands are copied, piece by piece, into the order in which the tile of simd/tiles.h reads them: B in panels of
// two vectors of columns that stay in the nearest cache, A in blocks of rows that stay in the next one. The copy takes
// about 1/rows + 1/columns of the product's time. It also widens 16-bit numbers and subtracts a number from each row of
// an operand.
// K. Goto, R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008.
#pragma once

#include "../simd/products.h"

namespace lcw_ops {

// A matrix with element (i, j) = data[i * row + j * column] - shift[i]. Without a shift, nothing is subtracted.
template <typename E>
struct Operand {
  const E* data;
  int64_t row, column;
  const Computed<E>* shift = nullptr;

  LCW_INLINE Operand at(int64_t i, int64_t j) const {
    return {data + i * row + j * column, row, column, shift ? shift + i : nullptr};
  }
  LCW_INLINE Computed<E> get(int64_t i, int64_t j) const {
    return load(data[i * row + j * column]) - (shift ? shift[i] : Computed<E>(0));
  }
};

template <class Isa, typename E>
struct Gemm {
  using T = Computed<E>;
  using Tiles = Products<Isa, T>;
  static constexpr int64_t lanes = Vector<T, Isa::vector_bytes>::lanes;
  static constexpr int64_t panel = 2 * lanes, tile_rows = Isa::accumulators / 2;
  // The rows of a panel, and the rows of A in a block. 256 rows of a panel are 16 KB for AVX2, and 192 rows are 24 KB
  // for AVX-512: half or three quarters of a nearest cache of 32 KB. The rows of 16 tiles, with as many columns as a
  // panel has rows, are about 96 KB, a fraction of the next cache.
  static constexpr int64_t block_depth = Isa::vector_bytes > 32 ? 192 : 256, block_rows = 16 * tile_rows;

  // out[k * panel + c] = element (k, c) of B for c < `count` <= panel, and 0 for the other columns.
  LCW_INLINE static void pack_panel(const Operand<E>& b, int64_t depth, int64_t count, T* out) {
    if (b.column == 1 && count == panel) {
      for (int64_t k = 0; k < depth; ++k) {
        const T shift = b.shift ? b.shift[k] : T(0);
        for (int64_t c = 0; c < panel; ++c) out[k * panel + c] = load(b.data[k * b.row + c]) - shift;
      }
      return;
    }
    if constexpr (std::is_same_v<E, T>)
      if (b.row == 1 && count == panel && !b.shift) return Tiles::transpose(b.data, b.column, out, panel, panel, depth);
    for (int64_t c = 0; c < panel; ++c)
      for (int64_t k = 0; k < depth; ++k) out[k * panel + c] = c < count ? b.get(k, c) : T(0);
  }

  // Copies element (r, k) of `rows` rows of A to out[r * row + k * column]. Returns the strides row and column.
  LCW_INLINE static std::pair<int64_t, int64_t> pack_rows(const Operand<E>& a, int64_t rows, int64_t depth, T* out) {
    if (a.column == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        const E* row = a.data + r * a.row;
        const T shift = a.shift ? a.shift[r] : T(0);
        for (int64_t k = 0; k < depth; ++k) out[r * depth + k] = load(row[k]) - shift;
      }
      return {depth, 1};
    }
    if (a.row == 1 && !a.shift && rows == tile_rows) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < tile_rows; ++r) out[k * tile_rows + r] = load(a.data[k * a.column + r]);
      return {1, rows};
    }
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < rows; ++r) out[k * rows + r] = a.get(r, k);
    return {1, rows};
  }

  // Computes C = A B + bias. C (rows, columns) is row-major, with rows ldc apart. `bias` has one number per column, or
  // is nullptr.
  LCW_INLINE static void multiply(
      const Operand<E>& a, const Operand<E>& b, int64_t rows, int64_t columns, int64_t depth, const T* bias, T* c,
      int64_t ldc) {
    // Make at least two partial sums, unless the sums are short: one sum of 256 terms errs 2.5 times as much as MKL's.
    const int64_t deepest = std::min({depth, block_depth, std::max<int64_t>(128, (depth + 1) / 2)});
    const int64_t panels = (columns + panel - 1) / panel;
    Buffer<T> packed_b(panels * panel * deepest), packed_a(block_rows * deepest), last(tile_rows * panel);
    Buffer<T> padded_bias(bias ? panels * panel : 0);
    if (bias) std::fill(std::copy(bias, bias + columns, padded_bias.data()), padded_bias.data() + panels * panel, T(0));
    for (int64_t k = 0; k < depth; k += deepest) {
      const int64_t part = std::min(deepest, depth - k);
      for (int64_t p = 0; p < panels; ++p)
        pack_panel(b.at(k, p * panel), part, std::min(panel, columns - p * panel), packed_b.data() + p * panel * part);
      for (int64_t i = 0; i < rows; i += block_rows) {
        const int64_t block = std::min(block_rows, rows - i);
        // Tiles have nearly equal heights, because a tile of one row takes as long as one of four.
        const int64_t tiles = (block + tile_rows - 1) / tile_rows;
        const auto start = [&](int64_t t) LCW_LAMBDA_INLINE { return block * t / tiles; };
        std::pair<int64_t, int64_t> strides;
        for (int64_t t = 0; t < tiles; ++t)
          strides = pack_rows(a.at(i + start(t), k), start(t + 1) - start(t), part, packed_a.data() + start(t) * part);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t count = std::min(panel, columns - p * panel);
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t height = start(t + 1) - start(t);
            T* target = c + (i + start(t)) * ldc + p * panel;
            Product<T> product{
                packed_a.data() + start(t) * part,
                strides.first,
                strides.first == 1 ? height : 1,
                packed_b.data() + p * panel * part,
                panel,
                target,
                ldc,
                height,
                panel,
                part,
                k > 0};
            if (bias && k + part == depth) product.column_shift = padded_bias.data() + p * panel;
            if (count == panel) {
              Tiles::multiply_tile(product);
              continue;
            }
            product.out = last.data(), product.ldo = panel, product.accumulate = false;
            Tiles::multiply_tile(product);
            for (int64_t r = 0; r < height; ++r)
              for (int64_t j = 0; j < count; ++j)
                target[r * ldc + j] = (k > 0 ? target[r * ldc + j] : T(0)) + last[r * panel + j];
          }
        }
      }
    }
  }
};

// Gemm::multiply on all threads of torch's pool; compiled once, in gemm.cpp.
template <typename E>
void multiply_on_threads(
    const Operand<E>& a, const Operand<E>& b, int64_t rows, int64_t columns, int64_t depth, const Computed<E>* bias,
    Computed<E>* c, int64_t ldc);

}  // namespace lcw_ops
