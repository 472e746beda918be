// A linear layer's two gradients for few samples: products that read or write the parameter once, in place.
#pragma once

#include "../simd/dispatch.h"
#include "../simd/products.h"

namespace lcw_ops {

template <typename E>
struct FewSamplesGradients {
  using T = Computed<E>;
  static constexpr bool is_narrow = !std::is_same_v<E, T>;
  int64_t samples, n, m;  // V is (n, m)

  // Computes out = A V, with A (samples, n) in T. Reads V row by row while the result stays in cache.
  void multiply_by_parameter(const T* a, const E* v, T* out, int64_t ldo) const {
    // The number of rows of V that a tile takes at a time; it reads one or two cache lines of each. With more rows, the
    // result is visited less often. But if V is not in any cache, each row is on another page of memory, so fewer rows
    // are better.
    const int64_t depth = n * m * int64_t(sizeof(E)) > int64_t(16) << 20 ? 32 : 128;
    constexpr int64_t width = 32;
    const int64_t strips = (m + width - 1) / width, grain = std::max<int64_t>(1, 16384 / (width * n));
    for_each_part(strips, grain, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      const int64_t first = begin * width, columns = std::min(m, end * width) - first;
      Buffer<T> wide(is_narrow ? depth * columns : 0);
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t part = std::min(depth, n - k);
        Product<T> product{a + k, n, 1, nullptr, 0, out + first, ldo, samples, columns, part, k > 0};
        product.is_near = true;
        if constexpr (is_narrow) {
          for (int64_t i = 0; i < part; ++i)
            for (int64_t j = 0; j < columns; ++j) wide[i * columns + j] = load(v[(k + i) * m + first + j]);
          product.b = wide.data(), product.ldb = columns;
        } else {
          product.b = v + k * m + first, product.ldb = m;
        }
        multiply_evenly<decltype(isa)>(product);
      }
    });
  }

  // Computes out = G^T (X - shifts). G is `grad` (samples, n) and X is (samples, m) with rows `ldx` apart; `shifts` has
  // one number per row of X, or is nullptr. Calls finish(isa, first, last) for rows of `out` that are done and still in
  // cache.
  template <class Finish>
  void grad_weight(const E* grad, const E* x, int64_t ldx, const T* shifts, T* out, const Finish& finish) const {
    // Copy both operands into the order in which a tile reads them. Tiles are wide and low, so that the result is
    // written once and in few streams. In a high tile, the cache lines of the result would be a whole row apart and
    // would compete for a few places of the nearest cache.
    constexpr int64_t height = 3;
    constexpr int64_t widest = 4 * Vector<T, 64>::lanes;
    const int64_t blocks = (n + height - 1) / height;
    Buffer<T> ordered((m + widest) * samples), columns(blocks * height * samples);
    T *a = columns.data(), *b = ordered.data();
    for_each_part(samples, samples, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      constexpr int64_t width = 4 * Vector<T, decltype(isa)::vector_bytes>::lanes;
      for (int64_t k = begin; k < end; ++k) {
        const E *row = x + k * ldx, *grad_row = grad + k * n;
        const T shift = shifts ? shifts[k] : T(0);
        for (int64_t j = 0; j < m; j += width)
          for (int64_t c = 0; c < std::min(width, m - j); ++c)
            b[j * samples + k * width + c] = load(row[j + c]) - shift;
        for (int64_t i = 0; i < n; i += height)
          for (int64_t r = 0; r < std::min(height, n - i); ++r) a[i * samples + k * height + r] = load(grad_row[i + r]);
      }
    });
    const int64_t grain = std::max<int64_t>(1, 16384 / (height * m));
    for_each_part(blocks, grain, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      constexpr int64_t width = 4 * Vector<T, Isa::vector_bytes>::lanes;
      // This many blocks of rows are multiplied by a strip of X while the strip is in the nearest cache.
      constexpr int64_t chunk = 8;
      for (int64_t block = begin; block < end; block += chunk) {
        const int64_t first = block * height, last = std::min(n, std::min(end, block + chunk) * height);
        for (int64_t j = 0; j < m; j += width)
          for (int64_t i = first; i < last; i += height) {
            const Product<T> product{a + i * samples,
                                     1,
                                     height,
                                     b + j * samples,
                                     width,
                                     out + i * m + j,
                                     m,
                                     std::min(height, n - i),
                                     std::min(width, m - j),
                                     samples};
            if (product.rows == height && product.columns == width)
              multiply_tile<Isa, height, 4>(product);
            else
              Products<Isa, T>::multiply(product);
          }
        finish(isa, first, last);
      }
    });
  }
};

}  // namespace lcw_ops
