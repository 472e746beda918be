// Linearly constrained weights (LCW): rows w of zero sum, their gradients, and the whole linear layer.
//
//   centred:  w = u - mean(u), a map that is its own adjoint
//   basis:    w = B v:    w_j = v_j - S / (s (s+1)) for j < m,  w_m = -S / s,  S = sum(v),  s = sqrt(m)
//             B^T g:      g_j - t,  j < m,                      t = sum_{j<m} g_j / (s (s+1)) + g_m / s
//
// u or v is a row of the parameter, and g the gradient of w. T. Kutsuna, arXiv 2403.13833; B is Householder's, as in
// lcw_ops/reference/lcw_linear.py. A row is read twice, the second time from cache, and written once, so the kernels
// are bound by memory. Sums are in float64, so that a row of large mean keeps its digits when the mean is subtracted.
// Rows run in parallel; every sum has a fixed order.
//
// The layer y = X w^T + b multiplies X' = X B by the parameter V itself (n, m), because <B v, x> = <v, B^T x>. In the
// centred form, X' is X minus the mean of each row. In both forms, X' is X minus one number per row, made while X is
// copied for the product. Finding these numbers takes one more pass over X.
//   Y = X' V^T + b        dX = (dY V) B^T        dV = dY^T X'        db = sum of dY's rows
// Each product takes 2 M m n operations for M samples, by our own matmul or torch's, whichever is faster
// (blas/matmul.h). From a dozen samples on it is bound by arithmetic. With fewer samples it is bound by reading V once,
// or by writing dV once.

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "blas/few_samples.h"
#include "blas/gemm.h"
#include "blas/matmul.h"
#include "tensors.h"

namespace lcw_ops {
namespace {

enum class Map { centre, embed, project };  // centre: u - mean(u); embed: B v; project: B^T g

// The sum of a row, from partial sums that do not wait for each other.
template <typename E>
LCW_INLINE double sum(const E* row, int64_t count) {
  constexpr int64_t lanes = 16;
  double part[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) part[lane] += double(load(row[i + lane]));
  double total = 0;
  for (; i < count; ++i) total += double(load(row[i]));
  for (double one : part) total += one;
  return total;
}

// The number that a map subtracts from every element of a row. The last element of B v is computed otherwise.
template <typename E>
LCW_INLINE double find_shift(Map map, const E* row, int64_t in_length) {
  if (map == Map::centre) return sum(row, in_length) / double(in_length);
  const double s = std::sqrt(double(map == Map::embed ? in_length + 1 : in_length));
  if (map == Map::embed) return sum(row, in_length) / (s * (s + 1));
  return sum(row, in_length - 1) / (s * (s + 1)) + double(load(row[in_length - 1])) / s;
}

// Maps one row. `out` may be `in` if both have the same type.
template <typename In, typename Out>
LCW_INLINE void map_row(Map map, const In* in, int64_t in_length, Out* out) {
  using T = Computed<In>;
  const double shift = find_shift(map, in, in_length);
  const T narrow = T(shift);
  const int64_t count = map == Map::project ? in_length - 1 : in_length;
  for (int64_t i = 0; i < count; ++i) store(load(in[i]) - narrow, out[i]);
  // The last element is -S / s, and shift is S / (s (s+1)).
  if (map == Map::embed) store(T(-shift * (std::sqrt(double(in_length + 1)) + 1)), out[in_length]);
}

// All dimensions but the first form a row.
Tensor map_rows(Map map, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 || (map == Map::centre && tensor.dim() > 2),
      "lcw_weight: the weight must have rows; call lcw_ops.functional");
  const Tensor in = as_contiguous(tensor);
  const int64_t count = in.size(0);
  int64_t length = 1;
  for (int64_t d = 1; d < in.dim(); ++d) length *= in.size(d);
  STD_TORCH_CHECK(map != Map::project || length >= 1, "lcw_weight_backward: the rows of grad_output are empty");
  const int64_t out_length = map == Map::centre ? length : map == Map::embed ? length + 1 : length - 1;
  Tensor out = map == Map::centre ? new_large(in, in.sizes()) : new_large(in, {count, out_length});
  with_elements(in, [&](auto element) {
    using E = decltype(element);
    if (out.numel() == 0) return;
    const E* source = static_cast<const E*>(in.const_data_ptr());
    E* target = static_cast<E*>(out.mutable_data_ptr());
    for_each_part(count, grain_of(length), [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) map_row(map, source + r * length, length, target + r * out_length);
    });
  });
  return out;
}

