// sin t and cos t of a vector of angles, with the compiler's vector types.
//
// t = n pi/2 + r, where n is the nearest integer to 2 t / pi and |r| is at most a little above pi/4. Then
// sin r = r + r^3 S(r^2) and cos r = 1 - r^2/2 + r^4 C(r^2). Depending on n mod 4, the two are exchanged and negated.
// The polynomials are minimax for the relative error, 7e-9 in float32 and 4e-18 in float64. n pi/2 is subtracted in
// three parts, and nothing is rounded before the cancellation: either the parts of pi/2 are so short that their
// products with n are exact, or a multiply-add does not round the products (W. J. Cody, W. Waite, "Software Manual for
// the Elementary Functions", 1980). The error is under 2 ulp in float32 and 2.5 in float64 up to |t| = 1e6, near
// multiples of pi/2 too, and 0 at 0 (tested). For larger |t|, callers use libm.
#pragma once

#include <cmath>

#include <type_traits>

#include "simd/vectors.h"

namespace lcw_ops {

template <typename T>
struct SincosTraits;

template <>
struct SincosTraits<float> {
  using Bits = int32_t;
  // Adding 1.5 * 2^23 to a number rounds it to an integer, which the low bits of the sum then hold.
  static constexpr float round_shift = 12582912.0f;
  // With a multiply-add, n times a part is exact whatever its length.
  static constexpr float half_pi[] = {0x1.921fb6p+0f, -0x1.777a5cp-25f, -0x1.ee59dap-50f};
  // Highest power first. Fitted up to |r| = 0.84, because at |t| = 1e6 the rounding of 2/pi moves the boundaries of n
  // by 0.03.
  static constexpr float sine[] = {-0.00019468466f, 0.008331798f, -0.16666649f};
  static constexpr float cosine[] = {0.00002437957f, -0.0013886823f, 0.041666635f};
};

template <>
struct SincosTraits<double> {
  using Bits = int64_t;
  static constexpr double round_shift = 6755399441055744.0;
  // The first two parts have 33 bits each, so that their products with n below 2^20 are exact.
  static constexpr double half_pi[] = {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2e037073p-69};
  static constexpr double sine[] = {1.5896197635833297633e-10, -2.5050747218202253177e-8, 2.7557313618017425746e-6,
                                    -0.0001984126982958016616, 0.0083333333333221073295,  -0.16666666666666630686};
  static constexpr double cosine[] = {-1.1358513910110193054e-11, 2.0875700415244958924e-9, -2.7557314176233499094e-7,
                                      0.000024801587288841375139, -0.001388888888887304033, 0.041666666666666592832};
};

// The largest |t| for which n times a part of pi/2 is exact.
template <typename T>
constexpr T sincos_limit = T(1 << 20);

template <typename Wide, typename T, size_t count>
LCW_INLINE Wide evaluate(const T (&coefficients)[count], Wide square) {
  Wide value = Wide{} + coefficients[0];
#pragma GCC unroll 8
  for (size_t k = 1; k < count; ++k) value = value * square + coefficients[k];
  return value;
}

// Correct for |t| <= sincos_limit. For other angles the result is arbitrary, but nothing traps.
template <class Isa, typename T>
LCW_INLINE void sincos(
    typename Vector<T, Isa::vector_bytes>::type t, typename Vector<T, Isa::vector_bytes>::type& sine,
    typename Vector<T, Isa::vector_bytes>::type& cosine) {
  using Traits = SincosTraits<T>;
  using Wide = typename Vector<T, Isa::vector_bytes>::type;
  using Bits = typename Vector<typename Traits::Bits, Isa::vector_bytes>::type;
  const Wide shifted = t * T(0.63661977236758134308) + Traits::round_shift;
  const Wide n = shifted - Traits::round_shift;
  Wide r;
  if constexpr (std::is_same_v<T, double> || Isa::has_multiply_add) {
    r = t - n * Traits::half_pi[0];
    r = r - n * Traits::half_pi[1];
    r = r - n * Traits::half_pi[2];
  } else {
    // Without a multiply-add, the products are not exact in float32. float64 has enough bits for them.
    using Double = typename Vector<double, 2 * Isa::vector_bytes>::type;
    using Parts = SincosTraits<double>;
    const Double long_n = __builtin_convertvector(n, Double);
    Double long_r = __builtin_convertvector(t, Double) - long_n * Parts::half_pi[0];
    long_r = long_r - long_n * Parts::half_pi[1];
    r = __builtin_convertvector(long_r, Wide);
  }
  const Wide square = r * r;
  const Wide sine_r = r + r * (square * evaluate(Traits::sine, square));
  // The small terms are added to each other before the 1 is added. Added one by one to a number near 1, they would be
  // lost to rounding, always downwards.
  const Wide cosine_r = T(1) + square * (square * evaluate(Traits::cosine, square) - T(0.5));
  // The shift leaves n mod 4 in the low bits.
  Bits quadrant;
  std::memcpy(&quadrant, &shifted, sizeof quadrant);
  constexpr int to_sign = 8 * sizeof(T) - 2;
  // The lowest bit of n is moved to the sign bit, by which AVX2 selects.
  const Bits is_odd = quadrant << (to_sign + 1) < 0;
  const Bits sine_sign = (quadrant & 2) << to_sign, cosine_sign = ((quadrant + 1) & 2) << to_sign;
  Bits sine_bits, cosine_bits;
  const Wide first = is_odd ? cosine_r : sine_r, second = is_odd ? sine_r : cosine_r;
  std::memcpy(&sine_bits, &first, sizeof sine_bits);
  std::memcpy(&cosine_bits, &second, sizeof cosine_bits);
  sine_bits ^= sine_sign, cosine_bits ^= cosine_sign;
  std::memcpy(&sine, &sine_bits, sizeof sine);
  std::memcpy(&cosine, &cosine_bits, sizeof cosine);
}

}  // namespace lcw_ops
