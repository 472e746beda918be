// An operator new[] that fails once, loaded by LD_PRELOAD: the kernels allocate the memory of their threads with it.
#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> left{-1};
}

// The allocation after `count` others fails. Negative: none does.
extern "C" void fail_after(long count) { left = count; }

void* operator new[](std::size_t size) {
  void* const memory = left.load() >= 0 && left.fetch_sub(1) == 0 ? nullptr : std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
