// The recurrence solved in parallel over depth, on the CPU: a forward sweep over all layers, an adjoint sweep, and the
// activations alone.
//
//   h_l = alpha_l O h_{l-1} + beta_l act(product_l + bias_l + inputs_l)         l = 1..D
//   g_{l-1} = alpha_l O g_l + product_l + outside_l,  scaled_l = slope_l g_l    l = D..1
//
// O is the filter: a permutation of a row's units, or rotations of pairs of them. In the forward sweep, product_l is
// W_l h_{l-1}, computed from the states of the previous sweep. In the adjoint sweep it is the gradient that flows back
// through W_l: scaled_l W_l, with the scaled_l of the previous sweep. outside_l is the gradient that h_{l-1} receives
// from outside the recurrence, and slope_l is beta_l act'. Each sweep overwrites the states or gradients of the sweep
// before it and returns the largest relative change. lcw_ops/reference/parallel_depth.py has the derivation.
//
// Memory traffic per float32 element: a forward sweep takes 12 bytes (product and old state read, new state written),
// or 16 with inputs. An adjoint sweep takes 12 bytes, or 16 with outside, 20 with slope and scaled, 24 with all three.
//
// Instructions per float32 element in rows of 128 with AVX2, by filter. The first two columns are forward sweeps. The
// last two are adjoint sweeps, without and with slope and scaled.
//
//   filter                          tanh   ReLU   without   with slope and scaled
//   identity                         6.8    3.7     2.3        3.1
//   cyclic shift                     7.1    4.0     2.6        3.4
//   any other permutation            8.8    5.6     4.3        5.1
//   rotations                       10.3    7.2     5.8        6.9
//
// The counts include about 100 instructions per row, whatever the row's length. A core that copies 20 GB/s moves 12
// bytes in 0.6 ns, about 2 cycles. So a sweep is bound by memory if its tensors do not fit in the cache, and by
// arithmetic if they do.

#include <initializer_list>
#include <optional>
#include <string>

#include "scan.h"
#include "terms.h"

namespace lcw_ops::parallel_depth {
namespace {

std::string to_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "(";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// Checks an op's arguments, for memory safety. They must fit the first one. Its shape is (D, M, N): D layers, M rows, N
// units. If `given` is 1, it is (D + 1, M, N), because it also holds the state or gradient that the sweep begins with.
struct Arguments {
  const char* op;
  const char* name;
  const Tensor& first;
  int64_t layers, rows, width;

  Arguments(const char* op_, const char* name_, const Tensor& first_, int64_t given)
      : op(op_), name(name_), first(first_) {
    const ScalarType type = first.scalar_type();
    STD_TORCH_CHECK(
        first.is_cpu() && first.is_contiguous() && (type == ScalarType::Float || type == ScalarType::Double), op, ": ",
        name, " must be a contiguous tensor of float32 or float64 on the CPU", advice);
    STD_TORCH_CHECK(
        first.dim() == 3 && first.size(0) >= given, op, ": ", name, " has shape ", to_text(first.sizes()),
        ", expected ", given ? "(layers + 1, samples, units)" : "(layers, samples, units)", advice);
    layers = first.size(0) - given, rows = first.size(1), width = first.size(2);
  }

  using Shape = std::initializer_list<int64_t>;

  // Requires that the tensor has the shape `shape` or `other`.
  void check(const char* argument, const Tensor& tensor, Shape shape, std::optional<Shape> other = {}) const {
    STD_TORCH_CHECK(
        tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == first.scalar_type(), op, ": ", argument,
        " must be a contiguous tensor of the dtype of ", name, " on the CPU", advice);
    const auto is = [&](Shape expected) {
      const auto sizes = tensor.sizes();
      return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
    };
    STD_TORCH_CHECK(
        is(shape) || (other && is(*other)), op, ": ", argument, " has shape ", to_text(tensor.sizes()), ", expected ",
        to_text(shape), other ? " or " + to_text(*other) : "", advice);
  }

  void check_scale(const char* argument, const Tensor& tensor) const { check(argument, tensor, {1}, Shape{layers}); }

  void check_terms(const char* argument, const std::optional<Tensor>& tensor) const {
    if (tensor) check(argument, *tensor, {layers, rows, width});
  }

  void check_bias(const std::optional<Tensor>& bias) const {
    if (bias) check("bias", *bias, {width}, Shape{layers, width});
  }

  // Calls f(filter) with the filter in the form that the kernels take.
  template <typename T, typename F>
  void with_filter(const Tensor& filter, const F& f) const {
    const bool permutes = filter.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(
        filter.is_cpu() && filter.is_contiguous() && filter.dim() == 1 &&
            (permutes ? filter.numel() == width
                      : filter.scalar_type() == ScalarType::Double && filter.numel() == 2 * width),
        op, ": filter must be contiguous and on the CPU: an int64 permutation of ", width, " units, or ", width,
        " cosines followed by ", width, " sines in float64", advice);
    if (!permutes) {
      const double* cosine = data<double>(filter);
      return f(Rotation<T>{cosine, cosine + width, width});
    }
    const int64_t* index = data<int64_t>(filter);
    std::vector<bool> seen(width, false);
    for (int64_t i = 0; i < width; ++i) {
      const bool is_fresh = index[i] >= 0 && index[i] < width && !seen[index[i]];
      STD_TORCH_CHECK(is_fresh, op, ": filter is not a permutation: entry ", i, " is ", index[i], advice);
      seen[index[i]] = true;
    }
    f(Permutation<T>(index, width));
  }

