// The shared memory of a block of the cluster kernels: its pieces, and the ring of chunks through which the matrices
// pass.
#pragma once

#include "orthogonal_filter_common.h"

namespace lcw_ops {

// A block owns at most as many units as a warp has lanes.
constexpr int block_units = warp_size;
// Enough warps to keep the multiply-add units busy while others wait for shared memory.
constexpr int consumer_warps = 8;
constexpr int consumer_threads = consumer_warps * warp_size;
constexpr int cluster_threads = consumer_threads + warp_size;
// The columns of a chunk, 512 bytes of a float32 row: long enough for the copy engine, and short enough that rows of
// 512 columns have four chunks to stream.
constexpr int chunk_columns = 128;
constexpr int most_cluster_blocks = 16;
constexpr int64_t most_cluster_width = most_cluster_blocks * block_units;

struct ClusterShape {
  int blocks, units;               // blocks of a cluster, units of a block
  int filter_slots, weight_slots;  // chunks of each matrix that shared memory holds
};

template <typename E>
struct alignas(4 * sizeof(E)) Quad {
  E values[4];
};

template <typename E>
__device__ Quad<E> load_four(const E* source) {
  return *reinterpret_cast<const Quad<E>*>(source);
}

// The length of a chunk's row in shared memory. Its 16 extra bytes spread a column of quads over all banks.
template <typename E>
constexpr int chunk_pitch = chunk_columns + 16 / sizeof(E);

// Cuts a block's shared memory into pieces that start on multiples of 16 bytes. On the host, the memory starts at
// nullptr and its bytes are only counted.
class SharedPieces {
 public:
  LCW_HOST_DEVICE explicit SharedPieces(unsigned char* start) : start_(start) {}

  template <typename E>
  LCW_HOST_DEVICE E* take(int64_t count) {
    unsigned char* piece = start_ + bytes_;
    bytes_ += (count * sizeof(E) + 15) / 16 * 16;
    return reinterpret_cast<E*>(piece);
  }
  LCW_HOST_DEVICE size_t bytes() const { return bytes_; }

 private:
  unsigned char* start_;
  size_t bytes_ = 0;
};

template <typename W>
struct RingMemory {
  float* filter;
  W* weight;
  uint64_t *filter_barriers, *weight_barriers;  // two per slot

  LCW_HOST_DEVICE RingMemory(SharedPieces& pieces, const ClusterShape& shape)
      : filter(pieces.take<float>(int64_t(shape.filter_slots) * shape.units * chunk_pitch<float>)),
        weight(pieces.take<W>(int64_t(shape.weight_slots) * shape.units * chunk_pitch<W>)),
        filter_barriers(pieces.take<uint64_t>(2 * shape.filter_slots)),
        weight_barriers(pieces.take<uint64_t>(2 * shape.weight_slots)) {}
};

LCW_HOST_DEVICE inline int state_pitch(int64_t width) { return int(width + 3) / 4 * 4; }

// The forward kernel's memory for a tile of R rows: the whole state, twice, and the warps' partial sums of both
// products.
template <int R>
struct ForwardMemory {
  float *states, *partials;
  uint64_t* inbox;

  LCW_HOST_DEVICE ForwardMemory(SharedPieces& pieces, const ClusterShape&, const Recurrence<float>& r)
      : states(pieces.take<float>(2 * R * state_pitch(r.width))),
        partials(pieces.take<float>(consumer_warps * 2 * R * warp_size)),
        inbox(pieces.take<uint64_t>(2)) {}
};

// The backward kernel's memory for a tile of R rows: alpha G (`scaled`) and P of the block's units, and the partial
// sums that every block sends (`received`), with one more place for permuted numbers. All of them exist twice, because
// a warp may write the numbers of the next step while another warp still multiplies.
template <int R>
struct BackwardMemory {
  float *scaled, *grad_pre, *received;
  int* seen;
  uint64_t* inbox;

  LCW_HOST_DEVICE BackwardMemory(SharedPieces& pieces, const ClusterShape& shape, const Recurrence<float>& r)
      : scaled(pieces.take<float>(2 * shape.units * R)),
        grad_pre(pieces.take<float>(2 * shape.units * R)),
        received(pieces.take<float>(2 * (shape.blocks + 1) * shape.units * R)),
        seen(pieces.take<int>(r.width)),
        inbox(pieces.take<uint64_t>(2)) {}

