// The simplest correct kernels of the orthogonal-filter recurrence: one block carries one row of the batch through all
// layers. They serve float64, GPUs without clusters, and nets that are too wide for clusters. The other kernels are
// tested against them.
//
// Cost per forward step and row of N units: 4 N^2 operations. Each block reads O and W_l from the second-level cache.
// The kernels are bound by the latency of one step (two reads of a matrix row, a reduction over a warp, two barriers),
// not by arithmetic. The symbols are those of orthogonal_filter.cu.
#pragma once

#include "orthogonal_filter_common.h"

namespace lcw_ops {

// Every scheduler of a multiprocessor gets two warps. With more, warps would idle in narrow nets.
constexpr int block_threads = 256;

// One warp computes <row, state>, and widens a 16-bit row as it reads the row. The result is valid in lane 0.
template <typename W, typename T>
__device__ T warp_dot(const W* row, const T* state, int64_t n) {
  T sum = 0;
  for (int64_t k = threadIdx.x % warp_size; k < n; k += warp_size) sum += static_cast<T>(row[k]) * state[k];
  return warp_sum(sum);
}

// Computes filtered = O h and pre = W h + b + u for the block's row. `state` must be complete before the call; both
// results are complete after it.
template <typename W, typename T>
__device__ void apply_matrices(const Recurrence<T>& r, int64_t l, const T* state, T* filtered, T* pre) {
  const int64_t n = r.width;
  const bool first_lane = threadIdx.x % warp_size == 0;
  for (int64_t o = threadIdx.x / warp_size; o < n; o += block_threads / warp_size) {
    const T product = warp_dot(r.template weight_at<W>(l) + o * n, state, n);
    if (first_lane) {
      T sum = product;
      if (r.bias) sum += r.bias[l * r.bias_stride + o];
      if (r.inputs) sum += r.inputs[(l * r.rows + blockIdx.x) * n + o];
      pre[o] = sum;
    }
    if (r.permutation) {
      const int64_t from = r.permutation[o];
      // The public function has checked the index, unless torch.compile or torch.func kept it from reading the values.
      // The op itself could not check it without waiting for the device.
      if (from < 0 || from >= n) __trap();
      if (first_lane) filtered[o] = state[from];
    } else {
      const T rotated = warp_dot(r.filter_at(l) + o * n, state, n);
      if (first_lane) filtered[o] = rotated;
    }
  }
  __syncthreads();
}

template <typename T, typename W>
__global__ void __launch_bounds__(block_threads) forward_rows(const Forward<T> pass) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, m = blockIdx.x;
  T* state = dynamic_shared<T>();
  T *filtered = state + n, *pre = filtered + n;
  for (int64_t i = threadIdx.x; i < n; i += block_threads) {
    state[i] = pass.h0[m * n + i];
    if (pass.return_states) pass.output[m * n + i] = state[i];
  }
  __syncthreads();
  for (int64_t l = 0; l < r.steps; ++l) {
    const bool keep = pass.checkpoints && l % r.segment == 0;
    T* checkpoint = keep ? pass.checkpoints + (l / r.segment * r.rows + m) * n : nullptr;
    apply_matrices<W>(r, l, state, filtered, pre);
    const T alpha = r.alpha_at(l), beta = r.beta_at(l);
    for (int64_t i = threadIdx.x; i < n; i += block_threads) {
      if (keep) checkpoint[i] = state[i];
      state[i] = alpha * filtered[i] + beta * activate(pre[i], r.activation);
      if (pass.return_states) pass.output[((l + 1) * r.rows + m) * n + i] = state[i];
    }
    __syncthreads();
  }
  if (pass.return_states) return;
  for (int64_t i = threadIdx.x; i < n; i += block_threads) pass.output[m * n + i] = state[i];
}

