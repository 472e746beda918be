// The linear layer with normalised rows: y = X (s v / |v|)^T + b.
//
// It multiplies by the unnormalised rows (unnormalised.h) if there are few samples or, in the forward pass, few samples
// compared with the inputs of a unit. Backward also does so for more samples, except in float16.
#include <optional>
#include <tuple>
#include <type_traits>

#include "../blas/layer_products.h"
#include "unnormalised.h"

namespace lcw_ops {
namespace {

// The most samples for which our own products multiply by the unnormalised rows.
constexpr int64_t few_unnormalised = 64;

// Whether the product takes unnormalised rows. It does not for m = 1, because the gradient of a row with a single
// element must be exactly 0. With more samples than few_unnormalised, the products are rounded to x's dtype and then
// scaled, for which the range of float16 is too small.
bool is_unnormalised(const Tensor& x) {
  const int64_t samples = x.size(0), m = x.size(1);
  return m > 1 && (samples <= few_unnormalised || (samples <= m / 4 && x.scalar_type() != ScalarType::Half));
}

// The scale may have torch's shape (n, 1), so that autograd need not record a view.
void check_weight_norm(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.is_cpu() && weight.size(1) >= 1 &&
          (fits(scale, weight, {weight.size(0)}) || fits(scale, weight, {weight.size(0), int64_t(1)})),
      "weight_norm_linear: weight (n, m) and scale (n,) do not fit; call lcw_ops.functional.weight_norm_linear");
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_cpu() && x.scalar_type() == weight.scalar_type() && x.size(1) == weight.size(1),
      "weight_norm_linear: x (M, m) and weight (n, m) do not fit; call lcw_ops.functional.weight_norm_linear");
}

Tensor as_vector(const Tensor& scale) { return scale.dim() == 1 ? scale : stable::view(scale, {scale.size(0)}); }

// y = x (s v / |v|)^T + b
Tensor weight_norm_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, bool deterministic) {
  check_weight_norm(x, weight, scale);
  const int64_t samples = x.size(0), n = weight.size(0), m = x.size(1);
  STD_TORCH_CHECK(
      !bias || fits(*bias, x, {n}),
      "weight_norm_linear: the bias does not fit; call lcw_ops.functional.weight_norm_linear");
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  if (samples == 0 || n == 0) return stable::new_empty(x, {samples, n});
  x = as_contiguous(x), weight = as_contiguous(weight), scale = as_contiguous(scale);
  const auto multiply = [&](const Tensor& rows, const std::optional<Tensor>& add) {
    const Multiplier by = choose(Pass::plain_forward, x.scalar_type(), {samples, n, m}, deterministic);
    return multiply_forward(by, x, rows, add);
  };
  if (is_unnormalised(x)) {
    Tensor y = no_elements(x);
    bool is_done = false;
    with_computed(x, [&](auto number) {
      using T = decltype(number);
      const Wide<T> factor(scale);
      const WideOrNothing<T> shift(bias);
      const UnnormalisedRows<T> rows{source<T>(weight), samples, n, m, factor.data()};
      if (samples <= few_unnormalised) {
        y = new_large(x, {samples, n});
        is_done = rows.forward_few(Wide<T>(x).data(), shift.data(), target<T>(y));
        return;
      }
      Buffer<T> factors(n);
      if (!rows.measure(factors.data())) return;
      y = multiply(weight, std::nullopt);
      rows.forward_many(source<T>(x), factors.data(), shift.data(), target<T>(y));
      is_done = true;
    });
    if (is_done) return y;
  }
  return multiply(normalize_scale(weight, as_vector(scale)), bias);
}

// Computes the gradients in one of three ways: `few`, `many` or `normalised`. `few` and `many` multiply by the
// unnormalised rows. Each of them returns false if the numbers do not allow that; the next one then starts again.
template <typename T>
struct LinearBackward {
  const Tensor &grad_output, &x, &weight, &scale;
  bool deterministic, needs_x, needs_rows, needs_bias;
  Tensor &grad_x, &grad_weight, &grad_scale, &grad_bias;
  int64_t samples = x.size(0), n = weight.size(0), m = x.size(1);
  Wide<T> scales{scale};
  UnnormalisedRows<T> rows{source<T>(weight), samples, n, m, scales.data()};
  Buffer<T> factors{n};  // s / |v|

  // Up to 64 samples, by our own products.
  bool few() {
    if (samples > few_unnormalised || !is_unnormalised(x)) return false;
    bool is_ordinary = true;
    with_elements(x, [&](auto element) {
      using E = decltype(element);
      if constexpr (std::is_same_v<Computed<E>, T>) {
        if (needs_rows) {
          grad_weight = new_large(weight, weight.sizes());
          computed<E>(grad_weight, [&](T* out) {
            is_ordinary =
                rows.backward_few(data<E>(x), data<E>(grad_output), out, target<T>(grad_scale), factors.data());
          });
        } else if (needs_x) {
          is_ordinary = rows.measure(factors.data());
        }
        if (!is_ordinary || (!needs_x && !needs_bias)) return;
        Buffer<T> scaled(needs_x ? samples * n : 0);
        const bool is_finite = scale_grad({needs_x ? scaled.data() : nullptr, scalar_type<T>});
        if (!needs_x) return;
        if (!is_finite) return multiply_by_normalised();
        grad_x = new_large(x, x.sizes());
        computed<E>(grad_x, [&](T* out) {
          FewSamplesGradients<E>{samples, n, m}.multiply_by_parameter(scaled.data(), data<E>(weight), out, m);
        });
      }
    });
    return is_ordinary;
  }

