// A linear layer whose weight has the rows w = s v / |v|, computed by products with the unnormalised rows v of V:
//
//   q = X v^T,  y = (s / |v|) q + b;    G = dY^T X,  ds = <G, v> / |v|,  dV = (s / |v|) (G - (ds / |v|) v),
//   dX = ((s / |v|) dY) V
//
// X is the input and Y the output; s and b are a unit's scale and bias. dY, the gradient of the loss, has one column
// per unit, and s / |v| multiplies the unit's column. G is the gradient with respect to w.
//
// Besides the products of a plain layer, each pass reads the weight once more: the forward pass for the norms, the
// backward pass for the norms and dV.
#pragma once

#include <atomic>

#include "../blas/few_samples.h"
#include "../units.h"
#include "rows.h"

namespace lcw_ops {

// The functions of type bool return false if an intermediate number was, or might have been, too large or too small.
// The caller must then start again, with products by normalised rows.
template <typename T>
struct UnnormalisedRows {
  Source<T> weight;
  int64_t samples, n, m;
  const T* scale;

  // The limit of |v|, of 1 / |v| and of |s| / |v|. Within it, each of these factors brings a number at most this much
  // closer to overflow or underflow. A small |s| / |v| does no harm: q can overflow where y does not, but `finish`
  // notices that.
  static constexpr double most = 0x1p16;

  // Writes |v| to `length` and s / |v| to `factor`, or returns false. A non-finite entry of v is accepted: it makes the
  // length and the factor of this row NaN, and affects no other row.
  template <class Isa>
  LCW_INLINE bool measure(const T* row, int64_t unit, double& length, T& factor) const {
    return measure(row, compiled<Isa, square<Isa, T>>(row, m), unit, length, factor);
  }
  bool measure(const T* row, double square, int64_t unit, double& length, T& factor) const {
    const double found = std::sqrt(square);
    const double ratio = double(scale[unit]) / found, size = std::abs(ratio);
    length = found, factor = T(ratio);
    if (found < most && found > 1 / most && (ratio == 0 || (size < most && size > 0x1p-64))) return true;
    constexpr T largest = std::numeric_limits<T>::max();
    if (found == 0 && std::all_of(row, row + m, [](T number) { return number == T(0); })) {
      // A zero row has no direction. Its derivatives are taken as 0, which an infinite length makes them.
      length = std::numeric_limits<double>::infinity(), factor = scale[unit] * T(0);
      return true;
    }
    if (found != found || !(std::abs(scale[unit]) <= largest)) return true;
    if (std::all_of(row, row + m, [](T number) { return std::abs(number) <= largest; })) return false;
    length = std::numeric_limits<double>::quiet_NaN(), factor = T(length);
    return true;
  }

  // From `g`, the gradient with respect to w, computes dv in `out`, ds in `grad_scale` and s / |v| in `factor`. Or
  // returns false, and leaves `out` and `grad_scale` as they were. `row` is v; `out` may be `g`.
  template <class Isa>
  LCW_INLINE bool backward(
      const T* row, int64_t unit, const T* g, T* out, T& factor, const Target<T>& grad_scale) const {
    const auto [square, product] = compiled<Isa, squares<Isa, T>>(row, g, m);
    double length;
    if (!measure(row, square, unit, length, factor)) return false;
    const double along = product / length;
    const T of_scale = T(along), share = T(along / length);
    constexpr T largest = std::numeric_limits<T>::max();
    if (!(std::abs(of_scale) <= largest && std::abs(share) <= largest) &&
        std::all_of(g, g + m, [](T number) { return std::abs(number) <= largest; }) && factor == factor)
      return false;
    compiled<Isa, take_off<Isa, T>>(row, share, factor, m, g, out);
    grad_scale.template write<Isa>(&of_scale, unit, 1);
    return true;
  }

  // Writes s / |v| of every row, or returns false.
  bool measure(T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    for_each_unit(n, m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> buffer(weight.is_narrow() ? m : 0);
      bool ordinary = true;
      double length;
      for (int64_t unit = begin; unit < end; ++unit)
        ordinary &= measure<Isa>(weight.template read<Isa>(unit * m, m, buffer.data()), unit, length, factor[unit]);
      if (!ordinary) *found = false;
    });
    return all;
  }

  // Replaces q by y in `row`, for the sample x and `units` units. The first entries of `row`, `factor` and `bias`
  // belong to unit `first`.
  LCW_INLINE void finish(const T* x, int64_t first, int64_t units, const T* factor, const T* bias, T* row) const {
    int infinite = 0;
    for (int64_t u = 0; u < units; ++u) {
      infinite |= !(std::abs(row[u]) <= std::numeric_limits<T>::max());
      row[u] = factor[u] * row[u] + (bias ? bias[u] : T(0));
    }
    if (infinite) finish_infinite(x, first, units, factor, bias, row);
  }

