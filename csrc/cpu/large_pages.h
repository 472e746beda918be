// Puts large results into large pages of memory.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lcw_ops {

constexpr uintptr_t large_page = uintptr_t(2) << 20;

// Fresh memory is mapped at the first touch, page by page. The gradient of 50,000 layers has 200,000 pages of 4 KB, and
// mapping these took longer than computing dW. In pages of 2 MB it has 400. The call is only advice: pages stay small
// if the system does not follow it, and where the memory does not fill a large page.
inline void prefer_large_pages(const torch::stable::Tensor& tensor) {
#ifdef __linux__
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (start + large_page - 1) & ~(large_page - 1);
  const uintptr_t last = (start + tensor.numel() * tensor.element_size()) & ~(large_page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace lcw_ops
