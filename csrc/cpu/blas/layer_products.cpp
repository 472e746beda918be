#include "layer_products.h"

#include "../widening.h"
#include "gemm.h"

namespace lcw_ops {

Tensor multiply_forward(Multiplier by, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (by == Multiplier::torch) return linear(x, weight, bias);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  Tensor y = new_large(x, {samples, n});
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    const WideOrNothing<Computed<E>> wide_bias(bias);
    computed<E>(y, [&](Computed<E>* out) {
      multiply_on_threads<E>({data<E>(x), m, 1}, {data<E>(weight), 1, m}, samples, n, m, wide_bias.data(), out, n);
    });
  });
  return y;
}

Tensor multiply_grad_input(Multiplier by, const Tensor& grad, const Tensor& weight) {
  if (by == Multiplier::torch) return linear(grad, stable::transpose(weight, 0, 1));
  const int64_t samples = grad.size(0), n = weight.size(0), m = weight.size(1);
  Tensor result = new_large(grad, {samples, m});
  with_elements(grad, [&](auto element) {
    using E = decltype(element);
    computed<E>(result, [&](Computed<E>* out) {
      multiply_on_threads<E>({data<E>(grad), n, 1}, {data<E>(weight), m, 1}, samples, m, n, nullptr, out, m);
    });
  });
  return result;
}

Tensor multiply_grad_weight(Multiplier by, const Tensor& grad, const Tensor& x) {
  if (by == Multiplier::torch) return linear(stable::transpose(grad, 0, 1), stable::transpose(x, 0, 1));
  const int64_t samples = grad.size(0), n = grad.size(1), m = x.size(1);
  Tensor result = new_large(grad, {n, m});
  with_elements(grad, [&](auto element) {
    using E = decltype(element);
    computed<E>(result, [&](Computed<E>* out) {
      multiply_on_threads<E>({data<E>(grad), 1, n}, {data<E>(x), m, 1}, n, m, samples, nullptr, out, m);
    });
  });
  return result;
}

Multiplier choose(Pass pass, ScalarType type, LayerSize size, bool deterministic) {
  return choose_multiplier(pass, type, size, deterministic, [=](LayerSize like, int64_t count) -> Trial {
    const Tensor samples_by_m = make_operand(type, like.samples, like.m);
    const Tensor grad = make_operand(type, like.samples, like.n);
    if (pass == Pass::plain_grad_weight) return [=](Multiplier by) { multiply_grad_weight(by, grad, samples_by_m); };
    InTurns weights(make_operands(type, like.n, like.m, count));
    if (pass == Pass::plain_forward)
      return [=](Multiplier by) mutable { multiply_forward(by, samples_by_m, weights.next(), std::nullopt); };
    return [=](Multiplier by) mutable { multiply_grad_input(by, grad, weights.next()); };
  });
}

}  // namespace lcw_ops
