// How a number lies in memory, and how it is computed with: 16 bits become float32, exactly, and are rounded once.
#pragma once

#include "matrix.h"

namespace lcw_ops {

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

// What a number of type E is computed in.
template <typename E>
using Computed = decltype(load(E{}));

}  // namespace lcw_ops
