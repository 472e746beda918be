// The orthogonal-filter recurrence on thread-block clusters (sm_90 and later, float32 state, N <= 512). A cluster
// carries a tile of the batch through all layers. Each of its blocks owns up to 32 output units, one per lane of a
// warp.
//
// The symbols are those of orthogonal_filter.cu. Forward, a block multiplies its units' rows of O_l and W_l with the
// whole state. It sends the result to every block of the cluster (distributed shared memory). A block starts the next
// layer once the results of all blocks have arrived. Backward, a block multiplies the same rows with its units' G and
// P. Every block receives a partial sum for its units from each block and adds these in the order of the ranks. So both
// directions read the same slice of the matrices, and no layer needs a barrier across the cluster.
//
// The copy engine brings the slices to shared memory in chunks of columns, ahead of the layer that uses them. A matrix
// shared by all steps stays there for the whole sequence if it fits (N = 512: 64 KB of W and as much of O in each of 16
// blocks). An extra warp does nothing but start the copies.
//
// Cost per layer and tile of R rows, in each of C blocks with N / C units: the products take 4 R N N/C operations on
// registers, and share their reads of the state. From shared memory, a block reads 8 N N/C bytes of slices, and each of
// its warps up to R N bytes of the state (or of G and P). A block sends 4 R N bytes. At R = 8, arithmetic and shared
// memory take about equally long, and the latency of one exchange is added.
// float32 products are multiply-adds, not TF32. A sum has one part per warp (forward) or per block (backward), so the
// number of rows in a tile does not change the order of the sum.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "orthogonal_filter_gradients.h"
#include "orthogonal_filter_ring.h"

namespace lcw_ops {

// A thread's place in the block and the cluster, and the rings of both matrices (orthogonal_filter_ring.h), whose slots
// every warp counts for itself.
template <typename W, int R>
struct ClusterBlock {
  const Recurrence<float>& r;
  int rank, blocks, slot_units, first_unit, units;
  int64_t first_row;
  int chunks;
  Ring<float> filter;
  Ring<W> weight;

  __device__ ClusterBlock(const Recurrence<float>& recurrence, const ClusterShape& shape, const RingMemory<W>& memory)
      : r(recurrence),
        rank(cluster_rank()),
        blocks(shape.blocks),
        slot_units(shape.units),
        first_unit(rank * shape.units),
        units(max(0, min(shape.units, int(r.width) - first_unit))),
        first_row(int64_t(blockIdx.x) / shape.blocks * R),
        chunks((int(r.width) + chunk_columns - 1) / chunk_columns),
        filter(
            r.filter, r.filter_stride, r.width, first_unit, units, memory.filter, memory.filter_barriers,
            shape.filter_slots, shape.units),
        weight(
            static_cast<const W*>(r.weight), r.weight_stride, r.width, first_unit, units, memory.weight,
            memory.weight_barriers, shape.weight_slots, shape.units) {}

  __device__ bool is_producer() const { return threadIdx.x >= consumer_threads; }
  __device__ int warp() const { return threadIdx.x / warp_size; }
  __device__ int lane() const { return threadIdx.x % warp_size; }

  // Called by every thread of the cluster, so that no thread sends before all barriers exist.
  __device__ void init_barriers(uint64_t* inbox) {
    if (threadIdx.x == 0) {
      if (!r.permutation) filter.init();
      weight.init();
      mbarrier_init(inbox, 1);
      mbarrier_init(inbox + 1, 1);
      mbarrier_init_fence();
    }
    cluster_barrier();
  }

  __device__ void produce_layer(int64_t l) {
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (!r.permutation) filter.fill(l, chunk);
      weight.fill(l, chunk);
    }
  }
};

// The parity to wait for at the inbox of step s: the barrier that counts the bytes which the blocks send for that step.
// Steps alternate between two inboxes, and step 0 needs none.
__device__ inline unsigned inbox_parity(int64_t s) { return (s - 1) / 2 % 2; }

