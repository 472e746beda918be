// Rows of unit length from their angles, and the gradient of the angles; formulas and cost are in rows.h.
#include "../units.h"
#include "rows.h"

namespace lcw_ops {

Tensor hypersphere_direction(Tensor angles) {
  STD_TORCH_CHECK(
      angles.dim() == 2 && angles.is_cpu(),
      "hypersphere_direction: angles must have two dimensions, (n, m-1), and be on the CPU; call lcw_ops.functional");
  angles = as_contiguous(angles);
  const int64_t n = angles.size(0), m = angles.size(1) + 1;
  Tensor result = new_large(angles, {n, m});
  with_computed(angles, [&](auto number) {
    using T = decltype(number);
    const AngleRows<T> rows{source<T>(angles), m};
    const Target<T> out = target<T>(result);
    for_each_unit(n, m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      Buffer<T> kept(rows.kept()), direction(padded<T>(m));
      for (int64_t unit = begin; unit < end; ++unit) {
        rows.template make<decltype(isa)>(unit, kept.data(), direction.data());
        out.template write<decltype(isa)>(direction.data(), unit * m, m);
      }
    });
  });
  return result;
}

namespace {

Tensor hypersphere_direction_backward(Tensor grad_direction, Tensor angles) {
  STD_TORCH_CHECK(
      angles.dim() == 2 && angles.is_cpu() && fits(grad_direction, angles, {angles.size(0), angles.size(1) + 1}),
      "hypersphere_direction_backward: grad_direction (n, m) and angles (n, m-1) do not fit; call lcw_ops.functional");
  angles = as_contiguous(angles), grad_direction = as_contiguous(grad_direction);
  Tensor result = new_large(angles, angles.sizes());
  if (result.numel() == 0) return result;
  with_computed(angles, [&](auto number) {
    using T = decltype(number);
    const AngleRows<T> rows{source<T>(angles), angles.size(1) + 1, target<T>(result)};
    backward_rows(rows, source<T>(grad_direction), angles.size(0));
  });
  return result;
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("hypersphere_direction.cpp", TORCH_BOX(&lcw_ops::hypersphere_direction));
  m.impl("hypersphere_direction_backward.cpp", TORCH_BOX(&lcw_ops::hypersphere_direction_backward));
}
