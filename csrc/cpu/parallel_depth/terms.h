// The terms that a sweep adds in every layer. The symbols are those of parallel_depth.cpp.
#pragma once

#include "../vector_math.h"

namespace lcw_ops::parallel_depth {

// Computes out = beta act(a) or, if is_derivative, beta act'(a), for rows of a = product + bias + inputs with the same
// bias. `bias` and `inputs` may be nullptr, and `out` may be `product`.
template <bool is_derivative, typename T>
LCW_INLINE void activate_rows(
    Activation kind, T beta, const T* product, const T* bias, const T* inputs, int64_t rows, int64_t width, T* out) {
  if (inputs) {
#pragma GCC ivdep
    for (int64_t i = 0; i < rows * width; ++i) out[i] = product[i] + inputs[i];
    product = out;
  }
  with_activation(kind, [&](auto activation) LCW_LAMBDA_INLINE {
    using A = decltype(activation);
    const auto apply = [beta](T a) LCW_LAMBDA_INLINE {
      const T y = A::value(a);
      return beta * (is_derivative ? A::slope(a, y) : y);
    };
    if (!bias) {
#pragma GCC ivdep
      for (int64_t i = 0; i < rows * width; ++i) out[i] = apply(product[i]);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = product + r * width;
      T* to = out + r * width;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) to[i] = apply(from[i] + bias[i]);
    }
  });
}

// The terms of a forward sweep: beta_l act(product_l + bias_l + inputs_l). A missing argument is nullptr.
template <typename T>
struct Activated {
  int64_t rows, width;
  const T *product, *bias, *inputs, *beta;
  int64_t bias_stride, beta_stride;
  Activation activation;

  // Returns the terms of `count` rows from `first` on, which it computes in `out`. Without a product it returns `out`
  // as it is: zeros.
  template <bool is_derivative = false>
  LCW_INLINE const T* at(int64_t layer, int64_t first, int64_t count, T* out) const {
    if (!product) return out;
    const int64_t at = (layer * rows + first) * width;
    activate_rows<is_derivative>(
        activation, beta[layer * beta_stride], product + at, bias ? bias + layer * bias_stride : nullptr,
        inputs ? inputs + at : nullptr, count, width, out);
    return out;
  }

  template <typename Carried>
  LCW_INLINE void after_step(int64_t, int64_t, int64_t, const Carried*) const {}
};

// The terms of an adjoint sweep: product_l + outside_l. If there is a slope, scaled_l = slope_l g_l is computed after
// each step.
template <typename T>
struct Summed {
  int64_t rows, width;
  const T *product, *outside, *slope;
  T* scaled;

  // Returns the terms of `count` rows from `first` on: in `out`, or where they are if there is only one term. Without
  // terms it returns `out` as it is: zeros.
  LCW_INLINE const T* at(int64_t layer, int64_t first, int64_t count, T* out) const {
    const int64_t at = (layer * rows + first) * width;
    if (!product && !outside) return out;
    if (!product || !outside) return (product ? product : outside) + at;
    const T *one = product + at, *other = outside + at;
    for (int64_t i = 0; i < count * width; ++i) out[i] = one[i] + other[i];
    return out;
  }

  // `before` holds g_l, the gradients that the layer carries back.
  template <typename Carried>
  LCW_INLINE void after_step(int64_t layer, int64_t first, int64_t count, const Carried* before) const {
    if (!slope) return;
    const T* factor = slope + (layer * rows + first) * width;
    T* out = scaled + (layer * rows + first) * width;
#pragma GCC ivdep
    for (int64_t i = 0; i < count * width; ++i) out[i] = factor[i] * T(before[i]);
  }
};

}  // namespace lcw_ops::parallel_depth