// Multiplies the warp's quads (groups of four columns) in one chunk of columns with R rows of the state.
template <bool filters, typename W, int R>
__device__ void multiply_chunk(
    const float* filter, const W* weight, const float* state, int pitch, int columns, int warp, float* filter_terms,
    float* weight_terms) {
#pragma unroll 2
  for (int column = 4 * warp; column < columns; column += 4 * consumer_warps) {
    const Quad<W> w = load_four(weight + column);
    const Quad<float> o = filters ? load_four(filter + column) : Quad<float>{};
#pragma unroll
    for (int row = 0; row < R; ++row) {
      const Quad<float> h = load_four(state + row * pitch + column);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        weight_terms[row] += static_cast<float>(w.values[k]) * h.values[k];
        if (filters) filter_terms[row] += o.values[k] * h.values[k];
      }
    }
  }
}

// Multiplies the block's rows of both matrices with the state. Each warp sums over a part of the columns and writes its
// partial sums.
template <typename W, int R>
__device__ void multiply_state(ClusterBlock<W, R>& block, const float* state, int pitch, float* partials) {
  const int n = int(block.r.width), row_of_lane = max(0, min(block.lane(), block.units - 1));
  float filter_terms[R] = {}, weight_terms[R] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
    const int begin = chunk * chunk_columns, columns = min(chunk_columns, n - begin);
    const W* weight = block.weight.acquire() + row_of_lane * chunk_pitch<W>;
    if (block.r.permutation) {
      multiply_chunk<false, W, R>(
          nullptr, weight, state + begin, pitch, columns, block.warp(), filter_terms, weight_terms);
    } else {
      const float* filter = block.filter.acquire() + row_of_lane * chunk_pitch<float>;
      multiply_chunk<true, W, R>(
          filter, weight, state + begin, pitch, columns, block.warp(), filter_terms, weight_terms);
      block.filter.release();
    }
    block.weight.release();
  }
#pragma unroll
  for (int row = 0; row < R; ++row) {
    partials[((block.warp() * 2 + 0) * R + row) * warp_size + block.lane()] = filter_terms[row];
    partials[((block.warp() * 2 + 1) * R + row) * warp_size + block.lane()] = weight_terms[row];
  }
}

template <int R>
__device__ float sum_partials(const float* partials, int product, int row, int unit) {
  float sum = 0;
  for (int warp = 0; warp < consumer_warps; ++warp)
    sum += partials[((warp * 2 + product) * R + row) * warp_size + unit];
  return sum;
}

// An element of the tile that a thread computes. A thread has the same elements for the whole pass.
struct Element {
  bool exists, in_batch;  // the last tile may have rows, of zeros, that are not in the batch
  int row, unit;
  int64_t m, i;
};

// The thread's `which`-th element in the forward pass. Neighbouring threads have neighbouring units.
template <typename W, int R>
__device__ Element forward_element(const ClusterBlock<W, R>& block, int which) {
  const int index = threadIdx.x + which * consumer_threads;
  Element e;
  e.row = index / warp_size, e.unit = index % warp_size;
  e.exists = e.row < R && e.unit < block.units;
  e.m = block.first_row + e.row, e.i = block.first_unit + e.unit;
  e.in_batch = e.exists && e.m < block.r.rows;
  return e;
}

// The thread's `which`-th element in the backward pass. Neighbouring threads have neighbouring rows, in the order of G
// and P in shared memory.
template <typename W, int R>
__device__ Element backward_element(const ClusterBlock<W, R>& block, int which) {
  const int index = threadIdx.x + which * consumer_threads;
  Element e;
  e.row = index % R, e.unit = index / R;
  e.exists = e.unit < block.units;
  e.m = block.first_row + e.row, e.i = block.first_unit + e.unit;
  e.in_batch = e.exists && e.m < block.r.rows;
  return e;
}

template <int R>
constexpr int elements_per_thread = (R * block_units + consumer_threads - 1) / consumer_threads;