  // Where y came out infinite or NaN, computes it again in float64 and scaled by `small`: perhaps q overflowed, but y
  // need not. If x itself is not finite, `row` stays as it is.
  LCW_NOINLINE void finish_infinite(
      const T* x, int64_t first, int64_t units, const T* factor, const T* bias, T* row) const {
    for (int64_t k = 0; k < m; ++k)
      if (!(std::abs(x[k]) <= std::numeric_limits<T>::max())) return;
    constexpr double small = 0x1p-40;
    Buffer<T> buffer(weight.is_narrow() ? m : 0);
    for (int64_t u = 0; u < units; ++u) {
      if (std::abs(row[u]) <= std::numeric_limits<T>::max()) continue;
      const T* v = weight.template read<Portable>((first + u) * m, m, buffer.data());
      double sum = 0;
      for (int64_t k = 0; k < m; ++k) sum += small * double(x[k]) * double(v[k]);
      row[u] = T(double(factor[u]) / small * sum + (bias ? double(bias[u]) : 0));
    }
  }

  // Computes y from x (samples, m).
  bool forward_few(const T* x, const T* bias, const Target<T>& y) const {
    std::atomic<bool> all{true}, *found = &all;
    // `multiply_by_rows` multiplies samples by four rows at a time, but the last of an odd number of samples by eight.
    const int64_t units = samples % 2 ? 8 : 4;
    const int64_t blocks = (n + units - 1) / units;
    for_each_unit(blocks, units * m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> block(weight.is_narrow() ? units * m : 0), products(samples * units);
      double length[8];
      T factor[8];
      bool ordinary = true;
      for (int64_t j = begin * units; j < std::min(n, end * units); j += units) {
        const int64_t count = std::min(units, n - j);
        const T* rows = weight.template read<Isa>(j * m, count * m, block.data());
        for (int64_t u = 0; u < count; ++u) ordinary &= measure<Isa>(rows + u * m, j + u, length[u], factor[u]);
        Products<Isa, T>::multiply_by_rows(x, rows, m, products.data(), units, samples, count, nullptr);
        for (int64_t i = 0; i < samples; ++i) {
          T* row = products.data() + i * units;
          finish(x + i * m, j, count, factor, bias ? bias + j : nullptr, row);
          y.template write<Isa>(row, i * n + j, count);
        }
      }
      if (!ordinary) *found = false;
    });
    return all;
  }

  // Replaces q, which `y` holds on entry, by y.
  void forward_many(const Source<T>& x, const T* factor, const T* bias, const Target<T>& y) const {
    for_each_part(samples, grain_of(n), [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      const Source<T> product{y.data, y.type};
      Buffer<T> row(n), sample(x.is_narrow() ? m : 0);
      for (int64_t i = begin; i < end; ++i) {
        T* q = const_cast<T*>(product.template read<Isa>(i * n, n, row.data()));
        finish(x.template read<Isa>(i * m, m, sample.data()), 0, n, factor, bias, q);
        if (y.is_narrow()) y.template write<Isa>(q, i * n, n);
      }
    });
  }

  // From X and dY computes dV, ds, and s / |v| of every row.
  template <typename E>
  bool backward_few(const E* x, const E* grad, T* grad_weight, const Target<T>& grad_scale, T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    FewSamplesGradients<E>{samples, n, m}.grad_weight(
        grad, x, m, nullptr, grad_weight, [=, *this](auto isa, int64_t first, int64_t last) LCW_LAMBDA_INLINE {
          using Isa = decltype(isa);
          Buffer<T> buffer(weight.is_narrow() ? m : 0);
          bool ordinary = true;
          for (int64_t unit = first; unit < last; ++unit) {
            const T* v = weight.template read<Isa>(unit * m, m, buffer.data());
            T* g = grad_weight + unit * m;
            ordinary &= backward<Isa>(v, unit, g, g, factor[unit], grad_scale);
          }
          if (!ordinary) *found = false;
        });
    return all;
  }

  // Replaces G by dV, and computes ds and s / |v| of every row.
  bool backward_many(const Target<T>& g, const Target<T>& grad_scale, T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    for_each_unit(n, m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      const Source<T> in{g.data, g.type};
      Buffer<T> row(weight.is_narrow() ? m : 0), buffer(weight.is_narrow() ? m : 0);
      bool ordinary = true;
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* v = weight.template read<Isa>(unit * m, m, row.data());
        T* sums = const_cast<T*>(in.template read<Isa>(unit * m, m, buffer.data()));
        ordinary = backward<Isa>(v, unit, sums, sums, factor[unit], grad_scale);
        if (!ordinary) break;
        if (g.is_narrow()) g.template write<Isa>(sums, unit * m, m);
      }
      if (!ordinary) *found = false;
    });
    return all;
  }
};

}  // namespace lcw_ops
