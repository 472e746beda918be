// Activated gradients on NVIDIA GPUs: in place over a list of tensors, and inside the steps of SGD and AdamW.
//
//   f(g) = alpha atan(beta g) | alpha tanh(beta g) | alpha sign(g) ln(1 + beta |g|)
//   SGD     d = f(g) + wd w,  v <- mu v + (1 - damp) d,  w <- w - lr v          (on the gradient)
//           d = g + wd w,     v <- mu v + (1 - damp) d,  w <- w - lr f(v)       (on the momentum)
//   AdamW   g' = f(g),  w <- (1 - lr wd) w,  m <- m + (1 - b1) (g' - m),  v <- b2 v + (1 - b2) g'^2,
//           w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// g is the gradient of the parameter w, wd the weight decay, mu the momentum, damp the dampening, t the count of steps.
// M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for Deep Neural Networks", TNNLS 2021, arXiv
// 2107.04228; the update rules are those of torch.optim.
//
// Cost: every number is read and written at most once. An element of 4 bytes moves 8 bytes for f, 20 for SGD with
// momentum, 28 for AdamW (36 with amsgrad). Counted in the sm_90a code, an element takes 23 / 20 / 37 instructions for
// f with arctan / tanh / log. With arctan it takes 70 for SGD (the code has f in two places, one of which runs) and 82
// for AdamW. An H200 issues 33 T instructions a second and copies 4.3 TB/s. While the bytes of an element move, the GPU
// has time for 61, 153 and 215 instructions, so all three ops are bound by memory. For 16-bit numbers it has time for
// half as many instructions, and f takes 27 / 23 / 41.
//
// A list of tensors is one index space, cut into blocks of equal work that find their tensor by bisection. Addresses
// and sizes are in the launch's arguments, so nothing is copied to the GPU first, and a CUDA graph can record the
// launch. As with any graph, the addresses stay those of the recording, and so do the values of step counters on the
// CPU. A launch takes 255 tensors for f, 126 for SGD, 72 for AdamW, in the 4 KB of arguments that every driver accepts.
//
// f uses CUDA's own atan, tanh and log1p, whose errors are at most 2, 2 and 1 units in the last place in float32 (CUDA
// C++ Programming Guide, mathematical functions) over the whole range. Multiplying by alpha and beta rounds too. NaN
// stays NaN, and +-inf gives f's limit. 16-bit numbers are computed in float32 and rounded once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../refusal.h"

namespace lcw_ops {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int block_threads = 256;
// The width of the widest load.
constexpr int vector_bytes = 16;
// A block takes 16 KB of each array: so much that finding the tensor takes only a tenth of its time, and so little that
// the last wave of blocks is short.
constexpr int vectors_per_thread = 4;
// The most bytes that the arguments of a launch may take.
constexpr int argument_bytes = 4096;

template <typename E>
using Computed = std::conditional_t<std::is_same_v<E, double>, double, float>;

enum class Kind { arctan, tanh, log };

template <Kind kind, typename T>
struct Activation {
  T alpha, beta;

  Activation(double alpha, double beta) : alpha(T(alpha)), beta(T(beta)) {}

  __device__ T operator()(T gradient) const {
    const T x = beta * gradient;
    if constexpr (kind == Kind::arctan) return alpha * atan(x);
    if constexpr (kind == Kind::tanh) return alpha * tanh(x);
    return alpha * copysign(log1p(fabs(x)), x);
  }
};

// One word of the arguments for a tensor: an address, or the count of steps.
union Slot {
  void* memory;
  float number;
};

// The three operations. An operation changes the numbers x[0], x[1], ... of one element, which come from `arrays`
// arrays. It reads some of the arrays and writes some, always the first. `together` is the number of vectors that a
// thread loads before it computes, so that enough bytes are in flight.
template <Kind kind, typename T>
struct Activate {
  static constexpr int arrays = 1, slots = 1, together = 2;
  Activation<kind, T> f;

  __device__ bool reads(int) const { return true; }
  __device__ bool writes(int) const { return true; }
  __device__ void begin(const Slot*) {}
  __device__ void operator()(T* x) const { x[0] = f(x[0]); }
};

template <Kind kind, typename T>
struct SgdStep {
  enum { param, gradient, buffer };
  static constexpr int arrays = 3, slots = 3, together = 1;
  Activation<kind, T> f;
  T lr, momentum, undamped, weight_decay;
  bool has_buffer, nesterov, maximize, is_first, on_momentum;

