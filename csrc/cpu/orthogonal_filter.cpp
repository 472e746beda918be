// The orthogonal-filter recurrence on the CPU, forward and backward.
//
//   h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
//   P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T H_{l-1}
//
// Cost per step and row, forward: 4 N^2 operations (2 N^2 with a permutation filter), W_l read once per thread;
// backward: the forward again, 4 N^2 for G, 2 N^2 for dW. Bound by arithmetic from about 16 rows, below by reading W.
// A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
//
// Rows are independent: each thread carries its slice of the batch through all layers. Backward works segment by
// segment from the end: recompute the states of the segment and run G back through it (rows in parallel), then the
// weight gradients of the segment (layers in parallel). Every sum has a fixed order.

#include "orthogonal_filter.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "matrix.h"
#include "vector_math.h"

namespace lcw_ops {
namespace {

// Matrices in the order the product reads them: transposed for O h and W h. One buffer pair per thread.
template <class Isa, typename T>
struct StepMatrices {
  std::vector<T> weight, filter;
  const T *last_weight = nullptr, *last_filter = nullptr;

  explicit StepMatrices(const Recurrence<T>& r)
      : weight(r.width * r.width), filter(r.permutation ? 0 : r.width * r.width) {}

  LCW_INLINE void load(const Recurrence<T>& r, int64_t l) {
    if (r.weight_at(l) != last_weight) transpose<Isa>(last_weight = r.weight_at(l), weight.data(), r.width);
    if (!r.permutation && r.filter_at(l) != last_filter)
      transpose<Isa>(last_filter = r.filter_at(l), filter.data(), r.width);
  }
};

// O h for `count` rows.
template <class Isa, typename T>
LCW_INLINE void apply_filter(
    const Recurrence<T>& r, const StepMatrices<Isa, T>& matrices, const T* state, T* filtered, int64_t count) {
  const int64_t n = r.width;
  if (!r.permutation) {
    multiply<Isa>(state, n, int64_t(1), matrices.filter.data(), n, n, filtered, n, count, n);
    return;
  }
  for (int64_t m = 0; m < count; ++m)
    for (int64_t i = 0; i < n; ++i) filtered[m * n + i] = state[m * n + r.permutation[i]];
}

// A = W h + b + u for rows begin..begin+count-1 of step l.
template <class Isa, typename T>
LCW_INLINE void pre_activation(
    const Recurrence<T>& r, const StepMatrices<Isa, T>& matrices, const T* state, T* out, int64_t l, int64_t begin,
    int64_t count) {
  const int64_t n = r.width;
  multiply<Isa>(state, n, int64_t(1), matrices.weight.data(), n, n, out, n, count, n);
  if (r.bias) {
    const T* bias = r.bias + l * r.bias_stride;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t i = 0; i < n; ++i) out[m * n + i] += bias[i];
  }
  if (r.inputs) {
    const T* input = r.inputs + (l * r.rows + begin) * n;
    for (int64_t i = 0; i < count * n; ++i) out[i] += input[i];
  }
}

template <class Isa, typename T>
LCW_INLINE void forward_rows(const Forward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, count = end - begin, size = count * n;
  StepMatrices<Isa, T> matrices(r);
  std::vector<T> state(pass.h0 + begin * n, pass.h0 + end * n), filtered(size), pre(size);
  const auto copy_state = [&](T* states, int64_t index) {
    std::copy(state.begin(), state.end(), states + (index * r.rows + begin) * n);
  };
  if (pass.return_states) copy_state(pass.output, 0);
  for (int64_t l = 0; l < r.steps; ++l) {
    if (pass.checkpoints && l % r.segment == 0) copy_state(pass.checkpoints, l / r.segment);
    matrices.load(r, l);
    apply_filter<Isa>(r, matrices, state.data(), filtered.data(), count);
    pre_activation<Isa>(r, matrices, state.data(), pre.data(), l, begin, count);
    const T alpha = r.alpha_at(l), beta = r.beta_at(l);
    with_activation(r.activation, [&](auto act) LCW_LAMBDA_INLINE {
      for (int64_t i = 0; i < size; ++i) state[i] = alpha * filtered[i] + beta * act.value(pre[i]);
    });
    if (pass.return_states) copy_state(pass.output, l + 1);
  }
  if (!pass.return_states) copy_state(pass.output, 0);
}

// Recompute the segment's states and slopes for some rows, then carry G back through it.
template <class Isa, typename T>
LCW_INLINE void backward_rows(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, count = end - begin, size = count * n;
  const auto rows_of = [&](T* buffer, int64_t index) { return buffer + (index * r.rows + begin) * n; };
  StepMatrices<Isa, T> matrices(r);
  std::vector<T> filtered(size), pre(size), scaled(size);

  const T* checkpoint = pass.checkpoints + (pass.first / r.segment * r.rows + begin) * n;
  std::copy(checkpoint, checkpoint + size, rows_of(pass.states, 0));
  for (int64_t s = 0; s < pass.count; ++s) {
    const int64_t l = pass.first + s;
    const T* state = rows_of(pass.states, s);
    matrices.load(r, l);
    apply_filter<Isa>(r, matrices, state, filtered.data(), count);
    pre_activation<Isa>(r, matrices, state, pre.data(), l, begin, count);
    const T alpha = r.alpha_at(l), beta = r.beta_at(l);
    T* slope = rows_of(pass.grad_pre, s);
    T* next = s + 1 < pass.count ? rows_of(pass.states, s + 1) : scaled.data();
    T* activated = pass.activated ? rows_of(pass.activated, s) : pre.data();
    with_activation(r.activation, [&](auto act) LCW_LAMBDA_INLINE {
      for (int64_t i = 0; i < size; ++i) {
        const T a = pre[i], y = act.value(a);
        slope[i] = beta * act.slope(a, y);
        next[i] = alpha * filtered[i] + beta * y;
        activated[i] = y;
      }
    });
    if (pass.filtered) std::copy(filtered.begin(), filtered.end(), rows_of(pass.filtered, s));
  }

  T* gradient = pass.gradient + begin * n;
  for (int64_t s = pass.count - 1; s >= 0; --s) {
    const int64_t l = pass.first + s;
    if (pass.grad_states) std::copy(gradient, gradient + size, rows_of(pass.grad_states, l + 1));
    if (pass.filtered) {
      for (int64_t m = 0; m < count; ++m) {
        double alpha_product = 0, beta_product = 0;
        for (int64_t i = m * n; i < (m + 1) * n; ++i) {
          alpha_product += double(gradient[i]) * double(rows_of(pass.filtered, s)[i]);
          beta_product += double(gradient[i]) * double(rows_of(pass.activated, s)[i]);
        }
        pass.alpha_products[l * r.rows + begin + m] = alpha_product;
        pass.beta_products[l * r.rows + begin + m] = beta_product;
      }
    }
    T* grad_pre = rows_of(pass.grad_pre, s);
    const T alpha = r.alpha_at(l);
    for (int64_t i = 0; i < size; ++i) {
      grad_pre[i] *= gradient[i];
      scaled[i] = alpha * gradient[i];
    }
    if (r.permutation) {
      for (int64_t m = 0; m < count; ++m)
        for (int64_t i = 0; i < n; ++i) gradient[m * n + r.permutation[i]] = scaled[m * n + i];
    } else {
      multiply<Isa>(scaled.data(), n, int64_t(1), r.filter_at(l), n, n, gradient, n, count, n);
    }
    // A sum of its own: added term by term onto the far larger filter branch, every term would be rounded at its scale.
    multiply<Isa>(grad_pre, n, int64_t(1), r.weight_at(l), n, n, scaled.data(), n, count, n);
    for (int64_t i = 0; i < size; ++i) gradient[i] += scaled[i];
    if (pass.return_states) {
      const T* direct = pass.grad_output + (l * r.rows + begin) * n;
      for (int64_t i = 0; i < size; ++i) gradient[i] += direct[i];
    }
    if (pass.grad_inputs) std::copy(grad_pre, grad_pre + size, rows_of(pass.grad_inputs, l));
  }
  if (pass.grad_states && pass.first == 0) std::copy(gradient, gradient + size, rows_of(pass.grad_states, 0));
}

// dW_l = P_l^T H_{l-1} and db_l for some layers of the segment. Biases are summed in float64.
template <class Isa, typename T>
LCW_INLINE void weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  std::vector<double> bias_sum(n);
  for (int64_t s = begin; s < end; ++s) {
    const T* grad_pre = pass.grad_pre + s * r.rows * n;
    const T* state = pass.states + s * r.rows * n;
    const int64_t l = pass.first + s;
    if (pass.grad_weight)
      multiply<Isa>(grad_pre, int64_t(1), n, state, n, r.rows, pass.grad_weight + l * n * n, n, n, n);
    if (pass.grad_bias) {
      std::fill(bias_sum.begin(), bias_sum.end(), 0.0);
      for (int64_t m = 0; m < r.rows; ++m)
        for (int64_t i = 0; i < n; ++i) bias_sum[i] += double(grad_pre[m * n + i]);
      for (int64_t i = 0; i < n; ++i) pass.grad_bias[l * n + i] = static_cast<T>(bias_sum[i]);
    }
  }
}

