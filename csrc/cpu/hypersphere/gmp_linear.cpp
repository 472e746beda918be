// GmP's linear layer: y = r act(X u^T + lambda), with the rows u given by their angles (rows.h). X is the input of m
// numbers for each of M samples; r and lambda are the radius and location of a unit.
//
// With few samples, the layer takes a few units at a time. It makes their rows in the nearest caches, multiplies them
// with all samples, and drops them. Backward makes the rows again and passes their gradient to the recurrence of the
// angles in the same caches. So the layer reads its angles twice and writes their gradient: 12 bytes per float32 angle
// instead of 32. With more samples, it makes the rows once and multiplies them by our own matmul or torch's, whichever
// is faster (blas/matmul.h).
#include <optional>
#include <tuple>
#include <vector>

#include "../blas/layer_products.h"
#include "../units.h"
#include "rows.h"

namespace lcw_ops {
namespace {

// The most samples for which rows are made inside the product. With more samples, making the rows twice costs more than
// keeping them from forward to backward, although they are as large as the weight.
constexpr int64_t few_samples = 32;

// The caller reads it to decide whether to keep the direction.
int64_t gmp_linear_few_samples() { return few_samples; }

// Turns the gradients (n, m) of the rows into the gradients (n, m-1) of the angles, in the same memory: the system
// clears every page of new memory, which costs more than the pass itself. Each row's result lies nearer to the start of
// the memory than its input. A result that would overwrite numbers that another thread has yet to read is kept until
// all threads are done.
template <typename T>
void backward_in_place(AngleRows<T> rows, const Tensor& grad, int64_t n) {
  const int64_t m = rows.m, parts = std::max<int64_t>(1, std::min<int64_t>(n, stable::get_num_threads()));
  rows.grad_angles = Target<T>{grad.mutable_data_ptr(), grad.scalar_type()};
  const Source<T> in = source<T>(grad);
  const auto first_of = [=](int64_t part) { return n * part / parts; };
  std::vector<Buffer<T>> waiting;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = first_of(part), early = (first * m + m - 2) / (m - 1) - first;
    waiting.emplace_back(std::min(early, first_of(part + 1) - first) * (m - 1) + slack<T>);
  }
  Buffer<T>* early = waiting.data();
  for_each_part(parts, 1, [=](auto isa, int64_t first_part, int64_t last_part) LCW_LAMBDA_INLINE {
    using Isa = decltype(isa);
    Buffer<T> kept(rows.kept()), direction(padded<T>(m)), g(padded<T>(m));
    for (int64_t part = first_part; part < last_part; ++part)
      for (int64_t unit = first_of(part); unit < first_of(part + 1); ++unit) {
        rows.template make<Isa>(unit, kept.data(), direction.data());
        const T* row = in.template read<Isa>(unit * m, m, g.data());
        if (row != g.data()) std::copy(row, row + m, g.data());
        std::fill(g.data() + m, g.data() + padded<T>(m), T(0));
        if (unit * (m - 1) >= first_of(part) * m) {
          rows.template backward<Isa>(unit, kept.data(), direction.data(), g.data());
          continue;
        }
        rows.template backward_in<Isa>(kept.data(), g.data());
        std::copy(g.data(), g.data() + m - 1, early[part].data() + (unit - first_of(part)) * (m - 1));
      }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t unit = first_of(part); unit < first_of(part + 1) && unit * (m - 1) < first_of(part) * m; ++unit)
      rows.grad_angles.template write<Portable>(
          early[part].data() + (unit - first_of(part)) * (m - 1), unit * (m - 1), m - 1);
}

// The rest of the layer after q = x u^T: z = q + location, a = act(z), y = scale a + bias. `location` and `bias` may be
// nullptr.
template <typename T>
struct Epilogue {
  const T *location, *scale, *bias;
  bool relu;