  // Before the first step the buffer is not initialised.
  __device__ bool reads(int array) const { return array != buffer || (has_buffer && !is_first); }
  __device__ bool writes(int array) const { return array == param || (array == buffer && has_buffer); }
  __device__ void begin(const Slot*) {}

  __device__ void operator()(T* x) const {
    const T g = maximize ? -x[gradient] : x[gradient];
    const T d = (on_momentum ? g : f(g)) + weight_decay * x[param];
    T step = d;
    if (has_buffer) {
      const T v = is_first ? d : momentum * x[buffer] + undamped * d;
      x[buffer] = v;
      step = nesterov ? d + momentum * v : v;
    }
    x[param] -= lr * (on_momentum ? f(step) : step);
  }
};

template <Kind kind, typename T>
struct AdamWStep {
  enum { param, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, state_step };
  static constexpr int arrays = 5, slots = 6, together = 1;
  Activation<kind, T> f;
  T lr, kept, added, beta2, added_sq, eps, log_beta1, log_beta2;
  bool amsgrad, maximize, steps_on_gpu;
  T step_size, root_scale;  // depend on the tensor's count of steps: set by begin()

  __device__ bool reads(int array) const { return array != max_exp_avg_sq || amsgrad; }
  __device__ bool writes(int array) const { return array != gradient && reads(array); }

  // 1 - b^t = -expm1(t ln b) keeps its digits if b^t is near 1, in float32 too.
  __device__ void begin(const Slot* slot) {
    const Slot step = slot[state_step];
    const T t = steps_on_gpu ? *static_cast<const float*>(step.memory) : step.number;
    step_size = lr / -expm1(t * log_beta1);
    root_scale = T(1) / sqrt(-expm1(t * log_beta2));
  }

  __device__ void operator()(T* x) const {
    const T g = f(maximize ? -x[gradient] : x[gradient]);
    x[exp_avg] += added * (g - x[exp_avg]);
    x[exp_avg_sq] = beta2 * x[exp_avg_sq] + added_sq * g * g;
    T second = x[exp_avg_sq];
    // A NaN stays NaN, as in torch.maximum.
    if (amsgrad) {
      const T most = x[max_exp_avg_sq];
      second = x[max_exp_avg_sq] = most >= second || most != most ? most : second;
    }
    x[param] = kept * x[param] - step_size * (x[exp_avg] / (sqrt(second) * root_scale + eps));
  }
};

template <typename E>
constexpr int vector_width = vector_bytes / int(sizeof(E));

// The number of elements of a block in every array.
template <typename E>
constexpr int chunk = block_threads * vectors_per_thread * vector_width<E>;

// The arguments of a launch. A tensor's chunks are counted from the multiple of 16 bytes at or before its first
// element, so that only its first and its last chunk have elements outside whole vectors.
template <class Operation>
struct Launch {
  static constexpr int slot_bytes = Operation::slots * sizeof(Slot);
  static constexpr int fixed_bytes = (sizeof(Operation) + sizeof(int) + 7) / 8 * 8;
  static constexpr int capacity = (argument_bytes - fixed_bytes) / (slot_bytes + 2 * int(sizeof(uint32_t)));

  Operation operation;
  int count;
  Slot slots[capacity][Operation::slots];
  uint32_t first_chunk[capacity];
  uint32_t last_end[capacity];  // the place in its last chunk at which a tensor ends
};

template <typename E>
__host__ __device__ int elements_behind_boundary(const void* memory) {
  return int(reinterpret_cast<uintptr_t>(memory) % vector_bytes / sizeof(E));
}

template <typename E, int width>
struct alignas(sizeof(E) * width) Pack {
  E values[width];
};

template <typename E, int width, class Operation>
struct Vectors {
  using T = Computed<E>;
  Pack<E, width> packs[Operation::arrays];

  __device__ void load(const Operation& operation, E* const* memory, int i) {
#pragma unroll
    for (int a = 0; a < Operation::arrays; ++a)
      if (operation.reads(a)) packs[a] = *reinterpret_cast<const Pack<E, width>*>(memory[a] + i);
  }

  __device__ void compute(const Operation& operation) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      T x[Operation::arrays];
#pragma unroll
      for (int a = 0; a < Operation::arrays; ++a) x[a] = operation.reads(a) ? T(packs[a].values[j]) : T(0);
      operation(x);
#pragma unroll
      for (int a = 0; a < Operation::arrays; ++a)
        if (operation.writes(a)) packs[a].values[j] = E(x[a]);
    }
  }

  __device__ void store(const Operation& operation, E* const* memory, int i) const {
#pragma unroll
    for (int a = 0; a < Operation::arrays; ++a)
      if (operation.writes(a)) *reinterpret_cast<Pack<E, width>*>(memory[a] + i) = packs[a];
  }
};

