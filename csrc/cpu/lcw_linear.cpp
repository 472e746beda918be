// Linearly constrained weights: rows of zero sum, the derivative of making them, and the whole linear layer.
//
//   centred:  w = u - mean(u), which is its own derivative
//   basis:    w = B v:    w_j = v_j - S / (s (s+1)) for j < m,  w_m = -S / s,  S = sum(v),  s = sqrt(m)
//             B^T g:      g_j - t,  j < m,                      t = sum_{j<m} g_j / (s (s+1)) + g_m / s
//
// T. Kutsuna, arXiv 2403.13833; B is Householder's, as in lcw_ops/reference/lcw_linear.py. A row is read twice, the
// second time from cache, and written once: bound by memory. Sums in float64, so that a row of large mean keeps the
// digits of what is left of it; rows in parallel, every sum in a fixed order.
//
// The layer y = X w^T + b multiplies the parameter V itself, with X' = X B, for <B v, x> = <v, B^T x>. X' is X less one
// number per row: it is made while X is copied for the product, and costs a pass over X to find the numbers.
//   Y = X' V^T + b        dX = (dY V) B^T        dV = dY^T X'        db = sum of dY's rows
// 2 M m n operations each, for many samples by torch's own matmul where that is the fastest. From a dozen samples on
// bound by arithmetic, below by reading V, or writing dV, once.

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dispatch.h"
#include "gemm.h"

namespace lcw_ops {
namespace {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fewer elements than these on a thread take less time than waking it.
constexpr int64_t least_elements = 16384;

// Parts of a loop whose every step takes so many elements.
int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, least_elements / std::max<int64_t>(elements, 1)); }

// In 16 bits, samples up to which copying the parameter would cost more than it saves.
constexpr int64_t few_samples = 16;

enum class Map { centre, embed, project };  // embed: B v; project: B^T g

// Sums side by side, added up in the end: independent of each other, so that they are carried out at once.
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

// What is subtracted from every element of a row but the last one of B v.
template <typename E>
LCW_INLINE double find_shift(Map map, const E* row, int64_t in_length) {
  if (map == Map::centre) return sum(row, in_length) / double(in_length);
  const double s = std::sqrt(double(map == Map::embed ? in_length + 1 : in_length));
  if (map == Map::embed) return sum(row, in_length) / (s * (s + 1));
  return sum(row, in_length - 1) / (s * (s + 1)) + double(load(row[in_length - 1])) / s;
}

// One row; `out` may be `in`, where both are of one type.
template <typename In, typename Out>
LCW_INLINE void map_row(Map map, const In* in, int64_t in_length, Out* out) {
  using T = Computed<In>;
  const double shift = find_shift(map, in, in_length);
  const T narrow = T(shift);
  const int64_t count = map == Map::project ? in_length - 1 : in_length;
  for (int64_t i = 0; i < count; ++i) store(load(in[i]) - narrow, out[i]);
  // S / s from S / (s (s+1)).
  if (map == Map::embed) store(T(-shift * (std::sqrt(double(in_length + 1)) + 1)), out[in_length]);
}

// f(E{}) for the element type of a tensor.
template <typename F>
auto with_elements(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "lcw_ops: float32, float64, bfloat16 or float16; call lcw_ops.functional");
  }
}

