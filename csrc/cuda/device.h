// Small functions for the facilities that only a GPU has: dynamic shared memory, thread-block clusters, barriers in
// shared memory and the copy engine (PTX ISA 8.1, sm_90 and later). tests/cuda_emulator/device.h has them for a CPU.
//
// An mbarrier counts arrivals and bytes. A phase ends when both are complete. A thread that waits gives the parity of
// the phase that it waits for: 0, 1, 0, ... A new mbarrier is in phase 0, so a wait for parity 1 returns at once.
#pragma once

#include <cstdint>

namespace lcw_ops {

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for every thread of every block of the cluster. Writes before it are visible after it.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Waits for the first `threads` threads of the block. This is barrier 1, because __syncthreads is barrier 0.
__device__ inline void barrier_of_first(int threads) { asm volatile("barrier.sync 1, %0;" ::"r"(threads) : "memory"); }

__device__ inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine. A cluster_barrier must follow.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for this many bytes, some of which may have arrived already.
__device__ inline void mbarrier_arrive_expecting(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  unsigned complete = 0;
  while (!complete)
    asm volatile(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// Lets the copy engine copy from global memory and count the bytes at the barrier. Addresses and size must be multiples
// of 16.
__device__ inline void copy_in_bulk(void* target, const void* source, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// The address in block `rank` of the cluster that corresponds to `pointer` in this block.
__device__ inline uint32_t address_in(unsigned rank, const void* pointer) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Stores into the shared memory of block `rank` of the cluster, and counts the bytes at that block's barrier. Both
// pointers are addresses in this block; in send_four, the target starts on a multiple of 16 bytes.
__device__ inline void send(unsigned rank, float* target, float value, uint64_t* barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                   address_in(rank, target)),
               "f"(value), "r"(address_in(rank, barrier))
               : "memory");
}

__device__ inline void send_four(unsigned rank, float* target, const float* values, uint64_t* barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in(rank, target)),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(address_in(rank, barrier))
               : "memory");
}

}  // namespace lcw_ops