// The same for a weight or bias shared by all steps: output units begin..end-1, added up over the segment's samples.
template <class Isa, typename T>
LCW_INLINE void shared_weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, samples = pass.count * r.rows;
  if (pass.weight_sum) {
    // Short sums in T, long ones in float64: terms of one sign were off by up to 80 times eager torch's error otherwise.
    constexpr int64_t block_samples = 16 * chunk_terms;
    std::vector<T> sum((end - begin) * n);
    for (int64_t first = 0; first < samples; first += block_samples) {
      const int64_t count = std::min(block_samples, samples - first);
      multiply<Isa>(
          pass.grad_pre + first * n + begin, int64_t(1), n, pass.states + first * n, n, count, sum.data(), n, end - begin,
          n);
      for (int64_t i = 0; i < (end - begin) * n; ++i) pass.weight_sum[begin * n + i] += double(sum[i]);
    }
  }
  if (pass.bias_sum) {
    for (int64_t m = 0; m < samples; ++m)
      for (int64_t i = begin; i < end; ++i) pass.bias_sum[i] += double(pass.grad_pre[m * n + i]);
  }
}

// The same four functions for each instruction set; which one runs is decided once, by the processor, and for tests by
// LCW_OPS_CPU_CAPABILITY=avx2 or portable.
template <typename T>
struct Kernels {
  void (*forward)(const Forward<T>&, int64_t begin, int64_t end);
  void (*backward)(const Backward<T>&, int64_t begin, int64_t end);
  void (*weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
  void (*shared_weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
};

#define LCW_KERNELS(Isa, attributes)                                                                  \
  template <typename T>                                                                               \
  struct Isa##Kernels {                                                                               \
    attributes static void forward(const Forward<T>& pass, int64_t begin, int64_t end) {              \
      forward_rows<Isa>(pass, begin, end);                                                            \
    }                                                                                                 \
    attributes static void backward(const Backward<T>& pass, int64_t begin, int64_t end) {            \
      backward_rows<Isa>(pass, begin, end);                                                           \
    }                                                                                                 \
    attributes static void weights(const Backward<T>& pass, int64_t begin, int64_t end) {             \
      weight_gradients<Isa>(pass, begin, end);                                                        \
    }                                                                                                 \
    attributes static void shared_weights(const Backward<T>& pass, int64_t begin, int64_t end) {      \
      shared_weight_gradients<Isa>(pass, begin, end);                                                 \
    }                                                                                                 \
    static constexpr Kernels<T> all{forward, backward, weights, shared_weights};                      \
  };

LCW_KERNELS(Portable, )
#if defined(__x86_64__) && defined(__GNUC__)
#define LCW_X86_DISPATCH 1
LCW_KERNELS(Avx2, __attribute__((target("avx2,fma"))))
LCW_KERNELS(Avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))))
#endif

