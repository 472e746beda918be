// Weights on the hypersphere: directions from angles, normalised rows, and the linear layers of both.
//
//   direction:   u_k = P_k cos t_k (k < m),  u_m = P_m,  P_k = prod_{i<k} sin t_i
//   backward:    T_m = g_m,  T_k = cos t_k g_k + sin t_k T_{k+1},  dL/dt_k = P_k (cos t_k T_{k+1} - sin t_k g_k)
//   normalised:  w = s v / |v|        ds = <g, v / |v|>,  dv = s (g - ds v / |v|) / |v|
//   layers:      y = r act(X u^T + lambda),   y = X w^T + b
//
// W. Chen, H. Ge, NeurIPS 2024, arXiv 2305.15912, the division-free backward is ours; T. Salimans, D. P. Kingma, 2016.
//
// An angle costs a sine and a cosine, some 40 instructions a vector, its running product 30, and in backward its sum
// 45; 8 bytes of memory forward, 12 backward: bound by arithmetic. Backward makes sine and cosine anew. Keeping both
// from forward on takes a tenth off the two passes of 8 samples (1024 x 1024, one thread: 3.97 in place of 4.43 ms),
// for twice the memory of the weight.
//
// Few samples: a few units at a time. Their rows are made where the nearest caches hold them, multiplied with all
// samples, and forgotten; backward makes them once more, and the gradient of the rows goes into the recurrence from the
// same caches: the layer reads its angles twice and writes their gradient, 12 bytes in place of 32. More samples: the
// rows are made once and multiplied by whoever matmul.h finds the fastest.
//
// A layer with normalised rows makes none as long as samples are few, or, forward, few beside a unit's inputs:
//   q = X v^T,  y = (s / |v|) q + b;    G = dY^T X,  ds = <G, v> / |v|,  dV = (s / |v|) (G - (ds / |v|) v),
//   dX = (s / |v|) dY V
// Beside the plain layer's products that is a reading of the weight for the lengths, and one more for dV.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "few_samples.h"
#include "gemm.h"
#include "matmul.h"
#include "sincos.h"
#include "tensors.h"

namespace lcw_ops {
namespace {

// Samples up to which rows are made inside the product; the Python side knows the same number.
constexpr int64_t few_samples = 32;

// The same where rows are multiplied as they are.
constexpr int64_t few_unnormalised = 64;

// The widest vector of any instruction set: rows in buffers end with so many numbers that may be written over.
template <typename T>
constexpr int64_t slack = 64 / sizeof(T);

template <typename T>
int64_t padded(int64_t length) {
  return (length + slack<T> - 1) / slack<T> * slack<T>;
}

template <class Isa, typename T>
struct Lanes {
  using Wide = typename Vector<T, Isa::vector_bytes>::type;
  using Index = typename Vector<typename SincosTraits<T>::Bits, Isa::vector_bytes>::type;
  static constexpr int count = Vector<T, Isa::vector_bytes>::lanes;