Tensor lcw_weight(Tensor weight, bool basis) { return map_rows(basis ? Map::embed : Map::centre, weight); }

Tensor lcw_weight_backward(Tensor grad_output, bool basis) {
  return map_rows(basis ? Map::project : Map::centre, grad_output);
}

// The layer with our own products. They are designed for few samples, but take any number where torch's matmul is not
// faster: for example, in 16 bits on processors without 16-bit instructions. Matrices are stored in type E, products
// are computed in type T.
template <typename E>
struct Layer {
  using T = Computed<E>;
  static constexpr bool is_narrow = !std::is_same_v<E, T>;
  // The most samples for which copying V into panels (blas/gemm.h) would cost more than it saves.
  static constexpr int64_t few_samples = is_narrow ? 16 : 64;
  int64_t samples, n, m;  // m: columns of the parameter
  int64_t in_features;

  // The number that X' subtracts from each row of X.
  std::vector<T> find_shifts(const E* x) const {
    std::vector<T> shifts(samples);
    const Map map = m == in_features ? Map::centre : Map::project;
    for_each_part(samples, grain_of(in_features), [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) shifts[i] = T(find_shift(map, x + i * in_features, in_features));
    });
    return shifts;
  }

  // Copies a few rows of X minus their shifts, or of dY, without gaps and in T.
  static void copy_rows(
      const E* in, const std::vector<T>* shifts, int64_t rows, int64_t columns, int64_t stride, T* out) {
    for_each_part(rows, rows, [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) {
        const T shift = shifts ? (*shifts)[i] : T(0);
        for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = load(in[i * stride + j]) - shift;
      }
    });
  }

  void forward(const E* x, const E* v, const T* bias, T* y) const {
    const std::vector<T> shifts = find_shifts(x);
    if (samples > few_samples)
      return multiply_on_threads<E>({x, in_features, 1, shifts.data()}, {v, 1, m}, samples, n, m, bias, y, n);
    // Few samples: V is read in place, because its rows and those of X' are both contiguous along the summed dimension.
    Buffer<T> projected(samples * m);
    copy_rows(x, &shifts, samples, m, in_features, projected.data());
    // A block of rows of V stays in the nearest cache for all samples. `multiply_by_rows` multiplies samples by four
    // rows at a time, but the last of an odd number of samples by eight.
    const int64_t units = samples % 2 ? 8 : 4;
    const T* rows = projected.data();
    const int64_t blocks = (n + units - 1) / units;
    for_each_part(blocks, grain_of(units * m), [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      Buffer<T> wide(is_narrow ? units * m : 0);
      for (int64_t j = begin * units; j < std::min(n, end * units); j += units) {
        const int64_t count = std::min(units, n - j);
        const T* block;
        const T* ahead = nullptr;
        if constexpr (is_narrow) {
          for (int64_t i = 0; i < count * m; ++i) wide[i] = load(v[j * m + i]);
          block = wide.data();
        } else {
          block = v + j * m;
          if (j + units + count <= n) ahead = block + units * m;
        }
        Products<decltype(isa), T>::multiply_by_rows(rows, block, m, y + j, n, samples, count, ahead);
        if (!bias) continue;
        for (int64_t i = 0; i < samples; ++i)
          for (int64_t u = j; u < j + count; ++u) y[i * n + u] += bias[u];
      }
    });
  }

  // Computes dX from dY. The rows of `out`, of m numbers until they are mapped, are in_features apart.
  void grad_input(const E* grad, const E* v, T* out) const {
    multiply_by_parameter(grad, v, out);
    const Map map = m == in_features ? Map::centre : Map::embed;
    for_each_part(samples, grain_of(in_features), [=, *this](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) map_row(map, out + i * in_features, m, out + i * in_features);
    });
  }

  // Computes dY V, in rows that are in_features apart.
  void multiply_by_parameter(const E* grad, const E* v, T* out) const {
    if (samples > few_samples)
      return multiply_on_threads<E>({grad, n, 1}, {v, m, 1}, samples, m, n, nullptr, out, in_features);
    if constexpr (is_narrow) {
      Buffer<T> wide(samples * n);
      copy_rows(grad, nullptr, samples, n, n, wide.data());
      FewSamplesGradients<E>{samples, n, m}.multiply_by_parameter(wide.data(), v, out, in_features);
    } else {
      FewSamplesGradients<E>{samples, n, m}.multiply_by_parameter(grad, v, out, in_features);
    }
  }

  void grad_weight(const E* grad, const E* x, T* out) const {
    const std::vector<T> shifts = find_shifts(x);
    if (samples > few_samples)
      return multiply_on_threads<E>({grad, 1, n}, {x, in_features, 1, shifts.data()}, n, m, samples, nullptr, out, m);
    FewSamplesGradients<E>{samples, n, m}.grad_weight(
        grad, x, in_features, shifts.data(), out, [](auto, int64_t, int64_t) LCW_LAMBDA_INLINE {});
  }

  // Sums the rows of dY in float64 and in partial sums, because the number of samples has no bound. Neighbouring units
  // are summed side by side.
  void grad_bias(const E* grad, E* out) const {
    constexpr int64_t width = 32, terms = 64;
    const int64_t grain = std::max(width, grain_of(samples));
    for_each_part(n, grain, [=, *this](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t j = begin; j < end; j += width) {
        const int64_t count = std::min(width, end - j);
        double total[width] = {};
        for (int64_t first = 0; first < samples; first += terms) {
          double part[width] = {};
          for (int64_t i = first; i < std::min(samples, first + terms); ++i)
            for (int64_t u = 0; u < count; ++u) part[u] += double(load(grad[i * n + j + u]));
          for (int64_t u = 0; u < count; ++u) total[u] += part[u];
        }
        for (int64_t u = 0; u < count; ++u) store(T(total[u]), out[j + u]);
      }
    });
  }
};