// Everything but dimension 0 is one row.
Tensor map_rows(Map map, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= (map == Map::centre ? 1 : 2), "lcw_weight: not rows; call lcw_ops.functional");
  const Tensor in = stable::contiguous(tensor);
  const int64_t count = in.size(0);
  int64_t length = 1;
  for (int64_t d = 1; d < in.dim(); ++d) length *= in.size(d);
  STD_TORCH_CHECK(map != Map::project || length >= 1, "lcw_weight_backward: rows of at least one element");
  const int64_t out_length = map == Map::centre ? length : map == Map::embed ? length + 1 : length - 1;
  Tensor out = map == Map::centre ? stable::new_empty(in, in.sizes()) : stable::new_empty(in, {count, out_length});
  if (out.numel() == 0) return out;
  with_elements(in, [&](auto element) {
    using E = decltype(element);
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

// The layer by our own products: made for few samples, and for any number in 16 bits, which some processors have no
// library for. The matrices are in numbers of type T where they are computed with, E where they lie.
template <typename E>
struct Layer {
  using T = Computed<E>;
  static constexpr bool is_narrow = !std::is_same_v<E, T>;
  int64_t samples, n, m;  // m: columns of the parameter
  int64_t in_features;

  // Threads as rows by columns of a result, so that each copies as little as possible of the operands.
  template <typename Part>
  static void for_each_block(int64_t rows, int64_t columns, int64_t depth, const Part& part) {
    // Some 50 microseconds of arithmetic on one thread.
    constexpr int64_t least_operations = 1 << 21;
    // A whole panel of columns, for most instruction sets.
    constexpr int64_t panel = 16;
    const int64_t worthwhile = std::max<int64_t>(1, 2 * rows * columns * depth / least_operations);
    const int64_t most = std::min<int64_t>(stable::get_num_threads(), worthwhile);
    int64_t down = 1;
    for (int64_t d = 1; d <= most; ++d)
      if (most % d == 0 && rows / d + columns * d / most < rows / down + columns * down / most) down = d;
    const int64_t across = most / down;
    const auto cut = [](int64_t size, int64_t index, int64_t parts, int64_t multiple) {
      return index == parts ? size : size * index / parts / multiple * multiple;
    };
    for_each_part(most, 1, [&, down, across](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = cut(rows, t / across, down, 1), last_row = cut(rows, t / across + 1, down, 1);
        const int64_t column = cut(columns, t % across, across, panel);
        const int64_t last_column = cut(columns, t % across + 1, across, panel);
        if (row < last_row && column < last_column) part(isa, row, last_row - row, column, last_column - column);
      }
    });
  }

  // c (rows, columns) = A B, plus `bias` to every row of it unless it is nullptr.
  static void multiply(
      const Operand<E>& a, const Operand<E>& b, int64_t rows, int64_t columns, int64_t depth, const T* bias, T* c,
      int64_t ldc) {
    for_each_block(
        rows, columns, depth,
        [&](auto isa, int64_t i, int64_t row_count, int64_t j, int64_t column_count) LCW_LAMBDA_INLINE {
          Gemm<decltype(isa), E>::multiply(
              a.at(i, 0), b.at(0, j), row_count, column_count, depth, bias ? bias + j : nullptr, c + i * ldc + j, ldc);
        });
  }

  // The numbers by which X' is less than X.
  std::vector<T> find_shifts(const E* x) const {
    std::vector<T> shifts(samples);
    const Map map = m == in_features ? Map::centre : Map::project;
    for_each_part(samples, grain_of(in_features), [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) shifts[i] = T(find_shift(map, x + i * in_features, in_features));
    });
    return shifts;
  }

  // Few rows of X less their shifts, or of dY, one after another in T.
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
    if constexpr (is_narrow)
      if (samples > few_samples)
        return multiply({x, in_features, 1, shifts.data()}, {v, 1, m}, samples, n, m, bias, y, n);
    // A few samples against rows of V: both lie along what is summed over, and V is read as it lies.
    Buffer<T> projected(samples * m);
    copy_rows(x, &shifts, samples, m, in_features, projected.data());
    // So many rows of V as stay in the nearest cache while all samples pass; a sample by itself takes eight at a time.
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
        ProductsFor<decltype(isa), T>::multiply_by_rows(rows, block, m, y + j, n, samples, count, ahead);
        if (!bias) continue;
        for (int64_t i = 0; i < samples; ++i)
          for (int64_t u = j; u < j + count; ++u) y[i * n + u] += bias[u];
      }
    });
  }

  // dX, whose rows have a stride of in_features.
  void grad_input(const E* grad, const E* v, T* out) const {
    multiply_by_parameter(grad, v, out);
    const Map map = m == in_features ? Map::centre : Map::embed;
    for_each_part(samples, grain_of(in_features), [=, *this](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) map_row(map, out + i * in_features, m, out + i * in_features);
    });
  }

  // dY V, of a few samples by the rows of V one after another; the result stays in cache.
  void multiply_by_parameter(const E* grad, const E* v, T* out) const {
    if constexpr (is_narrow)
      if (samples > few_samples) return multiply({grad, n, 1}, {v, m, 1}, samples, m, n, nullptr, out, in_features);
    constexpr int64_t depth = 16;
    Buffer<T> wide_grad(samples * n);
    copy_rows(grad, nullptr, samples, n, n, wide_grad.data());
    const T* a = wide_grad.data();
    // A cache line or two of every row of V.
    constexpr int64_t width = 32;
    const int64_t strips = (m + width - 1) / width;
    for_each_part(strips, grain_of(width * n), [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      const int64_t first = begin * width, columns = std::min(m, end * width) - first;
      Buffer<T> wide(is_narrow ? depth * columns : 0);
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t part = std::min(depth, n - k);
        Product<T> product{a + k, n, 1, nullptr, 0, out + first, in_features, samples, columns, part, k > 0};
        product.is_near = true;
        if constexpr (is_narrow) {
          for (int64_t i = 0; i < part; ++i)
            for (int64_t j = 0; j < columns; ++j) wide[i * columns + j] = load(v[(k + i) * m + first + j]);
          product.b = wide.data(), product.ldb = columns;
        } else {
          product.b = v + k * m + first, product.ldb = m;
        }
        ProductsFor<decltype(isa), T>::multiply(product);
      }
    });
  }

  void grad_weight(const E* grad, const E* x, T* out) const {
    const std::vector<T> shifts = find_shifts(x);
    if constexpr (is_narrow)
      if (samples > few_samples)
        return multiply({grad, 1, n}, {x, in_features, 1, shifts.data()}, n, m, samples, nullptr, out, m);
    Buffer<T> projected(samples * m), wide_grad(samples * n);
    copy_rows(x, &shifts, samples, m, in_features, projected.data());
    copy_rows(grad, nullptr, samples, n, n, wide_grad.data());
    const T *a = wide_grad.data(), *b = projected.data();
    // Rows of the result one after another: it is written once, in the order in which it lies.
    constexpr int64_t rows = 12;
    const int64_t blocks = (n + rows - 1) / rows;
    for_each_part(blocks, grain_of(rows * m), [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin * rows; i < std::min(n, end * rows); i += rows)
        ProductsFor<decltype(isa), T>::multiply(
            Product<T>{a + i, 1, n, b, m, out + i * m, m, std::min(rows, n - i), m, samples});
    });
  }

  // In float64, units side by side, in partial sums: samples have no bound.
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