  LCW_INLINE static Wide load(const T* from) {
    Wide value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  LCW_INLINE static void store(const Wide& value, T* to) { std::memcpy(to, &value, sizeof value); }

  // Every lane from the one below; the first from `fill`, whose lanes are all alike.
  LCW_INLINE static Wide shift_up(Wide value, Wide fill) {
    return choose(value, fill, [](int i) { return i < 1 ? count : i - 1; }, std::make_integer_sequence<int, count>());
  }
  LCW_INLINE static Wide shift_down(Wide value, Wide fill) {
    return choose(
        value, fill, [](int i) { return i + 1 < count ? i + 1 : count; }, std::make_integer_sequence<int, count>());
  }

  // For a running product or sum in steps of by = 1, 2, 4, ...: to every lane one below it whose sum goes down as far
  // as it must, or `fill`. Within 16 bytes, where lanes move in one instruction, that is the one `by` below; beyond,
  // the last one of the half below.
  template <int by>
  LCW_INLINE static Wide from_below(Wide value, Wide fill) {
    constexpr auto source = [](int i) {
      if (by < near) return i % near < by ? count + i : i - by;
      return i / by % 2 ? i / by * by - 1 : count + i;
    };
    return choose(value, fill, source, std::make_integer_sequence<int, count>());
  }
  template <int by>
  LCW_INLINE static Wide from_above(Wide value, Wide fill) {
    constexpr auto source = [](int i) {
      if (by < near) return i % near + by < near ? i + by : count + i;
      return i / by % 2 ? count + i : (i / by + 1) * by;
    };
    return choose(value, fill, source, std::make_integer_sequence<int, count>());
  }

 private:
  static constexpr int near = 16 / sizeof(T);

  // Lane i is lane source(i) of the two behind each other.
  template <typename Source, int... i>
  LCW_INLINE static Wide choose(Wide value, Wide fill, Source source, std::integer_sequence<int, i...>) {
#if LCW_SHUFFLES
    return __builtin_shuffle(value, fill, Index{source(i)...});
#else
    return Wide{(source(i) < count ? value[source(i)] : fill[0])...};
#endif
  }
};

// lane i <- value[0] * .. * value[i]
template <class L, int by = 1>
LCW_INLINE typename L::Wide running_product(typename L::Wide value) {
  if constexpr (by < L::count) {
    value *= L::template from_below<by>(value, typename L::Wide{} + 1);
    return running_product<L, 2 * by>(value);
  }
  return value;
}

// (s, a) o (s', a') = (s s', a + s a') over each lane and all above it.
template <class L, int by = 1>
LCW_INLINE void running_recurrence(typename L::Wide& factor, typename L::Wide& sum) {
  if constexpr (by < L::count) {
    sum += factor * L::template from_above<by>(sum, typename L::Wide{});
    factor *= L::template from_above<by>(factor, typename L::Wide{} + 1);
    running_recurrence<L, 2 * by>(factor, sum);
  }
}

// The sines and cosines of a row, and of zeros up to a whole vector beyond its end.
template <class Isa, typename T>
LCW_INLINE void sincos_row(const T* angles, int64_t count, T* sine, T* cosine) {
  using L = Lanes<Isa, T>;
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

// All lanes multiplied with each other.
template <class Isa, typename T>
LCW_INLINE double product_of_lanes(typename Lanes<Isa, T>::Wide value) {
  using L = Lanes<Isa, T>;
  T lane[L::count];
  L::store(value, lane);
  if constexpr (std::is_same_v<T, double>) {
    double product = lane[0];
    for (int i = 1; i < L::count; ++i) product *= lane[i];
    return product;
  } else {
    using Half = typename Vector<T, Isa::vector_bytes / 2>::type;
    using Doubles = typename Lanes<Isa, double>::Wide;
    Half low, high;
    std::memcpy(&low, lane, sizeof low);
    std::memcpy(&high, lane + L::count / 2, sizeof high);
    return product_of_lanes<Isa, double>(
        __builtin_convertvector(low, Doubles) * __builtin_convertvector(high, Doubles));
  }
}

// All numbers of some vectors added up in float64.
template <class Isa, typename T, size_t vectors>
LCW_INLINE double sum_of_lanes(const T (&part)[vectors]) {
  using Number = std::decay_t<decltype(part[0][0])>;
  using Doubles = typename Lanes<Isa, double>::Wide;
  Doubles sum{};
  for (const T& vector : part) {
    if constexpr (std::is_same_v<Number, double>) {
      sum += vector;
    } else {
      using Half = typename Vector<Number, Isa::vector_bytes / 2>::type;
      Half half[2];
      std::memcpy(half, &vector, sizeof half);
      sum += __builtin_convertvector(half[0], Doubles) + __builtin_convertvector(half[1], Doubles);
    }
  }
  double total = 0;
  for (int i = 0; i < Lanes<Isa, double>::count; ++i) total += sum[i];
  return total;
}

// P_k and u_k for k < m and beyond, to the end of a vector, and the product of the sines of each vector. What goes from
// one vector to the next does so in float64: products of numbers just below 1 round downwards, for the a b in
// (1 - a)(1 - b) = 1 - a - b + a b is lost, and thousands of them would add up.
template <class Isa, typename T>
LCW_INLINE void direction_row(
    const T* sine, const T* cosine, int64_t m, T* products, double* vector_products, T* direction) {
  using L = Lanes<Isa, T>;
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

// dL/dt_k for k < m - 1 from g = dL/du, which is 0 beyond m to the end of a vector; `out` may be `g`.
template <class Isa, typename T>
LCW_INLINE void angles_backward_row(
    const T* sine, const T* cosine, const T* products, const double* vector_products, const T* g, int64_t m, T* out) {
  using L = Lanes<Isa, T>;
  double above = 0;
  for (int64_t k = (m - 1) / L::count * L::count; k >= 0; k -= L::count) {
    const typename L::Wide s = L::load(sine + k), c = L::load(cosine + k), gradient = L::load(g + k);
    typename L::Wide factor = s, sum = c * gradient;
    running_recurrence<L>(factor, sum);
    const typename L::Wide total = sum + factor * T(above);
    const typename L::Wide next = L::shift_down(total, typename L::Wide{} + T(above));
    L::store(L::load(products + k) * (c * next - s * gradient), out + k);
    above = double(sum[0]) + vector_products[k / L::count] * above;
  }
}

// <a, b> and, if there is one, <a, c>, in partial sums of 16 numbers each that are carried out at once, added up in
// float64.
template <class Isa, typename T>
LCW_INLINE std::pair<double, double> dots(const T* a, const T* b, const T* c, int64_t count) {
  using L = Lanes<Isa, T>;
  constexpr int vectors = 4;
  constexpr int64_t step = vectors * L::count, block = 16 * step;
  double with_b = 0, with_c = 0;
  for (int64_t first = 0; first < count; first += block) {
    const int64_t end = std::min(count, first + block);
    typename L::Wide part_b[vectors] = {}, part_c[vectors] = {};
    int64_t i = first;
    const auto add = [&](int v) LCW_LAMBDA_INLINE {
      const typename L::Wide of_a = L::load(a + i);
      part_b[v] += of_a * L::load(b + i);
      if (c) part_c[v] += of_a * L::load(c + i);
      i += L::count;
    };
    while (i + step <= end)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) add(v);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      if (i + L::count <= end) add(v);
    with_b += sum_of_lanes<Isa>(part_b);
    if (c) with_c += sum_of_lanes<Isa>(part_c);
    for (; i < end; ++i) {
      with_b += double(a[i]) * double(b[i]);
      if (c) with_c += double(a[i]) * double(c[i]);
    }
  }
  return {with_b, with_c};
}

template <class Isa, typename T>
LCW_INLINE double dot(const T* a, const T* b, int64_t count) {
  return dots<Isa, T>(a, b, nullptr, count).first;
}

// scale v / |v|, or zeros, into out, which may be the row, and |v|, or infinity: every derivative of a row without
// direction is zero.
template <class Isa, typename T>
LCW_INLINE double normalize_row(const T* row, int64_t m, T scale, T* out) {
  const double square = dot<Isa>(row, row, m);
  // Within, no square that counts was rounded to 0 or infinity, and the factor is a number of full accuracy.
  constexpr double limit = std::is_same_v<T, double> ? 0x1p900 : 0x1p90;
  const double length = std::sqrt(square), factor = double(scale) / length, size = std::abs(factor);
  if (square > 1 / limit && square < limit && (factor == 0 || (size > 0x1p-100 && size < 0x1p100))) {
    // A row of one number is exactly 1 or -1, so that no gradient is left along it.
    if (scale == T(1))
      for (int64_t i = 0; i < m; ++i) out[i] = row[i] / T(length);
    else
      for (int64_t i = 0; i < m; ++i) out[i] = row[i] * T(factor);
    return length;
  }
  T largest = 0;
  for (int64_t i = 0; i < m; ++i) largest = std::max(largest, std::abs(row[i]));
  // Of a NaN every component has a NaN.
  if (square != square || largest > std::numeric_limits<T>::max()) {
    std::fill(out, out + m, std::numeric_limits<T>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (largest == 0) {
    std::fill(out, out + m, scale * T(0));
    return std::numeric_limits<double>::infinity();
  }
  const int exponent = std::ilogb(largest);
  double scaled_square = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double scaled = std::ldexp(double(row[i]), -exponent);
    scaled_square += scaled * scaled;
  }
  const double scaled_length = std::sqrt(scaled_square);
  for (int64_t i = 0; i < m; ++i) out[i] = T(double(scale) * (std::ldexp(double(row[i]), -exponent) / scaled_length));
  return std::ldexp(scaled_length, exponent);
}

// g <- s (g - <g, v / |v|> v / |v|) / |v|, and returns the inner product.
template <class Isa, typename T>
LCW_INLINE double normalized_backward_row(const T* direction, double length, double scale, int64_t m, T* g) {
  const double along = dot<Isa>(g, direction, m), factor = scale / length;
  const T narrow = T(along);
  // A factor of full accuracy, or every step in float64.
  if (std::abs(factor) < 0x1p100 && std::abs(factor) > 0x1p-100)
    for (int64_t i = 0; i < m; ++i) g[i] = (g[i] - narrow * direction[i]) * T(factor);
  else
    for (int64_t i = 0; i < m; ++i) g[i] = T(scale * ((double(g[i]) - along * double(direction[i])) / length));
  return along;
}

// The loops over a row, compiled once for each instruction set.
#define LCW_ROW_KERNELS(Instructions, attributes)                                                                 \
  template <typename T>                                                                                           \
  struct Instructions##Rows {                                                                                     \
    using Isa = Instructions;                                                                                     \
    attributes LCW_NOINLINE static void make_direction(                                                           \
        const T* angles, int64_t m, T* sine, T* cosine, T* products, double* vector_products, T* direction) {     \
      sincos_row<Isa>(angles, m - 1, sine, cosine);                                                               \
      direction_row<Isa>(sine, cosine, m, products, vector_products, direction);                                  \
    }                                                                                                             \
    attributes LCW_NOINLINE static void angles_backward(                                                          \
        const T* sine, const T* cosine, const T* products, const double* vector_products, int64_t m, T* g) {      \
      angles_backward_row<Isa>(sine, cosine, products, vector_products, g, m, g);                                 \
    }                                                                                                             \
    attributes LCW_NOINLINE static double square(const T* row, int64_t m) { return dot<Isa>(row, row, m); }       \
    /* <row, row> and <row, other> */                                                                             \
    attributes LCW_NOINLINE static std::pair<double, double> squares(const T* row, const T* other, int64_t m) {   \
      return dots<Isa>(row, row, other, m);                                                                       \
    }                                                                                                             \
    /* out <- factor (g - share row), which may be g */                                                           \
    attributes LCW_NOINLINE static void take_off(                                                                 \
        const T* row, T share, T factor, int64_t m, const T* g, T* out) {                                         \
      for (int64_t i = 0; i < m; ++i) out[i] = (g[i] - share * row[i]) * factor;                                  \
    }                                                                                                             \
    attributes LCW_NOINLINE static double normalize(const T* row, int64_t m, T scale, T* out) {                   \
      return normalize_row<Isa>(row, m, scale, out);                                                              \
    }                                                                                                             \
    attributes LCW_NOINLINE static double normalized_backward(                                                    \
        const T* direction, double length, double scale, int64_t m, T* g) {                                       \
      return normalized_backward_row<Isa>(direction, length, scale, m, g);                                        \
    }                                                                                                             \
  };

LCW_ROW_KERNELS(Portable, )
#ifdef LCW_X86_DISPATCH
LCW_ROW_KERNELS(Avx2, LCW_AVX2)
LCW_ROW_KERNELS(Avx512, LCW_AVX512)
#endif

template <class Isa, typename T>
struct RowsFor;
template <typename T>
struct RowsFor<Portable, T> : PortableRows<T> {};
#ifdef LCW_X86_DISPATCH
template <typename T>
struct RowsFor<Avx2, T> : Avx2Rows<T> {};
template <typename T>
struct RowsFor<Avx512, T> : Avx512Rows<T> {};
#endif

// Numbers of a tensor, read in those to compute with: as they lie, or widened.
template <typename T>
struct Source {
  const void* data;
  ScalarType type;

  bool is_narrow() const { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

  template <class Isa>
  LCW_INLINE const T* read(int64_t at, int64_t count, T* buffer) const {
    if (!is_narrow()) return static_cast<const T*>(data) + at;
    ProductsFor<Isa, T>::widen(static_cast<const uint16_t*>(data) + at, type, buffer, count);
    return buffer;
  }
};

template <typename T>
struct Target {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
  bool is_narrow() const { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

  template <class Isa>
  LCW_INLINE void write(const T* numbers, int64_t at, int64_t count) const {
    if (is_narrow())
      ProductsFor<Isa, T>::round(numbers, type, static_cast<uint16_t*>(data) + at, count);
    else
      std::copy(numbers, numbers + count, static_cast<T*>(data) + at);
  }
};

template <typename T>
Source<T> source(const Tensor& tensor) {
  return {tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr, tensor.scalar_type()};
}

// Nowhere, for a tensor without elements.
template <typename T>
Target<T> target(Tensor& tensor) {
  return {tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr, tensor.scalar_type()};
}

// f(T{}) for the numbers that a tensor's are computed in.
template <typename F>
void with_computed(const Tensor& tensor, const F& f) {
  with_elements(tensor, [&](auto element) { f(Computed<decltype(element)>{}); });
}

// Everything of a tensor in numbers to compute with.
template <typename T>
class Wide {
 public:
  explicit Wide(const Tensor& tensor)
      : tensor_(as_contiguous(tensor)), copy_(source<T>(tensor_).is_narrow() ? tensor.numel() : 0) {
    const Source<T> in = source<T>(tensor_);
    data_ = static_cast<const T*>(in.data);
    if (!in.is_narrow()) return;
    data_ = copy_.data();
    for_each_part(tensor.numel(), least_elements, [=, this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      in.template read<decltype(isa)>(begin, end - begin, copy_.data() + begin);
    });
  }
  const T* data() const { return data_; }

 private:
  Tensor tensor_;
  Buffer<T> copy_;
  const T* data_;
};

// The same of what may not be there.
template <typename T>
class WideOrNothing {
 public:
  explicit WideOrNothing(const std::optional<Tensor>& tensor) {
    if (tensor) wide_.emplace(*tensor);
  }
  const T* data() const { return wide_ ? wide_->data() : nullptr; }

 private:
  std::optional<Wide<T>> wide_;
};

template <typename T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls compute(T*) with the tensor's memory, with wider memory that is then rounded into it, or, without elements to
// compute, with nullptr.
template <typename T, typename Compute>
void computed_in(Tensor& result, const Compute& compute) {
  if (result.numel() == 0) return compute(static_cast<T*>(nullptr));
  with_elements(result, [&](auto element) {
    using E = decltype(element);
    if constexpr (std::is_same_v<Computed<E>, T>) computed<E>(result, compute);
  });
}

// Units given by their angles. What `make` leaves in `kept` is what backward needs of a row beside its gradient.
template <typename T>
struct AngleRows {
  Source<T> angles;
  int64_t m;
  Target<T> grad_angles = {};

  // Sines, cosines and products, and one double for every vector, which has at least two lanes.
  int64_t kept() const { return 4 * padded<T>(m); }
  LCW_INLINE double* vector_products(T* kept) const { return reinterpret_cast<double*>(kept + 3 * padded<T>(m)); }

  template <class Isa>
  LCW_INLINE void make(int64_t unit, T* kept, T* out) const {
    const T* row = angles.template read<Isa>(unit * (m - 1), m - 1, out);
    T *cosine = kept + padded<T>(m), *products = cosine + padded<T>(m);
    RowsFor<Isa, T>::make_direction(row, m, kept, cosine, products, vector_products(kept), out);
  }

  // g: dL/d(row), 0 beyond m; overwritten.
  template <class Isa>
  LCW_INLINE void backward(int64_t unit, T* kept, const T*, T* g) const {
    backward_in<Isa>(kept, g);
    grad_angles.template write<Isa>(g, unit * (m - 1), m - 1);
  }
  template <class Isa>
  LCW_INLINE void backward_to(T* kept, T* g, T* out) const {
    backward_in<Isa>(kept, g);
    std::copy(g, g + m - 1, out);
  }
  template <class Isa>
  LCW_INLINE void backward_in(T* kept, T* g) const {
    const T *cosine = kept + padded<T>(m), *products = cosine + padded<T>(m);
    RowsFor<Isa, T>::angles_backward(kept, cosine, products, vector_products(kept), m, g);
  }
};

// Units given by any vector along their direction.
template <typename T>
struct VectorRows {
  Source<T> weight;
  int64_t m;
  const T* scale = nullptr;
  Target<T> grad_weight = {}, grad_scale = {};

  int64_t kept() const { return slack<T>; }

  template <class Isa>
  LCW_INLINE void make(int64_t unit, T* kept, T* out) const {
    const double length = RowsFor<Isa, T>::normalize(weight.template read<Isa>(unit * m, m, out), m, T(1), out);
    std::memcpy(kept, &length, sizeof length);
  }

  // g: the gradient of scale * row, over scale.
  template <class Isa>
  LCW_INLINE void backward(int64_t unit, T* kept, const T* direction, T* g) const {
    double length;
    std::memcpy(&length, kept, sizeof length);
    const T along = T(RowsFor<Isa, T>::normalized_backward(direction, length, double(scale[unit]), m, g));
    grad_scale.template write<Isa>(&along, unit, 1);
    grad_weight.template write<Isa>(g, unit * m, m);
  }
};

// work(isa, first, last) for ranges of units, of which each costs `elements`.
template <typename Work>
void for_each_unit(int64_t units, int64_t elements, const Work& work) {
  for_each_part(units, grain_of(elements), work);
}

// Rows' gradients (n, m) into those of what the rows are made of.
template <template <typename> class Rows, typename T>
void backward_rows(const Rows<T>& rows, const Source<T>& grad, int64_t n) {
  const int64_t m = rows.m;
  for_each_unit(n, m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    Buffer<T> kept(rows.kept()), direction(padded<T>(m)), g(padded<T>(m));
    for (int64_t unit = begin; unit < end; ++unit) {
      rows.template make<decltype(isa)>(unit, kept.data(), direction.data());
      const T* row = grad.template read<decltype(isa)>(unit * m, m, g.data());
      if (row != g.data()) std::copy(row, row + m, g.data());
      std::fill(g.data() + m, g.data() + padded<T>(m), T(0));
      rows.template backward<decltype(isa)>(unit, kept.data(), direction.data(), g.data());
    }
  });
}

// The same from rows' gradients (n, m) to angles' (n, m-1), in the memory of the first: new memory, of which each page
// is cleared first, costs more than the pass itself. A row ends up before where it was; what would end up where another
// thread has still to read waits until all are done.
template <typename T>
void backward_in_place(AngleRows<T> rows, const Tensor& grad, int64_t n) {
  const int64_t m = rows.m, parts = std::max<int64_t>(1, std::min<int64_t>(n, stable::get_num_threads()));
  rows.grad_angles = Target<T>{grad.mutable_data_ptr(), grad.scalar_type()};
  const Source<T> in = source<T>(grad);
  const auto first_of = [=](int64_t part) { return n * part / parts; };
  std::vector<Buffer<T>> waiting;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = first_of(part), early = (first * m + m - 2) / (m - 1) - first;
    waiting.emplace_back(std::min(early, first_of(part + 1) - first) * (m - 1) + slack<T>);
  }
  Buffer<T>* early = waiting.data();
  for_each_part(parts, 1, [=](auto isa, int64_t first_part, int64_t last_part) LCW_LAMBDA_INLINE {
    using Isa = decltype(isa);
    Buffer<T> kept(rows.kept()), direction(padded<T>(m)), g(padded<T>(m));
    for (int64_t part = first_part; part < last_part; ++part)
      for (int64_t unit = first_of(part); unit < first_of(part + 1); ++unit) {
        rows.template make<Isa>(unit, kept.data(), direction.data());
        const T* row = in.template read<Isa>(unit * m, m, g.data());
        if (row != g.data()) std::copy(row, row + m, g.data());
        std::fill(g.data() + m, g.data() + padded<T>(m), T(0));
        if (unit * (m - 1) >= first_of(part) * m)
          rows.template backward<Isa>(unit, kept.data(), direction.data(), g.data());
        else
          rows.template backward_to<Isa>(kept.data(), g.data(), early[part].data() + (unit - first_of(part)) * (m - 1));
      }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t unit = first_of(part); unit < first_of(part + 1) && unit * (m - 1) < first_of(part) * m; ++unit)
      rows.grad_angles.template write<Portable>(
          early[part].data() + (unit - first_of(part)) * (m - 1), unit * (m - 1), m - 1);
}

// The layer with normalised rows by products with the rows as they are; see the top. Each function is false where a
// number was, or might have been, too large or too small for that: then rows must be normalised first.
template <typename T>
struct UnnormalisedRows {
  Source<T> weight;
  int64_t samples, n, m;
  const T* scale;

  // Within it, lengths of rows, and factors above 1, cost at most so much of the range of numbers. Small factors cost
  // nothing: that q overflows is seen.
  static constexpr double most = 0x1p16;

  // |v| into `length` and s / |v| into `factor`, or false. What is infinite or NaN leaves no number of its row behind,
  // and the others as they are.
  template <class Isa>
  LCW_INLINE bool measure(const T* row, int64_t unit, double& length, T& factor) const {
    return measure(row, RowsFor<Isa, T>::square(row, m), unit, length, factor);
  }
  bool measure(const T* row, double square, int64_t unit, double& length, T& factor) const {
    const double found = std::sqrt(square);
    const double ratio = double(scale[unit]) / found, size = std::abs(ratio);
    length = found, factor = T(ratio);
    if (found < most && found > 1 / most && (ratio == 0 || (size < most && size > 0x1p-64))) return true;
    constexpr T largest = std::numeric_limits<T>::max();
    if (found == 0 && std::all_of(row, row + m, [](T number) { return number == T(0); })) {
      // A row without direction has no derivatives.
      length = std::numeric_limits<double>::infinity(), factor = scale[unit] * T(0);
      return true;
    }
    if (found != found || !(std::abs(scale[unit]) <= largest)) return true;
    if (std::all_of(row, row + m, [](T number) { return std::abs(number) <= largest; })) return false;
    length = std::numeric_limits<double>::quiet_NaN(), factor = T(length);
    return true;
  }

  // From g = dL/d(row) to dL/dv in `out`, which may be g, and ds; s / |v|; or false.
  template <class Isa>
  LCW_INLINE bool backward(
      const T* row, int64_t unit, const T* g, T* out, T& factor, const Target<T>& grad_scale) const {
    const auto [square, product] = RowsFor<Isa, T>::squares(row, g, m);
    double length;
    if (!measure(row, square, unit, length, factor)) return false;
    const double along = product / length;
    const T of_scale = T(along), share = T(along / length);
    constexpr T largest = std::numeric_limits<T>::max();
    if (!(std::abs(of_scale) <= largest && std::abs(share) <= largest) &&
        std::all_of(g, g + m, [](T number) { return std::abs(number) <= largest; }) && factor == factor)
      return false;
    RowsFor<Isa, T>::take_off(row, share, factor, m, g, out);
    grad_scale.template write<Isa>(&of_scale, unit, 1);
    return true;
  }

  // s / |v| of every row, or false.
  bool measure(T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    for_each_unit(n, m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> buffer(weight.is_narrow() ? m : 0);
      bool ordinary = true;
      double length;
      for (int64_t unit = begin; unit < end; ++unit)
        ordinary &= measure<Isa>(weight.template read<Isa>(unit * m, m, buffer.data()), unit, length, factor[unit]);
      if (!ordinary) *found = false;
    });
    return all;
  }

  // q of one sample and the units from `first` on to y, in its place; x is the sample, factor and bias the units'.
  LCW_INLINE void finish(const T* x, int64_t first, int64_t units, const T* factor, const T* bias, T* row) const {
    int infinite = 0;
    for (int64_t u = 0; u < units; ++u) {
      infinite |= !(std::abs(row[u]) <= std::numeric_limits<T>::max());
      row[u] = factor[u] * row[u] + (bias ? bias[u] : T(0));
    }
    if (infinite) finish_infinite(x, first, units, factor, bias, row);
  }

  // The same where q is infinite, or NaN: it may be where y is not.
  LCW_NOINLINE void finish_infinite(
      const T* x, int64_t first, int64_t units, const T* factor, const T* bias, T* row) const {
    for (int64_t k = 0; k < m; ++k)
      if (!(std::abs(x[k]) <= std::numeric_limits<T>::max())) return;
    constexpr double small = 0x1p-40;
    Buffer<T> buffer(weight.is_narrow() ? m : 0);
    for (int64_t u = 0; u < units; ++u) {
      if (std::abs(row[u]) <= std::numeric_limits<T>::max()) continue;
      const T* v = weight.template read<Portable>((first + u) * m, m, buffer.data());
      double sum = 0;
      for (int64_t k = 0; k < m; ++k) sum += small * double(x[k]) * double(v[k]);
      row[u] = T(double(factor[u]) / small * sum + (bias ? double(bias[u]) : 0));
    }
  }

  // y from x (samples, m).
  bool forward_few(const T* x, const T* bias, const Target<T>& y) const {
    std::atomic<bool> all{true}, *found = &all;
    // A sample by itself takes eight rows at a time.
    const int64_t units = samples % 2 ? 8 : 4;
    const int64_t blocks = (n + units - 1) / units;
    for_each_unit(blocks, units * m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> block(weight.is_narrow() ? units * m : 0), products(samples * units);
      double length[8];
      T factor[8];
      bool ordinary = true;
      for (int64_t j = begin * units; j < std::min(n, end * units); j += units) {
        const int64_t count = std::min(units, n - j);
        const T* rows = weight.template read<Isa>(j * m, count * m, block.data());
        for (int64_t u = 0; u < count; ++u) ordinary &= measure<Isa>(rows + u * m, j + u, length[u], factor[u]);
        ProductsFor<Isa, T>::multiply_by_rows(x, rows, m, products.data(), units, samples, count, nullptr);
        for (int64_t i = 0; i < samples; ++i) {
          T* row = products.data() + i * units;
          finish(x + i * m, j, count, factor, bias ? bias + j : nullptr, row);
          y.template write<Isa>(row, i * n + j, count);
        }
      }
      if (!ordinary) *found = false;
    });
    return all;
  }

  // The same from q, in its place.
  void forward_many(const Source<T>& x, const T* factor, const T* bias, const Target<T>& y) const {
    for_each_part(samples, grain_of(n), [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      const Source<T> product{y.data, y.type};
      Buffer<T> row(n), sample(x.is_narrow() ? m : 0);
      for (int64_t i = begin; i < end; ++i) {
        T* q = const_cast<T*>(product.template read<Isa>(i * n, n, row.data()));
        finish(x.template read<Isa>(i * m, m, sample.data()), 0, n, factor, bias, q);
        if (y.is_narrow()) y.template write<Isa>(q, i * n, n);
      }
    });
  }

  // dV and ds from X and dY, and s / |v| of every row.
  template <typename E>
  bool backward_few(const E* x, const E* grad, T* grad_weight, const Target<T>& grad_scale, T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    FewSamplesGradients<E>{samples, n, m}.grad_weight(
        grad, x, m, nullptr, grad_weight, [=, *this](auto isa, int64_t first, int64_t last) LCW_LAMBDA_INLINE {
          using Isa = decltype(isa);
          Buffer<T> buffer(weight.is_narrow() ? m : 0);
          bool ordinary = true;
          for (int64_t unit = first; unit < last; ++unit) {
            const T* v = weight.template read<Isa>(unit * m, m, buffer.data());
            T* g = grad_weight + unit * m;
            ordinary &= backward<Isa>(v, unit, g, g, factor[unit], grad_scale);
          }
          if (!ordinary) *found = false;
        });
    return all;
  }

  // G, in the memory of which dV is then, and ds; s / |v| of every row.
  bool backward_many(const Target<T>& g, const Target<T>& grad_scale, T* factor) const {
    std::atomic<bool> all{true}, *found = &all;
    for_each_unit(n, m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      const Source<T> in{g.data, g.type};
      Buffer<T> row(weight.is_narrow() ? m : 0), buffer(weight.is_narrow() ? m : 0);
      bool ordinary = true;
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* v = weight.template read<Isa>(unit * m, m, row.data());
        T* sums = const_cast<T*>(in.template read<Isa>(unit * m, m, buffer.data()));
        ordinary = backward<Isa>(v, unit, sums, sums, factor[unit], grad_scale);
        if (!ordinary) break;
        if (g.is_narrow()) g.template write<Isa>(sums, unit * m, m);
      }
      if (!ordinary) *found = false;
    });
    return all;
  }
};

bool fits(const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != int64_t(sizes.size()) || tensor.scalar_type() != like.scalar_type() || !tensor.is_cpu())
    return false;
  int64_t d = 0;
  for (const int64_t size : sizes)
    if (tensor.size(d++) != size) return false;
  return true;
}

