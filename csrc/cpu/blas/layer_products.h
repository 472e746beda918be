// The three products of a plain layer with a weight w (n, m), forward and backward, by our own kernels or torch's. dY
// is the gradient of the layer's output. No size is 0.
#pragma once

#include "matmul.h"

namespace lcw_ops {

// x w^T + bias
torch::stable::Tensor multiply_forward(
    Multiplier by, const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias);

// dY w
torch::stable::Tensor multiply_grad_input(
    Multiplier by, const torch::stable::Tensor& grad, const torch::stable::Tensor& weight);

// dY^T x
torch::stable::Tensor multiply_grad_weight(
    Multiplier by, const torch::stable::Tensor& grad, const torch::stable::Tensor& x);

// The faster multiplier for one of the three products, which are Pass::plain_...
Multiplier choose(Pass pass, torch::headeronly::ScalarType type, LayerSize size, bool deterministic);

}  // namespace lcw_ops