void check_layer(const Tensor& x, const Tensor& weight, bool basis) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
          type == ScalarType::Half,
      "lcw_linear: x must be float32, float64, bfloat16 or float16; call lcw_ops.functional.lcw_linear");
  STD_TORCH_CHECK(
      x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) + int64_t(basis) && x.is_cpu() &&
          weight.is_cpu() && x.scalar_type() == weight.scalar_type(),
      "lcw_linear: x (M, m) and weight (n, m), or (n, m-1) with a basis, do not fit each other; call "
      "lcw_ops.functional.lcw_linear");
}

Tensor centre_in_place(Tensor tensor) {
  tensor = as_contiguous(tensor);
  const int64_t length = tensor.size(1);
  with_elements(tensor, [&](auto element) {
    using E = decltype(element);
    E* rows = static_cast<E*>(tensor.mutable_data_ptr());
    for_each_part(tensor.size(0), grain_of(length), [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) map_row(Map::centre, rows + r * length, length, rows + r * length);
    });
  });
  return tensor;
}

// Each of the three passes below runs our own kernels, or torch's matmul with the constraint applied to the smaller of
// x and the weight. No size is 0.

Tensor forward(Multiplier by, Tensor x, Tensor weight, std::optional<Tensor> bias, bool basis) {
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  if (by != Multiplier::own)
    return samples > n ? linear(x, lcw_weight(weight, basis), bias)
                       : linear(lcw_weight_backward(x, basis), weight, bias);
  x = as_contiguous(x), weight = as_contiguous(weight);
  if (bias) bias = as_contiguous(*bias);
  Tensor y = new_large(x, {samples, n});
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    using T = Computed<E>;
    const T* wide_bias = nullptr;
    Buffer<T> widened(0);
    if constexpr (std::is_same_v<E, T>) {
      if (bias) wide_bias = data<E>(*bias);
    } else if (bias) {
      widened = Buffer<T>(n);
      for (int64_t j = 0; j < n; ++j) widened[j] = load(data<E>(*bias)[j]);
      wide_bias = widened.data();
    }
    computed<E>(y, [&](T* out) {
      Layer<E>{samples, n, m, x.size(1)}.forward(data<E>(x), data<E>(weight), wide_bias, out);
    });
  });
  return y;
}

Tensor grad_input(Multiplier by, const Tensor& grad_output, Tensor weight, bool basis) {
  const int64_t samples = grad_output.size(0), n = weight.size(0), m = weight.size(1), in_features = m + int64_t(basis);
  if (by != Multiplier::own) {
    if (samples > n) return linear(grad_output, stable::transpose(lcw_weight(weight, basis), 0, 1));
    Tensor grad_x = linear(grad_output, stable::transpose(weight, 0, 1));
    return basis ? lcw_weight(grad_x, true) : centre_in_place(grad_x);
  }
  weight = as_contiguous(weight);
  Tensor grad_x = new_large(weight, {samples, in_features});
  with_elements(weight, [&](auto element) {
    using E = decltype(element);
    computed<E>(grad_x, [&](Computed<E>* out) {
      Layer<E>{samples, n, m, in_features}.grad_input(data<E>(grad_output), data<E>(weight), out);
    });
  });
  return grad_x;
}

