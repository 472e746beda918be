// The two ops of the orthogonal-filter recurrence, up to their kernels for the CPU and for CUDA: they check the
// arguments and allocate the results.
//
// Shapes are those of lcw_ops/ops/orthogonal_filter/op.py, which has the schemas: L steps (layers), M rows (samples), N
// units. The other symbols are those of cpu/orthogonal_filter/orthogonal_filter.cpp.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "activation.h"
#include "attributes.h"

namespace lcw_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace stable = torch::stable;

// All data that a step needs. An argument that all steps share has a stride of 0.
template <typename T>
struct Recurrence {
  int64_t rows, width, steps, segment;
  Activation activation;
  const void* weight;  // of weight_type: the state's type, or 16 bits with a float32 state
  ScalarType weight_type;
  const T *bias, *filter, *alpha, *beta, *inputs;
  const int64_t* permutation;  // instead of filter, which is then nullptr
  int64_t weight_stride, bias_stride, filter_stride, alpha_stride, beta_stride;

  template <typename W>
  LCW_HOST_DEVICE const W* weight_at(int64_t l) const {
    return static_cast<const W*>(weight) + l * weight_stride;
  }
  LCW_HOST_DEVICE const T* filter_at(int64_t l) const { return filter + l * filter_stride; }
  LCW_HOST_DEVICE T alpha_at(int64_t l) const { return alpha[l * alpha_stride]; }
  LCW_HOST_DEVICE T beta_at(int64_t l) const { return beta[l * beta_stride]; }
};

template <typename T>
struct Forward {
  Recurrence<T> recurrence;
  const T* h0;
  T* output;       // (M, N), or (L + 1, M, N)
  T* checkpoints;  // (ceil(L / segment), M, N), or nullptr
  T* activated;    // (L, M, N): act(A_l), or nullptr
  bool return_states;
};

// One segment of the backward pass: layers first..first+count-1. Buffers without another shape are (count, M, N), and
// the pass has as many of each as it has slots.
template <typename T>
struct Backward {
  Recurrence<T> recurrence;
  const T* grad_output;
  const T* checkpoints;
  int64_t checkpoint_every;  // steps from one checkpoint to the next: a segment, or 1
  const T* known;            // (L, M, N): act(A_l) from the forward pass, or nullptr
  bool return_states;
  int64_t segments, slots;
  int64_t first, count;
  T* states;               // h_{l-1}
  T* slopes;               // beta act'(A_l), or nullptr where Device::keeps_slopes is false
  T* grad_pre;             // P_l; without slopes, beta act'(A_l) until P_l replaces it
  T* filtered;             // O h_{l-1}, or nullptr if alpha and beta need no gradient
  T* activated;            // act(A_l), or nullptr likewise
  T* gradient;             // (M, N): G at the end of the segment, then at its start
  void* grad_weight;       // (L, N, N) of weight_type, or nullptr
  T* grad_bias;            // (L, N), or nullptr
  double* weight_sum;      // (N, N): dW of a weight that all steps share, summed over samples and steps; or nullptr
  double* bias_sum;        // (N): db of a shared bias, summed likewise; or nullptr
  T* grad_inputs;          // (L, M, N), or nullptr
  T* grad_states;          // (L + 1, M, N), or nullptr
  double* alpha_products;  // (L, M): <G_l, O h_{l-1}> of each row
  double* beta_products;   // (L, M): <G_l, act(A_l)>

  // The state at the start of the segment.
  LCW_HOST_DEVICE const T* checkpoint() const {
    return checkpoints + first / checkpoint_every * recurrence.rows * recurrence.width;
  }

  // The pass of a segment, counted from the last one, with the buffers of its slot.
  Backward of_segment(int64_t number) const {
    Backward pass = *this;
    pass.first = (segments - 1 - number) * recurrence.segment;
    pass.count = std::min(recurrence.segment, recurrence.steps - pass.first);
    const int64_t state_size = recurrence.rows * recurrence.width;
    const int64_t offset = number % slots * recurrence.segment * state_size;
    for (T** buffer : {&pass.states, &pass.slopes, &pass.grad_pre, &pass.filtered, &pass.activated})
      if (*buffer) *buffer += offset;
    return pass;
  }
};