// The state to carry through layers first..first+count-1, and the results to write on the way if they are not nullptr.
struct Carry {
  const float* start;  // (M, N)
  int64_t first, count;
  float* last;         // (M, N), after the last layer
  float* checkpoints;  // the states of layers 0, segment, 2 segment, ...
  // (count, M, N): the state before each layer, beta act'(A), O h and act(A).
  float *states, *slopes, *filtered, *activated;
};

inline Carry forward_carry(const Forward<float>& pass) {
  const Recurrence<float>& r = pass.recurrence;
  Carry carry{};
  carry.start = pass.h0, carry.count = r.steps, carry.checkpoints = pass.checkpoints;
  carry.states = pass.return_states ? pass.output : nullptr;
  carry.last = pass.return_states ? pass.output + r.steps * r.rows * r.width : pass.output;
  return carry;
}

inline Carry recomputing_carry(const Backward<float>& pass) {
  const Recurrence<float>& r = pass.recurrence;
  Carry carry{};
  carry.start = pass.checkpoint();
  carry.first = pass.first, carry.count = pass.count;
  carry.states = pass.states, carry.slopes = pass.grad_pre;
  carry.filtered = pass.filtered, carry.activated = pass.activated;
  return carry;
}

// Writes the results of layer l for element e: O h = filtered, A = pre, act(A) = y.
__device__ inline void write_forward(
    const Recurrence<float>& r, const Carry& carry, const Element& e, int64_t l, float state, float filtered, float pre,
    float y) {
  if (!e.in_batch) return;
  const int64_t place = ((l - carry.first) * r.rows + e.m) * r.width + e.i;
  if (carry.states) carry.states[place] = state;
  if (carry.slopes) carry.slopes[place] = r.beta_at(l) * activation_slope(pre, y, r.activation);
  if (carry.filtered) carry.filtered[place] = filtered, carry.activated[place] = y;
  if (carry.checkpoints && l % r.segment == 0)
    carry.checkpoints[(l / r.segment * r.rows + e.m) * r.width + e.i] = state;
}

// Below sm_90 the kernels are empty, and they are never launched.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LCW_HAS_CLUSTERS 1
#else
#define LCW_HAS_CLUSTERS 0
#endif