// Recomputes one row's states and slopes in a segment, then propagates the row's G, the gradient of its state, back
// through the segment.
template <typename T, typename W>
__global__ void __launch_bounds__(block_threads) backward_rows(const Backward<T> pass) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, m = blockIdx.x;
  const auto row_of = [&](T* buffer, int64_t index) { return buffer + (index * r.rows + m) * n; };
  T* state = dynamic_shared<T>();
  T *filtered = state + n, *pre = filtered + n;
  const T* checkpoint = pass.checkpoint() + m * n;
  for (int64_t i = threadIdx.x; i < n; i += block_threads) state[i] = checkpoint[i];
  __syncthreads();
  for (int64_t s = 0; s < pass.count; ++s) {
    const int64_t l = pass.first + s;
    apply_matrices<W>(r, l, state, filtered, pre);
    const T alpha = r.alpha_at(l), beta = r.beta_at(l);
    for (int64_t i = threadIdx.x; i < n; i += block_threads) {
      const T y = activate(pre[i], r.activation);
      row_of(pass.states, s)[i] = state[i];
      row_of(pass.grad_pre, s)[i] = beta * activation_slope(pre[i], y, r.activation);
      if (pass.filtered) {
        row_of(pass.filtered, s)[i] = filtered[i];
        row_of(pass.activated, s)[i] = y;
      }
      state[i] = alpha * filtered[i] + beta * y;
    }
    __syncthreads();
  }

  // From here the three shared rows hold G, alpha G and P (grad_pre).
  T *gradient = state, *scaled = filtered, *grad_pre = pre;
  for (int64_t i = threadIdx.x; i < n; i += block_threads) gradient[i] = pass.gradient[m * n + i];
  __syncthreads();
  for (int64_t s = pass.count - 1; s >= 0; --s) {
    const int64_t l = pass.first + s;
    if (pass.filtered && threadIdx.x < warp_size) {
      double alpha_product = 0, beta_product = 0;
      for (int64_t i = threadIdx.x; i < n; i += warp_size) {
        alpha_product += double(gradient[i]) * double(row_of(pass.filtered, s)[i]);
        beta_product += double(gradient[i]) * double(row_of(pass.activated, s)[i]);
      }
      alpha_product = warp_sum(alpha_product);
      beta_product = warp_sum(beta_product);
      if (threadIdx.x == 0) {
        pass.alpha_products[l * r.rows + m] = alpha_product;
        pass.beta_products[l * r.rows + m] = beta_product;
      }
    }
    const T alpha = r.alpha_at(l);
    for (int64_t i = threadIdx.x; i < n; i += block_threads) {
      if (pass.grad_states) row_of(pass.grad_states, l + 1)[i] = gradient[i];
      scaled[i] = alpha * gradient[i];
      grad_pre[i] = gradient[i] * row_of(pass.grad_pre, s)[i];
      row_of(pass.grad_pre, s)[i] = grad_pre[i];
      if (pass.grad_inputs) row_of(pass.grad_inputs, l)[i] = grad_pre[i];
    }
    __syncthreads();
    if (r.permutation) {
      for (int64_t i = threadIdx.x; i < n; i += block_threads) gradient[r.permutation[i]] = scaled[i];
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < n; i += block_threads) {
      // The filter branch and the weight branch have a sum each. If the terms of the weight branch were added to the
      // sum of the filter branch, which is far larger, they would be rounded at its scale.
      T filter_branch = r.permutation ? gradient[i] : T(0), weight_branch = 0;
      for (int64_t chunk = 0; chunk < n; chunk += chunk_terms) {
        T filter_terms = 0, weight_terms = 0;
        for (int64_t o = chunk; o < n && o < chunk + chunk_terms; ++o) {
          if (!r.permutation) filter_terms += scaled[o] * r.filter_at(l)[o * n + i];
          weight_terms += grad_pre[o] * static_cast<T>(r.template weight_at<W>(l)[o * n + i]);
        }
        filter_branch += filter_terms;
        weight_branch += weight_terms;
      }
      T sum = filter_branch + weight_branch;
      if (pass.return_states) sum += pass.grad_output[(l * r.rows + m) * n + i];
      gradient[i] = sum;
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < n; i += block_threads) {
    pass.gradient[m * n + i] = gradient[i];
    if (pass.grad_states && pass.first == 0) row_of(pass.grad_states, 0)[i] = gradient[i];
  }
}

template <typename Kernel, typename Pass>
void launch_rows(Kernel kernel, const Pass& pass, const Tensor& like) {
  const int64_t width = pass.recurrence.width;
  const size_t bytes = 3 * size_t(width) * like.element_size();
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index());
  STD_TORCH_CHECK(
      bytes <= size_t(most), "orthogonal_filter: width is ", width, ", which needs ", bytes,
      " bytes of shared memory per block; expected at most ", most,
      " on this GPU. Use lcw_ops.use_backend(\"reference\")");
  launch(launch_config(dim3(unsigned(pass.recurrence.rows)), dim3(block_threads), bytes, like), kernel, pass);
}

}  // namespace lcw_ops