  LCW_INLINE T activate(T product, int64_t unit) const {
    const T z = location ? product + location[unit] : product;
    // A NaN stays NaN.
    return relu && z < T(0) ? T(0) : z;
  }
  LCW_INLINE T finish(T activated, int64_t unit) const {
    const T y = scale[unit] * activated;
    return bias ? y + bias[unit] : y;
  }
};

// Adds the sums of the other threads, in order.
template <typename T>
void add_parts(const T* partial, int64_t parts, int64_t count, T* sum) {
  if (parts == 0) return;
  for_each_part(count, least_elements, [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sum[i] += partial[part * count + i];
  });
}

// The layer for few samples. It takes units in blocks whose rows fit the nearest caches.
template <typename T>
struct FewSamples {
  AngleRows<T> rows;
  int64_t samples, n, m;

  // Writes y and, if it has a target, act(z), from x (samples, m).
  void forward(const T* x, const Epilogue<T>& epilogue, const Target<T>& y, const Target<T>& activated) const {
    // `multiply_by_rows` multiplies samples by four rows at a time, but the last of an odd number of samples by eight.
    const int64_t units = samples % 2 ? 8 : 4;
    const int64_t blocks = (n + units - 1) / units;
    for_each_unit(blocks, units * m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> kept(rows.kept()), block(units * m + slack<T>), products(samples * units);
      for (int64_t j = begin * units; j < std::min(n, end * units); j += units) {
        const int64_t count = std::min(units, n - j);
        for (int64_t u = 0; u < count; ++u) rows.template make<Isa>(j + u, kept.data(), block.data() + u * m);
        Products<Isa, T>::multiply_by_rows(x, block.data(), m, products.data(), units, samples, count, nullptr);
        for (int64_t i = 0; i < samples; ++i) {
          T* row = products.data() + i * units;
          for (int64_t u = 0; u < count; ++u) row[u] = epilogue.activate(row[u], j + u);
          if (activated) activated.template write<Isa>(row, i * n + j, count);
          for (int64_t u = 0; u < count; ++u) row[u] = epilogue.finish(row[u], j + u);
          y.template write<Isa>(row, i * n + j, count);
        }
      }
    });
  }

  // Computes dX from grad_product = dL/d(x u^T), unless grad_x is nullptr, and the gradients of the angles from
  // dL/du = grad_rows^T x, unless grad_rows is nullptr.
  void backward(const T* x, const T* grad_product, const T* grad_rows, T* grad_x) const {
    // Each thread sums its own dX. All sums together are no larger than the weight, and they are added in order.
    const int64_t most = std::max<int64_t>(1, n / samples), worthwhile = std::max<int64_t>(1, n * m / least_elements);
    const int64_t parts = std::min({int64_t(stable::get_num_threads()), most, worthwhile});
    Buffer<T> sums(grad_x ? (parts - 1) * samples * m : 0);
    T* partial = sums.data();
    for_each_part(parts, 1, [=, *this](auto isa, int64_t first_part, int64_t last_part) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      // The height of two tiles of a product.
      constexpr int64_t units = Isa::accumulators;
      const int64_t stride = padded<T>(m);
      Buffer<T> kept(rows.kept()), direction(units * stride), g(units * stride);
      for (int64_t part = first_part; part < last_part; ++part) {
        T* out = part == 0 ? grad_x : partial + (part - 1) * samples * m;
        const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
        for (int64_t j = begin; j < end; j += units) {
          const int64_t count = std::min(units, end - j);
          if (grad_rows)
            multiply_evenly<Isa, T>(
                {grad_rows + j, 1, n, x, m, g.data(), stride, count, m, samples, false, nullptr, nullptr, true});
          // Make each row just before its backward, which then finds the row's numbers in the nearest cache.
          for (int64_t u = 0; u < count; ++u) {
            T *row = direction.data() + u * stride, *gradient = g.data() + u * stride;
            rows.template make<Isa>(j + u, kept.data(), row);
            if (!grad_rows) continue;
            std::fill(gradient + m, gradient + stride, T(0));
            rows.template backward<Isa>(j + u, kept.data(), row, gradient);
          }
          if (grad_x)
            multiply_evenly<Isa, T>(
                {grad_product + j, n, 1, direction.data(), stride, out, m, samples, m, count, j > begin, nullptr,
                 nullptr, true});
        }
      }
    });
    if (grad_x) add_parts(partial, parts - 1, samples * m, grad_x);
  }
};