template <typename W, int R>
__global__ void __launch_bounds__(cluster_threads, 1)
    forward_cluster(const Recurrence<float> r, const Carry carry, ClusterShape shape) {
#if LCW_HAS_CLUSTERS
  SharedPieces pieces(dynamic_shared<unsigned char>());
  const RingMemory<W> rings(pieces, shape);
  const ForwardMemory<R> memory(pieces, shape, r);
  ClusterBlock<W, R> block(r, shape, rings);
  const int64_t n = r.width;
  const int pitch = state_pitch(n);
  constexpr int elements = elements_per_thread<R>;
#pragma unroll 1
  for (int index = threadIdx.x; !block.is_producer() && index < R * pitch; index += consumer_threads) {
    const int64_t m = block.first_row + index / pitch, i = index % pitch;
    memory.states[index] = m < r.rows && i < n ? carry.start[m * n + i] : 0.0f;
    memory.states[R * pitch + index] = 0;
  }
  block.init_barriers(memory.inbox);
  if (block.is_producer()) {
#pragma unroll 1
    for (int64_t s = 0; s < carry.count; ++s) block.produce_layer(carry.first + s);
    cluster_barrier();
    return;
  }
  float current[elements];
  int64_t from[elements] = {};
  for (int which = 0; which < elements; ++which) {
    const Element e = forward_element(block, which);
    if (!e.exists) continue;
    current[which] = memory.states[e.row * pitch + e.i];
    if (r.permutation) from[which] = r.permutation[e.i];
    // The public function has checked the index, unless torch.compile or torch.func kept it from reading the values.
    // The op itself could not check it without waiting for the device.
    if (from[which] < 0 || from[which] >= n) __trap();
  }
  for (int64_t s = 0; s < carry.count; ++s) {
    const int64_t l = carry.first + s;
    const bool last = s + 1 == carry.count;
    const float* state = memory.states + s % 2 * R * pitch;
    float* next = memory.states + (s + 1) % 2 * R * pitch;
    uint64_t* next_inbox = memory.inbox + (s + 1) % 2;
    if (!last && threadIdx.x == 0) mbarrier_arrive_expecting(next_inbox, unsigned(R * n * sizeof(float)));
    // Read these numbers while the inbox fills. They are used after the products.
    const float alpha = r.alpha_at(l), beta = r.beta_at(l);
    float shift[elements] = {};
    for (int which = 0; which < elements; ++which) {
      const Element e = forward_element(block, which);
      if (e.exists && r.bias) shift[which] = r.bias[l * r.bias_stride + e.i];
      if (e.in_batch && r.inputs) shift[which] += r.inputs[(l * r.rows + e.m) * n + e.i];
    }
    if (s > 0) mbarrier_wait(memory.inbox + s % 2, inbox_parity(s));
    multiply_state(block, state, pitch, memory.partials);
    barrier_of_first(consumer_threads);
    for (int which = 0; which < elements; ++which) {
      const Element e = forward_element(block, which);
      if (!e.exists) continue;
      const float before = current[which];
      const float filtered = r.permutation ? state[e.row * pitch + from[which]]
                                           : sum_partials<R>(memory.partials, 0, e.row, e.unit);
      const float pre = sum_partials<R>(memory.partials, 1, e.row, e.unit) + shift[which];
      const float y = activate(pre, r.activation);
      current[which] = alpha * filtered + beta * y;
      // The other blocks wait for this number: send it before writing results that only later kernels read.
#pragma unroll 2
      for (int rank = 0; rank < block.blocks && !last; ++rank)
        send(rank, next + e.row * pitch + e.i, current[which], next_inbox);
      write_forward(r, carry, e, l, before, filtered, pre, y);
    }
  }
  for (int which = 0; which < elements; ++which) {
    const Element e = forward_element(block, which);
    if (e.in_batch && carry.last) carry.last[e.m * n + e.i] = current[which];
  }
  // No block may end while another block still sends to it.
  cluster_barrier();
#endif
}

// The numbers of one element that a step of the backward pass needs. They are read from global memory one step ahead.
struct BackwardRead {
  float slope, filtered, activated, grad_output;
};

__device__ inline BackwardRead read_backward(const Backward<float>& pass, const Element& e, int64_t s) {
  const Recurrence<float>& r = pass.recurrence;
  BackwardRead read{};
  if (!e.in_batch || s < 0) return read;
  const int64_t place = (s * r.rows + e.m) * r.width + e.i;
  read.slope = pass.grad_pre[place];
  if (pass.filtered) read.filtered = pass.filtered[place], read.activated = pass.activated[place];
  if (pass.return_states) read.grad_output = pass.grad_output[((pass.first + s) * r.rows + e.m) * r.width + e.i];
  return read;
}

// Computes P from G and writes it to shared memory, for the products, and to global memory, for later gradients.
template <int R>
__device__ void write_backward(
    const Backward<float>& pass, const BackwardMemory<R>& memory, const Element& e, int64_t s, float gradient,
    const BackwardRead& read) {
  const Recurrence<float>& r = pass.recurrence;
  const int64_t l = pass.first + s, row = s * r.rows + e.m;
  const float grad_pre = gradient * read.slope;
  memory.scaled[e.unit * R + e.row] = r.alpha_at(l) * gradient;
  memory.grad_pre[e.unit * R + e.row] = grad_pre;
  if (!e.in_batch) return;
  pass.grad_pre[row * r.width + e.i] = grad_pre;
  if (pass.grad_inputs) pass.grad_inputs[(l * r.rows + e.m) * r.width + e.i] = grad_pre;
  if (pass.grad_states) pass.grad_states[((l + 1) * r.rows + e.m) * r.width + e.i] = gradient;
  // scale_products sums these products later.
  if (pass.filtered) {
    pass.filtered[row * r.width + e.i] = gradient * read.filtered;
    pass.activated[row * r.width + e.i] = gradient * read.activated;
  }
}

