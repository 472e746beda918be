// The recurrence in parallel over depth on the CPU: one sweep over all layers, and one of its adjoint.
//
//   h_l = alpha_l O h_{l-1} + beta_l act(product_l + bias_l + inputs_l)         l = 1..D
//   g_{l-1} = alpha_l O g_l + product_l + outside_l,  scaled_l = slope_l g_l    l = D..1
//
// in place of the last sweep's states or gradients, and the largest relative change. Formulas and derivation:
// lcw_ops/reference/parallel_depth.py.
//
// Bytes an element of float32: 12 (product and the old state read, the new one written), the adjoint 12, with outside
// 16, with slope and scaled 20, with all of them 24. Instructions an element of float32 in rows of 128, AVX2:
//
//                                   tanh   ReLU   adjoint   with slope and scaled
//   identity                         6.8    3.7     2.3        3.1
//   cyclic shift                     7.1    4.0     2.6        3.4
//   any other permutation            8.8    5.6     4.3        5.1
//   rotations                       10.3    7.2     5.8        6.9
//
// Some 100 instructions of every row, whatever its length, are among them. A core that copies 20 GB/s moves 12 bytes in
// some 2 cycles: bound by memory beyond the cache, by arithmetic in it.
//
// Rows are independent and are shared out among threads. Where they are too few, layers are, one chunk more than there
// are threads: the first chunk is solved while the sums of the others, from nothing, are carried to their ends; then
// alpha^C O^C takes the carry from end to end, and all other chunks are solved at once. That computes every term of the
// inner chunks twice and takes 2 / (threads + 1) of one thread's time. Every sum has a fixed order.

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensors.h"
#include "vector_math.h"

namespace lcw_ops {
namespace {

// ---- One row -------------------------------------------------------------------------------------------------------

template <typename T, int count>
struct Lanes {
  using Magnitude = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Wide = typename Vector<T, count * sizeof(T)>::type;
  using Bits = typename Vector<Magnitude, count * sizeof(T)>::type;

  LCW_INLINE static Wide load(const T* from) {
    Wide value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  LCW_INLINE static void store(const Wide& value, T* to) { std::memcpy(to, &value, sizeof value); }

  // Without the sign, floating-point numbers have the order of their bits, and a NaN comes last.
  LCW_INLINE static Bits magnitude(const Wide& value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof value);
    return bits & std::numeric_limits<Magnitude>::max();
  }

  LCW_INLINE static Wide gather(const T* from, const int64_t* index) { return gather(from, index, Sequence()); }
  LCW_INLINE static Wide swap_partners(const Wide& value) { return swap(value, Sequence()); }

 private:
  using Sequence = std::make_integer_sequence<int, count>;

  template <int... i>
  LCW_INLINE static Wide gather(const T* from, const int64_t* index, std::integer_sequence<int, i...>) {
    return Wide{from[index[i]]...};
  }

  template <int... i>
  LCW_INLINE static Wide swap(const Wide& value, std::integer_sequence<int, i...>) {
#if LCW_SHUFFLES
    return __builtin_shuffle(value, Bits{i ^ 1 ...});
#else
    return Wide{value[i ^ 1]...};
#endif
  }
};

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

// A NaN is larger than any number.
LCW_INLINE void raise_to(double& largest, double value) {
  if (value > largest || value != value) largest = value;
}

// max |new - old| and max |new| of a row, which vectors of `count` lanes go through.
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

