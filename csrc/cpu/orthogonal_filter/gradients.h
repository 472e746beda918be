// The parts of the backward pass that are parallel over steps: slopes of known states, gradients of parameters. The
// symbols are those of orthogonal_filter.cpp.
#pragma once

#include "../vector_math.h"
#include "layouts.h"

namespace lcw_ops {

// Computes the slopes beta act'(A_l) of samples begin..end-1 of a segment whose states are known: a sample is a row at
// one step. `packed` holds the matrices in panels, for products of a row with W^T and O^T.
template <class Tiles, typename T>
LCW_INLINE void known_slopes(const Backward<T>& pass, const Recurrence<T>& packed, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  constexpr int64_t most = 48;  // whole tiles for every instruction set
  const Permutation permutation(r);
  Buffer<T> pre(most * n);
  for (int64_t first = begin; first < end; first += most) {
    const int64_t count = std::min(most, end - first);
    const PackedRows<Tiles, T> layout(count, n, {0, n});
    const T* states = pass.states + first * n;
    layout.multiply(packed.template weight_at<T>(0), nullptr, states, pre.data(), nullptr);
    if (pass.filtered && r.permutation)
      layout.permute(permutation.forward, states, pass.filtered + first * n);
    else if (pass.filtered)
      layout.multiply(packed.filter, nullptr, states, pass.filtered + first * n, nullptr);
    for (int64_t m = first; m < first + count; ++m) {
      const int64_t l = pass.first + m / r.rows;
      T *row = pre.data() + (m - first) * n, *slopes = pass.slopes + m * n;
      T* activated = pass.activated ? pass.activated + m * n : row;
      if (r.bias)
        for (int64_t i = 0; i < n; ++i) row[i] += r.bias[l * r.bias_stride + i];
      if (r.inputs)
        for (int64_t i = 0; i < n; ++i) row[i] += r.inputs[(pass.first * r.rows + m) * n + i];
      const T beta = r.beta_at(l);
      with_activation(r.activation, [&](auto act) LCW_LAMBDA_INLINE {
        for (int64_t i = 0; i < n; ++i) {
          const T a = row[i], y = act.value(a);
          slopes[i] = beta * act.slope(a, y);
          activated[i] = y;
        }
      });
    }
  }
}

// Computes dW_l = P_l^T h_{l-1} and db_l for layers begin..end-1 of the segment. db_l is summed in float64.
template <class Tiles, typename T>
LCW_INLINE void weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  const bool narrow = sizeof(T) == 4 && r.weight_type != ScalarType::Float;
  Buffer<T> wide(pass.grad_weight && narrow ? n * n : 0);
  std::vector<double> bias_sum(n);
  for (int64_t s = begin; s < end; ++s) {
    const T* grad_pre = pass.grad_pre + s * r.rows * n;
    const T* state = pass.states + s * r.rows * n;
    const int64_t l = pass.first + s;
    if (pass.grad_weight) {
      T* target = narrow ? wide.data() : static_cast<T*>(pass.grad_weight) + l * n * n;
      multiply_in_parts<Tiles, T>({grad_pre, 1, n, state, n, target, n, n, n, r.rows}, sample_terms);
      if (narrow) Tiles::round(target, r.weight_type, static_cast<uint16_t*>(pass.grad_weight) + l * n * n, n * n);
    }
    if (pass.grad_bias) {
      std::fill(bias_sum.begin(), bias_sum.end(), 0.0);
      for (int64_t m = 0; m < r.rows; ++m)
        for (int64_t i = 0; i < n; ++i) bias_sum[i] += double(grad_pre[m * n + i]);
      for (int64_t i = 0; i < n; ++i) pass.grad_bias[l * n + i] = static_cast<T>(bias_sum[i]);
    }
  }
}

// Computes dW and db if all steps share the weight or the bias: the sums over all samples of the segment, for output
// units begin..end-1.
template <class Tiles, typename T>
LCW_INLINE void shared_weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, samples = pass.count * r.rows;
  if (pass.weight_sum) {
    // Short sums are in T, and they are added in float64: in T alone, the sum of terms of one sign errs up to 80 times
    // as much as eager torch's.
    constexpr int64_t block_samples = 16 * sample_terms;
    Buffer<T> sum((end - begin) * n);
    for (int64_t first = 0; first < samples; first += block_samples) {
      const int64_t count = std::min(block_samples, samples - first);
      multiply_in_parts<Tiles, T>(
          {pass.grad_pre + first * n + begin, 1, n, pass.states + first * n, n, sum.data(), n, end - begin, n, count},
          sample_terms);
      for (int64_t i = 0; i < (end - begin) * n; ++i) pass.weight_sum[begin * n + i] += double(sum[i]);
    }
  }
  if (pass.bias_sum) {
    for (int64_t m = 0; m < samples; ++m)
      for (int64_t i = begin; i < end; ++i) pass.bias_sum[i] += double(pass.grad_pre[m * n + i]);
  }
}

}  // namespace lcw_ops
