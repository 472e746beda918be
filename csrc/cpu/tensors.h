// Tensors of torch's stable ABI as memory of a known type.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "large_pages.h"
#include "simd/dispatch.h"
#include "simd/elements.h"
#include "simd/vectors.h"

namespace lcw_ops {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// To work on fewer elements than this takes less time than to wake a thread.
constexpr int64_t least_elements = 16384;

// The least number of a loop's steps that are worth a thread, if a step works on `elements` elements.
inline int64_t grain_of(int64_t elements) {
  return std::max<int64_t>(1, least_elements / std::max<int64_t>(elements, 1));
}

// Calls f(E{}) with the element type of a tensor.
template <typename F>
auto with_elements(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "lcw_ops: expected float32, float64, bfloat16 or float16; call lcw_ops.functional");
  }
}

// stable::contiguous calls the dispatcher even if there is nothing to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : stable::contiguous(tensor);
}

// Whether a tensor is on the CPU and has these sizes and the dtype of `like`.
inline bool fits(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != int64_t(sizes.size()) || tensor.scalar_type() != like.scalar_type() || !tensor.is_cpu())
    return false;
  int64_t d = 0;
  for (const int64_t size : sizes)
    if (tensor.size(d++) != size) return false;
  return true;
}

// Whether torch may be in its deterministic mode, in which it can fill new memory (fill_uninitialized_memory).
inline thread_local bool may_fill_memory = true;

// While an object of this type exists, new tensors come without a call of torch's dispatcher, unless torch is in its
// deterministic mode. The call takes four times as long as the allocation, and a small layer's step makes seven.
struct QuickAllocations {
  bool before = may_fill_memory;
  explicit QuickAllocations(bool deterministic) { may_fill_memory = deterministic; }
  ~QuickAllocations() { may_fill_memory = before; }
  QuickAllocations(const QuickAllocations&) = delete;
};

// A new contiguous tensor on the CPU, of the dtype of `like`, which is on the CPU too.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const int64_t dims = sizes.size();
  if (may_fill_memory || dims > 2) return stable::new_empty(like, sizes);
  const int64_t strides[] = {dims == 2 ? std::max<int64_t>(sizes[1], 1) : 1, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type())),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor no_elements(const Tensor& like) { return allocate(like, {int64_t(0)}); }

inline Tensor zeros_if(bool needed, const Tensor& like) {
  return needed ? stable::new_zeros(like, like.sizes()) : no_elements(like);
}

// The least size, in bytes, of a result whose memory comes from the pool of lcw_ops/ops/memory_pool.py. Python sets it;
// without Python, or with the pool switched off, no result is large enough.
inline std::atomic<int64_t> least_pooled{std::numeric_limits<int64_t>::max()};

// Whether the pool, which is Python code, may run now. Python code would be the first to see a pending signal, and what
// the signal's handler raises, such as KeyboardInterrupt, would become an error of the op. So the handlers run here. If
// one raises, the error is raised again after the op, and until then the pool does not run.
bool may_run_python();

// A new tensor in memory of the pool, or nothing if the pool does not take it.
inline std::optional<Tensor> new_pooled(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < least_pooled.load(std::memory_order_relaxed) || !may_run_python()) return std::nullopt;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(like), torch::stable::detail::from(sizes)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lcw_ops::new_large", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<std::optional<Tensor>>(stack[0]);
}

// A new tensor for a result that may be as large as a weight.
inline Tensor new_large(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  if (std::optional<Tensor> pooled = new_pooled(like, sizes)) return *pooled;
  Tensor tensor = allocate(like, sizes);
  prefer_large_pages(tensor);
  return tensor;
}

// Calls compute(T*) with the tensor's memory, or with wider memory that is then rounded into it.
template <typename E, typename Compute>
void computed(Tensor& result, const Compute& compute) {
  using T = Computed<E>;
  if constexpr (std::is_same_v<E, T>) {
    compute(static_cast<T*>(result.mutable_data_ptr()));
  } else {
    const int64_t count = result.numel();
    Buffer<T> wide(count);
    compute(wide.data());
    const T* in = wide.data();
    E* out = static_cast<E*>(result.mutable_data_ptr());
    for_each_part(count, least_elements, [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < end; ++i) store(in[i], out[i]);
    });
  }
}

template <typename E>
const E* data(const Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}

// While an object of this type exists, autograd does not record the calls that an op makes.
struct WithoutGradients {
  bool was_enabled = aoti_torch_grad_mode_is_enabled();
  WithoutGradients() { aoti_torch_grad_mode_set_enabled(false); }
  ~WithoutGradients() { aoti_torch_grad_mode_set_enabled(was_enabled); }
  WithoutGradients(const WithoutGradients&) = delete;
};

// A matrix for timing a product: numbers between -1 and 1 that use every bit of the mantissa.
inline Tensor make_operand(ScalarType type, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  with_elements(tensor, [&](auto element) {
    using E = decltype(element);
    E* out = static_cast<E*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < rows * columns; ++i)
      store(Computed<E>(int32_t(uint32_t(i) * 2654435761u)) * Computed<E>(0x1p-31), out[i]);
  });
  return tensor;
}

inline std::vector<Tensor> make_operands(ScalarType type, int64_t rows, int64_t columns, int64_t count) {
  std::vector<Tensor> operands;
  for (int64_t i = 0; i < count; ++i) operands.push_back(make_operand(type, rows, columns));
  return operands;
}

}  // namespace lcw_ops