  // Raises `largest` to the ratio of both: 0 where nothing changed, NaN where a new state is not finite.
  LCW_INLINE void raise(double& largest) const {
    const double scale = number(std::max(last_scale_, largest_lane<count>(scale_)));
    const double change = number(std::max(last_change_, largest_lane<count>(change_)));
    // Nearly always, and without a division. What is not finite makes a change that is not less than anything.
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

// step(first element, lanes) for vectors of elements begin..end-1, then for what fills no vector: a vector that ends
// with them, or, in a short range, `few` elements at a time. Elements may so be computed twice, to the same bits.
template <int count, int few, typename Step>
LCW_INLINE void for_each_vector(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + count <= end; i += count) step(i, std::integral_constant<int, count>());
  if (i == end) return;
  if (end - begin >= count) return step(end - count, std::integral_constant<int, count>());
  for (; i < end; i += few) step(i, std::integral_constant<int, few>());
}

// ---- The two kinds of filters --------------------------------------------------------------------------------------

// Elements that come from neighbouring ones: p_i = source + i - begin.
struct Run {
  int64_t begin, end, source;
};

// (O h)_i = h_{p_i}, carried in the states' own type.
template <typename T>
struct Permutation {
  using Carried = T;
  template <class Isa>
  static constexpr int lanes = Isa::vector_bytes / sizeof(T);
  // Shorter ones gain nothing over elements one by one.
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

