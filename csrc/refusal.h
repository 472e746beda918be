// Refusals by kernels that check the memory layout of their tensors themselves, and the two forms of their ops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/headeronly/util/Exception.h>

namespace lcw_ops {

// The reason why a kernel does not take its tensors, or an empty text if it takes them. The kernel checks them before
// its first write, so the caller can copy the tensors into another layout and call again. A mistake that no other
// layout corrects raises an error instead.
using Refusal = std::string;

inline Refusal refuse_for(const char* op, const std::string& what, const char* caller) {
  return std::string(op) + ": " + what + "; call " + caller;
}

// The ranges of memory that tensors without gaps take. They must not meet, because two threads could then write to the
// same place.
class AddressRanges {
 public:
  void reserve(size_t count) { ranges_.reserve(count); }

  void add(const void* begin, int64_t bytes) {
    const char* first = static_cast<const char*>(begin);
    if (bytes > 0) ranges_.emplace_back(first, first + bytes);
  }

  bool meet() {
    if (!std::is_sorted(ranges_.begin(), ranges_.end())) std::sort(ranges_.begin(), ranges_.end());
    for (size_t i = 1; i < ranges_.size(); ++i)
      if (ranges_[i - 1].second > ranges_[i].first) return true;
    return false;
  }

 private:
  std::vector<std::pair<const char*, const char*>> ranges_;
};

// Two forms of an op: one raises a refusal as an error, the other returns whether the kernel took the tensors. A traced
// program cannot branch on the returned value, so it needs the form that raises.
template <auto kernel>
struct Forms;

template <typename... Arguments, Refusal (*kernel)(Arguments...)>
struct Forms<kernel> {
  static void raising(Arguments... arguments) {
    const Refusal refusal = kernel(std::forward<Arguments>(arguments)...);
    STD_TORCH_CHECK(refusal.empty(), refusal);
  }

  // Whether the kernel took the tensors.
  static bool answering(Arguments... arguments) { return kernel(std::forward<Arguments>(arguments)...).empty(); }
};

}  // namespace lcw_ops