void check_gmp(const Tensor& x, const Tensor& angles, const Tensor& radius, const Tensor& location) {
  STD_TORCH_CHECK(
      x.dim() == 2 && angles.dim() == 2 && x.is_cpu() && fits(angles, x, {angles.size(0), x.size(1) - 1}) &&
          fits(radius, x, {angles.size(0)}) && fits(location, x, {angles.size(0)}),
      "gmp_linear: x (M, m), angles (n, m-1), radius and location (n,) do not fit; call lcw_ops.functional.gmp_linear");
}

// Returns y = r act(x u^T + lambda), act(x u^T + lambda) and u. The last two have no elements if they are not kept.
std::tuple<Tensor, Tensor, Tensor> gmp_linear(
    Tensor x, Tensor angles, Tensor radius, Tensor location, bool relu, bool deterministic, bool keep_activated,
    bool keep_direction) {
  check_gmp(x, angles, radius, location);
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  const int64_t samples = x.size(0), n = angles.size(0), m = x.size(1);
  x = as_contiguous(x), angles = as_contiguous(angles);
  Tensor y = new_large(x, {samples, n});
  Tensor activated = keep_activated ? new_large(y, y.sizes()) : no_elements(x);
  const bool is_few = samples <= few_samples;
  Tensor direction = keep_direction || (!is_few && n > 0) ? hypersphere_direction(angles) : no_elements(x);
  if (samples == 0 || n == 0) return {y, activated, keep_direction ? direction : no_elements(x)};
  Tensor product = y;
  if (!is_few) {
    const Multiplier by = choose(Pass::plain_forward, x.scalar_type(), {samples, n, m}, deterministic);
    product = multiply_forward(by, x, direction, location);
  }
  with_computed(x, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scale(radius), shift(location);
    const Epilogue<T> epilogue{is_few ? shift.data() : nullptr, scale.data(), nullptr, relu};
    const Target<T> out = target<T>(y), kept = target<T>(activated);
    if (is_few) {
      const FewSamples<T> layer{{source<T>(angles), m}, samples, n, m};
      return layer.forward(Wide<T>(x).data(), epilogue, out, kept);
    }
    const Source<T> in = source<T>(product);
    for_each_part(samples, grain_of(n), [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> row(n);
      for (int64_t i = begin; i < end; ++i) {
        const T* q = in.template read<Isa>(i * n, n, row.data());
        for (int64_t j = 0; j < n; ++j) row[j] = epilogue.activate(q[j], j);
        if (kept) kept.template write<Isa>(row.data(), i * n, n);
        for (int64_t j = 0; j < n; ++j) row[j] = epilogue.finish(row[j], j);
        out.template write<Isa>(row.data(), i * n, n);
      }
    });
  });
  return {y, activated, keep_direction ? direction : no_elements(x)};
}

