// The types in which numbers are stored, and the types in which they are computed: 16-bit numbers are converted to
// float32, which is exact, and results are rounded once.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../attributes.h"

namespace lcw_ops {

// The conversions below consist of operations that the compiler vectorises for every instruction set.
LCW_INLINE float widen_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

LCW_INLINE float widen_half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff;
  // Move exponent and fraction into place, and correct the exponent's bias. For infinities and NaN, correct it twice.
  const uint32_t bias = 112u << 23;
  uint32_t wide = (magnitude << 13) + bias + (magnitude >= 0x7c00 ? bias : 0u);
  // Denormal numbers are multiples of 2^-24. Converted as integers, they are exact in every rounding mode.
  const float multiple = float(int32_t(magnitude)) * 0x1p-24f;
  uint32_t denormal;
  std::memcpy(&denormal, &multiple, sizeof(denormal));
  wide = (magnitude < 0x0400 ? denormal : wide) | uint32_t(bits & 0x8000) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Rounds to nearest, ties to even.
LCW_INLINE uint16_t round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding could clear a NaN's fraction, so a NaN is truncated and gets a bit of its fraction set.
  return uint16_t(value != value ? (bits >> 16) | 0x40 : rounded);
}

LCW_INLINE uint16_t round_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // From 2^-14 on: reduce the exponent's bias by 112, and drop 13 bits.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: add 1/2. The low bits of the sum are then the fraction, rounded by the addition itself.
  float absolute;
  std::memcpy(&absolute, &magnitude, sizeof(absolute));
  const float shifted = absolute + 0.5f;
  uint32_t denormal;
  std::memcpy(&denormal, &shifted, sizeof(denormal));
  denormal -= 0x3f000000u;
  // From 65520 on, the result is infinite: it is half-way between the largest number and the one that would follow it.
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  return uint16_t(sign | (magnitude >= 0x477ff000u ? large : finite));
}

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

LCW_INLINE float load(float value) { return value; }
LCW_INLINE double load(double value) { return value; }
LCW_INLINE float load(BFloat16 value) { return widen_bfloat16(value.bits); }
LCW_INLINE float load(Half value) { return widen_half(value.bits); }

LCW_INLINE void store(float value, float& out) { out = value; }
LCW_INLINE void store(double value, double& out) { out = value; }
LCW_INLINE void store(float value, BFloat16& out) { out.bits = round_to_bfloat16(value); }
LCW_INLINE void store(float value, Half& out) { out.bits = round_to_half(value); }

// The type in which a number of type E is computed.
template <typename E>
using Computed = decltype(load(E{}));

}  // namespace lcw_ops