template <typename T>
const Kernels<T>& kernels() {
#ifdef LCW_X86_DISPATCH
  static const Kernels<T>& fastest = []() -> const Kernels<T>& {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const char* limit = std::getenv("LCW_OPS_CPU_CAPABILITY");
    const bool portable_only = limit && std::string(limit) == "portable";
    const bool avx2_only = limit && std::string(limit) == "avx2";
    if (avx2 && avx512 && !avx2_only && !portable_only) return Avx512Kernels<T>::all;
    return avx2 && !portable_only ? Avx2Kernels<T>::all : PortableKernels<T>::all;
  }();
  return fastest;
#else
  return PortableKernels<T>::all;
#endif
}

struct Cpu {
  // Fresh memory is mapped at the first touch. The gradient of 50,000 layers has 200,000 pages of 4 KB, which took
  // longer than the arithmetic of dW; in pages of 2 MB it has 400.
  static void allocated(const Tensor& tensor) {
#ifdef __linux__
    constexpr uintptr_t page = uintptr_t(2) << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t first = (start + page - 1) & ~(page - 1);
    const uintptr_t last = (start + tensor.numel() * tensor.element_size()) & ~(page - 1);
    // Only advice: where it is refused, the pages stay small.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }

  template <typename T>
  static void run(const Forward<T>& pass, const Tensor&) {
    stable::parallel_for(
        0, pass.recurrence.rows, 1, [&](int64_t begin, int64_t end) { kernels<T>().forward(pass, begin, end); });
  }

  template <typename T>
  static void run_segment(const Backward<T>& pass, const Tensor&) {
    stable::parallel_for(
        0, pass.recurrence.rows, 1, [&](int64_t begin, int64_t end) { kernels<T>().backward(pass, begin, end); });
    if (pass.grad_weight || pass.grad_bias)
      stable::parallel_for(0, pass.count, 1, [&](int64_t begin, int64_t end) {
        kernels<T>().weight_gradients(pass, begin, end);
      });
    if (pass.weight_sum || pass.bias_sum)
      stable::parallel_for(0, pass.recurrence.width, 1, [&](int64_t begin, int64_t end) {
        kernels<T>().shared_weight_gradients(pass, begin, end);
      });
  }
};

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("orthogonal_filter.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter<lcw_ops::Cpu>));
  m.impl("orthogonal_filter_backward.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter_backward<lcw_ops::Cpu>));
}