// Updates elements begin..end-1 of a chunk, in whole vectors where possible. If the arrays of the tensor start at
// different distances from a multiple of 16 bytes, all elements are updated one by one.
template <typename E, class Operation>
__device__ void update_chunk(const Operation& operation, E* const* memory, int begin, int end, bool in_vectors) {
  constexpr int width = vector_width<E>, together = Operation::together;
  int vectors_begin = (begin + width - 1) / width * width, vectors_end = end / width * width;
  if (!in_vectors || vectors_begin > vectors_end) vectors_begin = vectors_end = begin;
#pragma unroll 1
  for (int round = 0; round < vectors_per_thread; round += together) {
    Vectors<E, width, Operation> vectors[together];
    const auto place = [round](int k) { return int(((round + k) * block_threads + threadIdx.x) * width); };
    const auto inside = [&](int k) { return place(k) >= vectors_begin && place(k) < vectors_end; };
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (inside(k)) vectors[k].load(operation, memory, place(k));
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (!inside(k)) continue;
      vectors[k].compute(operation);
      vectors[k].store(operation, memory, place(k));
    }
  }
  const int before = vectors_begin - begin, singles = before + end - vectors_end;
#pragma unroll 1
  for (int k = threadIdx.x; k < singles; k += block_threads) {
    Vectors<E, 1, Operation> single;
    const int i = k < before ? begin + k : vectors_end + k - before;
    single.load(operation, memory, i);
    single.compute(operation);
    single.store(operation, memory, i);
  }
}

template <class Operation, typename E>
__global__ void __launch_bounds__(block_threads) update_tensors(const __grid_constant__ Launch<Operation> launch) {
  int tensor = 0;
  for (int above = launch.count; above - tensor > 1;) {
    const int middle = (tensor + above) / 2;
    if (launch.first_chunk[middle] <= blockIdx.x)
      tensor = middle;
    else
      above = middle;
  }
  const uint32_t number = blockIdx.x - launch.first_chunk[tensor];
  const uint32_t next = tensor + 1 < launch.count ? launch.first_chunk[tensor + 1] : gridDim.x;
  const Slot* slots = launch.slots[tensor];
  Operation operation = launch.operation;
  operation.begin(slots);

  const int behind = elements_behind_boundary<E>(slots[0].memory);
  bool in_vectors = true;
  E* memory[Operation::arrays];
#pragma unroll
  for (int a = 0; a < Operation::arrays; ++a) {
    E* start = static_cast<E*>(slots[a].memory);
    in_vectors &= elements_behind_boundary<E>(start) == behind || !(operation.reads(a) || operation.writes(a));
    memory[a] = start + (int64_t(number) * chunk<E> - behind);
  }
  const int begin = number == 0 ? behind : 0;
  const int end = blockIdx.x + 1 == next ? int(launch.last_end[tensor]) : chunk<E>;
  update_chunk<E>(operation, memory, begin, end, in_vectors);
}

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "gradient_activation: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "gradient_activation: the current CUDA stream is unknown");
  return static_cast<cudaStream_t>(stream);
}

// The tensors that belong to one parameter, as the host collects them for a launch.
template <int slot_count>
struct Entry {
  Slot slots[slot_count];
  int64_t elements;
  ScalarType dtype;
};

template <typename E, class Operation, class Entries>
void launch_one(const Operation& operation, const Entries& entries, size_t begin, size_t end, cudaStream_t stream) {
  Launch<Operation> launch{operation, int(end - begin)};
  static_assert(sizeof(launch) <= argument_bytes);
  uint32_t chunks = 0;
  for (int tensor = 0; tensor < launch.count; ++tensor) {
    const auto& entry = *entries[begin + tensor];
    std::copy(std::begin(entry.slots), std::end(entry.slots), launch.slots[tensor]);
    const int64_t elements = entry.elements + elements_behind_boundary<E>(entry.slots[0].memory);
    const int64_t own_chunks = (elements + chunk<E> - 1) / chunk<E>;
    launch.first_chunk[tensor] = chunks;
    launch.last_end[tensor] = uint32_t(elements - (own_chunks - 1) * chunk<E>);
    // The number of chunks fits: it would take 32 TB of memory to exceed one grid.
    chunks += uint32_t(own_chunks);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(chunks), config.blockDim = dim3(block_threads), config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, update_tensors<Operation, E>, launch));
}