Tensor hypersphere_direction(Tensor angles) {
  STD_TORCH_CHECK(angles.dim() == 2 && angles.is_cpu(), "hypersphere_direction: not rows; call lcw_ops.functional");
  angles = as_contiguous(angles);
  const int64_t n = angles.size(0), m = angles.size(1) + 1;
  Tensor result = new_large(angles, {n, m});
  with_computed(angles, [&](auto number) {
    using T = decltype(number);
    const AngleRows<T> rows{source<T>(angles), m};
    const Target<T> out = target<T>(result);
    for_each_unit(n, m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      Buffer<T> kept(rows.kept()), direction(padded<T>(m));
      for (int64_t unit = begin; unit < end; ++unit) {
        rows.template make<decltype(isa)>(unit, kept.data(), direction.data());
        out.template write<decltype(isa)>(direction.data(), unit * m, m);
      }
    });
  });
  return result;
}

Tensor hypersphere_direction_backward(Tensor grad_direction, Tensor angles) {
  STD_TORCH_CHECK(
      angles.dim() == 2 && angles.is_cpu() && fits(grad_direction, angles, {angles.size(0), angles.size(1) + 1}),
      "hypersphere_direction_backward: grad_direction (n, m) and angles (n, m-1) do not fit; call lcw_ops.functional");
  angles = as_contiguous(angles), grad_direction = as_contiguous(grad_direction);
  Tensor result = new_large(angles, angles.sizes());
  if (result.numel() == 0) return result;
  with_computed(angles, [&](auto number) {
    using T = decltype(number);
    const AngleRows<T> rows{source<T>(angles), angles.size(1) + 1, target<T>(result)};
    backward_rows(rows, source<T>(grad_direction), angles.size(0));
  });
  return result;
}

