// A normalised row and its gradients: w = s v / |v|,  ds = <G, v / |v|>,  dv = s (G - ds v / |v|) / |v|.
//
// T. Salimans, D. P. Kingma, 2016, arXiv 1602.07868. v is a row of the weight, s its scale, and G the gradient of w. A
// row is read twice, the second time from cache, and written once, so the functions are bound by memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../widening.h"

namespace lcw_ops {

// The sum of all numbers of some vectors, in float64.
template <class Isa, typename T, size_t vectors>
LCW_INLINE double sum_of_lanes(const T (&part)[vectors]) {
  using Number = std::decay_t<decltype(part[0][0])>;
  using Doubles = typename WholeVector<Isa, double>::Wide;
  Doubles sum{};
  for (const T& vector : part) {
    if constexpr (std::is_same_v<Number, double>) {
      sum += vector;
    } else {
      using Half = typename Vector<Number, Isa::vector_bytes / 2>::type;
      Half half[2];
      std::memcpy(half, &vector, sizeof half);
      sum += __builtin_convertvector(half[0], Doubles) + __builtin_convertvector(half[1], Doubles);
    }
  }
  double total = 0;
  for (int i = 0; i < WholeVector<Isa, double>::count; ++i) total += sum[i];
  return total;
}

// Returns <a, b> and, unless c is nullptr, <a, c>. Partial sums of 16 numbers each are computed side by side and added
// up in float64.
template <class Isa, typename T>
LCW_INLINE std::pair<double, double> dots(const T* a, const T* b, const T* c, int64_t count) {
  using L = WholeVector<Isa, T>;
  constexpr int vectors = 4;
  constexpr int64_t step = vectors * L::count, block = 16 * step;
  double with_b = 0, with_c = 0;
  for (int64_t first = 0; first < count; first += block) {
    const int64_t end = std::min(count, first + block);
    typename L::Wide part_b[vectors] = {}, part_c[vectors] = {};
    int64_t i = first;
    const auto add = [&](int v) LCW_LAMBDA_INLINE {
      const typename L::Wide of_a = L::load(a + i);
      part_b[v] += of_a * L::load(b + i);
      if (c) part_c[v] += of_a * L::load(c + i);
      i += L::count;
    };
    while (i + step <= end)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) add(v);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      if (i + L::count <= end) add(v);
    with_b += sum_of_lanes<Isa>(part_b);
    if (c) with_c += sum_of_lanes<Isa>(part_c);
    for (; i < end; ++i) {
      with_b += double(a[i]) * double(b[i]);
      if (c) with_c += double(a[i]) * double(c[i]);
    }
  }
  return {with_b, with_c};
}

template <class Isa, typename T>
LCW_INLINE double dot(const T* a, const T* b, int64_t count) {
  return dots<Isa, T>(a, b, nullptr, count).first;
}