template <typename E, class Operation, class Entries>
void launch_all(const Operation& operation, const Entries& entries, cudaStream_t stream) {
  constexpr size_t most = Launch<Operation>::capacity;
  for (size_t begin = 0; begin < entries.size(); begin += most)
    launch_one<E>(operation, entries, begin, std::min(begin + most, entries.size()), stream);
}

// A value whose type carries a template argument.
template <Kind kind>
using KindOf = std::integral_constant<Kind, kind>;

// Calls f(E{}) with the element type.
template <class F>
void with_elements(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(BFloat16());
    default: return f(Half());
  }
}

template <class F>
void with_kind(const std::string& kind, const F& f) {
  if (kind == "arctan") return f(KindOf<Kind::arctan>());
  if (kind == "tanh") return f(KindOf<Kind::tanh>());
  f(KindOf<Kind::log>());
}

// Runs an operation on all tensors. make(kind, T{}) returns the operation for numbers of type T. A launch has tensors
// of one dtype only.
template <int slot_count, class Make>
void run(const std::vector<Entry<slot_count>>& entries, const std::string& kind, const Tensor& like, const Make& make) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like);
  for (ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<const Entry<slot_count>*> same;
    for (const auto& entry : entries)
      if (entry.dtype == dtype && entry.elements > 0) same.push_back(&entry);
    if (same.empty()) continue;
    with_kind(kind, [&](auto kind_of) {
      with_elements(dtype, [&](auto element) {
        using E = decltype(element);
        launch_all<E>(make(kind_of, Computed<E>()), same, stream);
      });
    });
  }
}

// Whether a tensor has neither gaps nor overlap, in any order of dimensions.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.size(dim) != 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Checks the lists of one op, so that no call reads or writes out of bounds, and none writes before it raises an error.
struct Lists {
  const char* op;
  const std::vector<Tensor>& first;
  Refusal refusal;

  Lists(const char* op, const std::vector<Tensor>& first, const std::string& kind) : op(op), first(first) {
    STD_TORCH_CHECK(
        kind == "arctan" || kind == "tanh" || kind == "log", op, ": kind is ", kind, "; expected arctan, tanh or log");
    check_first();
  }

  void check_first() {
    AddressRanges ranges;
    for (const Tensor& tensor : first) {
      const ScalarType dtype = tensor.scalar_type();
      if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
          dtype != ScalarType::Half)
        return refuse("a tensor is not float32, float64, bfloat16 or float16");
      if (!on_device_of(tensor, first[0])) return refuse("the tensors are on several devices");
      if (!is_dense(tensor)) return refuse("a tensor has gaps or overlaps itself");
      ranges.add(tensor.const_data_ptr(), tensor.numel() * tensor.element_size());
    }
    if (ranges.meet()) refuse("two tensors share memory");
  }

  void refuse(const std::string& what) {
    if (refusal.empty()) refusal = refuse_for(op, what, "the public function");
  }

  static bool on_device_of(const Tensor& a, const Tensor& b) {
    return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
  }

  void check_length(const char* name, const std::vector<Tensor>& list) const {
    STD_TORCH_CHECK(
        list.size() == first.size(), op, ": ", name, " has ", list.size(), " tensors; expected ", first.size());
  }

  // Requires that every tensor has the device, dtype, shape and strides of the tensor at its place in the first list.
  void check_like_first(const char* name, const std::vector<Tensor>& list) {
    check_length(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor &one = first[i], &other = list[i];
      bool same = on_device_of(one, other) && one.scalar_type() == other.scalar_type() && one.dim() == other.dim();
      for (int64_t dim = 0; same && dim < one.dim(); ++dim)
        same = one.size(dim) == other.size(dim) && (one.size(dim) == 1 || one.stride(dim) == other.stride(dim));
      if (!same)
        return refuse(
            std::string(name) + "[" + std::to_string(i) +
            "] differs from its parameter in device, dtype, shape or strides");
    }
  }

  // Requires float32 numbers, all on the CPU or all on the GPU of the first list. Returns whether they are on the GPU.
  bool check_steps(const std::vector<Tensor>& steps) const {
    check_length("state_steps", steps);
    const bool on_gpu = !steps.empty() && !steps[0].is_cpu();
    for (const Tensor& step : steps)
      STD_TORCH_CHECK(
          step.numel() == 1 && step.scalar_type() == ScalarType::Float && on_device_of(step, steps[0]) &&
              (step.is_cpu() || on_device_of(step, first[0])),
          op, ": state_steps must be single float32 numbers, all on the CPU or all on the parameters' GPU");
    return on_gpu;
  }
};