// Computes the block's part of alpha G O + P W, which is the sum over the block's own units, and sends it to the blocks
// that own the columns. A warp takes 32 columns at a time.
template <typename W, int R>
__device__ void multiply_gradient(ClusterBlock<W, R>& block, const BackwardMemory<R>& memory) {
  constexpr int groups = chunk_columns / warp_size;
  const int n = int(block.r.width);
#pragma unroll 1
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
    const float* filter = block.r.permutation ? nullptr : block.filter.acquire();
    const W* weight = block.weight.acquire();
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      const int column = group * warp_size + block.lane(), i = chunk * chunk_columns + column;
      if ((chunk * groups + group) % consumer_warps != block.warp() || i - block.lane() >= n) continue;
      float filter_terms[R] = {}, weight_terms[R] = {};
#pragma unroll 4
      for (int unit = 0; unit < block.units; ++unit) {
        const float w = static_cast<float>(weight[unit * chunk_pitch<W> + column]);
        const float o = filter ? filter[unit * chunk_pitch<float> + column] : 0.0f;
#pragma unroll
        for (int row = 0; row < R; row += 4) {
          const Quad<float> scaled = load_four(memory.scaled + unit * R + row);
          const Quad<float> grad_pre = load_four(memory.grad_pre + unit * R + row);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            weight_terms[row + k] += grad_pre.values[k] * w;
            if (filter) filter_terms[row + k] += scaled.values[k] * o;
          }
        }
      }
      if (i >= n) continue;
      // Both sums have at most 32 terms, so the error of adding them here is that of a partial sum.
#pragma unroll
      for (int row = 0; row < R; ++row) weight_terms[row] += filter_terms[row];
      const int owner = i / block.slot_units, unit = i % block.slot_units;
      float* place = memory.received + (block.rank * block.slot_units + unit) * R;
#pragma unroll
      for (int row = 0; row < R; row += 4) send_four(owner, place + row, weight_terms + row, memory.inbox);
    }
    if (filter) block.filter.release();
    block.weight.release();
  }
}

// Stops the kernel if r.permutation is not a permutation: a block would wait forever for an index that does not occur.
__device__ inline void check_permutation(const Recurrence<float>& r, int* seen) {
  for (int64_t i = threadIdx.x; i < r.width; i += cluster_threads) seen[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r.width; i += cluster_threads) {
    const int64_t from = r.permutation[i];
    if (from < 0 || from >= r.width) __trap();
    seen[from] = 1;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r.width; i += cluster_threads)
    if (!seen[i]) __trap();
}