// How many steps a segment of the backward pass has, and how many segments have buffers at the same time.
struct Segments {
  int64_t length, slots;
};

// The arguments of both ops, made contiguous and checked, so that no call of an op reads out of bounds.
struct Arguments {
  Tensor weight, filter, alpha, beta;
  std::optional<Tensor> bias, inputs;

  Arguments(
      const Tensor& state, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& filter_,
      const Tensor& alpha_, const Tensor& beta_, const std::optional<Tensor>& inputs_, int64_t steps)
      : weight(stable::contiguous(weight_)),
        filter(stable::contiguous(filter_)),
        alpha(stable::contiguous(alpha_)),
        beta(stable::contiguous(beta_)) {
    if (bias_) bias = stable::contiguous(*bias_);
    if (inputs_) inputs = stable::contiguous(*inputs_);
    const int64_t m = state.size(state.dim() - 2), n = state.size(state.dim() - 1);
    const auto fits = [&](const Tensor& tensor, int64_t shared, int64_t per_step, int64_t entry) {
      return (tensor.dim() == shared && tensor.numel() == entry) ||
          (tensor.dim() == per_step && tensor.size(0) == steps && tensor.numel() == steps * entry);
    };
    const bool permutes = filter.scalar_type() == ScalarType::Long;
    const bool right = fits(weight, 2, 3, n * n) && (!bias || fits(*bias, 1, 2, n)) &&
        (permutes ? filter.dim() == 1 && filter.numel() == n : fits(filter, 2, 3, n * n)) && fits_scale(alpha, steps) &&
        fits_scale(beta, steps) && (!inputs || (inputs->dim() == 3 && inputs->numel() == steps * m * n));
    for (const Tensor* tensor : {&weight, &filter, &alpha, &beta, bias ? &*bias : &weight, inputs ? &*inputs : &weight})
      STD_TORCH_CHECK(
          tensor->is_cpu() == state.is_cpu() && tensor->get_device_index() == state.get_device_index(),
          "orthogonal_filter: an argument is on another device than the state; expected one device for all arguments");
    STD_TORCH_CHECK(
        right, "orthogonal_filter: shapes do not fit each other; call lcw_ops.functional.orthogonal_filter");
    bool same = weight.scalar_type() == state.scalar_type() ||
        (state.scalar_type() == ScalarType::Float &&
         (weight.scalar_type() == ScalarType::BFloat16 || weight.scalar_type() == ScalarType::Half));
    for (const Tensor* tensor :
         {&alpha, &beta, bias ? &*bias : &alpha, inputs ? &*inputs : &alpha, permutes ? &alpha : &filter})
      same = same && tensor->scalar_type() == state.scalar_type();
    STD_TORCH_CHECK(same, "orthogonal_filter: dtypes do not fit each other; call lcw_ops.functional.orthogonal_filter");
    if (permutes && filter.is_cpu()) {
      const int64_t* index = filter.const_data_ptr<int64_t>();
      std::vector<bool> seen(n, false);
      for (int64_t i = 0; i < n; ++i) {
        const bool fresh = index[i] >= 0 && index[i] < n && !seen[index[i]];
        STD_TORCH_CHECK(
            fresh, "orthogonal_filter: filter is not a permutation: entry ", i, " is ", index[i],
            ", which is out of range or occurs twice");
        seen[index[i]] = true;
      }
    }
  }