  template <typename T>
  Chain<T> chain(const Tensor& states, const Tensor& alpha, bool is_adjoint) const {
    return {layers, rows, width, memory<T>(states), data<T>(alpha), stride(alpha), is_adjoint};
  }

  template <typename T>
  Activated<T> activated(
      const std::optional<Tensor>& product, const std::optional<Tensor>& bias, const std::optional<Tensor>& inputs,
      const Tensor& beta, Activation activation) const {
    const int64_t bias_stride = bias && bias->dim() == 2 ? width : 0;
    return {rows,          width,       pointer<T>(product), pointer<T>(bias), pointer<T>(inputs),
            data<T>(beta), bias_stride, stride(beta),        activation};
  }

  static int64_t stride(const Tensor& scale) { return scale.numel() == 1 ? 0 : 1; }

  template <typename T>
  static T* memory(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <typename T>
  static const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  }

  static constexpr const char* advice = "; call lcw_ops.functional.orthogonal_filter";
};

template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Float)
    f(float{});
  else
    f(double{});
}

Tensor sweep(
    Tensor states, std::optional<Tensor> product, std::optional<Tensor> bias, std::optional<Tensor> inputs,
    Tensor filter, Tensor alpha, Tensor beta, std::string activation) {
  const Arguments arguments("parallel_depth_sweep_", "states", states, 1);
  arguments.check_terms("product", product);
  arguments.check_bias(bias);
  arguments.check_terms("inputs", inputs);
  arguments.check_scale("alpha", alpha);
  arguments.check_scale("beta", beta);
  const Activation kind = parse_activation(arguments.op, activation);
  Tensor change = stable::new_zeros(states, {1}, ScalarType::Double);
  with_type(states, [&](auto element) {
    using T = decltype(element);
    arguments.with_filter<T>(filter, [&](const auto& kernel) {
      *Arguments::memory<double>(change) = scan(
          arguments.chain<T>(states, alpha, false), kernel, arguments.activated<T>(product, bias, inputs, beta, kind));
    });
  });
  return change;
}

Tensor adjoint_sweep(
    Tensor gradients, std::optional<Tensor> product, std::optional<Tensor> outside, Tensor filter, Tensor alpha,
    std::optional<Tensor> slope, std::optional<Tensor> scaled) {
  const Arguments arguments("parallel_depth_adjoint_", "gradients", gradients, 1);
  arguments.check_terms("product", product);
  arguments.check_terms("outside", outside);
  arguments.check_terms("slope", slope);
  arguments.check_terms("scaled", scaled);
  arguments.check_scale("alpha", alpha);
  STD_TORCH_CHECK(
      slope.has_value() == scaled.has_value(), arguments.op,
      ": only one of slope and scaled is given; expected both or neither", Arguments::advice);
  Tensor change = stable::new_zeros(gradients, {1}, ScalarType::Double);
  with_type(gradients, [&](auto element) {
    using T = decltype(element);
    const Summed<T> terms{
        arguments.rows,
        arguments.width,
        Arguments::pointer<T>(product),
        Arguments::pointer<T>(outside),
        Arguments::pointer<T>(slope),
        scaled ? Arguments::memory<T>(*scaled) : nullptr};
    arguments.with_filter<T>(filter, [&](const auto& kernel) {
      *Arguments::memory<double>(change) = scan(arguments.chain<T>(gradients, alpha, true), kernel, terms);
    });
  });
  return change;
}

void activate(
    Tensor product, std::optional<Tensor> bias, std::optional<Tensor> inputs, Tensor beta, std::string activation,
    bool derivative) {
  const Arguments arguments("parallel_depth_activate_", "product", product, 0);
  arguments.check_bias(bias);
  arguments.check_terms("inputs", inputs);
  arguments.check_scale("beta", beta);
  const Activation kind = parse_activation(arguments.op, activation);
  with_type(product, [&](auto element) {
    using T = decltype(element);
    const Activated<T> terms = arguments.activated<T>(product, bias, inputs, beta, kind);
    T* out = Arguments::memory<T>(product);
    const int64_t rows = arguments.rows, width = arguments.width;
    for_each_part(arguments.layers * rows, grain_of(width), [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t r = begin; r < end;) {
        const int64_t layer = r / rows, first = r % rows, count = std::min(rows - first, end - r);
        if (derivative)
          terms.template at<true>(layer, first, count, out + r * width);
        else
          terms.template at<false>(layer, first, count, out + r * width);
        r += count;
      }
    });
  });
}

}  // namespace
}  // namespace lcw_ops::parallel_depth

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("parallel_depth_sweep_.cpp", TORCH_BOX(&lcw_ops::parallel_depth::sweep));
  m.impl("parallel_depth_adjoint_.cpp", TORCH_BOX(&lcw_ops::parallel_depth::adjoint_sweep));
  m.impl("parallel_depth_activate_.cpp", TORCH_BOX(&lcw_ops::parallel_depth::activate));
}