// Writes scale v / |v| to `out`, which may be `row` itself, and returns |v|. A zero row stays zero. It has no
// direction, and its derivatives are taken as 0: the returned length is infinity, which makes them 0.
template <class Isa, typename T>
LCW_INLINE double normalize_row(const T* row, int64_t m, T scale, T* out) {
  const double square = dot<Isa>(row, row, m);
  // If the sum is between 1 / limit and limit, no square that matters for it was rounded to 0 or infinity. If the
  // factor is 0 or its size is between 2^-100 and 2^100, it keeps its full accuracy when it is converted to T.
  constexpr double limit = std::is_same_v<T, double> ? 0x1p900 : 0x1p90;
  const double length = std::sqrt(square), factor = double(scale) / length, size = std::abs(factor);
  if (square > 1 / limit && square < limit && (factor == 0 || (size > 0x1p-100 && size < 0x1p100))) {
    // With scale 1, divide: a row with a single element then becomes exactly 1 or -1, and the gradient of the element
    // is exactly 0.
    if (scale == T(1))
      for (int64_t i = 0; i < m; ++i) out[i] = row[i] / T(length);
    else
      for (int64_t i = 0; i < m; ++i) out[i] = row[i] * T(factor);
    return length;
  }
  T largest = 0;
  for (int64_t i = 0; i < m; ++i) largest = std::max(largest, std::abs(row[i]));
  // A NaN or an infinity makes the whole row NaN.
  if (square != square || largest > std::numeric_limits<T>::max()) {
    std::fill(out, out + m, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (largest == 0) {
    std::fill(out, out + m, scale * T(0));
    return std::numeric_limits<double>::infinity();
  }
  const int exponent = std::ilogb(largest);
  double scaled_square = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double scaled = std::ldexp(double(row[i]), -exponent);
    scaled_square += scaled * scaled;
  }
  const double scaled_length = std::sqrt(scaled_square);
  for (int64_t i = 0; i < m; ++i) out[i] = T(double(scale) * (std::ldexp(double(row[i]), -exponent) / scaled_length));
  return std::ldexp(scaled_length, exponent);
}

// Replaces g by s (g - <g, v / |v|> v / |v|) / |v| and returns the inner product.
template <class Isa, typename T>
LCW_INLINE double normalized_backward_row(const T* direction, double length, double scale, int64_t m, T* g) {
  const double along = dot<Isa>(g, direction, m), factor = scale / length;
  const T narrow = T(along);
  // Beyond these limits, the factor would lose accuracy as a T, so every step is in float64.
  if (std::abs(factor) < 0x1p100 && std::abs(factor) > 0x1p-100)
    for (int64_t i = 0; i < m; ++i) g[i] = (g[i] - narrow * direction[i]) * T(factor);
  else
    for (int64_t i = 0; i < m; ++i) g[i] = T(scale * ((double(g[i]) - along * double(direction[i])) / length));
  return along;
}

template <class Isa, typename T>
LCW_INLINE double square(const T* row, int64_t m) {
  return dot<Isa>(row, row, m);
}

// Returns <row, row> and <row, other>.
template <class Isa, typename T>
LCW_INLINE std::pair<double, double> squares(const T* row, const T* other, int64_t m) {
  return dots<Isa>(row, row, other, m);
}

// Writes factor (g - share row) to `out`, which may be `g` itself.
template <class Isa, typename T>
LCW_INLINE void take_off(const T* row, T share, T factor, int64_t m, const T* g, T* out) {
  for (int64_t i = 0; i < m; ++i) out[i] = (g[i] - share * row[i]) * factor;
}

// The rows of a layer in which every unit is given by a vector v of any norm (in hypersphere/rows.h, by its angles).
// `make` writes v / |v| and stores |v| in `kept` for `backward`.
template <typename T>
struct VectorRows {
  Source<T> weight;
  int64_t m;
  const T* scale = nullptr;
  Target<T> grad_weight = {}, grad_scale = {};

  int64_t kept() const { return slack<T>; }

  template <class Isa>
  LCW_INLINE void make(int64_t unit, T* kept, T* out) const {
    const double length =
        compiled<Isa, normalize_row<Isa, T>>(weight.template read<Isa>(unit * m, m, out), m, T(1), out);
    std::memcpy(kept, &length, sizeof length);
  }

  // `g` is dL/dw, the gradient with respect to w = s v / |v|; it is overwritten.
  template <class Isa>
  LCW_INLINE void backward(int64_t unit, T* kept, const T* direction, T* g) const {
    double length;
    std::memcpy(&length, kept, sizeof length);
    const T along = T(compiled<Isa, normalized_backward_row<Isa, T>>(direction, length, double(scale[unit]), m, g));
    grad_scale.template write<Isa>(&along, unit, 1);
    grad_weight.template write<Isa>(g, unit * m, m);
  }
};

void check_normalised(const Tensor& weight, const Tensor& scale);

// s v / |v| of every row
Tensor normalize_scale(Tensor weight, Tensor scale);

}  // namespace lcw_ops
