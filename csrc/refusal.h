// Kernels that check for themselves whether they can take tensors as these lie in memory, and the two forms of their
// ops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/headeronly/util/Exception.h>

namespace lcw_ops {

// The reason why a kernel leaves tensors to its caller, who can copy them into another layout; empty if it takes them.
// Found before the first write. A mistake that no layout mends raises instead.
using Refusal = std::string;

inline Refusal refuse_for(const char* op, const std::string& what, const char* caller) {
  return std::string(op) + ": " + what + "; call " + caller;
}

// The memory of tensors without gaps. Two threads would write to tensors that overlap at once.
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

// A refusal is an error in one form of an op, and an answer in the other. A traced program cannot look at an answer.
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
