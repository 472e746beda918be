// The size from which on results come from the memory pool of lcw_ops/ops/memory_pool.py.

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace lcw_ops {
namespace {

// Sets the least size in bytes, and returns the one before.
int64_t set_least_pooled(int64_t bytes) { return least_pooled.exchange(bytes); }

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CompositeExplicitAutograd, m) {
  m.impl("set_least_pooled.cpp", TORCH_BOX(&lcw_ops::set_least_pooled));
}