  static bool fits_scale(const Tensor& scale, int64_t steps) {
    return scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == steps);
  }

  template <typename T>
  Recurrence<T> recurrence(int64_t rows, int64_t width, int64_t steps, int64_t segment, const std::string& name) const {
    Recurrence<T> r{};
    r.rows = rows, r.width = width, r.steps = steps, r.segment = segment;
    r.activation = parse_activation("orthogonal_filter", name);
    r.weight = weight.const_data_ptr();
    r.weight_type = weight.scalar_type();
    r.weight_stride = weight.dim() == 3 ? width * width : 0;
    if (filter.scalar_type() == ScalarType::Long) {
      r.permutation = filter.const_data_ptr<int64_t>();
    } else {
      r.filter = filter.const_data_ptr<T>();
      r.filter_stride = filter.dim() == 3 ? width * width : 0;
    }
    r.alpha = alpha.const_data_ptr<T>(), r.alpha_stride = alpha.numel() == 1 ? 0 : 1;
    r.beta = beta.const_data_ptr<T>(), r.beta_stride = beta.numel() == 1 ? 0 : 1;
    if (bias) r.bias = bias->const_data_ptr<T>(), r.bias_stride = bias->dim() == 2 ? width : 0;
    if (inputs) r.inputs = inputs->const_data_ptr<T>();
    return r;
  }
};

inline void check_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "orthogonal_filter: the state must be float32 or float64; call lcw_ops.functional.orthogonal_filter");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Forward keeps act(A_l) of all steps if `segment` is this.
constexpr int64_t keep_activated = -1;

// Device::run does the forward or the backward pass. Its last argument is a tensor on the device. Device::segments cuts
// the backward pass into segments. The functions below allocate their buffers and results; Device::new_large allocates
// every large result.
template <class Device, typename T>
std::tuple<Tensor, Tensor> forward(
    const Tensor& h0, const Arguments& arguments, int64_t steps, const std::string& activation, int64_t segment,
    bool return_states) {
  const int64_t rows = h0.size(0), width = h0.size(1);
  const bool keeps_activated = segment == keep_activated;
  const int64_t checkpoint_count = keeps_activated ? steps : segment ? (steps + segment - 1) / segment : 0;
  Tensor output = return_states ? Device::new_large(h0, {steps + 1, rows, width})
                                : stable::new_empty(h0, {rows, width});
  Tensor checkpoints = Device::new_large(h0, {checkpoint_count, rows, width});
  if (output.numel() == 0) return {output, checkpoints};
  Forward<T> pass{};
  pass.recurrence = arguments.recurrence<T>(rows, width, steps, segment, activation);
  pass.h0 = h0.const_data_ptr<T>();
  pass.output = output.mutable_data_ptr<T>();
  pass.checkpoints = segment > 0 ? checkpoints.mutable_data_ptr<T>() : nullptr;
  pass.activated = keeps_activated ? checkpoints.mutable_data_ptr<T>() : nullptr;
  pass.return_states = return_states;
  Device::run(pass, h0);
  return {output, checkpoints};
}

// The gradient of alpha or beta from the products of the rows: sums them over the rows, and over the steps if these
// share the scale, in float64 until the last rounding.
inline Tensor sum_products(const Tensor& products, const Tensor& like) {
  const bool shared = like.numel() == 1 && products.size(0) != 1;
  Tensor sum = stable::sum(products, shared ? std::vector<int64_t>{0, 1} : std::vector<int64_t>{1});
  return stable::reshape(stable::to(sum, like.scalar_type()), {like.numel()});
}

