// Vectors of numbers, with the compiler's vector types: one source serves every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "../../attributes.h"

// Whether the compiler has GCC's shuffle of two vectors. Without it elements move one by one.
#if defined(__GNUC__) && !defined(__clang__)
#define LCW_SHUFFLES 1
#else
#define LCW_SHUFFLES 0
#endif

namespace lcw_ops {

template <typename T, int bytes>
struct Vector {
  typedef T type __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(T);
};

// The number of lanes of the widest vector of any instruction set. Up to this many numbers after a row in a buffer may
// be overwritten.
template <typename T>
constexpr int64_t slack = 64 / sizeof(T);

template <typename T>
int64_t padded(int64_t length) {
  return (length + slack<T> - 1) / slack<T> * slack<T>;
}

// Uninitialised memory that begins with a cache line, so that whole vectors from its start on do not cross cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new unsigned char[count * sizeof(T) + line]) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
    begin_ = reinterpret_cast<T*>((start + line - 1) / line * line);
  }

  T* data() { return begin_; }
  T& operator[](int64_t i) { return begin_[i]; }

 private:
  static constexpr size_t line = 64;
  std::unique_ptr<unsigned char[]> memory_;
  T* begin_;
};

// A vector of `lanes` numbers: loads, stores, comparisons and moves of its lanes.
template <typename T, int lanes>
struct Lanes {
  using Magnitude = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Wide = typename Vector<T, lanes * sizeof(T)>::type;
  using Bits = typename Vector<Magnitude, lanes * sizeof(T)>::type;
  static constexpr int count = lanes;

  LCW_INLINE static Wide load(const T* from) {
    Wide value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  LCW_INLINE static void store(const Wide& value, T* to) { std::memcpy(to, &value, sizeof value); }

  // The bits of |value| as integers: these are in the same order as |value|, with NaN above infinity.
  LCW_INLINE static Bits magnitude(const Wide& value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof value);
    return bits & std::numeric_limits<Magnitude>::max();
  }

  LCW_INLINE static Wide gather(const T* from, const int64_t* index) { return gather(from, index, Sequence()); }
  LCW_INLINE static Wide swap_partners(const Wide& value) { return swap(value, Sequence()); }

  // Every lane takes the number of the lane below it. The first takes `fill`, whose lanes are all equal.
  LCW_INLINE static Wide shift_up(Wide value, Wide fill) {
    return choose(value, fill, [](int i) { return i < 1 ? count : i - 1; }, Sequence());
  }
  LCW_INLINE static Wide shift_down(Wide value, Wide fill) {
    return choose(value, fill, [](int i) { return i + 1 < count ? i + 1 : count; }, Sequence());
  }

  // For a running product or sum in steps of by = 1, 2, 4, ...: every lane takes the number of a lane below it, or
  // `fill`. Within 16 bytes, where lanes move in one instruction, this is the lane `by` below. For a larger step, a
  // lane in the upper half of 2 by lanes takes the last lane of the lower half, which has the sum of that half.
  template <int by>
  LCW_INLINE static Wide from_below(Wide value, Wide fill) {
    constexpr auto source = [](int i) {
      if (by < near) return i % near < by ? count + i : i - by;
      return i / by % 2 ? i / by * by - 1 : count + i;
    };
    return choose(value, fill, source, Sequence());
  }
  template <int by>
  LCW_INLINE static Wide from_above(Wide value, Wide fill) {
    constexpr auto source = [](int i) {
      if (by < near) return i % near + by < near ? i + by : count + i;
      return i / by % 2 ? count + i : (i / by + 1) * by;
    };
    return choose(value, fill, source, Sequence());
  }

 private:
  using Sequence = std::make_integer_sequence<int, lanes>;
  static constexpr int near = 16 / sizeof(T);

  template <int... i>
  LCW_INLINE static Wide gather(const T* from, const int64_t* index, std::integer_sequence<int, i...>) {
    return Wide{from[index[i]]...};
  }

  template <int... i>
  LCW_INLINE static Wide swap(const Wide& value, std::integer_sequence<int, i...>) {
#if LCW_SHUFFLES
    return __builtin_shuffle(value, Bits{i ^ 1 ...});
#else
    return Wide{value[i ^ 1]...};
#endif
  }

  // Lane i is lane source(i) of `value` followed by `fill`.
  template <typename Source, int... i>
  LCW_INLINE static Wide choose(Wide value, Wide fill, Source source, std::integer_sequence<int, i...>) {
#if LCW_SHUFFLES
    return __builtin_shuffle(value, fill, Bits{source(i)...});
#else
    return Wide{(source(i) < count ? value[source(i)] : fill[0])...};
#endif
  }
};

// The lanes of a whole vector of an instruction set.
template <class Isa, typename T>
using WholeVector = Lanes<T, Isa::vector_bytes / int(sizeof(T))>;

}  // namespace lcw_ops
