// The layouts in which a thread holds rows of the state, multiplies them with a matrix and permutes their units. The
// symbols are those of orthogonal_filter.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "../../orthogonal_filter.h"
#include "../simd/products.h"

namespace lcw_ops {

// The number of terms of one partial sum. Products with a state are summed like a plain matrix product. Gradients of
// weights are sums over all samples, whose number has no bound, so their partial sums are shorter.
constexpr int64_t state_terms = 128, sample_terms = 32;

// Computes a product in partial sums of `terms` terms, so that rounding errors grow like sqrt(terms) + sqrt(depth /
// terms) instead of sqrt(depth).
template <class Tiles, typename T>
void multiply_in_parts(Product<T> product, int64_t terms) {
  const int64_t depth = product.depth;
  const T* shift = product.shift;
  for (int64_t k = 0; k < depth; k += terms) {
    product.depth = std::min(terms, depth - k);
    product.shift = k + terms < depth ? nullptr : shift;
    Tiles::multiply(product);
    product.a += terms * product.a_k, product.b += terms * product.ldb;
    if (product.ahead) product.ahead += product.depth * product.rows;
    product.accumulate = true;
  }
}

// The weights W_l in the state's type: in place, or widened from 16 bits into the thread's buffer.
template <class Tiles, typename T>
class Weights {
 public:
  explicit Weights(const Recurrence<T>& r)
      : r_(r), native_(sizeof(T) == 8 || r.weight_type == ScalarType::Float), wide_(native_ ? 0 : r.width * r.width) {}

  LCW_INLINE const T* at(int64_t l) {
    if (native_) return r_.template weight_at<T>(l);
    const uint16_t* narrow = r_.template weight_at<uint16_t>(l);
    if (narrow != last_) Tiles::widen(last_ = narrow, r_.weight_type, wide_.data(), r_.width * r_.width);
    return wide_.data();
  }

  // The matrix of step l if it is worth fetching early; nullptr if it is not, or if there is no such step.
  LCW_INLINE const T* ahead(int64_t l) const {
    return native_ && r_.weight_stride > 0 && l >= 0 && l < r_.steps ? r_.template weight_at<T>(l) : nullptr;
  }

 private:
  const Recurrence<T>& r_;
  const bool native_;
  Buffer<T> wide_;
  const uint16_t* last_ = nullptr;
};

// The permutation p, where (O h)_i = h_{p_i}, and its inverse, for O^T.
struct Permutation {
  const int64_t* forward;
  std::vector<int64_t> inverse;

  template <typename T>
  explicit Permutation(const Recurrence<T>& r) : forward(r.permutation), inverse(r.permutation ? r.width : 0) {
    for (size_t i = 0; i < inverse.size(); ++i) inverse[forward[i]] = i;
  }
};

// A range of units. It has all units, unless several threads share the rows.
struct Slice {
  int64_t begin, end;
};

// The three layouts below store some rows of the state and have the same members. ManyRows stores them transposed, as
// (units, rows), in panels that are two vectors wide. So a vector holds one unit of neighbouring rows, and W is read in
// place, number by number. The number of rows is padded to whole vectors; the padding is never read back.
template <class Tiles, typename T>
struct ManyRows {
  static constexpr int64_t lanes = Tiles::lanes, widest = 2 * lanes;
  static constexpr bool is_row_major = false;
  int64_t rows, width;
  Slice units;  // always all units: threads do not share rows in this layout

  ManyRows(int64_t rows_, int64_t width_, Slice units_) : rows(rows_), width(width_), units(units_) {}

  LCW_INLINE static int64_t padded(int64_t rows) { return (rows + lanes - 1) / lanes * lanes; }
  LCW_INLINE static int64_t size(int64_t rows, int64_t width) { return padded(rows) * width; }

  // Calls f(first row, rows, padded rows, offset of the panel) for every panel.
  template <typename F>
  LCW_INLINE void for_each_panel(const F& f) const {
    for (int64_t first = 0; first < rows; first += widest) {
      const int64_t count = std::min(widest, rows - first);
      f(first, count, padded(count), first * width);
    }
  }

  // Calls f(begin, count) for the elements of this thread.
  template <typename F>
  LCW_INLINE void for_each_run(const F& f) const {
    f(int64_t(0), size(rows, width));
  }

  LCW_INLINE void load(const T* source, T* state) const {
    for_each_panel([&](int64_t first, int64_t count, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      Tiles::transpose(source + first * width, width, state + offset, columns, count, width);
      for (int64_t i = 0; i < width; ++i)
        for (int64_t r = count; r < columns; ++r) state[offset + i * columns + r] = T(0);
    });
  }

  LCW_INLINE void store(const T* state, T* target) const {
    for_each_panel([&](int64_t first, int64_t count, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      Tiles::transpose(state + offset, columns, target + first * width, width, width, count);
    });
  }

  // out = W h + b. `ahead` is the matrix of the next step, to be prefetched. `bias` and `ahead` may be nullptr.
  LCW_INLINE void multiply(const T* matrix, const T* bias, const T* state, T* out, const T* ahead) const {
    product(matrix, width, 1, bias, state, out, ahead);
  }

  // out = W^T h
  LCW_INLINE void multiply_transposed(const T* matrix, const T* state, T* out, const T* ahead) const {
    product(matrix, 1, width, nullptr, state, out, ahead);
  }

  LCW_INLINE void product(
      const T* matrix, int64_t row, int64_t k, const T* bias, const T* state, T* out, const T* ahead) const {
    for_each_panel([&](int64_t first, int64_t, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      multiply_in_parts<Tiles, T>(
          {matrix, row, k, state + offset, columns, out + offset, columns, width, columns, width, false, bias,
           first == 0 ? ahead : nullptr},
          state_terms);
    });
  }

