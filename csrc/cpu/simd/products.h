// The loops of tiles.h as separate functions, compiled once for each instruction set. If they were inlined at every
// call, the library would be megabytes larger.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "elements.h"
#include "tiles.h"

namespace lcw_ops {

using torch::headeronly::ScalarType;

template <class Isa, typename T>
struct ProductLoops {
  LCW_INLINE static void multiply(const Product<T>& product) { lcw_ops::multiply<Isa>(product); }

  // Multiplies one tile: two vectors of columns, and all rows of the product.
  LCW_INLINE static void multiply_tile(const Product<T>& product) {
    lcw_ops::multiply_rest<Isa, Isa::accumulators / 2, 2>(product);
  }

  LCW_INLINE static void multiply_by_rows(
      const T* state, const T* matrix, int64_t depth, T* out, int64_t ldo, int64_t rows, int64_t units,
      const T* ahead) {
    lcw_ops::multiply_by_rows<Isa>(state, matrix, depth, out, ldo, rows, units, ahead);
  }

  LCW_INLINE static void transpose(
      const T* in, int64_t in_row, T* out, int64_t out_row, int64_t rows, int64_t columns) {
    lcw_ops::transpose<Isa>(in, in_row, out, out_row, rows, columns);
  }

  LCW_INLINE static void widen(const uint16_t* in, ScalarType type, T* out, int64_t count) {
    if (type == ScalarType::BFloat16)
      for (int64_t i = 0; i < count; ++i) out[i] = widen_bfloat16(in[i]);
    else
      for (int64_t i = 0; i < count; ++i) out[i] = widen_half(in[i]);
  }

  LCW_INLINE static void round(const T* in, ScalarType type, uint16_t* out, int64_t count) {
    if (type == ScalarType::BFloat16)
      for (int64_t i = 0; i < count; ++i) out[i] = round_to_bfloat16(in[i]);
    else
      for (int64_t i = 0; i < count; ++i) out[i] = round_to_half(in[i]);
  }
};

// Compiled once, in products.cpp.
#ifndef LCW_PRODUCTS_HERE
#define LCW_PRODUCTS_HERE extern
#endif
#define LCW_INSTANTIATE(Isa, T)                                                            \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::multiply>;         \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::multiply_tile>;    \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::multiply_by_rows>; \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::transpose>;        \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::widen>;            \
  LCW_PRODUCTS_HERE template struct Compiled<Isa, ProductLoops<Isa, T>::round>;
LCW_INSTANTIATE(Portable, float)
LCW_INSTANTIATE(Portable, double)
#ifdef LCW_X86_DISPATCH
LCW_INSTANTIATE(Avx2, float)
LCW_INSTANTIATE(Avx2, double)
LCW_INSTANTIATE(Avx512, float)
LCW_INSTANTIATE(Avx512, double)
#endif

template <class Isa_, typename T>
struct Products {
  using Isa = Isa_;
  using Loops = ProductLoops<Isa, T>;
  static constexpr int64_t lanes = Vector<T, Isa::vector_bytes>::lanes;
  static constexpr auto multiply = compiled<Isa, Loops::multiply>;
  static constexpr auto multiply_tile = compiled<Isa, Loops::multiply_tile>;
  static constexpr auto multiply_by_rows = compiled<Isa, Loops::multiply_by_rows>;
  static constexpr auto transpose = compiled<Isa, Loops::transpose>;
  static constexpr auto widen = compiled<Isa, Loops::widen>;
  static constexpr auto round = compiled<Isa, Loops::round>;
};

// Computes a whole product, in strips of columns that stay in the nearest cache for all rows. The last two tiles of a
// strip share their rows evenly, because a tile of two rows takes as long as one of four.
template <class Isa, typename T>
LCW_INLINE void multiply_evenly(const Product<T>& product) {
  constexpr int64_t tile = Isa::accumulators / 2, width = 64;
  for (int64_t j = 0; j < product.columns; j += width)
    for (int64_t r = 0; r < product.rows;) {
      Product<T> part = product.at(r, j);
      part.columns = std::min(part.columns, width);
      if (part.rows > 2 * tile)
        part.rows = part.rows / tile * tile - tile;
      else if (part.rows > tile && part.rows < 2 * tile)
        part.rows = (part.rows + 1) / 2;
      r += part.rows;
      Products<Isa, T>::multiply(part);
    }
}

}  // namespace lcw_ops