template <typename W, int R>
__global__ void __launch_bounds__(cluster_threads, 1) backward_cluster(const Backward<float> pass, ClusterShape shape) {
#if LCW_HAS_CLUSTERS
  const Recurrence<float>& r = pass.recurrence;
  SharedPieces pieces(dynamic_shared<unsigned char>());
  const RingMemory<W> rings(pieces, shape);
  const BackwardMemory<R> both(pieces, shape, r);
  ClusterBlock<W, R> block(r, shape, rings);
  constexpr int elements = elements_per_thread<R>;
  if (r.permutation) check_permutation(r, both.seen);
  block.init_barriers(both.inbox);
  if (block.is_producer()) {
    for (int64_t s = pass.count - 1; s >= 0; --s) block.produce_layer(pass.first + s);
    cluster_barrier();
    return;
  }
  const int place_size = shape.units * R;
  const unsigned expected = (shape.blocks + (r.permutation ? 1 : 0)) * block.units * R * sizeof(float);
  float gradient[elements] = {};
  BackwardRead read[elements];
  int64_t to[elements] = {};
  for (int which = 0; which < elements; ++which) {
    const Element e = backward_element(block, which);
    if (e.in_batch) gradient[which] = pass.gradient[e.m * r.width + e.i];
    if (e.exists && r.permutation) to[which] = r.permutation[e.i];
    read[which] = read_backward(pass, e, pass.count - 1);
  }
  for (int64_t s = pass.count - 1; s >= 0; --s) {
    const int64_t step = pass.count - s;
    const BackwardMemory<R> memory = both.of_step(step, shape);
    if (threadIdx.x == 0) mbarrier_arrive_expecting(memory.inbox, expected);
    float grad_output[elements];
    for (int which = 0; which < elements; ++which) {
      const Element e = backward_element(block, which);
      grad_output[which] = read[which].grad_output;
      if (!e.exists) continue;
      write_backward(pass, memory, e, s, gradient[which], read[which]);
      // The element goes to the block that owns unit `to`, into the slot after those of all ranks.
      const int owner = int(to[which]) / shape.units, unit = int(to[which]) % shape.units;
      if (r.permutation)
        send(
            owner, memory.received + (shape.blocks * shape.units + unit) * R + e.row, memory.scaled[e.unit * R + e.row],
            memory.inbox);
      read[which] = read_backward(pass, e, s - 1);
    }
    barrier_of_first(consumer_threads);
    multiply_gradient(block, memory);
    mbarrier_wait(memory.inbox, inbox_parity(step));
    for (int which = 0; which < elements; ++which) {
      const Element e = backward_element(block, which);
      if (!e.exists) continue;
      const float* place = memory.received + e.unit * R + e.row;
      float sum = 0;
      for (int rank = 0; rank < shape.blocks; ++rank) sum += place[rank * place_size];
      if (r.permutation) sum += place[shape.blocks * place_size];
      gradient[which] = sum + grad_output[which];
    }
  }
  for (int which = 0; which < elements; ++which) {
    const Element e = backward_element(block, which);
    if (!e.in_batch) continue;
    pass.gradient[e.m * r.width + e.i] = gradient[which];
    if (pass.grad_states && pass.first == 0) pass.grad_states[e.m * r.width + e.i] = gradient[which];
  }
  cluster_barrier();
#endif
}

// The smallest cluster in which every unit has a lane.
inline ClusterShape cluster_shape(int64_t width) {
  ClusterShape shape{1, 0, 0, 0};
  while (shape.blocks * block_units < width) shape.blocks *= 2;
  shape.units = int((width + shape.blocks - 1) / shape.blocks);
  return shape;
}

template <typename W, class Memory>
size_t shared_bytes(const ClusterShape& shape, const Recurrence<float>& r) {
  SharedPieces pieces(nullptr);
  const RingMemory<W> rings(pieces, shape);
  const Memory memory(pieces, shape, r);
  return pieces.bytes();
}

// Divides the remaining shared memory between the two matrices, in slots of one chunk. A matrix that all steps share
// stays there if it fits; any other gets slots for up to two layers. Each matrix gets at least two slots, if it has two
// chunks: one is read while the other is copied. Returns nothing if these do not fit.
template <typename W, class Memory>
std::optional<ClusterShape> share_out_slots(ClusterShape shape, const Recurrence<float>& r, size_t most_bytes) {
  const int chunks = int((r.width + chunk_columns - 1) / chunk_columns), few = std::min(chunks, 2);
  const auto fits = [&](int filter_slots, int weight_slots) {
    shape.filter_slots = filter_slots, shape.weight_slots = weight_slots;
    return shared_bytes<W, Memory>(shape, r) <= most_bytes;
  };
  const int most_filter = r.permutation ? 0 : r.filter_stride ? 2 * chunks : chunks;
  const int most_weight = r.weight_stride ? 2 * chunks : chunks;
  int filter_slots = std::min(few, most_filter), weight_slots = few;
  if (!fits(filter_slots, weight_slots)) return std::nullopt;
  if (r.filter_stride == 0 && fits(most_filter, weight_slots)) filter_slots = most_filter;
  while (weight_slots < most_weight && fits(filter_slots, weight_slots + 1)) ++weight_slots;
  while (filter_slots < most_filter && fits(filter_slots + 1, weight_slots)) ++filter_slots;
  fits(filter_slots, weight_slots);
  return shape;
}

