// atan, tanh and sign(x) ln(1 + |x|) of a vector of numbers, with the compiler's vector types: no branches, no tables.
//
//   atan:  t = (x - c) / (1 + c x), with c = 0 up to 2/3 and near 1.5 beyond;  atan(x) = atan(c) + t + t^3 Q(t^2).
//   tanh:  e / (e + 2) with e = expm1(2|x|) = 2^n expm1(r) + (2^n - 1), 2|x| = n ln 2 + r.
//   log:   2^k m = 1 + |x| with m in [0.75, 1.5), f = m - 1 plus the rounding error of 1 + |x|;
//          ln = k ln 2 + f - s (f - s^2 Q(s^2)), s = f / (2 + f)  (T. Sun's log1p, fdlibm, 1993).
//
// Each function is computed from |x| and then given the sign of x. So it is odd to the last bit: -0 stays -0. NaN stays
// NaN.
// Errors stay below 2, 3 and 2 units in the last place over all numbers, denormal ones too (tested). The largest errors
// that were found are 1.38, 2.52, 0.90 among all float32 from 2^-9 to 16 (without multiply-add 1.52, 2.56, 1.07), and
// 1.32, 2.49, 1.25 among millions of float64 (without multiply-add 1.47, 2.49, 1.48).
#pragma once

#include <limits>

#include "simd/vectors.h"
#include "vector_math.h"

namespace lcw_ops {

// The layout of a number's bits, and the coefficients of both polynomials Q, highest power first (minimax for atan,
// Chebyshev interpolation for log; either adds an error of less than 0.2 ulp to the result). The coefficients for expm1
// are in vector_math.h. `center` is one of the rare numbers whose atan, `angle`, is exact to a thousandth of its last
// place.
template <typename T>
struct GradientFunctionTraits;

template <>
struct GradientFunctionTraits<float> {
  using Bits = uint32_t;
  using Signed = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Bits sign = 0x80000000u, one = 0x3f800000u, three_quarters = 0x3f400000u, infinity = 0x7f800000u;
  static constexpr float center = 0x1.7ebcp+0f, angle = 0x1.f668e6p-1f;
  static constexpr float atan[] = {0.024261639f, -0.06662783f, 0.104835145f, -0.14199068f, 0.19994348f, -0.3333321f};
  static constexpr float log[] = {0.237473445f, 0.285327448f, 0.400003113f, 0.666666663f};
};

template <>
struct GradientFunctionTraits<double> {
  using Bits = uint64_t;
  using Signed = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Bits sign = uint64_t(1) << 63, one = uint64_t(0x3ff) << 52, three_quarters = uint64_t(0x3fe8) << 48,
                        infinity = uint64_t(0x7ff) << 52;
  static constexpr double center = 0x1.7ec9p+0, angle = 0x1.f670ef2f969e6p-1;
  static constexpr double atan[] = {0.002323825071505645,  -0.01025333837908986, 0.02272677163637726,
                                    -0.035109232968798976, 0.04460016438306498,  -0.05182418635204417,
                                    0.058664493039709865,  -0.0666438883964419,  0.07692075585221267,
                                    -0.09090892837885607,  0.11111110370536473,  -0.1428571426562637,
                                    0.1999999999972373,    -0.33333333333332};
  static constexpr double log[] = {0.13604015707124079, 0.1321036048513262, 0.15388834677801916, 0.18181738454723026,
                                   0.22222223037807243, 0.2857142856733919, 0.400000000000078,   0.6666666666666666};
};

// The three functions, for the vectors of an instruction set.
template <class Isa, typename T>
struct GradientFunctions {
  using Traits = GradientFunctionTraits<T>;
  using Wide = typename Vector<T, Isa::vector_bytes>::type;
  using Bits = typename Vector<typename Traits::Bits, Isa::vector_bytes>::type;
  using Signed = typename Vector<typename Traits::Signed, Isa::vector_bytes>::type;

  template <typename To, typename From>
  LCW_INLINE static To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }

  LCW_INLINE static Signed magnitude_bits(Wide x) { return as<Signed>(as<Bits>(x) & ~Traits::sign); }

