// Activations written so that the compiler vectorises a loop over them: no branches, no calls, no tables.
//
// tanh(x) = e / (e + 2) with e = expm1(2|x|), sigmoid(x) = 1 / (1 + exp(-x)). expm1 is a Taylor polynomial on
// |r| <= ln(2)/2 after the usual reduction x = n ln(2) + r, so that small arguments keep their relative accuracy.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "orthogonal_filter.h"

#define LCW_INLINE inline __attribute__((always_inline))

namespace lcw_ops {

template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = int32_t;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
  static constexpr float round_shift = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // Beyond this tanh(x / 2) is 1 and exp(-x) is negligible against 1 but still normal.
  static constexpr float limit = 80.0f;
  // r^7 / 8! < 2^-25: the first term left out.
  static constexpr int degree = 7;
};

template <>
struct ExpTraits<double> {
  using Bits = int64_t;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double round_shift = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double limit = 700.0;
  // r^13 / 14! < 2^-53.
  static constexpr int degree = 13;
};

template <typename T>
LCW_INLINE T expm1(T x) {
  using Traits = ExpTraits<T>;
  using Bits = typename Traits::Bits;
  const T shifted = x * T(1.44269504088896340736) + Traits::round_shift;
  const T n = shifted - Traits::round_shift;
  const T r = (x - n * Traits::ln2_high) - n * Traits::ln2_low;
  T polynomial = T(1);
#pragma GCC unroll 16
  for (int k = Traits::degree; k >= 2; --k) polynomial = T(1) + polynomial * (r * (T(1) / T(k)));
  polynomial *= r;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  // Unsigned arithmetic: the shift drops round_shift's own bits, whatever they are.
  using Unsigned = std::make_unsigned_t<Bits>;
  const Unsigned exponent = (static_cast<Unsigned>(bits) + Traits::exponent_bias) << Traits::mantissa_bits;
  T power;
  std::memcpy(&power, &exponent, sizeof(T));
  return power * polynomial + (power - T(1));
}

template <Activation kind, typename T>
LCW_INLINE T activate(T a) {
  constexpr T limit = ExpTraits<T>::limit;
  const T magnitude = a < T(0) ? -a : a;  // a NaN stays a NaN in each of these selections
  if (kind == Activation::tanh) {
    const T twice = T(2) * magnitude;
    const T e = expm1(twice > limit ? limit : twice);
    const T value = e / (e + T(2));
    return a < T(0) ? -value : value;
  }
  if (kind == Activation::sigmoid) {
    const T decay = T(1) + expm1(-(magnitude > limit ? limit : magnitude));
    return (a < T(0) ? decay : T(1)) / (T(1) + decay);
  }
  if (kind == Activation::relu) return a < T(0) ? T(0) : a;
  return a;
}

// act'(a) from a and y = act(a).
template <Activation kind, typename T>
LCW_INLINE T activation_slope(T a, T y) {
  if (kind == Activation::tanh) return T(1) - y * y;
  if (kind == Activation::sigmoid) return y * (T(1) - y);
  if (kind == Activation::relu) return a > T(0) ? T(1) : T(0);
  return T(1);
}

}  // namespace lcw_ops
