// The activations of a recurrence, by name.
#pragma once

#include <string>

#include <torch/headeronly/util/Exception.h>

namespace lcw_ops {

enum class Activation { tanh, relu, sigmoid, identity };

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "tanh") return Activation::tanh;
  if (name == "relu") return Activation::relu;
  if (name == "sigmoid") return Activation::sigmoid;
  STD_TORCH_CHECK(
      name == "identity", op, ": activation is ", name,
      ", expected tanh, relu, sigmoid or identity; call lcw_ops.functional.orthogonal_filter");
  return Activation::identity;
}

}  // namespace lcw_ops