// Calls compute(T*) with the tensor's memory, or with wider memory that is then rounded into it.
template <typename E, typename Compute>
void computed(Tensor& result, const Compute& compute) {
  using T = Computed<E>;
  if constexpr (std::is_same_v<E, T>) {
    compute(static_cast<T*>(result.mutable_data_ptr()));
  } else {
    const int64_t count = result.numel();
    Buffer<T> wide(count);
    compute(wide.data());
    const T* in = wide.data();
    E* out = static_cast<E*>(result.mutable_data_ptr());
    for_each_part(count, least_elements, [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) store(in[i], out[i]);
    });
  }
}

template <typename E>
const E* data(const Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}

void check_layer(const Tensor& x, const Tensor& weight, bool basis) {
  STD_TORCH_CHECK(
      x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) + int64_t(basis) && x.is_cpu() && weight.is_cpu() &&
          x.scalar_type() == weight.scalar_type(),
      "lcw_linear: x (M, m) and weight do not fit each other; call lcw_ops.functional.lcw_linear");
}

// torch's own linear layer.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y = x w^T + b; torch multiplies with `vendor`, and the constraint is laid on the smaller of x and weight.
Tensor lcw_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, bool basis, bool vendor) {
  check_layer(x, weight, basis);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type() && bias->is_cpu()),
      "lcw_linear: the bias does not fit; call lcw_ops.functional.lcw_linear");
  if (vendor)
    return samples > n ? linear(x, lcw_weight(weight, basis), bias) : linear(lcw_weight_backward(x, basis), weight, bias);
  x = stable::contiguous(x), weight = stable::contiguous(weight);
  if (bias) bias = stable::contiguous(*bias);
  Tensor y = stable::new_empty(x, {samples, n});
  if (y.numel() == 0) return y;
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    using T = Computed<E>;
    std::vector<T> wide_bias(n, T(0));
    if (bias)
      for (int64_t j = 0; j < n; ++j) wide_bias[j] = load(data<E>(*bias)[j]);
    const Layer<E> layer{samples, n, m, x.size(1)};
    computed<E>(y, [&](T* out) {
      if (m > 0) return layer.forward(data<E>(x), data<E>(weight), bias ? wide_bias.data() : nullptr, out);
      for (int64_t i = 0; i < samples; ++i) std::copy(wide_bias.begin(), wide_bias.end(), out + i * n);
    });
  });
  return y;
}

