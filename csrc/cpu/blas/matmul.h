// Chooses the faster of two multipliers for a layer's matrices: our own kernels or torch's matmul.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace lcw_ops {

enum class Multiplier { own, torch };

// The products of `samples` rows with an n by m weight, or with the rows of its gradient. The first three include the
// constraint of the LCW layer, the others are plain.
enum class Pass { forward, grad_input, grad_weight, plain_forward, plain_grad_input, plain_grad_weight };
struct LayerSize {
  int64_t samples, n, m;
};

// LCW_OPS_MATMUL=own or torch decides if it is set. If `deterministic`, the size decides, because a timing could choose
// differently in the next process: up to 16 samples, where reading the weight takes most of the time, the product is
// ours, otherwise torch's. Else the choice is measured, once per processor, number of threads, size of the weight and
// power of two of samples: `prepare` makes such a product and returns a function that carries it out. The answer is
// kept in memory and in a file, so that later runs give the same bits.
using Trial = std::function<void(Multiplier)>;
Multiplier choose_multiplier(
    Pass pass, torch::headeronly::ScalarType type, LayerSize size, bool deterministic,
    const std::function<Trial(LayerSize)>& prepare);

// torch's x w^T + bias, for x (M, m) and w (n, m) of any strides.
torch::stable::Tensor linear(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias = std::nullopt);

}  // namespace lcw_ops
