// The inner loops of a sweep, for one row: a step with either kind of filter O, and the largest change of a state.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>
#include <vector>

#include "../simd/vectors.h"

namespace lcw_ops::parallel_depth {

template <typename Bits>
LCW_INLINE Bits larger(const Bits& a, const Bits& b) {
  return a > b ? a : b;
}

template <int count, typename Bits>
LCW_INLINE auto largest_lane(const Bits& bits) {
  using Lane = std::decay_t<decltype(bits[0])>;
  if constexpr (count > 2) {
    typename Vector<Lane, sizeof(Bits) / 2>::type half[2];
    std::memcpy(&half, &bits, sizeof bits);
    return largest_lane<count / 2>(larger(half[0], half[1]));
  } else {
    return std::max<Lane>(bits[0], bits[1]);
  }
}

// Treats a NaN as larger than any number.
LCW_INLINE void raise_to(double& largest, double value) {
  if (value > largest || value != value) largest = value;
}

// The largest |new - old| and the largest |new| of a row, found in vectors of `count` lanes.
template <typename T, int count>
class Largest {
  using Magnitude = typename Lanes<T, count>::Magnitude;
  using Bits = typename Lanes<T, count>::Bits;

 public:
  template <int lanes, typename Wide>
  LCW_INLINE void take(const Wide& after, const Wide& before) {
    const auto change = Lanes<T, lanes>::magnitude(after - before), scale = Lanes<T, lanes>::magnitude(after);
    if constexpr (lanes == count) {
      change_ = larger(change_, change), scale_ = larger(scale_, scale);
    } else {
      for (int i = 0; i < lanes; ++i) {
        last_change_ = std::max<Magnitude>(last_change_, change[i]);
        last_scale_ = std::max<Magnitude>(last_scale_, scale[i]);
      }
    }
  }

  // Raises `largest` to the largest |new - old| divided by the largest |new|. This ratio counts as 0 if nothing
  // changed, and as NaN if a new state is not finite.
  LCW_INLINE void raise(double& largest) const {
    const double scale = number(std::max(last_scale_, largest_lane<count>(scale_)));
    const double change = number(std::max(last_change_, largest_lane<count>(change_)));
    // This test is nearly always true and saves the division. If a state is not finite, neither is its change, and the
    // test is false.
    if (change < largest * scale) return;
    if (!(scale <= std::numeric_limits<T>::max())) return raise_to(largest, std::numeric_limits<double>::quiet_NaN());
    raise_to(largest, change == 0 ? 0 : change / scale);
  }

 private:
  LCW_INLINE static double number(Magnitude bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  Bits change_{}, scale_{};
  Magnitude last_change_ = 0, last_scale_ = 0;
};

// Calls step(first element, lanes) for vectors of elements begin..end-1. Elements left over, which do not fill a
// vector, are the end of one more vector, whose other elements are computed twice, to the same bits. In a range shorter
// than a vector, elements are taken `few` at a time.
template <int count, int few, typename Step>
LCW_INLINE void for_each_vector(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + count <= end; i += count) step(i, std::integral_constant<int, count>());
  if (i == end) return;
  if (end - begin >= count) return step(end - count, std::integral_constant<int, count>());
  for (; i < end; i += few) step(i, std::integral_constant<int, few>());
}

// A range of elements that a permutation p takes from neighbouring elements: p_i = source + i - begin.
struct Run {
  int64_t begin, end, source;
};

// (O h)_i = h_{p_i}, carried in the states' own type.
template <typename T>
struct Permutation {
  using Carried = T;
  template <class Isa>
  static constexpr int lanes = Isa::vector_bytes / sizeof(T);
  // Runs shorter than this are no faster than single elements.
  static constexpr int64_t least_run = 8;

  const int64_t* index;
  int64_t width;
  std::vector<Run> runs;
  bool has_long_runs;

  Permutation(const int64_t* index_, int64_t width_) : index(index_), width(width_) {
    for (int64_t i = 0; i < width; ++i)
      if (i > 0 && index[i] == index[i - 1] + 1)
        ++runs.back().end;
      else
        runs.push_back({i, i + 1, index[i]});
    has_long_runs = int64_t(runs.size()) * least_run <= width;
  }

  // Computes after = alpha O before + terms for a row. If is_final, `after` is the memory of the state, and the new
  // state replaces the old one.
  template <class Isa, bool is_final>
  LCW_INLINE void step(T alpha, const T* before, const T* terms, T* after, T*, Largest<T, lanes<Isa>>& largest) const {
    const auto finish = [&](int64_t i, auto count, const auto& filtered) LCW_LAMBDA_INLINE {
      using L = Lanes<T, count()>;
      const auto value = alpha * filtered + L::load(terms + i);
      if constexpr (is_final) largest.template take<count()>(value, L::load(after + i));
      L::store(value, after + i);
    };
    if (!has_long_runs) {
      // A copy, because the member would be read again after every store.
      const int64_t* from = index;
      return for_each_vector<lanes<Isa>, 1>(0, width, [&](int64_t i, auto count) LCW_LAMBDA_INLINE {
        finish(i, count, Lanes<T, count()>::gather(before, from + i));
      });
    }
    for (const Run& run : runs) {
      const T* from = before + run.source - run.begin;
      for_each_vector<lanes<Isa>, 1>(run.begin, run.end, [&](int64_t i, auto count) LCW_LAMBDA_INLINE {
        finish(i, count, Lanes<T, count()>::load(from + i));
      });
    }
  }

