// Normalised rows and their gradients; formulas and cost are in rows.h.
#include <tuple>

#include "unnormalised.h"

namespace lcw_ops {

void check_normalised(const Tensor& weight, const Tensor& scale) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.is_cpu() && weight.size(1) >= 1 && fits(scale, weight, {weight.size(0)}),
      "normalize_scale: weight (n, m) and scale (n,) do not fit; call lcw_ops.functional");
}

Tensor normalize_scale(Tensor weight, Tensor scale) {
  check_normalised(weight, scale);
  weight = as_contiguous(weight);
  Tensor result = new_large(weight, weight.sizes());
  with_computed(weight, [&](auto number) {
    using T = decltype(number);
    const Wide<T> wide_scale(scale);
    const T* scales = wide_scale.data();
    const int64_t m = weight.size(1);
    const Source<T> in = source<T>(weight);
    const Target<T> out = target<T>(result);
    for_each_unit(weight.size(0), m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> buffer(in.is_narrow() ? m : 0);
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* row = in.template read<Isa>(unit * m, m, buffer.data());
        // Write directly into the result, unless it has to be rounded.
        T* scaled = in.is_narrow() ? buffer.data() : static_cast<T*>(out.data) + unit * m;
        compiled<Isa, normalize_row<Isa, T>>(row, m, scales[unit], scaled);
        if (in.is_narrow()) out.template write<Isa>(scaled, unit * m, m);
      }
    });
  });
  return result;
}

namespace {

std::tuple<Tensor, Tensor> normalize_scale_backward(Tensor grad_output, Tensor weight, Tensor scale) {
  check_normalised(weight, scale);
  STD_TORCH_CHECK(
      fits(grad_output, weight, {weight.size(0), weight.size(1)}),
      "normalize_scale_backward: grad_output does not fit the weight; call lcw_ops.functional");
  weight = as_contiguous(weight), grad_output = as_contiguous(grad_output);
  Tensor grad_weight = new_large(weight, weight.sizes()), grad_scale = stable::new_empty(scale, scale.sizes());
  with_computed(weight, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scales(scale);
    const int64_t m = weight.size(1);
    const Source<T> in = source<T>(weight), grad = source<T>(grad_output);
    const Target<T> out = target<T>(grad_weight), of_scale = target<T>(grad_scale);
    const UnnormalisedRows<T> ordinary{in, 0, weight.size(0), m, scales.data()};
    const VectorRows<T> any{in, m, scales.data(), out, of_scale};
    for_each_unit(weight.size(0), m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> kept(any.kept()), row(padded<T>(m)), buffer(padded<T>(m));
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* v = in.template read<Isa>(unit * m, m, row.data());
        const T* g = grad.template read<Isa>(unit * m, m, buffer.data());
        T factor;
        T* to = out.is_narrow() ? buffer.data() : static_cast<T*>(out.data) + unit * m;
        if (m > 1 && ordinary.template backward<Isa>(v, unit, g, to, factor, of_scale)) {
          if (out.is_narrow()) out.template write<Isa>(to, unit * m, m);
          continue;
        }
        if (g != buffer.data()) std::copy(g, g + m, buffer.data());
        any.template make<Isa>(unit, kept.data(), row.data());
        any.template backward<Isa>(unit, kept.data(), row.data(), buffer.data());
      }
    });
  });
  return {grad_weight, grad_scale};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("normalize_scale.cpp", TORCH_BOX(&lcw_ops::normalize_scale));
  m.impl("normalize_scale_backward.cpp", TORCH_BOX(&lcw_ops::normalize_scale_backward));
}