template <class Device, typename T>
Gradients backward(
    const Tensor& grad_output, const Tensor& checkpoints, const Arguments& arguments, int64_t steps,
    const std::string& activation, int64_t segment, bool needs_weight, bool needs_bias, bool needs_scales,
    bool needs_inputs, bool needs_states, const Tensor* known) {
  const bool return_states = grad_output.dim() == 3;
  const int64_t rows = grad_output.size(return_states ? 1 : 0), width = grad_output.size(return_states ? 2 : 1);
  const int64_t state_size = rows * width;
  Backward<T> pass{};
  pass.recurrence = arguments.recurrence<T>(rows, width, steps, segment, activation);
  pass.checkpoint_every = checkpoints.numel() == steps * state_size ? 1 : segment;
  // The gradients of alpha and beta need O h_{l-1} too, which is not kept.
  pass.known = known && !needs_scales ? known->const_data_ptr<T>() : nullptr;
  const Segments cut = Device::segments(pass, needs_scales);
  pass.recurrence.segment = cut.length, pass.slots = cut.slots;
  pass.segments = state_size > 0 ? (steps + cut.length - 1) / cut.length : 0;
  // The segment of the last steps may be shorter than its slot.
  const int64_t count = std::min(cut.slots, pass.segments) * cut.length;
  const auto when = [&](bool needed, const Tensor& like) {
    const auto sizes = like.sizes();
    return needed ? Device::new_large(like, {sizes.begin(), sizes.end()}) : stable::new_empty(like, {int64_t(0)});
  };
  // The gradient of a shared parameter is summed over the segments in float64; every other gradient is written once.
  const bool sums_weight = needs_weight && arguments.weight.dim() == 2;
  const bool sums_bias = needs_bias && arguments.bias->dim() == 1;
  Tensor weight_sum = stable::new_zeros(grad_output, {sums_weight ? width : 0, width}, ScalarType::Double);
  Tensor bias_sum = stable::new_zeros(grad_output, {sums_bias ? width : 0}, ScalarType::Double);
  Tensor grad_h0 = stable::new_empty(grad_output, {rows, width});
  Tensor grad_weight = when(needs_weight, arguments.weight);
  Tensor grad_bias = when(needs_bias, arguments.bias ? *arguments.bias : arguments.weight);
  Tensor grad_inputs = when(needs_inputs, arguments.inputs ? *arguments.inputs : arguments.weight);
  if (state_size == 0) stable::zero_(grad_weight), stable::zero_(grad_bias);
  Tensor grad_states = needs_states ? Device::new_large(grad_output, {steps + 1, rows, width})
                                    : stable::new_empty(grad_output, {int64_t(0)});
  Tensor states = stable::new_empty(grad_output, {pass.known ? 0 : count, rows, width});
  Tensor slopes = stable::new_empty(grad_output, {Device::keeps_slopes && !pass.known ? count : 0, rows, width});
  Tensor grad_pre = stable::new_empty(grad_output, {count, rows, width});
  Tensor filtered = stable::new_empty(grad_output, {needs_scales ? count : 0, rows, width});
  Tensor activated = stable::new_empty(grad_output, {needs_scales ? count : 0, rows, width});
  const std::vector<int64_t> product_shape{needs_scales ? steps : 0, rows};
  Tensor alpha_products = stable::new_zeros(grad_output, product_shape, ScalarType::Double);
  Tensor beta_products = stable::new_zeros(grad_output, product_shape, ScalarType::Double);
  Tensor last = return_states ? stable::select(grad_output, 0, steps) : grad_output;
  stable::copy_(grad_h0, last);
  if (needs_states && steps == 0) {
    Tensor only = stable::select(grad_states, 0, 0);
    stable::copy_(only, last);
  }

  pass.grad_output = grad_output.const_data_ptr<T>();
  pass.checkpoints = checkpoints.const_data_ptr<T>();
  pass.return_states = return_states;
  pass.states = states.mutable_data_ptr<T>();
  pass.slopes = Device::keeps_slopes ? slopes.mutable_data_ptr<T>() : nullptr;
  pass.grad_pre = grad_pre.mutable_data_ptr<T>();
  pass.filtered = needs_scales ? filtered.mutable_data_ptr<T>() : nullptr;
  pass.activated = needs_scales ? activated.mutable_data_ptr<T>() : nullptr;
  pass.gradient = grad_h0.mutable_data_ptr<T>();
  pass.grad_weight = needs_weight && !sums_weight ? grad_weight.mutable_data_ptr() : nullptr;
  pass.grad_bias = needs_bias && !sums_bias ? grad_bias.mutable_data_ptr<T>() : nullptr;
  pass.weight_sum = sums_weight ? weight_sum.mutable_data_ptr<double>() : nullptr;
  pass.bias_sum = sums_bias ? bias_sum.mutable_data_ptr<double>() : nullptr;
  pass.grad_inputs = needs_inputs ? grad_inputs.mutable_data_ptr<T>() : nullptr;
  pass.grad_states = needs_states ? grad_states.mutable_data_ptr<T>() : nullptr;
  pass.alpha_products = alpha_products.mutable_data_ptr<double>();
  pass.beta_products = beta_products.mutable_data_ptr<double>();

  if (pass.segments > 0) Device::run(pass, grad_output);
  if (sums_weight) stable::copy_(grad_weight, weight_sum);
  if (sums_bias) stable::copy_(grad_bias, bias_sum);
  return {
      grad_h0,
      grad_weight,
      grad_bias,
      needs_scales ? sum_products(alpha_products, arguments.alpha) : when(false, arguments.alpha),
      needs_scales ? sum_products(beta_products, arguments.beta) : when(false, arguments.beta),
      grad_inputs,
      grad_states};
}