Tensor grad_weight(Multiplier by, const Tensor& grad_output, Tensor x, bool basis) {
  const int64_t samples = x.size(0), n = grad_output.size(1), m = x.size(1) - int64_t(basis);
  if (by != Multiplier::own) {
    const Tensor transposed = stable::transpose(grad_output, 0, 1);
    if (samples > n) return lcw_weight_backward(linear(transposed, stable::transpose(x, 0, 1)), basis);
    return linear(transposed, stable::transpose(lcw_weight_backward(x, basis), 0, 1));
  }
  x = as_contiguous(x);
  Tensor result = new_large(x, {n, m});
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    computed<E>(result, [&](Computed<E>* out) {
      Layer<E>{samples, n, m, x.size(1)}.grad_weight(data<E>(grad_output), data<E>(x), out);
    });
  });
  return result;
}

Multiplier choose_for(Pass pass, ScalarType type, LayerSize size, bool deterministic) {
  return choose_multiplier(pass, type, size, deterministic, [=](LayerSize like, int64_t count) -> Trial {
    const Tensor one = make_operand(type, like.samples, pass == Pass::forward ? like.m : like.n);
    if (pass == Pass::grad_weight) {
      const Tensor x = make_operand(type, like.samples, like.m);
      return [=](Multiplier by) { grad_weight(by, one, x, false); };
    }
    InTurns weights(make_operands(type, like.n, like.m, count));
    if (pass == Pass::grad_input) return [=](Multiplier by) mutable { grad_input(by, one, weights.next(), false); };
    return [=](Multiplier by) mutable { forward(by, one, weights.next(), std::nullopt, false); };
  });
}

// y = x w^T + b
Tensor lcw_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool basis, bool deterministic) {
  check_layer(x, weight, basis);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type() && bias->is_cpu()),
      "lcw_linear: the bias does not fit x and weight; call lcw_ops.functional.lcw_linear");
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  // Without samples, units or columns of the parameter, there is nothing to constrain.
  const bool is_empty = samples == 0 || n == 0 || m == 0;
  if (is_empty) return linear(stable::new_zeros(x, {samples, m}), weight, bias);
  return forward(choose_for(Pass::forward, x.scalar_type(), {samples, n, m}, deterministic), x, weight, bias, basis);
}

// The gradients of x, weight and bias. A gradient that is not needed is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> lcw_linear_backward(
    Tensor grad_output, Tensor x, Tensor weight, bool basis, bool deterministic, bool needs_x, bool needs_weight,
    bool needs_bias) {
  check_layer(x, weight, basis);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && grad_output.size(0) == samples && grad_output.size(1) == n && grad_output.is_cpu() &&
          grad_output.scalar_type() == x.scalar_type(),
      "lcw_linear_backward: grad_output does not fit x and weight; call lcw_ops.functional.lcw_linear");
  const WithoutGradients guard;
  const QuickAllocations allocations(deterministic);
  grad_output = as_contiguous(grad_output);
  const auto nothing = [&](bool needed, const Tensor& like) {
    return needed ? stable::new_zeros(like, like.sizes()) : no_elements(like);
  };
  const bool is_empty = samples == 0 || n == 0 || m == 0;
  const ScalarType type = x.scalar_type();
  const LayerSize size{samples, n, m};
  const Tensor grad_x = is_empty || !needs_x
      ? nothing(needs_x, x)
      : grad_input(choose_for(Pass::grad_input, type, size, deterministic), grad_output, weight, basis);
  const Tensor grad_w = is_empty || !needs_weight
      ? nothing(needs_weight, weight)
      : grad_weight(choose_for(Pass::grad_weight, type, size, deterministic), grad_output, x, basis);
  Tensor grad_bias = allocate(weight, {needs_bias ? n : 0});
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    if (needs_bias && n > 0)
      Layer<E>{samples, n, m, x.size(1)}.grad_bias(data<E>(grad_output), static_cast<E*>(grad_bias.mutable_data_ptr()));
  });
  return {grad_x, grad_w, grad_bias};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("lcw_weight.cpp", TORCH_BOX(&lcw_ops::lcw_weight));
  m.impl("lcw_weight_backward.cpp", TORCH_BOX(&lcw_ops::lcw_weight_backward));
  m.impl("lcw_linear.cpp", TORCH_BOX(&lcw_ops::lcw_linear));
  m.impl("lcw_linear_backward.cpp", TORCH_BOX(&lcw_ops::lcw_linear_backward));
}