void check_normalised(const Tensor& weight, const Tensor& scale) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.is_cpu() && weight.size(1) >= 1 && fits(scale, weight, {weight.size(0)}),
      "normalize_scale: weight (n, m) and scale (n,) do not fit; call lcw_ops.functional");
}

Tensor normalize_scale(Tensor weight, Tensor scale) {
  check_normalised(weight, scale);
  weight = as_contiguous(weight);
  Tensor result = new_large(weight, weight.sizes());
  with_computed(weight, [&](auto number) {
    using T = decltype(number);
    const Wide<T> wide_scale(scale);
    const T* scales = wide_scale.data();
    const int64_t m = weight.size(1);
    const Source<T> in = source<T>(weight);
    const Target<T> out = target<T>(result);
    for_each_unit(weight.size(0), m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> buffer(in.is_narrow() ? m : 0);
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* row = in.template read<Isa>(unit * m, m, buffer.data());
        // Straight to where it belongs, unless it is rounded there.
        T* scaled = in.is_narrow() ? buffer.data() : static_cast<T*>(out.data) + unit * m;
        RowsFor<Isa, T>::normalize(row, m, scales[unit], scaled);
        if (in.is_narrow()) out.template write<Isa>(scaled, unit * m, m);
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> normalize_scale_backward(Tensor grad_output, Tensor weight, Tensor scale) {
  check_normalised(weight, scale);
  STD_TORCH_CHECK(
      fits(grad_output, weight, {weight.size(0), weight.size(1)}),
      "normalize_scale_backward: grad_output does not fit the weight; call lcw_ops.functional");
  weight = as_contiguous(weight), grad_output = as_contiguous(grad_output);
  Tensor grad_weight = new_large(weight, weight.sizes()), grad_scale = stable::new_empty(scale, scale.sizes());
  with_computed(weight, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scales(scale);
    const int64_t m = weight.size(1);
    const Source<T> in = source<T>(weight), grad = source<T>(grad_output);
    const Target<T> out = target<T>(grad_weight), of_scale = target<T>(grad_scale);
    const UnnormalisedRows<T> ordinary{in, 0, weight.size(0), m, scales.data()};
    const VectorRows<T> any{in, m, scales.data(), out, of_scale};
    for_each_unit(weight.size(0), m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> kept(any.kept()), row(padded<T>(m)), buffer(padded<T>(m));
      for (int64_t unit = begin; unit < end; ++unit) {
        const T* v = in.template read<Isa>(unit * m, m, row.data());
        const T* g = grad.template read<Isa>(unit * m, m, buffer.data());
        T factor;
        T* to = out.is_narrow() ? buffer.data() : static_cast<T*>(out.data) + unit * m;
        if (m > 1 && ordinary.template backward<Isa>(v, unit, g, to, factor, of_scale)) {
          if (out.is_narrow()) out.template write<Isa>(to, unit * m, m);
          continue;
        }
        if (g != buffer.data()) std::copy(g, g + m, buffer.data());
        any.template make<Isa>(unit, kept.data(), row.data());
        any.template backward<Isa>(unit, kept.data(), row.data(), buffer.data());
      }
    });
  });
  return {grad_weight, grad_scale};
}

// What follows the product q = x u^T: z = q + location, a = act(z), y = scale a + bias; nullptr where there is none.
template <typename T>
struct Epilogue {
  const T *location, *scale, *bias;
  bool relu;

  LCW_INLINE T activate(T product, int64_t unit) const {
    const T z = location ? product + location[unit] : product;
    // A NaN stays one.
    return relu && z < T(0) ? T(0) : z;
  }
  LCW_INLINE T finish(T activated, int64_t unit) const {
    const T y = scale[unit] * activated;
    return bias ? y + bias[unit] : y;
  }
};

// Adds what other threads have summed, one after the other.
template <typename T>
void add_parts(const T* partial, int64_t parts, int64_t count, T* sum) {
  if (parts == 0) return;
  for_each_part(count, least_elements, [=](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sum[i] += partial[part * count + i];
  });
}

// GmP's layer of few samples. Units go through it in blocks, whose rows the nearest caches hold.
template <typename T>
struct FewSamples {
  AngleRows<T> rows;
  int64_t samples, n, m;

  // y and, unless it is nowhere, act(z), from x (samples, m).
  void forward(const T* x, const Epilogue<T>& epilogue, const Target<T>& y, const Target<T>& activated) const {
    // A sample by itself takes eight rows at a time.
    const int64_t units = samples % 2 ? 8 : 4;
    const int64_t blocks = (n + units - 1) / units;
    for_each_unit(blocks, units * m, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> kept(rows.kept()), block(units * m + slack<T>), products(samples * units);
      for (int64_t j = begin * units; j < std::min(n, end * units); j += units) {
        const int64_t count = std::min(units, n - j);
        for (int64_t u = 0; u < count; ++u) rows.template make<Isa>(j + u, kept.data(), block.data() + u * m);
        ProductsFor<Isa, T>::multiply_by_rows(x, block.data(), m, products.data(), units, samples, count, nullptr);
        for (int64_t i = 0; i < samples; ++i) {
          T* row = products.data() + i * units;
          for (int64_t u = 0; u < count; ++u) row[u] = epilogue.activate(row[u], j + u);
          if (activated) activated.template write<Isa>(row, i * n + j, count);
          for (int64_t u = 0; u < count; ++u) row[u] = epilogue.finish(row[u], j + u);
          y.template write<Isa>(row, i * n + j, count);
        }
      }
    });
  }

  // From dL/d(x u^T), and dL/du = grad_rows^T x: dX unless it is nullptr, and the gradients of what rows are made of
  // unless grad_rows is nullptr.
  void backward(const T* x, const T* grad_product, const T* grad_rows, T* grad_x) const {
    // Each thread has sums of its own for dX, no more in all than the weight has elements, which are added in order.
    const int64_t most = std::max<int64_t>(1, n / samples), worthwhile = std::max<int64_t>(1, n * m / least_elements);
    const int64_t parts = std::min({int64_t(stable::get_num_threads()), most, worthwhile});
    Buffer<T> sums(grad_x ? (parts - 1) * samples * m : 0);
    T* partial = sums.data();
    for_each_part(parts, 1, [=, *this](auto isa, int64_t first_part, int64_t last_part) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      // Two tiles of a product high.
      constexpr int64_t units = Isa::accumulators;
      const int64_t stride = padded<T>(m);
      Buffer<T> kept(rows.kept()), direction(units * stride), g(units * stride);
      for (int64_t part = first_part; part < last_part; ++part) {
        T* out = part == 0 ? grad_x : partial + (part - 1) * samples * m;
        const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
        for (int64_t j = begin; j < end; j += units) {
          const int64_t count = std::min(units, end - j);
          if (grad_rows)
            multiply_evenly<Isa, T>({grad_rows + j, 1, n, x, m, g.data(), stride, count, m, samples, false, nullptr,
                                     nullptr, true});
          // A row after another, so that what backward needs of it is still in the nearest cache.
          for (int64_t u = 0; u < count; ++u) {
            T *row = direction.data() + u * stride, *gradient = g.data() + u * stride;
            rows.template make<Isa>(j + u, kept.data(), row);
            if (!grad_rows) continue;
            std::fill(gradient + m, gradient + stride, T(0));
            rows.template backward<Isa>(j + u, kept.data(), row, gradient);
          }
          if (grad_x)
            multiply_evenly<Isa, T>({grad_product + j, n, 1, direction.data(), stride, out, m, samples, m, count,
                                     j > begin, nullptr, nullptr, true});
        }
      }
    });
    if (grad_x) add_parts(partial, parts - 1, samples * m, grad_x);
  }
};