template <int slot_count>
std::vector<Entry<slot_count>> entries_of(
    const std::vector<Tensor>& written, std::initializer_list<const std::vector<Tensor>*> others) {
  std::vector<Entry<slot_count>> entries(written.size());
  for (size_t i = 0; i < written.size(); ++i) {
    Entry<slot_count>& entry = entries[i];
    entry.elements = written[i].numel(), entry.dtype = written[i].scalar_type();
    entry.slots[0].memory = written[i].mutable_data_ptr();
    int slot = 1;
    for (const std::vector<Tensor>* list : others)
      entry.slots[slot++].memory = list->empty() ? nullptr : const_cast<void*>((*list)[i].const_data_ptr());
  }
  return entries;
}

Refusal gradient_activation(std::vector<Tensor> tensors, std::string kind, double alpha, double beta) {
  const Lists lists("gradient_activation_", tensors, kind);
  if (!lists.refusal.empty() || tensors.empty()) return lists.refusal;
  run(entries_of<1>(tensors, {}), kind, tensors[0], [&](auto kind_of, auto number) {
    using T = decltype(number);
    return Activate<kind_of(), T>{{alpha, beta}};
  });
  return {};
}

Refusal activated_sgd_step(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers, double lr,
    double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first,
    bool on_momentum, std::string kind, double alpha, double beta) {
  Lists lists("activated_sgd_step_", params, kind);
  lists.check_like_first("grads", grads);
  const bool has_buffer = momentum != 0;
  if (has_buffer) lists.check_like_first("momentum_buffers", momentum_buffers);
  if (!has_buffer) momentum_buffers.clear();
  if (!lists.refusal.empty() || params.empty()) return lists.refusal;
  run(entries_of<3>(params, {&grads, &momentum_buffers}), kind, params[0], [&](auto kind_of, auto number) {
    using T = decltype(number);
    SgdStep<kind_of(), T> step{{alpha, beta}};
    step.lr = T(lr), step.momentum = T(momentum), step.undamped = T(1 - dampening);
    step.weight_decay = T(weight_decay), step.has_buffer = has_buffer, step.nesterov = nesterov;
    step.maximize = maximize, step.is_first = is_first, step.on_momentum = on_momentum;
    return step;
  });
  return {};
}

Refusal activated_adamw_step(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> state_steps, double lr,
    double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize, std::string kind,
    double alpha, double beta) {
  Lists lists("activated_adamw_step_", params, kind);
  lists.check_like_first("grads", grads);
  lists.check_like_first("exp_avgs", exp_avgs);
  lists.check_like_first("exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) lists.check_like_first("max_exp_avg_sqs", max_exp_avg_sqs);
  if (!amsgrad) max_exp_avg_sqs.clear();
  const bool steps_on_gpu = lists.check_steps(state_steps);
  if (!lists.refusal.empty() || params.empty()) return lists.refusal;
  auto entries = entries_of<6>(params, {&grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &state_steps});
  for (auto& entry : entries) {
    Slot& step = entry.slots[5];
    if (!steps_on_gpu) step.number = *static_cast<const float*>(step.memory);
  }
  run(entries, kind, params[0], [&](auto kind_of, auto number) {
    using T = decltype(number);
    AdamWStep<kind_of(), T> step{{alpha, beta}};
    step.lr = T(lr), step.kept = T(1 - lr * weight_decay), step.eps = T(eps);
    step.added = T(1 - beta1), step.beta2 = T(beta2), step.added_sq = T(1 - beta2);
    step.log_beta1 = T(std::log(beta1)), step.log_beta2 = T(std::log(beta2));
    step.amsgrad = amsgrad, step.maximize = maximize, step.steps_on_gpu = steps_on_gpu;
    return step;
  });
  return {};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CUDA, m) {
  m.impl("gradient_activation_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::gradient_activation>::raising));
  m.impl("activated_sgd_step_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::activated_sgd_step>::raising));
  m.impl("activated_adamw_step_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::activated_adamw_step>::raising));
  m.impl("try_gradient_activation_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::gradient_activation>::answering));
  m.impl("try_activated_sgd_step_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::activated_sgd_step>::answering));
  m.impl("try_activated_adamw_step_.cuda", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::activated_adamw_step>::answering));
}