template <class Device>
std::tuple<Tensor, Tensor> orthogonal_filter(
    Tensor h0, Tensor weight, std::optional<Tensor> bias, Tensor filter, Tensor alpha, Tensor beta,
    std::optional<Tensor> inputs, int64_t steps, std::string activation, int64_t segment, bool return_states) {
  STD_TORCH_CHECK(
      h0.dim() == 2 && steps >= 0 && (segment >= 0 || (Device::keeps_activated && segment == keep_activated)),
      "orthogonal_filter: h0 must be (samples, units)");
  check_dtype(h0);
  h0 = stable::contiguous(h0);
  segment = std::min(segment, std::max<int64_t>(steps, 1));
  const Arguments arguments(h0, weight, bias, filter, alpha, beta, inputs, steps);
  return h0.scalar_type() == ScalarType::Float
      ? forward<Device, float>(h0, arguments, steps, activation, segment, return_states)
      : forward<Device, double>(h0, arguments, steps, activation, segment, return_states);
}

template <class Device>
Gradients orthogonal_filter_backward(
    Tensor grad_output, Tensor checkpoints, Tensor weight, std::optional<Tensor> bias, Tensor filter, Tensor alpha,
    Tensor beta, std::optional<Tensor> inputs, int64_t steps, std::string activation, int64_t segment,
    bool needs_weight, bool needs_bias, bool needs_scales, bool needs_inputs, bool needs_states,
    std::optional<Tensor> activated) {
  const int64_t dim = grad_output.dim();
  STD_TORCH_CHECK(
      (dim == 2 || (dim == 3 && grad_output.size(0) == steps + 1)) && steps >= 0 && segment >= 1,
      "orthogonal_filter_backward: grad_output must be (samples, units) or (layers + 1, samples, units)");
  const int64_t state_size = grad_output.size(dim - 2) * grad_output.size(dim - 1);
  segment = std::min(segment, std::max<int64_t>(steps, 1));
  STD_TORCH_CHECK(
      (checkpoints.numel() == (steps + segment - 1) / segment * state_size ||
       checkpoints.numel() == steps * state_size) &&
          checkpoints.scalar_type() == grad_output.scalar_type() && (!needs_bias || bias) && (!needs_inputs || inputs),
      "orthogonal_filter_backward: checkpoints do not fit the other arguments");
  STD_TORCH_CHECK(
      !activated ||
          (Device::keeps_activated && activated->numel() == steps * state_size &&
           checkpoints.numel() == steps * state_size && activated->scalar_type() == grad_output.scalar_type() &&
           activated->is_cpu() == grad_output.is_cpu()),
      "orthogonal_filter_backward: activated does not fit the other arguments");
  if (activated) activated = stable::contiguous(*activated);
  check_dtype(grad_output);
  grad_output = stable::contiguous(grad_output);
  checkpoints = stable::contiguous(checkpoints);
  const Arguments arguments(grad_output, weight, bias, filter, alpha, beta, inputs, steps);
  const auto run = grad_output.scalar_type() == ScalarType::Float ? backward<Device, float> : backward<Device, double>;
  return run(
      grad_output, checkpoints, arguments, steps, activation, segment, needs_weight, needs_bias, needs_scales,
      needs_inputs, needs_states, activated ? &*activated : nullptr);
}

}  // namespace lcw_ops