// For every unit and sample dL/dz = scale dL/dy act'(z), and for every unit, over the samples, the sums of
// dL/dy act(z), of dL/dz and of dL/dy: in float64, in a fixed order, each unless its target is nowhere.
template <typename T>
struct UnitGradients {
  int64_t samples, n;
  Source<T> grad, activated;  // activated: nowhere where there is no activation, and nothing to sum with it
  const T* scale;
  bool relu;
  std::atomic<bool>* overflowed = nullptr;  // set where a product is infinite of finite numbers

  void compute(
      const Target<T>& grad_product, const Target<T>& with_activated, const Target<T>& of_product,
      const Target<T>& of_grad) const {
    // A cascade: 16 terms at a time, 16 of these sums, and so on, which errs by 16 roundings for each level; only the
    // first level's are T's, the others float64's.
    constexpr int64_t width = 32, terms = 16;
    constexpr int levels = 4, sums = 3;
    constexpr T largest = std::numeric_limits<T>::max();
    const int64_t grain = std::max(width, grain_of(samples));
    for_each_part(n, grain, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      for (int64_t j = begin; j < end; j += width) {
        const int64_t count = std::min(width, end - j);
        // Units beyond the last one are zeros, so that all loops are of one length.
        T factor[width] = {}, grad_buffer[width] = {}, activated_buffer[width] = {}, dz[width];
        std::copy(scale + j, scale + j + count, factor);
        const auto whole = [&](const T* row, T* buffer) LCW_LAMBDA_INLINE {
          if (count == width || row == buffer) return row;
          std::copy(row, row + count, buffer);
          return static_cast<const T*>(buffer);
        };
        T part[sums][width] = {};
        double total[levels][sums][width] = {};
        int infinite = 0;
        for (int64_t i = 0; i < samples; ++i) {
          const T* dy = whole(grad.template read<Isa>(i * n + j, count, grad_buffer), grad_buffer);
          const T* a = activated_buffer;
          if (activated.data)
            a = whole(activated.template read<Isa>(i * n + j, count, activated_buffer), activated_buffer);
          for (int64_t u = 0; u < width; ++u) {
            // A NaN is not behind the ReLU.
            dz[u] = relu && a[u] <= T(0) ? T(0) : factor[u] * dy[u];
            infinite |= int(!(std::abs(dz[u]) <= largest)) & int(std::abs(dy[u]) <= largest);
            part[0][u] += dy[u] * a[u];
            part[1][u] += dz[u];
            part[2][u] += dy[u];
          }
          if (grad_product) grad_product.template write<Isa>(dz, i * n + j, count);
          const bool is_last = i + 1 == samples;
          if ((i + 1) % terms != 0 && !is_last) continue;
          for (int s = 0; s < sums; ++s)
            for (int64_t u = 0; u < width; ++u) total[0][s][u] += double(part[s][u]), part[s][u] = 0;
          int64_t done = (i + 1) / terms;
          for (int level = 0; level < levels - 1 && (done % terms == 0 || is_last); ++level, done /= terms)
            for (int s = 0; s < sums; ++s)
              for (int64_t u = 0; u < width; ++u) {
                total[level + 1][s][u] += total[level][s][u];
                total[level][s][u] = 0;
              }
        }
        if (infinite && overflowed) *overflowed = true;
        const Target<T> targets[sums] = {with_activated, of_product, of_grad};
        for (int s = 0; s < sums; ++s) {
          T rounded[width];
          for (int64_t u = 0; u < count; ++u) rounded[u] = T(total[levels - 1][s][u]);
          if (targets[s]) targets[s].template write<Isa>(rounded, j, count);
        }
      }
    });
  }
};

