// Activated gradients in place over a list of tensors, and the SGD and AdamW steps with the activation inside.
//
//   f(g) = alpha atan(beta g)  |  alpha tanh(beta g)  |  alpha sign(g) ln(1 + beta |g|)
//   SGD:    d = f(g) + wd w,  v = mu v + (1 - dampening) d,  w -= lr v        (activation on the gradient)
//           d = g + wd w,     v = mu v + (1 - dampening) d,  w -= lr f(v)     (activation on the momentum)
//   AdamW:  g = f(g),  w *= 1 - lr wd,  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
//           w -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//
// g is the gradient of the parameter w, wd the weight decay, mu the momentum and t the number of steps; Nesterov's SGD
// has d + mu v in place of the last v. f is from M. Liu, L. Chen, X. Du, L. Jin, M. Shang, "Activated Gradients for
// Deep Neural Networks", TNNLS 2021, arXiv 2107.04228.
//
// Every element of every tensor is read and written once, and f(g) stays in registers. Bytes of memory per element, and
// instructions per vector (8 float32 numbers in AVX2, 16 in AVX-512) for arctan / tanh / log, loop included:
//
//                          float32 bytes   AVX2, float32   AVX-512        AVX2, float64
//   activation                   8          27 / 30 / 35   26 / 29 / 33   35 / 37 / 39
//   SGD without momentum        12          29 / 32 / 44   28 / 31 / 40   43 / 45 / 47
//   SGD with momentum           20          45 / 49 / 55   43 / 46 / 51   53 / 55 / 58
//   AdamW                       28          40 / 44 / 49   38 / 41 / 45   48 / 50 / 52
//
// For each array that is read and written, bfloat16 takes 6 instructions more (4 in AVX-512), and float16 takes 42 more
// (34 in AVX-512). While a core moves the bytes of 8 float32 elements at 20 GB/s, it has time for about 11 cycles in
// the activation, and for 28 cycles in SGD with momentum.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../refusal.h"
#include "gradient_functions.h"
#include "tensors.h"