  // Any number of samples, by the fastest products. The range of float16 is too small for products with unnormalised
  // rows.
  bool many() {
    if (x.scalar_type() == ScalarType::Half || m == 1) return false;
    if (needs_rows) {
      // dV takes the memory of the rows' gradient, where each row is read before it is written: the system clears every
      // page of new memory, which costs more than the pass itself.
      make_grad_rows();
      if (!rows.backward_many(target<T>(grad_weight), target<T>(grad_scale), factors.data())) return false;
    } else if (needs_x && !rows.measure(factors.data())) {
      return false;
    }
    if (!needs_x) return sum_bias(), true;
    Tensor scaled = new_large(grad_output, {samples, n});
    if (scale_grad(target<T>(scaled)))
      grad_x = multiply_grad_input(choose_for(Pass::plain_grad_input), scaled, weight);
    else
      multiply_by_normalised();
    return true;
  }

  // Any numbers, with the rows normalised first.
  void normalised() {
    if (needs_rows) {
      make_grad_rows();
      const VectorRows<T> any{source<T>(weight), m, scales.data(), target<T>(grad_weight), target<T>(grad_scale)};
      backward_rows(any, source<T>(grad_weight), n);
    }
    sum_bias();
    if (needs_x) multiply_by_normalised();
  }

 private:
  Multiplier choose_for(Pass pass) const { return choose(pass, x.scalar_type(), {samples, n, m}, deterministic); }

  void make_grad_rows() { grad_weight = multiply_grad_weight(choose_for(Pass::plain_grad_weight), grad_output, x); }

  void multiply_by_normalised() {
    const Multiplier by = choose_for(Pass::plain_grad_input);
    grad_x = multiply_grad_input(by, grad_output, normalize_scale(weight, as_vector(scale)));
  }

  UnitGradients<T> gradients(const T* factor) const {
    return {samples, n, source<T>(grad_output), {nullptr, x.scalar_type()}, factor, false};
  }

  void sum_bias() {
    if (needs_bias) gradients(scales.data()).compute({}, {}, {}, target<T>(grad_bias));
  }

  // Writes (s / |v|) dY to `scaled` and, in the same pass, the bias's gradient. Returns false if a product overflowed.
  bool scale_grad(const Target<T>& scaled) {
    std::atomic<bool> overflowed{false};
    UnitGradients<T> by_lengths = gradients(factors.data());
    by_lengths.overflowed = &overflowed;
    by_lengths.compute(scaled, {}, {}, target<T>(grad_bias));
    return !overflowed;
  }
};

// The gradients of x, weight, scale, which has the shape (n,) or (n, 1), and bias. A gradient that is not needed has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> weight_norm_linear_backward(
    Tensor grad_output, Tensor x, Tensor weight, Tensor scale, bool deterministic, bool needs_x, bool needs_weight,
    bool needs_scale, bool needs_bias) {
  check_weight_norm(x, weight, scale);
  const int64_t samples = x.size(0), n = weight.size(0);
  STD_TORCH_CHECK(
      fits(grad_output, x, {samples, n}),
      "weight_norm_linear_backward: grad_output does not fit; call lcw_ops.functional.weight_norm_linear");
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  if (samples == 0 || n == 0)
    return {
        zeros_if(needs_x, x), zeros_if(needs_weight, weight), zeros_if(needs_scale, scale),
        needs_bias ? stable::new_zeros(scale, {n}) : no_elements(scale)};
  x = as_contiguous(x), weight = as_contiguous(weight), scale = as_contiguous(scale);
  grad_output = as_contiguous(grad_output);
  const bool needs_rows = needs_weight || needs_scale;
  Tensor grad_x = no_elements(x), grad_weight = no_elements(x);
  Tensor grad_scale = needs_rows ? allocate(scale, scale.sizes()) : no_elements(x);
  Tensor grad_bias = needs_bias ? allocate(scale, {n}) : no_elements(x);
  with_computed(x, [&](auto number) {
    LinearBackward<decltype(number)> pass{grad_output, x,          weight, scale,       deterministic, needs_x,
                                          needs_rows,  needs_bias, grad_x, grad_weight, grad_scale,    grad_bias};
    if (!pass.few() && !pass.many()) pass.normalised();
  });
  return {grad_x, needs_weight ? grad_weight : no_elements(x), needs_scale ? grad_scale : no_elements(x), grad_bias};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("weight_norm_linear.cpp", TORCH_BOX(&lcw_ops::weight_norm_linear));
  m.impl("weight_norm_linear_backward.cpp", TORCH_BOX(&lcw_ops::weight_norm_linear_backward));
}