// The three products of a plain layer's step with a weight (n, m), by our own kernels or torch's; no size is 0.

Tensor multiply_forward(Multiplier by, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (by == Multiplier::torch) return linear(x, weight, bias);
  const int64_t samples = x.size(0), n = weight.size(0), m = weight.size(1);
  Tensor y = stable::new_empty(x, {samples, n});
  with_elements(x, [&](auto element) {
    using E = decltype(element);
    const WideOrNothing<Computed<E>> wide_bias(bias);
    computed<E>(y, [&](Computed<E>* out) {
      multiply_on_threads<E>(
          {data<E>(x), m, 1}, {data<E>(weight), 1, m}, samples, n, m, wide_bias.data(), out, n);
    });
  });
  return y;
}

Tensor multiply_grad_input(Multiplier by, const Tensor& grad, const Tensor& weight) {
  if (by == Multiplier::torch) return linear(grad, stable::transpose(weight, 0, 1));
  const int64_t samples = grad.size(0), n = weight.size(0), m = weight.size(1);
  Tensor result = stable::new_empty(grad, {samples, m});
  with_elements(grad, [&](auto element) {
    using E = decltype(element);
    computed<E>(result, [&](Computed<E>* out) {
      multiply_on_threads<E>({data<E>(grad), n, 1}, {data<E>(weight), m, 1}, samples, m, n, nullptr, out, m);
    });
  });
  return result;
}

Tensor multiply_grad_weight(Multiplier by, const Tensor& grad, const Tensor& x) {
  if (by == Multiplier::torch) return linear(stable::transpose(grad, 0, 1), stable::transpose(x, 0, 1));
  const int64_t samples = grad.size(0), n = grad.size(1), m = x.size(1);
  Tensor result = new_large(grad, {n, m});
  with_elements(grad, [&](auto element) {
    using E = decltype(element);
    computed<E>(result, [&](Computed<E>* out) {
      multiply_on_threads<E>({data<E>(grad), 1, n}, {data<E>(x), m, 1}, n, m, samples, nullptr, out, m);
    });
  });
  return result;
}

Multiplier choose(Pass pass, ScalarType type, LayerSize size, bool deterministic) {
  return choose_multiplier(pass, type, size, deterministic, [=](LayerSize like) -> Trial {
    const Tensor samples_by_m = make_operand(type, like.samples, like.m);
    if (pass == Pass::plain_forward) {
      const Tensor weight = make_operand(type, like.n, like.m);
      return [=](Multiplier by) { multiply_forward(by, samples_by_m, weight, std::nullopt); };
    }
    const Tensor grad = make_operand(type, like.samples, like.n);
    if (pass == Pass::plain_grad_weight) return [=](Multiplier by) { multiply_grad_weight(by, grad, samples_by_m); };
    const Tensor weight = make_operand(type, like.n, like.m);
    return [=](Multiplier by) { multiply_grad_input(by, grad, weight); };
  });
}