  template <size_t count>
  LCW_INLINE static Wide polynomial(const T (&coefficients)[count], Wide x) {
    Wide value = Wide{} + coefficients[0];
#pragma GCC unroll 32
    for (size_t k = 1; k < count; ++k) value = value * x + coefficients[k];
    return value;
  }

  LCW_INLINE static Wide atan(Wide x) {
    const Bits sign = as<Bits>(x) & Traits::sign;
    const Wide magnitude = as<Wide>(as<Bits>(x) ^ sign);
    // The result rounds to pi/2 long before 2^60, and an infinity must not be divided. A NaN compares false and stays.
    const Wide bounded = magnitude > T(0x1p+60) ? Wide{} + T(0x1p+60) : magnitude;
    const auto is_outer = magnitude > T(0.667);
    const Wide center = is_outer ? Wide{} + Traits::center : Wide{};
    const Wide t = (bounded - center) / (T(1) + bounded * center);
    const Wide square = t * t;
    const Wide value = (is_outer ? Wide{} + Traits::angle : Wide{}) +
        (t + (t * square) * polynomial(Traits::atan, square));
    return as<Wide>(as<Bits>(value) | sign);
  }

  LCW_INLINE static Wide tanh(Wide x) {
    using Exp = ExpTraits<T>;
    const Bits sign = as<Bits>(x) & Traits::sign;
    const Wide magnitude = as<Wide>(as<Bits>(x) ^ sign);
    // tanh rounds to 1 long before the limit. A NaN compares false and stays.
    const Wide twice = magnitude > Exp::limit / 2 ? Wide{} + Exp::limit : magnitude + magnitude;
    const Wide shifted = twice * T(1.44269504088896340736) + Exp::round_shift;
    const Wide n = shifted - Exp::round_shift;
    const Wide r = (twice - n * Exp::ln2_high) - n * Exp::ln2_low;
    const Wide power = as<Wide>((as<Bits>(shifted) + Exp::exponent_bias) << Exp::mantissa_bits);
    const Wide fraction = (r * r) * polynomial(Exp::q, r) + r;
    const Wide e = power * fraction + (power - T(1));
    return as<Wide>(as<Bits>(e / (e + T(2))) | sign);
  }

  LCW_INLINE static Wide log(Wide x) {
    const Bits sign = as<Bits>(x) & Traits::sign;
    const Wide magnitude = as<Wide>(as<Bits>(x) ^ sign);
    const Wide u = T(1) + magnitude;
    // u is at least 1, so its exponent is not negative.
    const Bits exponent = (as<Bits>(u) - Traits::three_quarters) & Traits::infinity;
    const Wide mantissa = as<Wide>(as<Bits>(u) - exponent);
    // 2^-k; or 0 for an |x| so large that the 1 in 1 + |x|, and with it the rounding error of the sum, is far below the
    // last place.
    const Signed lowered = as<Signed>(Traits::one - exponent);
    const Wide power = as<Wide>(lowered > 0 ? lowered : Signed{});
    const Wide f = (mantissa - T(1)) + (magnitude - (u - T(1))) * power;
    const Wide s = f / (T(2) + f), square = s * s;
    const Wide value = to_number(exponent) * T(0.69314718055994530942) +
        (f - s * (f - square * polynomial(Traits::log, square)));
    // The exponent bits of an infinity or a NaN do not give a power of 2.
    const Wide finite = magnitude <= std::numeric_limits<T>::max() ? value : magnitude;
    return as<Wide>(as<Bits>(finite) | sign);
  }

 private:
  // Converts k, which the exponent's bits hold, to a floating-point number.
  LCW_INLINE static Wide to_number(Bits exponent) {
    const Bits k = exponent >> Traits::mantissa_bits;
    // Few processors convert 64-bit integers: add k to the low bits of a large number, then subtract that number.
    const Wide shift = Wide{} + ExpTraits<T>::round_shift;
    return as<Wide>(as<Bits>(shift) + k) - shift;
  }
};

}  // namespace lcw_ops
