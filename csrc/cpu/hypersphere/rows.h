// A unit row of m numbers, computed from its m - 1 angles, and the gradient of the angles.
//
//   direction:   u_k = P_k cos t_k (k < m),  u_m = P_m,  P_k = prod_{i<k} sin t_i
//   backward:    T_m = g_m,  T_k = cos t_k g_k + sin t_k T_{k+1},  dL/dt_k = P_k (cos t_k T_{k+1} - sin t_k g_k)
//
// u is the row, called a direction, t are its angles, and g is the gradient of u; P_k and T_k are a running product and
// a running sum. W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912; the division-free backward is ours.
//
// A vector of angles takes about 40 instructions for sine and cosine, 30 for the running product, and in backward 45
// for the running sum. A float32 angle moves 8 bytes of memory forward and 12 backward, so both passes are bound by
// arithmetic. Backward computes sine and cosine again. Keeping both from forward would make the two passes a tenth
// faster for 8 samples (1024 x 1024, one thread: 3.97 instead of 4.43 ms), but would take twice the weight's memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "../sincos.h"
#include "../widening.h"

namespace lcw_ops {

// Lane i of the result is value[0] * .. * value[i].
template <class L, int by = 1>
LCW_INLINE typename L::Wide running_product(typename L::Wide value) {
  if constexpr (by < L::count) {
    value *= L::template from_below<by>(value, typename L::Wide{} + 1);
    return running_product<L, 2 * by>(value);
  }
  return value;
}

// Combines each lane's (factor, sum) with those of all lanes above it, by (s, a) o (s', a') = (s s', a + s a').
template <class L, int by = 1>
LCW_INLINE void running_recurrence(typename L::Wide& factor, typename L::Wide& sum) {
  if constexpr (by < L::count) {
    sum += factor * L::template from_above<by>(sum, typename L::Wide{});
    factor *= L::template from_above<by>(factor, typename L::Wide{} + 1);
    running_recurrence<L, 2 * by>(factor, sum);
  }
}

// Computes the sines and cosines of a row of angles, and of up to a whole vector of zeros after it.
template <class Isa, typename T>
LCW_INLINE void sincos_row(const T* angles, int64_t count, T* sine, T* cosine) {
  using L = WholeVector<Isa, T>;
  using Wide = typename L::Wide;
  Wide largest{};
  const auto step = [&](Wide t, int64_t k) LCW_LAMBDA_INLINE {
    Wide sines, cosines;
    sincos<Isa, T>(t, sines, cosines);
    L::store(sines, sine + k);
    L::store(cosines, cosine + k);
    const Wide magnitude = t < T(0) ? -t : t;
    largest = magnitude > largest ? magnitude : largest;
  };
  const int64_t whole = count / L::count * L::count;
  for (int64_t k = 0; k < whole; k += L::count) step(L::load(angles + k), k);
  T last[L::count] = {};
  std::copy(angles + whole, angles + count, last);
  step(L::load(last), whole);
  bool any = false;
  for (int i = 0; i < L::count; ++i) any |= largest[i] > sincos_limit<T>;
  if (!any) return;
  for (int64_t k = 0; k < count; ++k) {
    const double angle = double(angles[k]);
    if (std::abs(angle) > double(sincos_limit<T>)) sine[k] = T(std::sin(angle)), cosine[k] = T(std::cos(angle));
  }
}

// The product of all lanes.
template <class Isa, typename T>
LCW_INLINE double product_of_lanes(typename WholeVector<Isa, T>::Wide value) {
  using L = WholeVector<Isa, T>;
  T lane[L::count];
  L::store(value, lane);
  if constexpr (std::is_same_v<T, double>) {
    double product = lane[0];
    for (int i = 1; i < L::count; ++i) product *= lane[i];
    return product;
  } else {
    using Half = typename Vector<T, Isa::vector_bytes / 2>::type;
    using Doubles = typename WholeVector<Isa, double>::Wide;
    Half low, high;
    std::memcpy(&low, lane, sizeof low);
    std::memcpy(&high, lane + L::count / 2, sizeof high);
    return product_of_lanes<Isa, double>(
        __builtin_convertvector(low, Doubles) * __builtin_convertvector(high, Doubles));
  }
}

// Computes P_k and u_k from the angles of a row, for k < m and on to the end of the last vector, and in
// `vector_products` the product of each vector's sines. These products, and P_k from vector to vector, are multiplied
// in float64: a product of numbers just below 1 is rounded downwards, because the a b in (1 - a)(1 - b) = 1 - a - b + a
// b is lost, and in float32 thousands of such errors would add up.
template <class Isa, typename T>
LCW_INLINE void make_direction(
    const T* angles, int64_t m, T* sine, T* cosine, T* products, double* vector_products, T* direction) {
  sincos_row<Isa>(angles, m - 1, sine, cosine);
  using L = WholeVector<Isa, T>;
  const typename L::Wide one = typename L::Wide{} + 1;
  double before = 1;
  for (int64_t k = 0; k < m; k += L::count) {
    const typename L::Wide sines = L::load(sine + k);
    const typename L::Wide product = L::shift_up(running_product<L>(sines), one) * T(before);
    L::store(product, products + k);
    L::store(product * L::load(cosine + k), direction + k);
    const double all = product_of_lanes<Isa, T>(sines);
    vector_products[k / L::count] = all;
    before *= all;
  }
}

// Replaces g = dL/du, which is 0 from m to the end of a vector, by dL/dt_k for k < m - 1.
template <class Isa, typename T>
LCW_INLINE void angles_backward(
    const T* sine, const T* cosine, const T* products, const double* vector_products, int64_t m, T* g) {
  using L = WholeVector<Isa, T>;
  double above = 0;
  for (int64_t k = (m - 1) / L::count * L::count; k >= 0; k -= L::count) {
    const typename L::Wide s = L::load(sine + k), c = L::load(cosine + k), gradient = L::load(g + k);
    typename L::Wide factor = s, sum = c * gradient;
    running_recurrence<L>(factor, sum);
    const typename L::Wide total = sum + factor * T(above);
    const typename L::Wide next = L::shift_down(total, typename L::Wide{} + T(above));
    L::store(L::load(products + k) * (c * next - s * gradient), g + k);
    above = double(sum[0]) + vector_products[k / L::count] * above;
  }
}

// The rows of a layer whose units are given by their angles. `make` stores in `kept` the numbers that `backward` needs
// besides the row's gradient.
template <typename T>
struct AngleRows {
  Source<T> angles;
  int64_t m;
  Target<T> grad_angles = {};