Tensor no_elements(const Tensor& like) { return stable::new_empty(like, {int64_t(0)}); }

Tensor zeros_if(bool needed, const Tensor& like) {
  return needed ? stable::new_zeros(like, like.sizes()) : no_elements(like);
}

void check_gmp(const Tensor& x, const Tensor& angles, const Tensor& radius, const Tensor& location) {
  STD_TORCH_CHECK(
      x.dim() == 2 && angles.dim() == 2 && x.is_cpu() && fits(angles, x, {angles.size(0), x.size(1) - 1}) &&
          fits(radius, x, {angles.size(0)}) && fits(location, x, {angles.size(0)}),
      "gmp_linear: x (M, m), angles (n, m-1), radius and location (n,) do not fit; call lcw_ops.functional.gmp_linear");
}

// y = r act(x u^T + lambda); act(x u^T + lambda) and u, without elements where they are not kept.
std::tuple<Tensor, Tensor, Tensor> gmp_linear(
    Tensor x, Tensor angles, Tensor radius, Tensor location, bool relu, bool deterministic, bool keep_activated,
    bool keep_direction) {
  check_gmp(x, angles, radius, location);
  const WithoutGradients guard;
  const int64_t samples = x.size(0), n = angles.size(0), m = x.size(1);
  x = as_contiguous(x), angles = as_contiguous(angles);
  Tensor y = stable::new_empty(x, {samples, n});
  Tensor activated = keep_activated ? stable::new_empty(y, y.sizes()) : no_elements(x);
  const bool is_few = samples <= few_samples;
  Tensor direction = keep_direction || (!is_few && n > 0) ? hypersphere_direction(angles) : no_elements(x);
  if (samples == 0 || n == 0) return {y, activated, keep_direction ? direction : no_elements(x)};
  Tensor product = y;
  if (!is_few) {
    const Multiplier by = choose(Pass::plain_forward, x.scalar_type(), {samples, n, m}, deterministic);
    product = multiply_forward(by, x, direction, location);
  }
  with_computed(x, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scale(radius), shift(location);
    const Epilogue<T> epilogue{is_few ? shift.data() : nullptr, scale.data(), nullptr, relu};
    const Target<T> out = target<T>(y), kept = target<T>(activated);
    if (is_few) {
      const FewSamples<T> layer{{source<T>(angles), m}, samples, n, m};
      return layer.forward(Wide<T>(x).data(), epilogue, out, kept);
    }
    const Source<T> in = source<T>(product);
    for_each_part(samples, grain_of(n), [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      Buffer<T> row(n);
      for (int64_t i = begin; i < end; ++i) {
        const T* q = in.template read<Isa>(i * n, n, row.data());
        for (int64_t j = 0; j < n; ++j) row[j] = epilogue.activate(q[j], j);
        if (kept) kept.template write<Isa>(row.data(), i * n, n);
        for (int64_t j = 0; j < n; ++j) row[j] = epilogue.finish(row[j], j);
        out.template write<Isa>(row.data(), i * n, n);
      }
    });
  });
  return {y, activated, keep_direction ? direction : no_elements(x)};
}

// The gradients of x, angles, radius and location; without elements where they are not needed. `direction` may have
// none: it is made anew.
std::tuple<Tensor, Tensor, Tensor, Tensor> gmp_linear_backward(
    Tensor grad_output, Tensor x, Tensor angles, Tensor radius, Tensor activated, Tensor direction, bool relu,
    bool deterministic, bool needs_x, bool needs_angles, bool needs_radius, bool needs_location) {
  check_gmp(x, angles, radius, radius);
  const int64_t samples = x.size(0), n = angles.size(0), m = x.size(1);
  const bool reads_activated = relu || needs_radius;
  STD_TORCH_CHECK(
      fits(grad_output, x, {samples, n}) && (!reads_activated || fits(activated, x, {samples, n})) &&
          (direction.numel() == 0 || fits(direction, x, {n, m})),
      "gmp_linear_backward: grad_output or what forward kept does not fit; call lcw_ops.functional.gmp_linear");
  const WithoutGradients guard;
  if (samples == 0 || n == 0)
    return {zeros_if(needs_x, x), zeros_if(needs_angles, angles), zeros_if(needs_radius, radius),
            zeros_if(needs_location, radius)};
  x = as_contiguous(x), angles = as_contiguous(angles), grad_output = as_contiguous(grad_output);
  activated = as_contiguous(activated), direction = as_contiguous(direction);
  const bool is_few = samples <= few_samples;
  Tensor grad_x = needs_x ? stable::new_empty(x, x.sizes()) : no_elements(x);
  // Beyond few samples the angles' gradient is made in the memory of the rows', of which a number a row then stays with
  // it: not where that is a large part.
  const bool is_in_place = !is_few && m >= 64;
  Tensor grad_angles =
      needs_angles && !is_in_place ? new_large(angles, angles.sizes()) : no_elements(x);
  Tensor grad_radius = needs_radius ? stable::new_empty(radius, {n}) : no_elements(x);
  Tensor grad_location = needs_location ? stable::new_empty(radius, {n}) : no_elements(x);
  with_computed(x, [&](auto number) {
    using T = decltype(number);
    const Wide<T> scale(radius);
    const Source<T> kept = reads_activated ? source<T>(activated) : Source<T>{nullptr, x.scalar_type()};
    const UnitGradients<T> gradients{samples, n, source<T>(grad_output), kept, scale.data(), relu};
    const Target<T> with_activated = target<T>(grad_radius), of_product = target<T>(grad_location);
    const bool needs_products = needs_x || needs_angles;
    const AngleRows<T> rows{source<T>(angles), m, target<T>(grad_angles)};
    if (is_few) {
      Buffer<T> grad_product(needs_products ? samples * n : 0);
      T* dz = needs_products ? grad_product.data() : nullptr;
      gradients.compute({dz, scalar_type<T>}, with_activated, of_product, {});
      if (!needs_products) return;
      const FewSamples<T> layer{rows, samples, n, m};
      const Wide<T> wide(x);
      // Without angles there is nothing to hand on to.
      const T* grad_rows = needs_angles && m > 1 ? dz : nullptr;
      return computed_in<T>(grad_x, [&](T* out) { layer.backward(wide.data(), dz, grad_rows, out); });
    }
    Tensor dz = needs_products ? stable::new_empty(grad_output, {samples, n}) : no_elements(x);
    gradients.compute(target<T>(dz), with_activated, of_product, {});
    const auto by = [&](Pass pass) { return choose(pass, x.scalar_type(), {samples, n, m}, deterministic); };
    if (needs_x) {
      if (direction.numel() == 0) direction = hypersphere_direction(angles);
      grad_x = multiply_grad_input(by(Pass::plain_grad_input), dz, direction);
    }
    if (!needs_angles || m == 1) return;
    const Tensor grad_rows = multiply_grad_weight(by(Pass::plain_grad_weight), dz, x);
    if (!is_in_place) return backward_rows(rows, source<T>(grad_rows), n);
    backward_in_place(rows, grad_rows, n);
    Tensor flat = stable::view(grad_rows, {n * m});
    grad_angles = stable::view(stable::narrow(flat, 0, 0, n * (m - 1)), {n, m - 1});
  });
  return {grad_x, grad_angles, grad_radius, grad_location};
}

// Whether y is made of products with rows that are not normalised. A row of one number has no gradient, exactly.
// Many samples' products are rounded to their dtype before they are scaled: float16 has no room for that.
bool is_unnormalised(const Tensor& x) {
  const int64_t samples = x.size(0), m = x.size(1);
  return m > 1 && (samples <= few_unnormalised || (samples <= m / 4 && x.scalar_type() != ScalarType::Half));
}

