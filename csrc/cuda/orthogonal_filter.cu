// The orthogonal-filter recurrence on NVIDIA GPUs: which of its kernels runs, and the two ops.
//
//   h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
//   P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T h_{l-1}
//
// The state h has M rows (samples) of N units. O_l is the filter, and u_l the input of step l, if there is one. A_l is
// the argument of act; G_l and P_l are the gradients of h_l and A_l.
//
// orthogonal_filter_cluster.h has the kernels for float32 and N <= 512 on sm_90 and later, orthogonal_filter_rows.h
// those for everything else. The sums that follow the backward pass of either are in orthogonal_filter_gradients.h.
// Each file states its cost.
// A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
//
// float32 products are multiply-adds, never TF32. No atomics: every sum has a fixed order.

#include <cstdlib>
#include <string_view>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>

#include "orthogonal_filter_cluster.h"
#include "orthogonal_filter_gradients.h"
#include "orthogonal_filter_rows.h"

namespace lcw_ops {
namespace {

// Calls run(w), where w has the weight's type.
template <typename T, class Run>
void with_weight_type(const Recurrence<T>& r, Run run) {
  if constexpr (std::is_same_v<T, float>) {
    if (r.weight_type == ScalarType::BFloat16) return run(BFloat16());
    if (r.weight_type == ScalarType::Half) return run(Half());
  }
  run(T());
}

// For tests and measurements, LCW_OPS_CUDA_KERNEL=rows or cluster requests a kernel. Without it, cluster runs where it
// can, and rows elsewhere.
bool runs_on_cluster(const char* requested) { return requested == nullptr || std::string_view(requested) != "rows"; }

template <typename W, typename T, class Pass>
bool ran_on_cluster(const Pass& pass, const Tensor& like) {
  const char* requested = std::getenv("LCW_OPS_CUDA_KERNEL");
  bool ran = false;
  if constexpr (std::is_same_v<T, float>) ran = runs_on_cluster(requested) && run_cluster<W>(pass, like);
  STD_TORCH_CHECK(
      ran || requested == nullptr || std::string_view(requested) != "cluster",
      "orthogonal_filter: LCW_OPS_CUDA_KERNEL=cluster needs float32, a width of at most ", most_cluster_width,
      " and a GPU with thread-block clusters (sm_90)");
  return ran;
}

struct Cuda {
  static constexpr bool keeps_slopes = false, keeps_activated = false;

  static Tensor new_large(const Tensor& like, const std::vector<int64_t>& sizes) {
    return stable::new_empty(like, sizes);
  }

  template <typename T>
  static void run(const Forward<T>& pass, const Tensor& like) {
    const stable::accelerator::DeviceGuard guard(like.get_device_index());
    with_weight_type(pass.recurrence, [&](auto w) {
      using W = decltype(w);
      if (!ran_on_cluster<W, T>(pass, like)) launch_rows(forward_rows<T, W>, pass, like);
    });
  }

  template <typename T>
  static Segments segments(const Backward<T>& pass, bool) {
    return {pass.recurrence.segment, 1};
  }

  template <typename T>
  static void run(const Backward<T>& all, const Tensor& like) {
    const stable::accelerator::DeviceGuard guard(like.get_device_index());
    with_weight_type(all.recurrence, [&](auto w) {
      using W = decltype(w);
      for (int64_t number = 0; number < all.segments; ++number) {
        const Backward<T> pass = all.of_segment(number);
        if (!ran_on_cluster<W, T>(pass, like)) launch_rows(backward_rows<T, W>, pass, like);
        launch_parameter_gradients<T, W>(pass, like);
      }
    });
  }
};

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CUDA, m) {
  m.impl("orthogonal_filter.cuda", TORCH_BOX(&lcw_ops::orthogonal_filter<lcw_ops::Cuda>));
  m.impl("orthogonal_filter_backward.cuda", TORCH_BOX(&lcw_ops::orthogonal_filter_backward<lcw_ops::Cuda>));
}