  // out_i = h_{index_i}
  LCW_INLINE void permute(const int64_t* index, const T* state, T* out) const {
    for_each_panel([&](int64_t, int64_t, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      for (int64_t i = 0; i < width; ++i)
        for (int64_t r = 0; r < columns; ++r) out[offset + i * columns + r] = state[offset + index[i] * columns + r];
    });
  }

  LCW_INLINE const T* row_major(const T* state, T* scratch) const {
    store(state, scratch);
    return scratch;
  }

  // out += source, which is row-major; `scratch` has the size of a state.
  LCW_INLINE void add_rows(const T* source, T* scratch, T* out) const {
    load(source, scratch);
    for (int64_t i = 0; i < size(rows, width); ++i) out[i] += scratch[i];
  }
};

// In FewRows, rows are row-major. Tiles run along the rows of W, so that W is not transposed here either.
template <class Tiles, typename T>
struct FewRows {
  static constexpr bool is_row_major = true;
  int64_t rows, width;
  Slice units;

  FewRows(int64_t rows_, int64_t width_, Slice units_) : rows(rows_), width(width_), units(units_) {}

  LCW_INLINE static int64_t size(int64_t rows, int64_t width) { return rows * width; }

  template <typename F>
  LCW_INLINE void for_each_run(const F& f) const {
    const int64_t count = units.end - units.begin;
    if (count == width) return f(int64_t(0), rows * width);
    for (int64_t m = 0; m < rows; ++m) f(m * width + units.begin, count);
  }

  LCW_INLINE void load(const T* source, T* state) const {
    for_each_run([&](int64_t begin, int64_t count)
                     LCW_LAMBDA_INLINE { std::copy(source + begin, source + begin + count, state + begin); });
  }

  LCW_INLINE void store(const T* state, T* target) const { load(state, target); }

  LCW_INLINE void multiply(const T* matrix, const T* bias, const T* state, T* out, const T* ahead) const {
    const int64_t count = units.end - units.begin;
    Tiles::multiply_by_rows(
        state, matrix + units.begin * width, width, out + units.begin, width, rows, count,
        ahead ? ahead + units.begin * width : nullptr);
    if (!bias) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = units.begin; i < units.end; ++i) out[m * width + i] += bias[i];
  }

  LCW_INLINE void multiply_transposed(const T* matrix, const T* state, T* out, const T*) const {
    multiply_in_parts<Tiles, T>(
        {state, width, 1, matrix + units.begin, width, out + units.begin, width, rows, units.end - units.begin, width},
        state_terms);
  }

  LCW_INLINE void permute(const int64_t* index, const T* state, T* out) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = units.begin; i < units.end; ++i) out[m * width + i] = state[m * width + index[i]];
  }

  LCW_INLINE const T* row_major(const T* state, T*) const { return state; }

  LCW_INLINE void add_rows(const T* source, T*, T* out) const {
    for_each_run([&](int64_t begin, int64_t count) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < begin + count; ++i) out[i] += source[i];
    });
  }
};

// PackedRows is for many rows and one matrix for all steps, as in a recurrence over time. Its rows are row-major too.
// `pack` reorders the matrix once, into panels of two vectors of columns, so that no step transposes states or inputs.
template <class Tiles, typename T>
struct PackedRows : FewRows<Tiles, T> {
  static constexpr int64_t panel = 2 * Tiles::lanes;  // the width has to be at least this
  using FewRows<Tiles, T>::FewRows;

  LCW_INLINE static int64_t panels(int64_t width) { return (width + panel - 1) / panel; }

  // Calls f(first column, offset of the panel) for every panel. The last panel ends where the matrix ends, and may
  // overlap the panel before it.
  template <typename F>
  LCW_INLINE static void for_each_panel(int64_t width, const F& f) {
    for (int64_t p = 0; p < panels(width); ++p) f(std::min(p * panel, width - panel), p * panel * width);
  }

  // Packs the matrix for products of a row with it or, if `transposed`, with its transpose.
  LCW_INLINE static void pack(const T* matrix, int64_t width, bool transposed, T* packed) {
    for_each_panel(width, [&](int64_t column, int64_t offset) LCW_LAMBDA_INLINE {
      if (transposed) return Tiles::transpose(matrix + column * width, width, packed + offset, panel, panel, width);
      for (int64_t k = 0; k < width; ++k)
        std::copy(matrix + k * width + column, matrix + k * width + column + panel, packed + offset + k * panel);
    });
  }

  LCW_INLINE void multiply(const T* packed, const T* bias, const T* state, T* out, const T*) const {
    const int64_t rows = this->rows, width = this->width;
    for_each_panel(width, [&](int64_t column, int64_t offset) LCW_LAMBDA_INLINE {
      Product<T> product{state, width, 1, packed + offset, panel, out + column, width, rows, panel, width};
      product.is_near = true;
      multiply_in_parts<Tiles, T>(product, state_terms);
    });
    if (!bias) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < width; ++i) out[m * width + i] += bias[i];
  }

  LCW_INLINE void multiply_transposed(const T* packed, const T* state, T* out, const T* ahead) const {
    multiply(packed, nullptr, state, out, ahead);
  }
};

// Packs the matrices that all steps share, for products with them or, if `transposed`, with their transposes.
template <class Tiles, typename T>
LCW_INLINE void pack_matrices(const Recurrence<T>& r, bool transposed, T* weight, T* filter) {
  using Rows = PackedRows<Tiles, T>;
  Rows::pack(Weights<Tiles, T>(r).at(0), r.width, transposed, weight);
  if (r.filter) Rows::pack(r.filter, r.width, transposed, filter);
}

}  // namespace lcw_ops