void check_weight_norm(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  check_normalised(weight, scale);
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_cpu() && x.scalar_type() == weight.scalar_type() && x.size(1) == weight.size(1),
      "weight_norm_linear: x (M, m) and weight (n, m) do not fit; call lcw_ops.functional.weight_norm_linear");
}

// y = x (s v / |v|)^T + b
Tensor weight_norm_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, bool deterministic) {
  check_weight_norm(x, weight, scale);
  const int64_t samples = x.size(0), n = weight.size(0), m = x.size(1);
  STD_TORCH_CHECK(
      !bias || fits(*bias, x, {n}),
      "weight_norm_linear: the bias does not fit; call lcw_ops.functional.weight_norm_linear");
  const WithoutGradients guard;
  if (samples == 0 || n == 0) return stable::new_empty(x, {samples, n});
  x = as_contiguous(x), weight = as_contiguous(weight), scale = as_contiguous(scale);
  const auto multiply = [&](const Tensor& rows, const std::optional<Tensor>& add) {
    const Multiplier by = choose(Pass::plain_forward, x.scalar_type(), {samples, n, m}, deterministic);
    return multiply_forward(by, x, rows, add);
  };
  if (is_unnormalised(x)) {
    Tensor y = no_elements(x);
    bool is_done = false;
    with_computed(x, [&](auto number) {
      using T = decltype(number);
      const Wide<T> factor(scale);
      const WideOrNothing<T> shift(bias);
      const UnnormalisedRows<T> rows{source<T>(weight), samples, n, m, factor.data()};
      if (samples <= few_unnormalised) {
        y = stable::new_empty(x, {samples, n});
        is_done = rows.forward_few(Wide<T>(x).data(), shift.data(), target<T>(y));
        return;
      }
      Buffer<T> factors(n);
      if (!rows.measure(factors.data())) return;
      y = multiply(weight, std::nullopt);
      rows.forward_many(source<T>(x), factors.data(), shift.data(), target<T>(y));
      is_done = true;
    });
    if (is_done) return y;
  }
  return multiply(normalize_scale(weight, scale), bias);
}

// The gradients of x, weight, scale and bias; without elements where they are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> weight_norm_linear_backward(
    Tensor grad_output, Tensor x, Tensor weight, Tensor scale, bool deterministic, bool needs_x, bool needs_weight,
    bool needs_scale, bool needs_bias) {
  check_weight_norm(x, weight, scale);
  const int64_t samples = x.size(0), n = weight.size(0), m = x.size(1);
  STD_TORCH_CHECK(
      fits(grad_output, x, {samples, n}),
      "weight_norm_linear_backward: grad_output does not fit; call lcw_ops.functional.weight_norm_linear");
  const WithoutGradients guard;
  if (samples == 0 || n == 0)
    return {zeros_if(needs_x, x), zeros_if(needs_weight, weight), zeros_if(needs_scale, scale),
            zeros_if(needs_bias, scale)};
  x = as_contiguous(x), weight = as_contiguous(weight), scale = as_contiguous(scale);
  grad_output = as_contiguous(grad_output);
  const bool needs_rows = needs_weight || needs_scale;
  Tensor grad_x = no_elements(x), grad_weight = no_elements(x);
  Tensor grad_scale = needs_rows ? stable::new_empty(scale, {n}) : no_elements(x);
  Tensor grad_bias = needs_bias ? stable::new_empty(scale, {n}) : no_elements(x);
  const auto by = [&](Pass pass) { return choose(pass, x.scalar_type(), {samples, n, m}, deterministic); };
  with_computed(x, [&](auto number) {
    using T = decltype(number);
    const Wide<T> factor(scale);
    const UnnormalisedRows<T> rows{source<T>(weight), samples, n, m, factor.data()};
    const UnitGradients<T> gradients{
        samples, n, source<T>(grad_output), {nullptr, x.scalar_type()}, factor.data(), false};
    const Target<T> of_grad = target<T>(grad_bias), of_scale = target<T>(grad_scale);
    // s / |v|, and dY with it.
    Buffer<T> factors(n);
    const auto scale_grad = [&](const Target<T>& scaled) {
      std::atomic<bool> overflowed{false};
      UnitGradients<T> by_lengths = gradients;
      by_lengths.scale = factors.data(), by_lengths.overflowed = &overflowed;
      by_lengths.compute(scaled, {}, {}, of_grad);
      return !overflowed;
    };
    const auto multiply_by_normalised = [&] {
      grad_x = multiply_grad_input(by(Pass::plain_grad_input), grad_output, normalize_scale(weight, scale));
    };
    if (samples <= few_unnormalised && is_unnormalised(x)) {
      bool is_ordinary = true;
      with_elements(x, [&](auto element) {
        using E = decltype(element);
        if constexpr (std::is_same_v<Computed<E>, T>) {
          if (needs_rows) {
            grad_weight = new_large(weight, weight.sizes());
            computed<E>(grad_weight, [&](T* out) {
              is_ordinary = rows.backward_few(data<E>(x), data<E>(grad_output), out, of_scale, factors.data());
            });
          } else if (needs_x) {
            is_ordinary = rows.measure(factors.data());
          }
          if (!is_ordinary || (!needs_x && !needs_bias)) return;
          Buffer<T> scaled(needs_x ? samples * n : 0);
          const bool is_finite = scale_grad({needs_x ? scaled.data() : nullptr, scalar_type<T>});
          if (!needs_x) return;
          if (!is_finite) return multiply_by_normalised();
          grad_x = stable::new_empty(x, x.sizes());
          computed<E>(grad_x, [&](T* out) {
            FewSamplesGradients<E>{samples, n, m}.multiply_by_parameter(scaled.data(), data<E>(weight), out, m);
          });
        }
      });
      if (is_ordinary) return;
    }
    if (needs_bias && !needs_x) gradients.compute({}, {}, {}, of_grad);
    const auto make_grad_rows = [&] {
      return multiply_grad_weight(by(Pass::plain_grad_weight), grad_output, x);
    };
    // Float16 has no room for products with rows of other lengths.
    const bool is_scaled = x.scalar_type() != ScalarType::Half;
    bool is_ordinary = is_scaled && m > 1;
    if (needs_rows) {
      // In the memory of the rows' gradient, of which each is read before it is written: new memory, of which each page
      // is cleared first, costs more than the pass itself.
      grad_weight = make_grad_rows();
      is_ordinary = is_ordinary && rows.backward_many(target<T>(grad_weight), of_scale, factors.data());
      if (!is_ordinary) {
        if (is_scaled && m > 1) grad_weight = make_grad_rows();
        const VectorRows<T> any{source<T>(weight), m, factor.data(), target<T>(grad_weight), of_scale};
        backward_rows(any, source<T>(grad_weight), n);
      }
    } else {
      is_ordinary = is_ordinary && needs_x && rows.measure(factors.data());
    }
    if (!needs_x) return;
    if (!is_ordinary) {
      if (needs_bias) gradients.compute({}, {}, {}, of_grad);
      return multiply_by_normalised();
    }
    Tensor scaled = stable::new_empty(grad_output, {samples, n});
    if (!scale_grad(target<T>(scaled))) return multiply_by_normalised();
    grad_x = multiply_grad_input(by(Pass::plain_grad_input), scaled, weight);
  });
  return {grad_x, needs_weight ? grad_weight : no_elements(x), needs_scale ? grad_scale : no_elements(x), grad_bias};
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("hypersphere_direction.cpp", TORCH_BOX(&lcw_ops::hypersphere_direction));
  m.impl("hypersphere_direction_backward.cpp", TORCH_BOX(&lcw_ops::hypersphere_direction_backward));
  m.impl("normalize_scale.cpp", TORCH_BOX(&lcw_ops::normalize_scale));
  m.impl("normalize_scale_backward.cpp", TORCH_BOX(&lcw_ops::normalize_scale_backward));
  m.impl("gmp_linear.cpp", TORCH_BOX(&lcw_ops::gmp_linear));
  m.impl("gmp_linear_backward.cpp", TORCH_BOX(&lcw_ops::gmp_linear_backward));
  m.impl("weight_norm_linear.cpp", TORCH_BOX(&lcw_ops::weight_norm_linear));
  m.impl("weight_norm_linear_backward.cpp", TORCH_BOX(&lcw_ops::weight_norm_linear_backward));
}
