// Tensors of any floating dtype, read and written in the type that they are computed in, which is float32 for 16-bit
// numbers.
#pragma once

#include <algorithm>
#include <optional>

#include "simd/products.h"
#include "tensors.h"

namespace lcw_ops {

// Reads the numbers of a tensor: in place, or widened into a buffer.
template <typename T>
struct Source {
  const void* data;
  ScalarType type;

  bool is_narrow() const { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

  template <class Isa>
  LCW_INLINE const T* read(int64_t at, int64_t count, T* buffer) const {
    if (!is_narrow()) return static_cast<const T*>(data) + at;
    Products<Isa, T>::widen(static_cast<const uint16_t*>(data) + at, type, buffer, count);
    return buffer;
  }
};

// Writes the numbers of a tensor. If `data` is nullptr, there is nothing to write.
template <typename T>
struct Target {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
  bool is_narrow() const { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

  template <class Isa>
  LCW_INLINE void write(const T* numbers, int64_t at, int64_t count) const {
    if (is_narrow())
      Products<Isa, T>::round(numbers, type, static_cast<uint16_t*>(data) + at, count);
    else
      std::copy(numbers, numbers + count, static_cast<T*>(data) + at);
  }
};

template <typename T>
Source<T> source(const Tensor& tensor) {
  return {tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr, tensor.scalar_type()};
}

// A tensor without elements is not a target.
template <typename T>
Target<T> target(Tensor& tensor) {
  return {tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr, tensor.scalar_type()};
}

// Calls f(T{}) with the type that a tensor's numbers are computed in.
template <typename F>
void with_computed(const Tensor& tensor, const F& f) {
  with_elements(tensor, [&](auto element) { f(Computed<decltype(element)>{}); });
}

// A whole tensor in the type that it is computed in: its own memory, or a wider copy.
template <typename T>
class Wide {
 public:
  explicit Wide(const Tensor& tensor)
      : tensor_(as_contiguous(tensor)), copy_(source<T>(tensor_).is_narrow() ? tensor.numel() : 0) {
    const Source<T> in = source<T>(tensor_);
    data_ = static_cast<const T*>(in.data);
    if (!in.is_narrow()) return;
    data_ = copy_.data();
    for_each_part(tensor.numel(), least_elements, [=, this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      in.template read<decltype(isa)>(begin, end - begin, copy_.data() + begin);
    });
  }
  const T* data() const { return data_; }

 private:
  Tensor tensor_;
  Buffer<T> copy_;
  const T* data_;
};

// As Wide, for a tensor that may be missing: data() is then nullptr.
template <typename T>
class WideOrNothing {
 public:
  explicit WideOrNothing(const std::optional<Tensor>& tensor) {
    if (tensor) wide_.emplace(*tensor);
  }
  const T* data() const { return wide_ ? wide_->data() : nullptr; }

 private:
  std::optional<Wide<T>> wide_;
};

template <typename T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls compute(T*) with the tensor's memory, or with wider memory that is then rounded into it. If the tensor has no
// elements, calls compute(nullptr).
template <typename T, typename Compute>
void computed_in(Tensor& result, const Compute& compute) {
  if (result.numel() == 0) return compute(static_cast<T*>(nullptr));
  with_elements(result, [&](auto element) {
    using E = decltype(element);
    if constexpr (std::is_same_v<Computed<E>, T>) computed<E>(result, compute);
  });
}

}  // namespace lcw_ops
