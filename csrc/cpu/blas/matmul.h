// Chooses the faster of two multipliers for a layer's matrices: our own kernels or torch's matmul.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace lcw_ops {

enum class Multiplier { own, torch };

// The three products of a layer with an n by m weight and `samples` samples. The first three passes include the
// constraint of the LCW layer; the others are a plain layer's.
enum class Pass { forward, grad_input, grad_weight, plain_forward, plain_grad_input, plain_grad_weight };
struct LayerSize {
  int64_t samples, n, m;
};

// Multiplies the next of a trial's products by one multiplier.
using Trial = std::function<void(Multiplier)>;

// Makes the operands of `count` products of a given size, and returns a function that multiplies them in turns. Each
// product has a weight of its own.
using Prepare = std::function<Trial(LayerSize size, int64_t count)>;

// Weights that are taken in turns.
class InTurns {
 public:
  explicit InTurns(std::vector<torch::stable::Tensor> tensors) : tensors_(std::move(tensors)) {}
  torch::stable::Tensor& next() { return tensors_[taken_++ % tensors_.size()]; }

 private:
  std::vector<torch::stable::Tensor> tensors_;
  size_t taken_ = 0;
};

// Chooses the multiplier for a product. If LCW_OPS_MATMUL is set to own or torch, it decides. Otherwise, if
// `deterministic`, the number of samples decides, because a measurement could decide differently in the next process:
// our own kernels multiply up to 16 samples, where reading the weight takes most of the time, and torch's matmul
// multiplies more. In all other cases the choice is measured, once for each processor, number of threads, size of the
// weight and power of two of samples. A large product is represented by parts of it. The answer is kept in memory and
// in a file, so that later runs give the same bits.
Multiplier choose_multiplier(
    Pass pass, torch::headeronly::ScalarType type, LayerSize size, bool deterministic, const Prepare& prepare);

// torch's x w^T + bias, for x (M, m) and w (n, m) of any strides.
torch::stable::Tensor linear(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias = std::nullopt);

}  // namespace lcw_ops