// The gradients of x, angles, radius and location. A gradient that is not needed has no elements. An empty `direction`
// is computed again.
std::tuple<Tensor, Tensor, Tensor, Tensor> gmp_linear_backward(
    Tensor grad_output, Tensor x, Tensor angles, Tensor radius, Tensor activated, Tensor direction, bool relu,
    bool deterministic, bool needs_x, bool needs_angles, bool needs_radius, bool needs_location) {
  check_gmp(x, angles, radius, radius);
  const int64_t samples = x.size(0), n = angles.size(0), m = x.size(1);
  const bool reads_activated = relu || needs_radius;
  STD_TORCH_CHECK(
      fits(grad_output, x, {samples, n}) && (!reads_activated || fits(activated, x, {samples, n})) &&
          (direction.numel() == 0 || fits(direction, x, {n, m})),
      "gmp_linear_backward: grad_output or a tensor kept by forward does not fit; call lcw_ops.functional.gmp_linear");
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  if (samples == 0 || n == 0)
    return {
        zeros_if(needs_x, x), zeros_if(needs_angles, angles), zeros_if(needs_radius, radius),
        zeros_if(needs_location, radius)};
  x = as_contiguous(x), angles = as_contiguous(angles), grad_output = as_contiguous(grad_output);
  activated = as_contiguous(activated), direction = as_contiguous(direction);
  const bool is_few = samples <= few_samples;
  Tensor grad_x = needs_x ? new_large(x, x.sizes()) : no_elements(x);
  // With more samples, the gradient of the angles takes the memory of the rows' gradient, which has one number per row
  // more. With short rows, that number would waste a large part of the memory.
  const bool is_in_place = !is_few && m >= 64;
  Tensor grad_angles = needs_angles && !is_in_place ? new_large(angles, angles.sizes()) : no_elements(x);
  Tensor grad_radius = needs_radius ? allocate(radius, {n}) : no_elements(x);
  Tensor grad_location = needs_location ? allocate(radius, {n}) : no_elements(x);
  with_computed(x, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scale(radius);
    const Source<T> kept = reads_activated ? source<T>(activated) : Source<T>{nullptr, x.scalar_type()};
    const UnitGradients<T> gradients{samples, n, source<T>(grad_output), kept, scale.data(), relu};
    const Target<T> with_activated = target<T>(grad_radius), of_product = target<T>(grad_location);
    const bool needs_products = needs_x || needs_angles;
    const AngleRows<T> rows{source<T>(angles), m, target<T>(grad_angles)};
    if (is_few) {
      Buffer<T> grad_product(needs_products ? samples * n : 0);
      T* dz = needs_products ? grad_product.data() : nullptr;
      gradients.compute({dz, scalar_type<T>}, with_activated, of_product, {});
      if (!needs_products) return;
      const FewSamples<T> layer{rows, samples, n, m};
      const Wide<T> wide(x);
      // A row with a single element has no angles.
      const T* grad_rows = needs_angles && m > 1 ? dz : nullptr;
      return computed_in<T>(grad_x, [&](T* out) { layer.backward(wide.data(), dz, grad_rows, out); });
    }
    Tensor dz = needs_products ? new_large(grad_output, {samples, n}) : no_elements(x);
    gradients.compute(target<T>(dz), with_activated, of_product, {});
    const auto by = [&](Pass pass) { return choose(pass, x.scalar_type(), {samples, n, m}, deterministic); };
    if (needs_x) {
      if (direction.numel() == 0) direction = hypersphere_direction(angles);
      grad_x = multiply_grad_input(by(Pass::plain_grad_input), dz, direction);
    }
    if (!needs_angles || m == 1) return;
    const Tensor grad_rows = multiply_grad_weight(by(Pass::plain_grad_weight), dz, x);
    if (!is_in_place) return backward_rows(rows, source<T>(grad_rows), n);
    backward_in_place(rows, grad_rows, n);
    Tensor flat = stable::view(grad_rows, {n * m});
    grad_angles = stable::view(stable::narrow(flat, 0, 0, n * (m - 1)), {n, m - 1});
  });
  return {grad_x, grad_angles, grad_radius, grad_location};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("gmp_linear.cpp", TORCH_BOX(&lcw_ops::gmp_linear));
  m.impl("gmp_linear_backward.cpp", TORCH_BOX(&lcw_ops::gmp_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CompositeExplicitAutograd, m) {
  m.impl("gmp_linear_few_samples.cpp", TORCH_BOX(&lcw_ops::gmp_linear_few_samples));
}