  // The size of `kept`: sines, cosines and products, and one double per vector. The doubles take no more room than a
  // fourth array would, because a vector has at least two lanes.
  int64_t kept() const { return 4 * padded<T>(m); }
  LCW_INLINE double* vector_products(T* kept) const { return reinterpret_cast<double*>(kept + 3 * padded<T>(m)); }

  template <class Isa>
  LCW_INLINE void make(int64_t unit, T* kept, T* out) const {
    const T* row = angles.template read<Isa>(unit * (m - 1), m - 1, out);
    T *cosine = kept + padded<T>(m), *products = cosine + padded<T>(m);
    compiled<Isa, make_direction<Isa, T>>(row, m, kept, cosine, products, vector_products(kept), out);
  }

  // `g` is the gradient dL/du of the row, 0 from m on; it is overwritten.
  template <class Isa>
  LCW_INLINE void backward(int64_t unit, T* kept, const T*, T* g) const {
    backward_in<Isa>(kept, g);
    grad_angles.template write<Isa>(g, unit * (m - 1), m - 1);
  }
  template <class Isa>
  LCW_INLINE void backward_in(T* kept, T* g) const {
    const T *cosine = kept + padded<T>(m), *products = cosine + padded<T>(m);
    compiled<Isa, lcw_ops::angles_backward<Isa, T>>(kept, cosine, products, vector_products(kept), m, g);
  }
};

// angles (n, m-1) -> unit rows (n, m)
Tensor hypersphere_direction(Tensor angles);

}  // namespace lcw_ops
