// Shared by the CUDA kernels of the orthogonal-filter recurrence: activations, sums, launches.
#pragma once

#include "../orthogonal_filter.h"

#include <algorithm>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "device.h"

namespace lcw_ops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int warp_size = 32;
// The number of terms of a partial sum. Partial sums bound the rounding error, as on the CPU.
constexpr int chunk_terms = 32;
// The most blocks that a grid may have along y and z.
constexpr int64_t most_blocks = 65535;

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "orthogonal_filter: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "orthogonal_filter: the current CUDA stream is unknown");
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

template <typename... Parameters, typename... Arguments>
void launch(cudaLaunchConfig_t config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)));
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, size_t bytes, const Tensor& like) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = bytes;
  config.stream = current_stream(like);
  return config;
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

}  // namespace lcw_ops