// The gradients of x, weight and bias; an empty tensor for one that nobody needs.
std::tuple<Tensor, Tensor, Tensor> lcw_linear_backward(
    Tensor grad_output, Tensor x, Tensor weight, bool basis, bool vendor, bool needs_x, bool needs_weight,
    bool needs_bias) {
  check_layer(x, weight, basis);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  STD_TORCH_CHECK(
      grad_output.dim() == 2 && grad_output.size(0) == samples && grad_output.size(1) == n && grad_output.is_cpu() &&
          grad_output.scalar_type() == x.scalar_type(),
      "lcw_linear_backward: grad_output does not fit; call lcw_ops.functional.lcw_linear");
  grad_output = stable::contiguous(grad_output);
  const auto when = [&](bool needed, const Tensor& like) {
    return needed ? stable::new_empty(like, like.sizes()) : stable::new_empty(like, {int64_t(0)});
  };
  Tensor grad_x = when(needs_x, x), grad_weight = when(needs_weight, weight);
  Tensor grad_bias = stable::new_empty(weight, {needs_bias ? n : 0});
  if (vendor) {
    const bool constrains_weight = samples > n;
    if (needs_x)
      grad_x = constrains_weight ? stable::matmul(grad_output, lcw_weight(weight, basis))
                                 : lcw_weight(stable::matmul(grad_output, weight), basis);
    const Tensor transposed = stable::transpose(grad_output, 0, 1);
    if (needs_weight)
      grad_weight = constrains_weight ? lcw_weight_backward(stable::matmul(transposed, x), basis)
                                      : stable::matmul(transposed, lcw_weight_backward(x, basis));
    with_elements(x, [&](auto element) {
      using E = decltype(element);
      if (needs_bias && n > 0)
        Layer<E>{samples, n, m, x.size(1)}.grad_bias(data<E>(grad_output), static_cast<E*>(grad_bias.mutable_data_ptr()));
    });
    return {grad_x, grad_weight, grad_bias};
  }
  x = stable::contiguous(x), weight = stable::contiguous(weight);
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    using T = Computed<E>;
    const Layer<E> layer{samples, n, m, x.size(1)};
    const E* grad = data<E>(grad_output);
    if (m == 0 || n == 0 || samples == 0) {
      if (needs_x) stable::zero_(grad_x);
      if (needs_weight) stable::zero_(grad_weight);
    } else {
      if (needs_x) computed<E>(grad_x, [&](T* out) { layer.grad_input(grad, data<E>(weight), out); });
      if (needs_weight) computed<E>(grad_weight, [&](T* out) { layer.grad_weight(grad, data<E>(x), out); });
    }
    if (needs_bias && n > 0) layer.grad_bias(grad, static_cast<E*>(grad_bias.mutable_data_ptr()));
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("lcw_weight.cpp", TORCH_BOX(&lcw_ops::lcw_weight));
  m.impl("lcw_weight_backward.cpp", TORCH_BOX(&lcw_ops::lcw_weight_backward));
  m.impl("lcw_linear.cpp", TORCH_BOX(&lcw_ops::lcw_linear));
  m.impl("lcw_linear_backward.cpp", TORCH_BOX(&lcw_ops::lcw_linear_backward));
}