struct ClusterLaunch {
  ClusterShape shape;
  cudaLaunchConfig_t config;
};

// Prepares the kernel for this configuration, and returns whether the GPU can run it. The driver is asked that once,
// because a call of the op launches the same kernels for every segment.
template <typename Kernel>
bool is_launchable(Kernel kernel, const cudaLaunchConfig_t& config, unsigned blocks, int device) {
  // The attributes belong to the kernel: a launch of another width may have changed them since.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)));
  if (blocks > 8) check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, size_t>, bool> known;
  const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), device, blocks, config.dynamicSmemBytes);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  int at_once = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config));
  return known[key] = at_once > 0;
}

// The launch of a cluster kernel with the shared memory of a `Memory`, or nothing if this GPU cannot run the kernel.
template <typename W, int R, class Memory, typename Kernel>
std::optional<ClusterLaunch> plan_cluster(
    Kernel kernel, const Recurrence<float>& r, cudaLaunchAttribute& cluster, const Tensor& like) {
  const int device = like.get_device_index();
  const auto shape = share_out_slots<W, Memory>(
      cluster_shape(r.width), r, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (!shape) return std::nullopt;
  const unsigned tiles = unsigned((r.rows + R - 1) / R);
  const size_t bytes = shared_bytes<W, Memory>(*shape, r);
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(shape->blocks), 1, 1};
  cudaLaunchConfig_t config = launch_config(dim3(tiles * shape->blocks), dim3(cluster_threads), bytes, like);
  config.attrs = &cluster, config.numAttrs = 1;
  if (!is_launchable(kernel, config, unsigned(shape->blocks), device)) return std::nullopt;
  return ClusterLaunch{*shape, config};
}

template <typename W, int R>
bool run_cluster_tiles(const Forward<float>& pass, const Tensor& like) {
  const Recurrence<float>& r = pass.recurrence;
  cudaLaunchAttribute cluster;
  const auto forward = plan_cluster<W, R, ForwardMemory<R>>(forward_cluster<W, R>, r, cluster, like);
  if (!forward) return false;
  launch(forward->config, forward_cluster<W, R>, r, forward_carry(pass), forward->shape);
  return true;
}

template <typename W, int R>
bool run_cluster_tiles(const Backward<float>& pass, const Tensor& like) {
  const Recurrence<float>& r = pass.recurrence;
  cudaLaunchAttribute cluster;
  const auto forward = plan_cluster<W, R, ForwardMemory<R>>(forward_cluster<W, R>, r, cluster, like);
  const auto backward = plan_cluster<W, R, BackwardMemory<R>>(backward_cluster<W, R>, r, cluster, like);
  if (!forward || !backward) return false;
  launch(forward->config, forward_cluster<W, R>, r, recomputing_carry(pass), forward->shape);
  launch(backward->config, backward_cluster<W, R>, pass, backward->shape);
  if (pass.filtered) launch_scale_products(pass, like);
  return true;
}

// Runs the kernels with the smallest tiles that can all run at once or, if no tiles can, with the largest, which read W
// least often. Returns false if the kernels cannot run.
template <typename W, typename Pass>
bool run_cluster(const Pass& pass, const Tensor& like) {
  const Recurrence<float>& r = pass.recurrence;
  const int device = like.get_device_index();
  if (r.width > most_cluster_width || device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return false;
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t clusters = std::max<int64_t>(processors / cluster_shape(r.width).blocks, 1);
  if (r.rows <= 4 * clusters) return run_cluster_tiles<W, 4>(pass, like);
  if (r.rows <= 8 * clusters) return run_cluster_tiles<W, 8>(pass, like);
  return run_cluster_tiles<W, 16>(pass, like);
}

}  // namespace lcw_ops
