// at::parallel_for on std::thread, for the thread sanitizer. The sanitizer does not see how OpenMP's threads wait for
// each other, and would report every loop as a race. The linker finds this function before torch's function of the same
// name, because this one is in the same library.
#include <algorithm>
#include <thread>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, ParallelFunc function, void* context) {
  uint32_t available = 1;
  torch_get_num_threads(&available);
  if (begin >= end) return 0;
  const int64_t count = end - begin, grains = (count + grain_size - 1) / std::max<int64_t>(grain_size, 1);
  const int64_t threads = std::min<int64_t>(available, grains), share = (count + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t first = begin + share; first < end; first += share)
    others.emplace_back([=] { function(first, std::min(first + share, end), context); });
  function(begin, std::min(begin + share, end), context);
  for (std::thread& other : others) other.join();
  return 0;
}
