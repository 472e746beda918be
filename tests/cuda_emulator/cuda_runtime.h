// Enough of CUDA to run a kernel on the CPU, for tests on machines without a GPU: a block is a group of threads, one
// std::thread each, with real barriers and real shuffles; blocks run one after the other. A missing __syncthreads, an
// index out of bounds or a wrong sum shows here as it would there. Slow, and no judge of speed.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 227 << 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

inline thread_local dim3 blockIdx, threadIdx, blockDim, gridDim;

struct EmulatedBlock {
  static constexpr int warp_size = 32;
  std::barrier<> threads;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> lanes;  // wide enough for every type that is shuffled
  std::vector<unsigned char> shared;

  EmulatedBlock(int count, size_t bytes) : threads(count), lanes(count), shared(bytes, 0xff) {
    for (int first = 0; first < count; first += warp_size)
      warps.push_back(std::make_unique<std::barrier<>>(count - first < warp_size ? count - first : warp_size));
  }
};

inline thread_local EmulatedBlock* emulated_block;
inline thread_local int emulated_thread;

inline unsigned char* emulated_shared() { return emulated_block->shared.data(); }
inline void __syncthreads() { emulated_block->threads.arrive_and_wait(); }
inline void __trap() { std::abort(); }

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  std::barrier<>& warp = *emulated_block->warps[emulated_thread / EmulatedBlock::warp_size];
  emulated_block->lanes[emulated_thread] = value;
  warp.arrive_and_wait();
  const bool inside = emulated_thread % EmulatedBlock::warp_size + offset < EmulatedBlock::warp_size;
  const T moved = inside ? T(emulated_block->lanes[emulated_thread + offset]) : value;
  warp.arrive_and_wait();
  return moved;
}

// What kernel<<<grid, block, bytes, stream>>>(...) becomes.
inline void emulated_launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& kernel) {
  const int count = block.x * block.y * block.z;
  for (unsigned index = 0; index < grid.x * grid.y * grid.z; ++index) {
    EmulatedBlock state(count, bytes);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < count; ++thread)
      threads.emplace_back([&, thread] {
        blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y));
        threadIdx = dim3(thread % block.x, thread / block.x % block.y, thread / (block.x * block.y));
        gridDim = grid;
        blockDim = block;
        emulated_block = &state;
        emulated_thread = thread;
        kernel();
      });
    for (std::thread& thread : threads) thread.join();
  }
}
