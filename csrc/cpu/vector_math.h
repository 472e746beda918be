// Activations written so that the compiler vectorises a loop over them: no branches, no calls, no tables.
//
// tanh(|x|) = e / (e + 2) with e = expm1(2|x|), so that small arguments keep their relative accuracy. sigmoid(x) =
// 1 / (1 + exp(-x)) is computed from exp(-|x|), which decays. Both compute expm1(r) = r + r^2 q(r) on |r| <= ln(2)/2,
// after the usual reduction x = n ln(2) + r. The error is under 4 ulp in both precisions (tested).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../activation.h"
#include "../attributes.h"

namespace lcw_ops {

template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  // Adding 1.5 * 2^23 to a number rounds it to an integer, which the low bits of the sum then hold.
  static constexpr float round_shift = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // For x above this limit, exp(-x) is not a normal number. Up to the limit, 2^n is one. tanh(x / 2) rounds to 1 long
  // before it.
  static constexpr float limit = 87.5f;
  // The coefficients of q, highest power first: minimax for the relative error of expm1, which is 1.3e-8, a quarter of
  // an ulp.
  static constexpr float q[] = {0.00139464729f, 0.00836659782f, 0.0416662805f, 0.166665435f, 0.5f};
};

template <>
struct ExpTraits<double> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double round_shift = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double limit = 708.5;
  // Taylor's series: the first omitted term, r^13 / 14!, is below 2^-53.
  static constexpr double q[] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320.,
                                 1 / 5040.,       1 / 720.,       1 / 120.,      1 / 24.,      1 / 6.,      1 / 2.};
};

// exp(x) = power + power * fraction, with power = 2^n and fraction = expm1(r).
template <typename T>
struct Exponential {
  T power, fraction;
};

template <typename T>
LCW_INLINE Exponential<T> exponential(T x) {
  using Traits = ExpTraits<T>;
  using Bits = typename Traits::Bits;
  const T shifted = x * T(1.44269504088896340736) + Traits::round_shift;
  const T n = shifted - Traits::round_shift;
  const T r = (x - n * Traits::ln2_high) - n * Traits::ln2_low;
  T polynomial = Traits::q[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < sizeof(Traits::q) / sizeof(T); ++k) polynomial = polynomial * r + Traits::q[k];
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  // The shift to the left drops the bits that come from round_shift.
  bits = (bits + Traits::exponent_bias) << Traits::mantissa_bits;
  T power;
  std::memcpy(&power, &bits, sizeof(T));
  return {power, r * r * polynomial + r};
}

// The activations: value(a) is y = act(a), and slope(a, y) is act'(a). A NaN stays a NaN in every selection.
struct Tanh {
  template <typename T>
  LCW_INLINE static T value(T a) {
    constexpr T limit = ExpTraits<T>::limit / 2;
    const T magnitude = std::abs(a);
    const Exponential<T> p = exponential(T(2) * (magnitude > limit ? limit : magnitude));
    const T e = p.power * p.fraction + (p.power - T(1));
    return std::copysign(e / (e + T(2)), a);
  }
  template <typename T>
  LCW_INLINE static T slope(T, T y) {
    return T(1) - y * y;
  }
};

struct Sigmoid {
  template <typename T>
  LCW_INLINE static T value(T a) {
    constexpr T limit = ExpTraits<T>::limit;
    const T magnitude = std::abs(a);
    const Exponential<T> p = exponential(-(magnitude > limit ? limit : magnitude));
    const T decay = p.power + p.power * p.fraction;
    return (a < T(0) ? decay : T(1)) / (T(1) + decay);
  }
  template <typename T>
  LCW_INLINE static T slope(T, T y) {
    return y * (T(1) - y);
  }
};

struct Relu {
  template <typename T>
  LCW_INLINE static T value(T a) {
    return a < T(0) ? T(0) : a;
  }
  template <typename T>
  LCW_INLINE static T slope(T a, T) {
    return a > T(0) ? T(1) : T(0);
  }
};

struct Identity {
  template <typename T>
  LCW_INLINE static T value(T a) {
    return a;
  }
  template <typename T>
  LCW_INLINE static T slope(T, T) {
    return T(1);
  }
};

// Calls `loop` with the activation as a type, so that the choice is made once and not for every element.
template <typename Loop>
LCW_INLINE void with_activation(Activation kind, const Loop& loop) {
  switch (kind) {
    case Activation::tanh: return loop(Tanh{});
    case Activation::relu: return loop(Relu{});
    case Activation::sigmoid: return loop(Sigmoid{});
    case Activation::identity: return loop(Identity{});
  }
}

}  // namespace lcw_ops
