// Deliberate mistakes, only in sanitized builds. Each must be caught, which proves that the sanitizer watches the
// library.
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

// `tensor` points at `count` floats that torch allocated.
extern "C" __attribute__((visibility("default"))) float lcw_ops_broken(int mistake, float* tensor, int64_t count) {
  volatile int64_t index = count;
  switch (mistake) {
    case 1: return tensor[index];              // read past the end
    case 2: return tensor[index - count - 1];  // read before the start
    case 3: tensor[index] = 1; return 0;       // write past the end
    case 4: return std::vector<float>(count)[index];
    case 5: {
      float* gone = nullptr;
      {
        std::vector<float> scratch(count);
        gone = scratch.data();
      }
      return gone[index - 1];
    }
    case 6: return float(std::numeric_limits<int64_t>::max() + index);
    case 7: return *reinterpret_cast<float*>(reinterpret_cast<char*>(tensor) + (index - count) + 1);  // misaligned
    case 8: return float(int32_t(1) << (index + 32));
    case 9: {  // a data race
      float sum = 0;
      std::thread other([&] { sum += tensor[0]; });
      sum += tensor[0];
      other.join();
      return sum;
    }
    default: return tensor[index - 1];
  }
}