  // Adds decay O^exponent `from` to `to`, row by row.
  void carry(int64_t exponent, double decay, int64_t rows, const T* from, T* to) const {
    std::vector<int64_t> power(width, -1), cycle;
    for (int64_t start = 0; start < width; ++start) {
      if (power[start] >= 0) continue;
      cycle.clear();
      int64_t i = start;
      do cycle.push_back(i), i = index[i];
      while (i != start);
      for (size_t k = 0; k < cycle.size(); ++k) power[cycle[k]] = cycle[(k + exponent) % cycle.size()];
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i)
        to[r * width + i] = T(double(to[r * width + i]) + decay * double(from[r * width + power[i]]));
  }
};

// (O h)_i = cosine_i h_i + sine_i h_{i xor 1}, carried in float64, because the error of a cosine in float32 would add
// up over 50,000 layers. The last of an odd number of elements has no partner, and its sine is not read.
template <typename T>
struct Rotation {
  using Carried = double;
  template <class Isa>
  static constexpr int lanes = Isa::vector_bytes / sizeof(double);

  const double *cosine, *sine;
  int64_t width;

  // Computes after = alpha O before + terms for a row. If is_final, the result is also rounded into `state`.
  template <class Isa, bool is_final>
  LCW_INLINE void step(
      double alpha, const double* before, const T* terms, double* after, T* state,
      Largest<T, lanes<Isa>>& largest) const {
    const auto finish = [&](int64_t i, auto count, const auto& filtered) LCW_LAMBDA_INLINE {
      using L = Lanes<double, count()>;
      using Rounded = Lanes<T, count()>;
      const auto term = __builtin_convertvector(Rounded::load(terms + i), typename L::Wide);
      const auto value = alpha * filtered + term;
      if constexpr (is_final) {
        const auto rounded = __builtin_convertvector(value, typename Rounded::Wide);
        largest.template take<count()>(rounded, Rounded::load(state + i));
        Rounded::store(rounded, state + i);
      }
      if constexpr (!is_final || !std::is_same_v<T, double>) L::store(value, after + i);
    };
    // Copies, because the members would be read again after every store.
    const double *cosines = cosine, *sines = sine;
    const int64_t paired = width - width % 2;
    for_each_vector<lanes<Isa>, 2>(0, paired, [&](int64_t i, auto count) LCW_LAMBDA_INLINE {
      using L = Lanes<double, count()>;
      const auto value = L::load(before + i);
      finish(i, count, L::load(cosines + i) * value + L::load(sines + i) * L::swap_partners(value));
    });
    if (paired < width) {
      using L = Lanes<double, 1>;
      finish(paired, std::integral_constant<int, 1>(), L::load(cosines + paired) * L::load(before + paired));
    }
  }

  // The 2 x 2 block of a pair, row by row. Every squaring doubles the error of a power. Where long double has more
  // digits than double, these digits keep 50,000 layers exact in float64.
  using Block = std::array<long double, 4>;

  static Block multiply(const Block& a, const Block& b) {
    return {a[0] * b[0] + a[1] * b[2], a[0] * b[1] + a[1] * b[3], a[2] * b[0] + a[3] * b[2], a[2] * b[1] + a[3] * b[3]};
  }

  Block block_power(int64_t i, int64_t exponent) const {
    Block base{cosine[i], 0, 0, 0}, power{1, 0, 0, 1};
    if (i + 1 < width) base = {cosine[i], sine[i], sine[i + 1], cosine[i + 1]};
    for (; exponent; exponent >>= 1) {
      if (exponent & 1) power = multiply(power, base);
      base = multiply(base, base);
    }
    return power;
  }

  // Adds decay O^exponent `from` to `to`, row by row.
  void carry(int64_t exponent, double decay, int64_t rows, const double* from, double* to) const {
    for (int64_t i = 0; i < width; i += 2) {
      const Block power = block_power(i, exponent);
      for (int64_t r = 0; r < rows; ++r) {
        const double* pair = from + r * width + i;
        double* out = to + r * width + i;
        const bool has_partner = i + 1 < width;
        const double first = pair[0], second = has_partner ? pair[1] : 0;
        out[0] += decay * double(power[0] * first + power[1] * second);
        if (has_partner) out[1] += decay * double(power[2] * first + power[3] * second);
      }
    }
  }
};

}  // namespace lcw_ops::parallel_depth
