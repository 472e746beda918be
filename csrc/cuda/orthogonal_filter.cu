// The orthogonal-filter recurrence on NVIDIA GPUs, the simplest right version: one block carries one row of the batch
// through all layers.
//
//   h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
//   P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T H_{l-1}
//
// Cost per step and row, forward: 4 N^2 operations, O and W_l read from the second-level cache by every block. Bound by
// the latency of one step (two reads of a matrix row, a reduction over a warp, two barriers), not by arithmetic.
// A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
//
// float32 products are plain multiply-adds, never TF32. No atomics: every sum has a fixed order.

#include "orthogonal_filter.h"

#include <algorithm>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace lcw_ops {
namespace {

constexpr int warp_size = 32;
// Enough warps to give every scheduler of a multiprocessor two, few enough that narrow nets do not idle.
constexpr int block_threads = 256;
// Partial sums of so many terms, for the sake of rounding; as on the CPU.
constexpr int64_t chunk_terms = 32;
// The most blocks a grid has along z.
constexpr int64_t most_layers = 65535;

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "orthogonal_filter: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "orthogonal_filter: the current CUDA stream is unknown");
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
__device__ T activate(T a, Activation kind) {
  switch (kind) {
    case Activation::tanh: return tanh(a);
    case Activation::relu: return a < T(0) ? T(0) : a;  // a NaN stays a NaN
    case Activation::sigmoid: return T(1) / (T(1) + exp(-a));
    default: return a;
  }
}

template <typename T>
__device__ T activation_slope(T a, T y, Activation kind) {
  switch (kind) {
    case Activation::tanh: return T(1) - y * y;
    case Activation::relu: return a > T(0) ? T(1) : T(0);
    case Activation::sigmoid: return y * (T(1) - y);
    default: return T(1);
  }
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// <row, state> by one warp; the result is valid in lane 0.
template <typename T>
__device__ T warp_dot(const T* row, const T* state, int64_t n) {
  T sum = 0;
  for (int64_t k = threadIdx.x % warp_size; k < n; k += warp_size) sum += row[k] * state[k];
  return warp_sum(sum);
}

// filtered = O h and pre = W h + b + u for the block's row; `state` is complete before, both results after.
template <typename T>
__device__ void apply_matrices(const Recurrence<T>& r, int64_t l, const T* state, T* filtered, T* pre) {
  const int64_t n = r.width;
  const bool first_lane = threadIdx.x % warp_size == 0;
  for (int64_t o = threadIdx.x / warp_size; o < n; o += block_threads / warp_size) {
    const T product = warp_dot(r.weight_at(l) + o * n, state, n);
    if (first_lane) {
      T sum = product;
      if (r.bias) sum += r.bias[l * r.bias_stride + o];
      if (r.inputs) sum += r.inputs[(l * r.rows + blockIdx.x) * n + o];
      pre[o] = sum;
    }
    if (r.permutation) {
      const int64_t from = r.permutation[o];
      // The public function has checked it; the op itself cannot without waiting for the device.
      if (from < 0 || from >= n) __trap();
      if (first_lane) filtered[o] = state[from];
    } else {
      const T rotated = warp_dot(r.filter_at(l) + o * n, state, n);
      if (first_lane) filtered[o] = rotated;
    }
  }
  __syncthreads();
}

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <typename T>
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
    apply_matrices(r, l, state, filtered, pre);
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

// Recompute one row's states and slopes in the segment, then carry its G back.
template <typename T>
__global__ void __launch_bounds__(block_threads) backward_rows(const Backward<T> pass) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, m = blockIdx.x;
  const auto row_of = [&](T* buffer, int64_t index) { return buffer + (index * r.rows + m) * n; };
  T* state = dynamic_shared<T>();
  T *filtered = state + n, *pre = filtered + n;
  const T* checkpoint = pass.checkpoints + (pass.first / r.segment * r.rows + m) * n;
  for (int64_t i = threadIdx.x; i < n; i += block_threads) state[i] = checkpoint[i];
  __syncthreads();
  for (int64_t s = 0; s < pass.count; ++s) {
    const int64_t l = pass.first + s;
    apply_matrices(r, l, state, filtered, pre);
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

  // From here the three shared rows hold G, alpha G and P.
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
      // Two sums: added onto the far larger filter branch, every term of the other would be rounded at its scale.
      T filter_branch = r.permutation ? gradient[i] : T(0), weight_branch = 0;
      for (int64_t chunk = 0; chunk < n; chunk += chunk_terms) {
        T filter_terms = 0, weight_terms = 0;
        for (int64_t o = chunk; o < n && o < chunk + chunk_terms; ++o) {
          if (!r.permutation) filter_terms += scaled[o] * r.filter_at(l)[o * n + i];
          weight_terms += grad_pre[o] * r.weight_at(l)[o * n + i];
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

// dW_l = P_l^T H_{l-1} and db_l, a thread per element; or, for a weight or bias shared by all steps, their sums over
// every sample of the segment. float64 until the last rounding.
template <typename T>
__global__ void weight_gradients(const Backward<T> pass) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t o = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  if (i >= n || o >= n) return;
  const auto weight_over = [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t m = begin; m < end; ++m) sum += double(pass.grad_pre[m * n + o]) * double(pass.states[m * n + i]);
    return sum;
  };
  const auto bias_over = [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t m = begin; m < end; ++m) sum += double(pass.grad_pre[m * n + i]);
    return sum;
  };
  for (int64_t s = blockIdx.z; s < pass.count; s += gridDim.z) {
    const int64_t l = pass.first + s, begin = s * r.rows, end = begin + r.rows;
    if (pass.grad_weight) pass.grad_weight[(l * n + o) * n + i] = static_cast<T>(weight_over(begin, end));
    if (pass.grad_bias && o == 0) pass.grad_bias[l * n + i] = static_cast<T>(bias_over(begin, end));
  }
  if (blockIdx.z != 0) return;
  if (pass.weight_sum) pass.weight_sum[o * n + i] += weight_over(0, pass.count * r.rows);
  if (pass.bias_sum && o == 0) pass.bias_sum[i] += bias_over(0, pass.count * r.rows);
}

// Three rows of shared memory; beyond 48 KB a kernel has to ask.
template <typename Kernel>
size_t shared_bytes(Kernel kernel, int64_t width, size_t element, int device) {
  const size_t bytes = 3 * size_t(width) * element;
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(
      bytes <= size_t(most), "orthogonal_filter: width ", width, " needs ", bytes, " bytes of shared memory, the GPU has ",
      most, " per block; use lcw_ops.use_backend(\"reference\")");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  return bytes;
}

struct Cuda {
  static void allocated(const Tensor&) {}

  template <typename T>
  static void run(const Forward<T>& pass, const Tensor& like) {
    const Recurrence<T>& r = pass.recurrence;
    const stable::accelerator::DeviceGuard guard(like.get_device_index());
    const size_t bytes = shared_bytes(forward_rows<T>, r.width, sizeof(T), like.get_device_index());
    forward_rows<T><<<unsigned(r.rows), block_threads, bytes, current_stream(like)>>>(pass);
    check_cuda(cudaGetLastError());
  }

  template <typename T>
  static void run_segment(const Backward<T>& pass, const Tensor& like) {
    const Recurrence<T>& r = pass.recurrence;
    const stable::accelerator::DeviceGuard guard(like.get_device_index());
    const cudaStream_t stream = current_stream(like);
    const size_t bytes = shared_bytes(backward_rows<T>, r.width, sizeof(T), like.get_device_index());
    backward_rows<T><<<unsigned(r.rows), block_threads, bytes, stream>>>(pass);
    check_cuda(cudaGetLastError());
    const bool per_layer = pass.grad_weight || pass.grad_bias;
    if (!per_layer && !pass.weight_sum && !pass.bias_sum) return;
    const dim3 tile(32, 8);
    const dim3 grid(
        unsigned((r.width + tile.x - 1) / tile.x), unsigned((r.width + tile.y - 1) / tile.y),
        per_layer ? unsigned(std::min(pass.count, most_layers)) : 1u);
    weight_gradients<T><<<grid, tile, 0, stream>>>(pass);
    check_cuda(cudaGetLastError());
  }
};

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CUDA, m) {
  m.impl("orthogonal_filter.cuda", TORCH_BOX(&lcw_ops::orthogonal_filter<lcw_ops::Cuda>));
  m.impl("orthogonal_filter_backward.cuda", TORCH_BOX(&lcw_ops::orthogonal_filter_backward<lcw_ops::Cuda>));
}
