// Linearly constrained weights: rows of zero sum, and the derivative of making them, in one pass over the rows.
//
//   centred:  w = u - mean(u), which is its own derivative
//   basis:    w = B v:    w_j = v_j - S / (s (s+1)) for j < m,  w_m = -S / s,  S = sum(v),  s = sqrt(m)
//             B^T g:      g_j - t,  j < m,                      t = sum_{j<m} g_j / (s (s+1)) + g_m / s
//
// T. Kutsuna, arXiv 2403.13833; B is Householder's, as in lcw_ops/reference/lcw_linear.py. A row is read twice, the
// second time from cache, and written once: bound by memory. Sums in float64, so that a row of large mean keeps the
// digits of what is left of it; rows in parallel, every sum in a fixed order.

#include <cmath>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dispatch.h"

namespace lcw_ops {
namespace {

// How a number is held in memory, by element type; 16 bits are float32 in registers.
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

// Sums side by side, added up in the end: independent of each other, so that they are carried out at once.
template <typename E>
LCW_INLINE double sum(const E* row, int64_t count) {
  constexpr int64_t lanes = 16;
  double part[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) part[lane] += double(load(row[i + lane]));
  double total = 0;
  for (; i < count; ++i) total += double(load(row[i]));
  for (double one : part) total += one;
  return total;
}

template <typename E>
LCW_INLINE void subtract(const E* row, int64_t count, double shift, E* out) {
  using Wide = decltype(load(E{}));
  const Wide narrow = Wide(shift);
  for (int64_t i = 0; i < count; ++i) store(load(row[i]) - narrow, out[i]);
}

struct Rows {
  int64_t count, in_length, out_length;
};

enum class Map { centre, embed, project };  // embed: B v; project: B^T g

template <typename E>
LCW_INLINE void map_rows(Map map, Rows rows, const void* in_, void* out_, int64_t begin, int64_t end) {
  const double s = std::sqrt(double(std::max(rows.in_length, rows.out_length)));
  for (int64_t r = begin; r < end; ++r) {
    const E* in = static_cast<const E*>(in_) + r * rows.in_length;
    E* out = static_cast<E*>(out_) + r * rows.out_length;
    if (map == Map::centre) {
      subtract(in, rows.in_length, sum(in, rows.in_length) / double(rows.in_length), out);
    } else if (map == Map::embed) {
      const double total = sum(in, rows.in_length);
      subtract(in, rows.in_length, total / (s * (s + 1)), out);
      store(decltype(load(E{}))(-total / s), out[rows.in_length]);
    } else {
      const double last = double(load(in[rows.out_length]));
      subtract(in, rows.out_length, sum(in, rows.out_length) / (s * (s + 1)) + last / s, out);
    }
  }
}

using Kernel = void (*)(Map, Rows, const void* in, void* out, int64_t begin, int64_t end);

#define LCW_ROWS(Isa, attributes)                                                                            \
  template <typename E>                                                                                      \
  attributes void map_rows_##Isa(Map map, Rows rows, const void* in, void* out, int64_t begin, int64_t end) { \
    map_rows<E>(map, rows, in, out, begin, end);                                                             \
  }

LCW_ROWS(portable, )
#ifdef LCW_X86_DISPATCH
LCW_ROWS(avx2, LCW_AVX2)
LCW_ROWS(avx512, LCW_AVX512)
#endif

template <typename E>
Kernel kernel() {
  switch (instruction_set()) {
#ifdef LCW_X86_DISPATCH
    case InstructionSet::avx512: return map_rows_avx512<E>;
    case InstructionSet::avx2: return map_rows_avx2<E>;
#endif
    default: return map_rows_portable<E>;
  }
}

Kernel kernel(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return kernel<float>();
    case ScalarType::Double: return kernel<double>();
    case ScalarType::BFloat16: return kernel<BFloat16>();
    case ScalarType::Half: return kernel<Half>();
    default: STD_TORCH_CHECK(false, "lcw_weight: float32, float64, bfloat16 or float16; call lcw_ops.functional"); return nullptr;
  }
}

using torch::stable::Tensor;

// Everything but dimension 0 is one row.
Tensor map_tensor(Map map, const Tensor& tensor) {
  namespace stable = torch::stable;
  // Fewer elements than these on a thread take less time than waking it.
  constexpr int64_t least_elements = 16384;
  STD_TORCH_CHECK(tensor.dim() >= (map == Map::centre ? 1 : 2), "lcw_weight: a tensor of rows; call lcw_ops.functional");
  const Tensor in = stable::contiguous(tensor);
  const int64_t count = in.size(0);
  int64_t length = 1;
  for (int64_t d = 1; d < in.dim(); ++d) length *= in.size(d);
  STD_TORCH_CHECK(map != Map::project || length >= 1, "lcw_weight_backward: rows of at least one element");
  const int64_t out_length = map == Map::centre ? length : map == Map::embed ? length + 1 : length - 1;
  Tensor out = map == Map::centre ? stable::empty_like(in) : stable::new_empty(in, {count, out_length});
  if (count * std::max(length, out_length) == 0) return out;
  const Rows rows{count, length, out_length};
  const Kernel run = kernel(in.scalar_type());
  const int64_t grain = std::max<int64_t>(1, least_elements / std::max<int64_t>(length, 1));
  stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    run(map, rows, in.const_data_ptr(), out.mutable_data_ptr(), begin, end);
  });
  return out;
}

Tensor lcw_weight(Tensor weight, bool basis) { return map_tensor(basis ? Map::embed : Map::centre, weight); }

Tensor lcw_weight_backward(Tensor grad_output, bool basis) {
  return map_tensor(basis ? Map::project : Map::centre, grad_output);
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("lcw_weight.cpp", TORCH_BOX(&lcw_ops::lcw_weight));
  m.impl("lcw_weight_backward.cpp", TORCH_BOX(&lcw_ops::lcw_weight_backward));
}