  // after = alpha O before + terms for a row; a final one is the state itself, in place of the old one.
  template <class Isa, bool is_final>
  LCW_INLINE void step(T alpha, const T* before, const T* terms, T* after, T*, Largest<T, lanes<Isa>>& largest) const {
    const auto finish = [&](int64_t i, auto count, const auto& filtered) LCW_LAMBDA_INLINE {
      using L = Lanes<T, count()>;
      const auto value = alpha * filtered + L::load(terms + i);
      if constexpr (is_final) largest.template take<count()>(value, L::load(after + i));
      L::store(value, after + i);
    };
    if (!has_long_runs) {
      // A member would be read again after every store.
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

  // to += decay O^exponent from, for rows of both.
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

// (O h)_i = cosine_i h_i + sine_i h_{i xor 1}, carried in float64: a cosine rounded to float32 drifts over 50,000
// layers. The last one of an odd number of elements has no partner, and its sine is not read.
template <typename T>
struct Rotation {
  using Carried = double;
  template <class Isa>
  static constexpr int lanes = Isa::vector_bytes / sizeof(double);

  const double *cosine, *sine;
  int64_t width;

  // after = alpha O before + terms for a row; a final one is rounded into the state too.
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
    // Members would be read again after every store.
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

  // Row by row the 2 x 2 block of a pair. Every squaring doubles the error of a power: with more digits, where there
  // are some, 50,000 layers stay exact in float64.
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

  // to += decay O^exponent from, for rows of both.
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

// ---- What is added in every layer ----------------------------------------------------------------------------------

// out = beta act(product + bias + inputs), or beta act' of it, for rows with the same bias. `bias` and `inputs` may be
// nullptr, and `out` the product.
template <bool is_derivative, typename T>
LCW_INLINE void activate_rows(
    Activation kind, T beta, const T* product, const T* bias, const T* inputs, int64_t rows, int64_t width, T* out) {
  if (inputs) {
#pragma GCC ivdep
    for (int64_t i = 0; i < rows * width; ++i) out[i] = product[i] + inputs[i];
    product = out;
  }
  with_activation(kind, [&](auto activation) LCW_LAMBDA_INLINE {
    using A = decltype(activation);
    const auto apply = [beta](T a) LCW_LAMBDA_INLINE {
      const T y = A::value(a);
      return beta * (is_derivative ? A::slope(a, y) : y);
    };
    if (!bias) {
#pragma GCC ivdep
      for (int64_t i = 0; i < rows * width; ++i) out[i] = apply(product[i]);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = product + r * width;
      T* to = out + r * width;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) to[i] = apply(from[i] + bias[i]);
    }
  });
}

// beta_l act(product_l + bias_l + inputs_l). What may be missing is nullptr.
template <typename T>
struct Activated {
  int64_t rows, width;
  const T *product, *bias, *inputs, *beta;
  int64_t bias_stride, beta_stride;
  Activation activation;

  // The terms of neighbouring rows, in `out` or wherever they lie already. Without any, what `out` holds: zeros.
  template <bool is_derivative = false>
  LCW_INLINE const T* at(int64_t layer, int64_t first, int64_t count, T* out) const {
    if (!product) return out;
    const int64_t at = (layer * rows + first) * width;
    activate_rows<is_derivative>(
        activation, beta[layer * beta_stride], product + at, bias ? bias + layer * bias_stride : nullptr,
        inputs ? inputs + at : nullptr, count, width, out);
    return out;
  }

  template <typename Carried>
  LCW_INLINE void after_step(int64_t, int64_t, int64_t, const Carried*) const {}
};

// product_l + outside_l, and what is made of the gradients on the way.
template <typename T>
struct Summed {
  int64_t rows, width;
  const T *product, *outside, *slope;
  T* scaled;

  LCW_INLINE const T* at(int64_t layer, int64_t first, int64_t count, T* out) const {
    const int64_t at = (layer * rows + first) * width;
    if (!product && !outside) return out;
    if (!product || !outside) return (product ? product : outside) + at;
    const T *one = product + at, *other = outside + at;
    for (int64_t i = 0; i < count * width; ++i) out[i] = one[i] + other[i];
    return out;
  }

  // `before` are the gradients that the layer carried back.
  template <typename Carried>
  LCW_INLINE void after_step(int64_t layer, int64_t first, int64_t count, const Carried* before) const {
    if (!slope) return;
    const T* factor = slope + (layer * rows + first) * width;
    T* out = scaled + (layer * rows + first) * width;
#pragma GCC ivdep
    for (int64_t i = 0; i < count * width; ++i) out[i] = factor[i] * T(before[i]);
  }
};

// ---- The scan ------------------------------------------------------------------------------------------------------

// The states (D + 1, M, N) in the order of the steps 0..D-1, which is that of the layers or, in the adjoint, the other.
template <typename T>
struct Chain {
  int64_t layers, rows, width;
  T* states;
  const T* alpha;
  int64_t alpha_stride;
  bool is_adjoint;

  LCW_INLINE int64_t layer(int64_t step) const { return is_adjoint ? layers - 1 - step : step; }
  LCW_INLINE T* first() const { return states + (is_adjoint ? layers * rows * width : 0); }
  LCW_INLINE T* after(int64_t step) const { return states + (layer(step) + !is_adjoint) * rows * width; }
  LCW_INLINE T alpha_at(int64_t step) const { return alpha[layer(step) * alpha_stride]; }

  // The product of every alpha; no infinity, which would make a NaN of a state of 0.
  double decay(int64_t begin, int64_t end) const {
    constexpr double most = std::numeric_limits<double>::max();
    double product = 1;
    for (int64_t step = begin; step < end; ++step) product = std::clamp(product * double(alpha_at(step)), -most, most);
    return product;
  }
};

// Some rows through some steps.
template <typename Carried>
struct Part {
  int64_t first_row, last_row, begin, end;
  const Carried* carry;  // all rows before the first step
  Carried* last;         // and after the last one, or nullptr
  bool is_final;         // whether states are written
  double change = 0;     // the largest relative one
};

// States of neighbouring rows go through the layers together, as many as the nearest cache holds twice.
constexpr int64_t bytes_together = 8192;

template <class Isa, typename T, class Filter, class Terms>
LCW_INLINE void scan_part(
    const Chain<T>& chain, const Filter& filter, const Terms& terms, Part<typename Filter::Carried>& part) {
  using Carried = typename Filter::Carried;
  const int64_t width = chain.width, fitting = std::max<int64_t>(1, bytes_together / (width * int64_t(sizeof(T))));
  const int64_t together = std::min(fitting, part.last_row - part.first_row);
  Buffer<Carried> carried(2 * together * width);
  Buffer<T> added(together * width);
  std::fill_n(added.data(), together * width, T(0));
  double change = 0;
  for (int64_t first = part.first_row; first < part.last_row; first += together) {
    const int64_t rows = std::min(together, part.last_row - first);
    const Carried* before = part.carry + first * width;
    for (int64_t step = part.begin; step < part.end; ++step) {
      const int64_t layer = chain.layer(step);
      const Carried alpha = chain.alpha_at(step);
      const T* row_terms = terms.at(layer, first, rows, added.data());
      T* states = chain.after(step) + first * width;
      Carried* after = carried.data() + (step & 1) * together * width;
      if constexpr (std::is_same_v<Carried, T>)
        if (part.is_final) after = states;
      const auto step_rows = [&](auto is_final) LCW_LAMBDA_INLINE {
        for (int64_t i = 0; i < rows * width; i += width) {
          Largest<T, Filter::template lanes<Isa>> largest;
          filter.template step<Isa, is_final()>(alpha, before + i, row_terms + i, after + i, states + i, largest);
          if (is_final()) largest.raise(change);
        }
      };
      if (part.is_final) {
        step_rows(std::true_type());
        terms.after_step(layer, first, rows, before);
      } else {
        step_rows(std::false_type());
      }
      before = after;
    }
    if (part.last) std::copy(before, before + rows * width, part.last + first * width);
  }
  part.change = change;
}

// Threads that write to one cache line wait for each other.
constexpr int64_t least_bytes_of_rows = 128;

// All steps, on all threads; returns the largest relative change.
template <typename T, class Filter, class Terms>
double scan(const Chain<T>& chain, const Filter& filter, const Terms& terms) {
  using Carried = typename Filter::Carried;
  const int64_t rows = chain.rows, layers = chain.layers, size = rows * chain.width;
  double change = 0;
  if (layers * size == 0) return change;
  const auto run = [&](std::vector<Part<Carried>>& parts) {
    for_each_part(parts.size(), 1, [&](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t p = begin; p < end; ++p) scan_part<decltype(isa)>(chain, filter, terms, parts[p]);
    });
    for (const Part<Carried>& part : parts) raise_to(change, part.change);
  };

  std::vector<Carried> converted;
  const Carried* start;
  if constexpr (std::is_same_v<Carried, T>)
    start = chain.first();
  else
    converted.assign(chain.first(), chain.first() + size), start = converted.data();

  const int64_t worthwhile = layers * size / least_elements;
  const int64_t threads = std::clamp<int64_t>(worthwhile, 1, stable::get_num_threads());
  std::vector<Part<Carried>> parts;
  // By layers it takes 2 / (threads + 1) of one thread's time, by rows 1 / rows.
  const bool are_few = 2 * rows <= threads || size * int64_t(sizeof(T)) < threads * least_bytes_of_rows;
  if (!are_few || threads == 1 || layers <= threads) {
    const int64_t count = std::min(threads, rows);
    for (int64_t p = 0; p < count; ++p)
      parts.push_back({p * rows / count, (p + 1) * rows / count, 0, layers, start, nullptr, true});
    run(parts);
    return change;
  }

  const auto bound = [&](int64_t chunk) { return chunk * layers / (threads + 1); };
  const std::vector<Carried> nothing(size);
  std::vector<Carried> ends(threads * size);
  for (int64_t c = 0; c < threads; ++c)
    parts.push_back({0, rows, bound(c), bound(c + 1), c ? nothing.data() : start, ends.data() + c * size, c == 0});
  run(parts);
  parts.clear();
  for (int64_t c = 1; c <= threads; ++c) {
    Carried* carry = ends.data() + (c - 1) * size;
    if (c > 1) {
      const int64_t begin = bound(c - 1), end = bound(c);
      filter.carry(end - begin, chain.decay(begin, end), rows, carry - size, carry);
    }
    parts.push_back({0, rows, bound(c), bound(c + 1), carry, nullptr, true});
  }
  run(parts);
  return change;
}

// ---- The ops, and what memory safety needs -------------------------------------------------------------------------

std::string to_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "(";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The arguments of an op against the first one, (D, M, N) or (D + 1, M, N), of which `layers` are D.
struct Arguments {
  const char* op;
  const char* name;
  const Tensor& first;
  int64_t layers, rows, width;

  Arguments(const char* op_, const char* name_, const Tensor& first_, int64_t given)
      : op(op_), name(name_), first(first_) {
    const ScalarType type = first.scalar_type();
    STD_TORCH_CHECK(
        first.is_cpu() && first.is_contiguous() && (type == ScalarType::Float || type == ScalarType::Double), op, ": ",
        name, " must be a contiguous tensor of float32 or float64 on the CPU", advice);
    STD_TORCH_CHECK(
        first.dim() == 3 && first.size(0) >= given, op, ": ", name, " has shape ", to_text(first.sizes()),
        ", expected ", given ? "(D + 1, M, N)" : "(D, M, N)", advice);
    layers = first.size(0) - given, rows = first.size(1), width = first.size(2);
  }

  using Shape = std::initializer_list<int64_t>;

  // Of the one shape, or the other.
  void check(const char* argument, const Tensor& tensor, Shape shape, std::optional<Shape> other = {}) const {
    STD_TORCH_CHECK(
        tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == first.scalar_type(), op, ": ", argument,
        " must be a contiguous tensor of the dtype of ", name, " on the CPU", advice);
    const auto is = [&](Shape expected) {
      const auto sizes = tensor.sizes();
      return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
    };
    STD_TORCH_CHECK(
        is(shape) || (other && is(*other)), op, ": ", argument, " has shape ", to_text(tensor.sizes()), ", expected ",
        to_text(shape), other ? " or " + to_text(*other) : "", advice);
  }

  void check_scale(const char* argument, const Tensor& tensor) const { check(argument, tensor, {1}, Shape{layers}); }

  void check_terms(const char* argument, const std::optional<Tensor>& tensor) const {
    if (tensor) check(argument, *tensor, {layers, rows, width});
  }

  void check_bias(const std::optional<Tensor>& bias) const {
    if (bias) check("bias", *bias, {width}, Shape{layers, width});
  }

  // f with the filter as the kernels take it.
  template <typename T, typename F>
  void with_filter(const Tensor& filter, const F& f) const {
    const bool permutes = filter.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(
        filter.is_cpu() && filter.is_contiguous() && filter.dim() == 1 &&
            (permutes ? filter.numel() == width
                      : filter.scalar_type() == ScalarType::Double && filter.numel() == 2 * width),
        op, ": filter must be a contiguous int64 permutation of ", width, " units or ", 2 * width,
        " cosines and sines of float64 on the CPU", advice);
    if (!permutes) {
      const double* cosine = data<double>(filter);
      return f(Rotation<T>{cosine, cosine + width, width});
    }
    const int64_t* index = data<int64_t>(filter);
    std::vector<bool> seen(width, false);
    for (int64_t i = 0; i < width; ++i) {
      const bool is_fresh = index[i] >= 0 && index[i] < width && !seen[index[i]];
      STD_TORCH_CHECK(is_fresh, op, ": filter is not a permutation: entry ", i, " is ", index[i], advice);
      seen[index[i]] = true;
    }
    f(Permutation<T>(index, width));
  }

  Activation to_activation(const std::string& activation) const {
    for (const char* known : {"tanh", "relu", "sigmoid", "identity"})
      if (activation == known) return parse_activation(activation);
    STD_TORCH_CHECK(
        false, op, ": activation is ", activation, ", expected tanh, relu, sigmoid or identity", advice);
  }

  template <typename T>
  Chain<T> chain(const Tensor& states, const Tensor& alpha, bool is_adjoint) const {
    return {layers, rows, width, memory<T>(states), data<T>(alpha), stride(alpha), is_adjoint};
  }

  template <typename T>
  Activated<T> activated(
      const std::optional<Tensor>& product, const std::optional<Tensor>& bias, const std::optional<Tensor>& inputs,
      const Tensor& beta, Activation activation) const {
    const int64_t bias_stride = bias && bias->dim() == 2 ? width : 0;
    return {rows,          width,       pointer<T>(product), pointer<T>(bias), pointer<T>(inputs),
            data<T>(beta), bias_stride, stride(beta),        activation};
  }

  static int64_t stride(const Tensor& scale) { return scale.numel() == 1 ? 0 : 1; }

  template <typename T>
  static T* memory(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  template <typename T>
  static const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  }

  static constexpr const char* advice = "; call lcw_ops.functional.orthogonal_filter";
};

template <typename F>
void with_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Float)
    f(float{});
  else
    f(double{});
}

Tensor sweep(
    Tensor states, std::optional<Tensor> product, std::optional<Tensor> bias, std::optional<Tensor> inputs,
    Tensor filter, Tensor alpha, Tensor beta, std::string activation) {
  const Arguments arguments("parallel_depth_sweep_", "states", states, 1);
  arguments.check_terms("product", product);
  arguments.check_bias(bias);
  arguments.check_terms("inputs", inputs);
  arguments.check_scale("alpha", alpha);
  arguments.check_scale("beta", beta);
  const Activation kind = arguments.to_activation(activation);
  Tensor change = stable::new_zeros(states, {1}, ScalarType::Double);
  with_type(states, [&](auto element) {
    using T = decltype(element);
    arguments.with_filter<T>(filter, [&](const auto& kernel) {
      *Arguments::memory<double>(change) = scan(
          arguments.chain<T>(states, alpha, false), kernel, arguments.activated<T>(product, bias, inputs, beta, kind));
    });
  });
  return change;
}

Tensor adjoint_sweep(
    Tensor gradients, std::optional<Tensor> product, std::optional<Tensor> outside, Tensor filter, Tensor alpha,
    std::optional<Tensor> slope, std::optional<Tensor> scaled) {
  const Arguments arguments("parallel_depth_adjoint_", "gradients", gradients, 1);
  arguments.check_terms("product", product);
  arguments.check_terms("outside", outside);
  arguments.check_terms("slope", slope);
  arguments.check_terms("scaled", scaled);
  arguments.check_scale("alpha", alpha);
  STD_TORCH_CHECK(
      slope.has_value() == scaled.has_value(), arguments.op, ": slope and scaled belong together", Arguments::advice);
  Tensor change = stable::new_zeros(gradients, {1}, ScalarType::Double);
  with_type(gradients, [&](auto element) {
    using T = decltype(element);
    const Summed<T> terms{
        arguments.rows,
        arguments.width,
        Arguments::pointer<T>(product),
        Arguments::pointer<T>(outside),
        Arguments::pointer<T>(slope),
        scaled ? Arguments::memory<T>(*scaled) : nullptr};
    arguments.with_filter<T>(filter, [&](const auto& kernel) {
      *Arguments::memory<double>(change) = scan(arguments.chain<T>(gradients, alpha, true), kernel, terms);
    });
  });
  return change;
}

void activate(
    Tensor product, std::optional<Tensor> bias, std::optional<Tensor> inputs, Tensor beta, std::string activation,
    bool derivative) {
  const Arguments arguments("parallel_depth_activate_", "product", product, 0);
  arguments.check_bias(bias);
  arguments.check_terms("inputs", inputs);
  arguments.check_scale("beta", beta);
  const Activation kind = arguments.to_activation(activation);
  with_type(product, [&](auto element) {
    using T = decltype(element);
    const Activated<T> terms = arguments.activated<T>(product, bias, inputs, beta, kind);
    T* out = Arguments::memory<T>(product);
    const int64_t rows = arguments.rows, width = arguments.width;
    for_each_part(arguments.layers * rows, grain_of(width), [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t r = begin; r < end;) {
        const int64_t layer = r / rows, first = r % rows, count = std::min(rows - first, end - r);
        if (derivative)
          terms.template at<true>(layer, first, count, out + r * width);
        else
          terms.template at<false>(layer, first, count, out + r * width);
        r += count;
      }
    });
  });
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("parallel_depth_sweep_.cpp", TORCH_BOX(&lcw_ops::sweep));
  m.impl("parallel_depth_adjoint_.cpp", TORCH_BOX(&lcw_ops::adjoint_sweep));
  m.impl("parallel_depth_activate_.cpp", TORCH_BOX(&lcw_ops::activate));
}
