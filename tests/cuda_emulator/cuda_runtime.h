// Enough of CUDA to run a kernel on the CPU, for tests on machines without a GPU. A GPU thread is a coroutine: the
// threads of a block, and of all blocks of a cluster, take turns; blocks or clusters run in sequence. A thread that
// waits at a barrier lets the others run. Their order differs in every round, so a missing barrier, an index out of
// bounds or a wrong sum shows here as it would on a GPU. If no thread can continue, the process prints a message and
// ends. Times are meaningless here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor
};

inline int emulated_number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::atoi(text) : otherwise;
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated_number("LCW_OPS_EMULATED_SHARED_BYTES", 227 << 10);
      break;
    // So few multiprocessors that small batches are cut into tiles of every size.
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    default: *value = 9;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

struct cudaLaunchAttributeValue {
  dim3 clusterDim;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// CUDA has these without a namespace.
using std::max;
using std::min;

inline dim3 blockIdx, threadIdx, blockDim, gridDim;

// A hardware barrier: the last thread to arrive lets all continue.
struct EmulatedBarrier {
  int expected = 0, arrived = 0, phase = 0;
};

struct EmulatedMbarrier {
  int expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // still to arrive; negative if they arrive before they are expected

  void end_phase_if_complete() {
    if (pending != 0 || bytes != 0) return;
    pending = expected;
    ++phase;
  }
};

struct EmulatedBlock {
  static constexpr int warp_size = 32, strip = 32;
  dim3 index;
  unsigned rank;
  EmulatedBarrier all, first;
  std::vector<EmulatedBarrier> warps;
  std::vector<double> lanes;                     // wide enough for every type that is shuffled
  std::vector<double> shared;                    // initially NaN; the strip at its end must stay NaN
  std::map<size_t, EmulatedMbarrier> mbarriers;  // by place in shared memory

  EmulatedBlock(dim3 index, unsigned rank, int count, size_t bytes)
      : index(index), rank(rank), all{count}, lanes(count), shared(bytes / sizeof(double) + 2 + strip, std::nan("")) {
    for (int begin = 0; begin < count; begin += warp_size) warps.push_back({std::min(warp_size, count - begin)});
  }
  unsigned char* memory() {
    const uintptr_t start = reinterpret_cast<uintptr_t>(shared.data());
    return reinterpret_cast<unsigned char*>((start + 15) / 16 * 16);
  }
  bool overrun() const {
    return std::any_of(shared.end() - strip, shared.end(), [](double value) { return !std::isnan(value); });
  }
  EmulatedMbarrier& mbarrier(const void* place) {
    return mbarriers[static_cast<const unsigned char*>(place) - memory()];
  }
};

struct EmulatedThread {
  ucontext_t start;
  jmp_buf place;  // where the thread waits; longjmp, unlike swapcontext, makes no system call
  bool started = false;
  EmulatedBlock* block;
  int number;
  std::function<bool()> goes_on;  // whether it can go on; empty if it does not wait
  bool ended = false;
};

struct EmulatedCluster {
  std::vector<EmulatedBlock> blocks;
  EmulatedBarrier all;
  std::vector<EmulatedThread> threads;
  jmp_buf scheduler;
};

inline EmulatedCluster* emulated_cluster;
inline EmulatedThread* emulated_thread;
inline const std::function<void()>* emulated_kernel;

template <class Condition>
void emulated_wait(Condition condition) {
  if (condition()) return;
  emulated_thread->goes_on = condition;
  if (_setjmp(emulated_thread->place) == 0) _longjmp(emulated_cluster->scheduler, 1);
}

inline void emulated_meet(EmulatedBarrier& barrier) {
  const int phase = barrier.phase;
  if (++barrier.arrived == barrier.expected) barrier.arrived = 0, ++barrier.phase;
  emulated_wait([&barrier, phase] { return barrier.phase != phase; });
}

inline void __syncthreads() { emulated_meet(emulated_thread->block->all); }
inline void __syncwarp() {
  emulated_meet(emulated_thread->block->warps[emulated_thread->number / EmulatedBlock::warp_size]);
}
inline void __trap() {
  std::fprintf(stderr, "emulated CUDA: the kernel called __trap()\n");
  std::abort();
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  EmulatedBlock& block = *emulated_thread->block;
  const int number = emulated_thread->number;
  block.lanes[number] = value;
  __syncwarp();
  const bool inside = number % EmulatedBlock::warp_size + offset < EmulatedBlock::warp_size;
  const T moved = inside ? T(block.lanes[number + offset]) : value;
  __syncwarp();
  return moved;
}

inline void emulated_thread_body() {
  (*emulated_kernel)();
  emulated_thread->ended = true;
  _longjmp(emulated_cluster->scheduler, 1);
}

// Returns when the thread waits or has ended.
[[gnu::noinline]] inline void emulated_resume(EmulatedThread& thread) {
  if (_setjmp(emulated_cluster->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void emulated_run(EmulatedCluster& cluster) {
  std::minstd_rand random(1);
  std::vector<size_t> order(cluster.threads.size());
  std::iota(order.begin(), order.end(), 0);
  size_t left = order.size();
  while (left > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (size_t number : order) {
      EmulatedThread& thread = cluster.threads[number];
      if (thread.ended || (thread.goes_on && !thread.goes_on())) continue;
      thread.goes_on = nullptr;
      moved = true;
      emulated_thread = &thread;
      blockIdx = thread.block->index;
      const unsigned place = thread.number;
      threadIdx = dim3(place % blockDim.x, place / blockDim.x % blockDim.y, place / (blockDim.x * blockDim.y));
      emulated_resume(thread);
      left -= thread.ended;
    }
    if (!moved) {
      std::fprintf(stderr, "emulated CUDA: %zu threads wait forever\n", left);
      std::abort();
    }
  }
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  // A launch's arguments may take 32 KB, and every thread has its own copy.
  constexpr size_t stack_bytes = 128 << 10;
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulated_kernel = &body;
  gridDim = config->gridDim, blockDim = config->blockDim;
  const int count = blockDim.x * blockDim.y * blockDim.z;
  const unsigned size = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  if (gridDim.x % size != 0) return 1;
  // Neighbours along x form a cluster.
  for (unsigned first = 0; first < gridDim.x * gridDim.y * gridDim.z; first += size) {
    EmulatedCluster cluster;
    cluster.all.expected = size * count;
    cluster.blocks.reserve(size);
    cluster.threads = std::vector<EmulatedThread>(size * count);
    for (unsigned rank = 0; rank < size; ++rank) {
      const unsigned index = first + rank;
      const dim3 place(index % gridDim.x, index / gridDim.x % gridDim.y, index / (gridDim.x * gridDim.y));
      cluster.blocks.emplace_back(place, rank, count, config->dynamicSmemBytes);
      for (int number = 0; number < count; ++number) {
        EmulatedThread& thread = cluster.threads[rank * count + number];
        thread.block = &cluster.blocks[rank], thread.number = number;
        if (stacks.size() <= rank * count + number) stacks.emplace_back(new unsigned char[stack_bytes]);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = stacks[rank * count + number].get();
        thread.start.uc_stack.ss_size = stack_bytes;
        makecontext(&thread.start, emulated_thread_body, 0);
      }
    }
    emulated_cluster = &cluster;
    emulated_run(cluster);
    for (const EmulatedBlock& block : cluster.blocks)
      if (block.overrun()) std::fprintf(stderr, "emulated CUDA: wrote behind shared memory\n"), std::abort();
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
  *count = 1;
  return cudaSuccess;
}
