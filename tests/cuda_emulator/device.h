// csrc/cuda/device.h for a CPU, based on cuda_runtime.h beside this file. A copy is carried out at once, and then its
// bytes are counted at its barrier.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

namespace lcw_ops {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulated_thread->block->memory());
}

inline unsigned cluster_rank() { return emulated_thread->block->rank; }
inline void cluster_barrier() { emulated_meet(emulated_cluster->all); }

inline void barrier_of_first(int threads) {
  EmulatedBarrier& barrier = emulated_thread->block->first;
  barrier.expected = threads;
  emulated_meet(barrier);
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  EmulatedMbarrier fresh;
  fresh.expected = fresh.pending = arrivals;
  emulated_thread->block->mbarrier(barrier) = fresh;
}

inline void mbarrier_init_fence() {}

inline void mbarrier_arrive_expecting(uint64_t* barrier, unsigned bytes) {
  EmulatedMbarrier& state = emulated_thread->block->mbarrier(barrier);
  state.bytes += bytes;
  --state.pending;
  state.end_phase_if_complete();
}

inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expecting(barrier, 0); }

inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  EmulatedMbarrier& state = emulated_thread->block->mbarrier(barrier);
  emulated_wait([&state, parity] { return state.phase % 2 != int(parity); });
}

inline void emulated_count(EmulatedMbarrier& barrier, unsigned bytes) {
  barrier.bytes -= bytes;
  barrier.end_phase_if_complete();
}

inline void copy_in_bulk(void* target, const void* source, unsigned bytes, uint64_t* barrier) {
  const auto on_sixteen = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (!on_sixteen(target) || !on_sixteen(source) || bytes % 16 != 0) __trap();
  std::memcpy(target, source, bytes);
  emulated_count(emulated_thread->block->mbarrier(barrier), bytes);
}

inline void emulated_send(unsigned rank, float* target, const float* values, int count, uint64_t* barrier) {
  EmulatedBlock &from = *emulated_thread->block, &to = emulated_cluster->blocks.at(rank);
  const auto there = [&](void* place) { return to.memory() + (static_cast<unsigned char*>(place) - from.memory()); };
  const size_t bytes = count * sizeof(float);
  if ((there(target) - to.memory()) % bytes != 0) __trap();
  std::memcpy(there(target), values, bytes);
  emulated_count(to.mbarrier(there(barrier)), bytes);
}

inline void send(unsigned rank, float* target, float value, uint64_t* barrier) {
  emulated_send(rank, target, &value, 1, barrier);
}

inline void send_four(unsigned rank, float* target, const float* values, uint64_t* barrier) {
  emulated_send(rank, target, values, 4, barrier);
}

}  // namespace lcw_ops