  // The memory of a step; steps are counted from 1.
  __device__ BackwardMemory of_step(int64_t step, const ClusterShape& shape) const {
    const int odd = int(step % 2);
    BackwardMemory memory = *this;
    memory.scaled += odd * shape.units * R, memory.grad_pre += odd * shape.units * R;
    memory.received += odd * (shape.blocks + 1) * shape.units * R;
    memory.inbox += odd;
    return memory;
  }
};

// The slots in shared memory through which the block's rows of every layer's matrix pass. The producer fills them in
// the order in which the consumers take them. Each warp counts the slots in a Ring of its own.
template <typename E>
class Ring {
 public:
  __device__ Ring(
      const E* matrix, int64_t layer_stride, int64_t width, int first_unit, int units, E* slots, uint64_t* barriers,
      int slot_count, int slot_units)
      : matrix_(matrix),
        layer_stride_(layer_stride),
        width_(int(width)),
        first_unit_(first_unit),
        units_(units),
        slots_(slots),
        full_(barriers),
        empty_(barriers + slot_count),
        slot_count_(slot_count),
        slot_size_(slot_units * chunk_pitch<E>),
        chunks_((int(width) + chunk_columns - 1) / chunk_columns),
        in_bulk_(width * sizeof(E) % 16 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0) {}

  // Called by one thread, before anything else.
  __device__ void init() {
#pragma unroll 1
    for (int slot = 0; slot < slot_count_; ++slot) {
      mbarrier_init(full_ + slot, in_bulk_ ? 1 : warp_size);
      mbarrier_init(empty_ + slot, consumer_warps);
    }
  }

  // Called by all lanes of the producer.
  __device__ void fill(int64_t l, int chunk) {
    if (resident() && filled_ == chunks_) return;
    ++filled_;
    mbarrier_wait(empty_ + slot_, parity_ ^ 1);
    const int begin = chunk * chunk_columns, columns = min(chunk_columns, width_ - begin);
    const E* source = matrix_ + l * layer_stride_ + int64_t(first_unit_) * width_ + begin;
    if (in_bulk_)
      copy_in_bulk_by_warp(source, columns);
    else
      copy_by_warp(source, columns);
    advance();
  }

  // Returns the next chunk: rows of chunk_pitch<E>, padded with zeros to a multiple of four columns.
  __device__ const E* acquire() {
    mbarrier_wait(full_ + slot_, parity_);
    return slots_ + slot_ * slot_size_;
  }

  __device__ void release() {
    if (!resident()) {
      __syncwarp();
      if (threadIdx.x % warp_size == 0) mbarrier_arrive(empty_ + slot_);
    }
    advance();
  }

 private:
  __device__ bool resident() const { return layer_stride_ == 0 && slot_count_ == chunks_; }

  __device__ void advance() {
    if (++slot_ < slot_count_) return;
    slot_ = 0;
    if (!resident()) parity_ ^= 1;
  }

  __device__ void copy_in_bulk_by_warp(const E* source, int columns) {
    E* slot = slots_ + slot_ * slot_size_;
    const int lane = threadIdx.x % warp_size;
    const unsigned bytes = columns * sizeof(E);
    if (lane == 0) mbarrier_arrive_expecting(full_ + slot_, units_ * bytes);
    __syncwarp();
#pragma unroll 1
    for (int unit = lane; unit < units_; unit += warp_size)
      copy_in_bulk(slot + unit * chunk_pitch<E>, source + int64_t(unit) * width_, bytes, full_ + slot_);
  }

  // For rows that do not start on multiples of 16 bytes.
  __device__ void copy_by_warp(const E* source, int columns) {
    E* slot = slots_ + slot_ * slot_size_;
#pragma unroll 1
    for (int unit = 0; unit < units_; ++unit)
      for (int column = threadIdx.x % warp_size; column < (columns + 3) / 4 * 4; column += warp_size)
        slot[unit * chunk_pitch<E> + column] = column < columns ? source[int64_t(unit) * width_ + column] : E(0.0f);
    mbarrier_arrive(full_ + slot_);
  }

  const E* matrix_;
  int64_t layer_stride_;
  int width_, first_unit_, units_;
  E* slots_;
  uint64_t *full_, *empty_;
  int slot_count_, slot_size_, chunks_;
  bool in_bulk_;
  int slot_ = 0, filled_ = 0;
  unsigned parity_ = 0;
};

}  // namespace lcw_ops