namespace lcw_ops {
namespace {

// The number of elements in a unit. All tensors of a call form one range of units, which threads share. A unit is a
// whole number of cache lines in every dtype; the last unit of a tensor may be shorter.
constexpr int64_t unit = 64;

enum class Kind { arctan, tanh, log };

Kind to_kind(const char* op, const std::string& name) {
  if (name == "arctan") return Kind::arctan;
  if (name == "tanh") return Kind::tanh;
  STD_TORCH_CHECK(name == "log", op, ": kind is ", name, "; expected arctan, tanh or log");
  return Kind::log;
}

// A list of tensors as handles from torch: stable::Tensor would allocate once more for each tensor.
class Tensors {
 public:
  explicit Tensors(StableListHandle list) {
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_.push_back(stable::detail::to<AtenTensorHandle>(element));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  Tensors(Tensors&&) = default;
  ~Tensors() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// ---- Vectors of numbers from and to memory --------------------------------------------------------------------------

// Loads and stores of vectors. 16-bit numbers are loaded as 32-bit words: the lower halves of the words become one
// vector and the upper halves another, which takes no shuffles.
template <class Isa, typename E>
struct Memory {
  using T = Computed<E>;
  using Wide = typename Vector<T, Isa::vector_bytes>::type;
  static constexpr int parts = sizeof(T) / sizeof(E), count = parts * Vector<T, Isa::vector_bytes>::lanes;

  LCW_INLINE static void load(const E* from, Wide (&values)[parts]) {
    if constexpr (parts == 1) {
      Wide value;
      std::memcpy(&value, from, sizeof value);
      values[0] = value;
    } else {
      Bits words;
      std::memcpy(&words, from, sizeof words);
      values[0] = widen_low(words, E{});
      values[1] = widen_high(words, E{});
    }
  }

  LCW_INLINE static void store(const Wide (&values)[parts], E* to) {
    if constexpr (parts == 1) {
      const Wide value = values[0];
      std::memcpy(to, &value, sizeof value);
    } else {
      const Bits words = join(values[0], values[1], E{});
      std::memcpy(to, &words, sizeof words);
    }
  }

 private:
  // The conversions of simd/elements.h, for a whole vector.
  using Bits = typename Vector<uint32_t, Isa::vector_bytes>::type;
  using Signed = typename Vector<int32_t, Isa::vector_bytes>::type;
  LCW_INLINE static Wide numbers(Bits bits) { return GradientFunctions<Isa, T>::template as<Wide>(bits); }
  LCW_INLINE static Bits bits_of(Wide value) { return GradientFunctions<Isa, T>::template as<Bits>(value); }

  LCW_INLINE static Wide widen_low(Bits words, BFloat16) { return numbers(words << 16); }
  LCW_INLINE static Wide widen_high(Bits words, BFloat16) { return numbers(words & 0xffff0000u); }
  LCW_INLINE static Bits join(Wide low, Wide high, BFloat16) {
    return (round(low) >> 16) | (round(high) & 0xffff0000u);
  }
  // The result is in the upper half of each word. A NaN stays NaN: it was widened from 16 bits, or is the default NaN
  // of the processor or of Python, so it has no lower bit set that could carry.
  LCW_INLINE static Bits round(Wide value) {
    const Bits bits = bits_of(value);
    return bits + 0x7fff + ((bits >> 16) & 1);
  }

  LCW_INLINE static Wide widen_low(Bits words, Half) { return widen_half(words & 0xffff); }
  LCW_INLINE static Wide widen_high(Bits words, Half) { return widen_half(words >> 16); }
  LCW_INLINE static Bits join(Wide low, Wide high, Half) { return round_half(low) | round_half(high) << 16; }

  LCW_INLINE static Wide widen_half(Bits bits) {
    const Bits magnitude = bits & 0x7fff;
    const Bits bias = Bits{} + (112u << 23);
    const Bits wide = (magnitude << 13) + bias + ((Signed)magnitude >= 0x7c00 ? bias : Bits{});
    const Bits denormal = bits_of(__builtin_convertvector((Signed)magnitude, Wide) * 0x1p-24f);
    return numbers(((Signed)magnitude < 0x0400 ? denormal : wide) | (bits & 0x8000) << 16);
  }

  LCW_INLINE static Bits round_half(Wide value) {
    const Bits bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits denormal = bits_of(numbers(magnitude) + 0.5f) - 0x3f000000u;
    const Signed order = (Signed)magnitude;
    const Bits large = order > 0x7f800000 ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    const Bits finite = order < 0x38800000 ? denormal : normal;
    return sign | (order >= 0x477ff000 ? large : finite);
  }
};

template <Kind kind, typename T>
struct Activation {
  T alpha, beta;

  template <class Isa>
  LCW_INLINE auto apply(typename Vector<T, Isa::vector_bytes>::type gradient) const {
    using A = GradientFunctions<Isa, T>;
    if constexpr (kind == Kind::arctan) return A::atan(gradient * beta) * alpha;
    if constexpr (kind == Kind::tanh) return A::tanh(gradient * beta) * alpha;
    if constexpr (kind == Kind::log) return A::log(gradient * beta) * alpha;
  }
};

// The square root of every lane; the compiler vectorises the loop.
template <class Isa, typename T>
LCW_INLINE auto square_root(typename Vector<T, Isa::vector_bytes>::type value) {
  T lane[Vector<T, Isa::vector_bytes>::lanes];
  std::memcpy(lane, &value, sizeof value);
  for (T& number : lane) number = std::sqrt(number);
  std::memcpy(&value, lane, sizeof value);
  return value;
}

// The larger of two averages of squares. Numbers that are not negative are in the order of their bits, and a NaN of
// either sign comes last.
template <class Isa, typename T>
LCW_INLINE auto larger(typename Vector<T, Isa::vector_bytes>::type a, typename Vector<T, Isa::vector_bytes>::type b) {
  return GradientFunctions<Isa, T>::magnitude_bits(a) > GradientFunctions<Isa, T>::magnitude_bits(b) ? a : b;
}

// ---- One tensor, or the tensors of one parameter --------------------------------------------------------------------

// The memory of the tensors. Those that will be written come first; the others are only read.
template <int arrays>
struct Item {
  void* at[arrays];
  int64_t count;
  ScalarType type;
};

// Calls step(vectors), which changes the first `written` of its `arrays` vectors, for `count` elements from `first` on.
template <class Isa, typename E, int arrays, int written, typename Step>
LCW_INLINE void step_through(const Item<arrays>& item, int64_t first, int64_t count, const Step& step) {
  using M = Memory<Isa, E>;
  E* at[arrays];
  for (int a = 0; a < arrays; ++a) at[a] = static_cast<E*>(item.at[a]) + first;
  const int64_t whole = count / M::count * M::count, left = count - whole;
  E rest[arrays][M::count] = {};
  int64_t end = whole;
  while (true) {
    for (int64_t i = 0; i < end; i += M::count) {
      typename M::Wide parts[arrays][M::parts];
#pragma GCC unroll 8
      for (int a = 0; a < arrays; ++a) M::load(at[a] + i, parts[a]);
#pragma GCC unroll 2
      for (int p = 0; p < M::parts; ++p) {
        typename M::Wide vectors[arrays];
#pragma GCC unroll 8
        for (int a = 0; a < arrays; ++a) vectors[a] = parts[a][p];
        step(vectors);
#pragma GCC unroll 8
        for (int a = 0; a < written; ++a) parts[a][p] = vectors[a];
      }
#pragma GCC unroll 8
      for (int a = 0; a < written; ++a) M::store(parts[a], at[a] + i);
    }
    if (left == 0 || at[0] == rest[0]) break;
    // Copy the rest into whole vectors, so that the same code computes every element and an element's bits do not
    // depend on its place.
    for (int a = 0; a < arrays; ++a) {
      std::copy(at[a] + whole, at[a] + count, rest[a]);
      at[a] = rest[a];
    }
    end = M::count;
  }
  if (left > 0)
    for (int a = 0; a < written; ++a) std::copy(rest[a], rest[a] + left, static_cast<E*>(item.at[a]) + first + whole);
}

// Calls task(Isa{}, i, first, count) for pieces of the items, on all threads: `count` elements of item i, from `first`
// on.
template <int arrays, typename Task>
void for_each_piece(const std::vector<Item<arrays>>& items, const Task& task) {
  std::vector<int64_t> ends(items.size());
  int64_t units = 0;
  for (size_t i = 0; i < items.size(); ++i) ends[i] = units += (items[i].count + unit - 1) / unit;
  for_each_part(units, least_elements / unit, [&](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t at = begin; at < end; at = ends[i++]) {
      const int64_t first = (at - (i > 0 ? ends[i - 1] : 0)) * unit;
      const int64_t last = std::min(items[i].count, first + (end - at) * unit);
      if (first < last) task(isa, i, first, last - first);
    }
  });
}

// Calls f(E{}) with the element type of a tensor.
template <typename F>
LCW_INLINE void with_numbers(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

// Calls f with the kind as a type, so that the choice is made once and not for every element.
template <typename F>
void with_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::arctan: return f(std::integral_constant<Kind, Kind::arctan>());
    case Kind::tanh: return f(std::integral_constant<Kind, Kind::tanh>());
    case Kind::log: return f(std::integral_constant<Kind, Kind::log>());
  }
}

template <typename F>
void with_flag(bool flag, const F& f) {
  if (flag)
    f(std::true_type());
  else
    f(std::false_type());
}

// ---- Guards of memory safety ----------------------------------------------------------------------------------------

template <typename Result, typename Of>
Result ask(AOTITorchError (*question)(AtenTensorHandle, Of*), AtenTensorHandle tensor) {
  Of result{};
  STABLE_TORCH_ERROR_CODE_CHECK(question(tensor, &result));
  return static_cast<Result>(result);
}

int64_t numel(AtenTensorHandle tensor) { return ask<int64_t>(aoti_torch_get_numel, tensor); }
int32_t dtype(AtenTensorHandle tensor) { return ask<int32_t>(aoti_torch_get_dtype, tensor); }
bool is_contiguous(AtenTensorHandle tensor) { return ask<bool>(aoti_torch_is_contiguous, tensor); }
bool is_cpu(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  return ask<int32_t>(aoti_torch_get_device_type, tensor) == cpu;
}

// (stride, size) of every dimension whose size is not 1, in the order of the dimensions.
std::vector<std::pair<int64_t, int64_t>> steps(AtenTensorHandle tensor) {
  const int64_t *sizes = ask<int64_t*>(aoti_torch_get_sizes, tensor),
                *strides = ask<int64_t*>(aoti_torch_get_strides, tensor);
  std::vector<std::pair<int64_t, int64_t>> result;
  for (int64_t d = 0; d < ask<int64_t>(aoti_torch_get_dim, tensor); ++d)
    if (sizes[d] != 1) result.emplace_back(strides[d], sizes[d]);
  return result;
}

bool is_dense(AtenTensorHandle tensor) {
  if (is_contiguous(tensor)) return true;
  auto dimensions = steps(tensor);
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether both tensors have their elements in the same order in memory, given that one of them is dense.
bool lie_alike(AtenTensorHandle one, AtenTensorHandle other) {
  if (is_contiguous(one) && is_contiguous(other)) return numel(one) == numel(other);
  return steps(one) == steps(other);
}

// The dtype of a tensor, if the kernels take the tensor. The layout is checked first, because a sparse tensor has no
// strides.
std::optional<ScalarType> taken_type(AtenTensorHandle tensor) {
  static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                       bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
  static const int32_t strided = aoti_torch_layout_strided();
  if (!is_cpu(tensor) || ask<int32_t>(aoti_torch_get_layout, tensor) != strided || !is_dense(tensor))
    return std::nullopt;
  const int32_t type = dtype(tensor);
  if (type == float32) return ScalarType::Float;
  if (type == float64) return ScalarType::Double;
  if (type == bfloat16) return ScalarType::BFloat16;
  if (type == float16) return ScalarType::Half;
  return std::nullopt;
}

void* memory(AtenTensorHandle tensor, bool is_written) {
  if (is_written) return ask<void*>(torch_get_mutable_data_ptr, tensor);
  return const_cast<void*>(ask<const void*>(torch_get_const_data_ptr, tensor));
}

int64_t size_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Whether the first arrays of two items share memory: two tensors to be activated, or two parameters.
template <int arrays>
bool share_memory(const std::vector<Item<arrays>>& items) {
  AddressRanges ranges;
  ranges.reserve(items.size());
  for (const Item<arrays>& item : items) ranges.add(item.at[0], item.count * size_of(item.type));
  return ranges.meet();
}

// Calls run(items) with an item for every parameter. `lists` holds the parameters first, then the other lists; the
// first `written` lists will be changed. If the kernels do not take a tensor, returns a refusal instead.
template <int arrays, typename Run>
Refusal with_items(const char* op, const std::array<const Tensors*, arrays>& lists, int written, const Run& run) {
  const Tensors& params = *lists[0];
  for (const Tensors* list : lists)
    STD_TORCH_CHECK(
        list->size() == params.size(), op, ": a list of gradients or states has ", list->size(), " tensors; expected ",
        params.size(), ", one for each parameter; call lcw_ops.optim");
  std::vector<Item<arrays>> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const AtenTensorHandle param = params[i];
    const std::optional<ScalarType> type = taken_type(param);
    if (!type)
      return refuse_for(
          op, "parameter " + std::to_string(i) + " is not on the CPU, not of a floating dtype or has gaps in memory",
          "lcw_ops.optim");
    Item<arrays> item{{}, numel(param), *type};
    for (int a = 1; a < arrays; ++a) {
      const AtenTensorHandle other = (*lists[a])[i];
      if (!is_cpu(other) || dtype(other) != dtype(param) || !lie_alike(param, other))
        return refuse_for(
            op,
            "the gradient or a state of parameter " + std::to_string(i) +
                " differs from the parameter in dtype, device, shape or strides",
            "lcw_ops.optim");
    }
    for (int a = 0; a < arrays; ++a) item.at[a] = memory((*lists[a])[i], a < written);
    items.push_back(item);
  }
  if (share_memory(items)) return refuse_for(op, "two parameters share memory", "lcw_ops.optim");
  run(items);
  return {};
}

// ---- The ops --------------------------------------------------------------------------------------------------------

Refusal gradient_activation(const Tensors& tensors, std::string kind_name, double alpha, double beta) {
  const char* op = "gradient_activation_";
  const Kind kind = to_kind(op, kind_name);
  std::vector<Item<1>> items;
  items.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<ScalarType> type = taken_type(tensors[i]);
    if (!type)
      return refuse_for(
          op, "tensors[" + std::to_string(i) + "] is not on the CPU, not of a floating dtype or has gaps in memory",
          "lcw_ops.functional.gradient_activation_");
    items.push_back({{memory(tensors[i], true)}, numel(tensors[i]), *type});
  }
  if (share_memory(items)) return refuse_for(op, "two tensors share memory", "lcw_ops.functional.gradient_activation_");
  with_kind(kind, [&](auto kind_type) {
    for_each_piece(items, [&](auto isa, size_t i, int64_t first, int64_t count) LCW_LAMBDA_INLINE {
      with_numbers(items[i].type, [&](auto element) LCW_LAMBDA_INLINE {
        using Isa = decltype(isa);
        using E = decltype(element);
        const Activation<kind_type(), Computed<E>> activation{Computed<E>(alpha), Computed<E>(beta)};
        step_through<Isa, E, 1, 1>(items[i], first, count, [&](auto* vectors) LCW_LAMBDA_INLINE {
          vectors[0] = activation.template apply<Isa>(vectors[0]);
        });
      });
    });
  });
  return {};
}

Refusal sgd_step(
    const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, double lr, double momentum,
    double dampening, double weight_decay, bool nesterov, bool maximize, bool is_first, bool on_momentum,
    std::string kind_name, double alpha, double beta) {
  const char* op = "activated_sgd_step_";
  const Kind kind = to_kind(op, kind_name);
  const double sign = maximize ? -1 : 1;
  // The activation is an odd function, so beta can carry the sign of the gradient.
  const double signed_beta = on_momentum ? beta : sign * beta;
  const auto run = [&](auto kind_type, auto at_momentum, const auto& items) {
    constexpr int arrays = sizeof(items[0].at) / sizeof(void*), gradient = arrays - 1;
    for_each_piece(items, [&](auto isa, size_t i, int64_t first, int64_t count) LCW_LAMBDA_INLINE {
      with_numbers(items[i].type, [&](auto element) LCW_LAMBDA_INLINE {
        using Isa = decltype(isa);
        using E = decltype(element);
        using T = Computed<E>;
        using Wide = typename Memory<Isa, E>::Wide;
        const Activation<kind_type(), T> activation{T(alpha), T(signed_beta)};
        const T rate = T(lr), decay = T(weight_decay), keep = T(momentum), add = T(1 - dampening), turn = T(sign);
        // Copies for the registers: the compiler has to assume that the loop's stores change numbers in memory.
        const bool decays = weight_decay != 0, starts = is_first, looks_ahead = nesterov;
        step_through<Isa, E, arrays, gradient>(items[i], first, count, [&](auto* vectors) LCW_LAMBDA_INLINE {
          Wide d;
          if constexpr (at_momentum)
            d = vectors[gradient] * turn;
          else
            d = activation.template apply<Isa>(vectors[gradient]);
          if (decays) d += decay * vectors[0];
          Wide step = d;
          if constexpr (arrays == 3) {
            const Wide v = starts ? d : keep * vectors[1] + add * d;
            vectors[1] = v;
            step = looks_ahead ? d + keep * v : v;
          }
          if constexpr (at_momentum) step = activation.template apply<Isa>(step);
          vectors[0] -= rate * step;
        });
      });
    });
  };
  const auto run_all = [&](const auto& items) {
    with_kind(kind, [&](auto kind_type) {
      with_flag(on_momentum, [&](auto at_momentum) { run(kind_type, at_momentum, items); });
    });
  };
  if (momentum != 0) return with_items<3>(op, {&params, &momentum_buffers, &grads}, 2, run_all);
  STD_TORCH_CHECK(
      momentum_buffers.size() == 0, op, ": momentum_buffers has ", momentum_buffers.size(),
      " tensors; expected none, because momentum is 0; call lcw_ops.optim.SGD");
  return with_items<2>(op, {&params, &grads}, 1, run_all);
}

// The numbers in AdamW's step that depend on the count of steps.
struct Correction {
  double step_size, inverse_root;
};

double to_count(AtenTensorHandle step) {
  const std::optional<ScalarType> type = taken_type(step);
  STD_TORCH_CHECK(
      numel(step) == 1 && (type == ScalarType::Float || type == ScalarType::Double),
      "activated_adamw_step_: a count of steps is not a single float32 or float64 number on the CPU; call "
      "lcw_ops.optim.AdamW");
  const void* count = memory(step, false);
  return type == ScalarType::Float ? *static_cast<const float*>(count) : *static_cast<const double*>(count);
}

Refusal adamw_step(
    const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
    const Tensors& max_exp_avg_sqs, const Tensors& state_steps, double lr, double beta1, double beta2,
    double weight_decay, double eps, bool amsgrad, bool maximize, std::string kind_name, double alpha, double beta) {
  const char* op = "activated_adamw_step_";
  const Kind kind = to_kind(op, kind_name);
  STD_TORCH_CHECK(
      state_steps.size() == params.size(), op, ": state_steps has ", state_steps.size(), " tensors; expected ",
      params.size(), ", one for each parameter; call lcw_ops.optim.AdamW");
  std::vector<Correction> corrections;
  corrections.reserve(params.size());
  double previous = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const double count = to_count(state_steps[i]);
    // Nearly always all counts are equal, and computing the powers takes longer than the step of a small tensor.
    if (i > 0 && count == previous)
      corrections.push_back(corrections.back());
    else
      corrections.push_back({lr / (1 - std::pow(beta1, count)), 1 / std::sqrt(1 - std::pow(beta2, count))});
    previous = count;
  }
  const double signed_beta = maximize ? -beta : beta;
  const auto run = [&](auto kind_type, const auto& items) {
    constexpr int arrays = sizeof(items[0].at) / sizeof(void*), gradient = arrays - 1;
    for_each_piece(items, [&](auto isa, size_t i, int64_t first, int64_t count) LCW_LAMBDA_INLINE {
      with_numbers(items[i].type, [&](auto element) LCW_LAMBDA_INLINE {
        using Isa = decltype(isa);
        using E = decltype(element);
        using T = Computed<E>;
        using Wide = typename Memory<Isa, E>::Wide;
        const Activation<kind_type(), T> activation{T(alpha), T(signed_beta)};
        const T keep1 = T(beta1), add1 = T(1 - beta1), keep2 = T(beta2), add2 = T(1 - beta2);
        const T shrink = T(1 - lr * weight_decay), epsilon = T(eps);
        const T step_size = T(corrections[i].step_size), inverse_root = T(corrections[i].inverse_root);
        step_through<Isa, E, arrays, gradient>(items[i], first, count, [&](auto* vectors) LCW_LAMBDA_INLINE {
          const Wide g = activation.template apply<Isa>(vectors[gradient]);
          const Wide m = vectors[1] = keep1 * vectors[1] + add1 * g;
          Wide v = vectors[2] = keep2 * vectors[2] + add2 * (g * g);
          if constexpr (arrays == 5) {
            v = vectors[3] = larger<Isa, T>(vectors[3], v);
          }
          const Wide denominator = square_root<Isa, T>(v) * inverse_root + epsilon;
          vectors[0] = vectors[0] * shrink - step_size * (m / denominator);
        });
      });
    });
  };
  const auto run_all = [&](const auto& items) { with_kind(kind, [&](auto kind_type) { run(kind_type, items); }); };
  if (amsgrad) return with_items<5>(op, {&params, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &grads}, 4, run_all);
  STD_TORCH_CHECK(
      max_exp_avg_sqs.size() == 0, op, ": max_exp_avg_sqs has ", max_exp_avg_sqs.size(),
      " tensors; expected none without amsgrad; call lcw_ops.optim.AdamW");
  return with_items<4>(op, {&params, &exp_avgs, &exp_avg_sqs, &grads}, 3, run_all);
}

}  // namespace
}  // namespace lcw_ops

// Called by TORCH_BOX to take a list from the stack.
template <>
struct torch::stable::detail::ToImpl<lcw_ops::Tensors> {
  static lcw_ops::Tensors call(StableIValue value, uint64_t, bool) {
    return lcw_ops::Tensors(to<StableListHandle>(value));
  }
};

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("gradient_activation_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::gradient_activation>::raising));
  m.impl("activated_sgd_step_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::sgd_step>::raising));
  m.impl("activated_adamw_step_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::adamw_step>::raising));
}

// Registered for every device, because these ops answer for a tensor that is not on the CPU, too.
STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CompositeExplicitAutograd, m) {
  m.impl("try_gradient_activation_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::gradient_activation>::answering));
  m.impl("try_activated_sgd_step_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::sgd_step>::answering));
  m.impl("try_activated_adamw_step_.cpp", TORCH_BOX(&lcw_ops::Forms<&lcw_ops::adamw_step>::answering));
}
