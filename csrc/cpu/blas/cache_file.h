// The file that keeps measured choices between our own matmul and torch's, one line each. Processes that measure at the
// same time may write two lines for one question; the first line counts.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "matmul.h"

namespace lcw_ops {

// The facts that decide how long a product takes. The number of samples is rounded up to a power of two, because our
// kernels change at powers of two. All numbers have a limit, because larger products run at the rate of the largest one
// that is measured.
struct Question {
  int64_t pass, type, threads, samples, n, m;

  Question(Pass pass, torch::headeronly::ScalarType type, LayerSize size)
      : pass(int64_t(pass)),
        type(int64_t(type)),
        threads(torch::stable::get_num_threads()),
        samples(1),
        n(std::min<int64_t>(size.n, 4096)),
        m(std::min<int64_t>(size.m, 4096)) {
    constexpr int64_t most_products = int64_t(1) << 31;
    while (samples < 256 && samples < size.samples && samples * n * m < most_products) samples *= 2;
  }
  Question() = default;

  auto values() const { return std::tie(pass, type, threads, samples, n, m); }
  bool operator<(const Question& other) const { return values() < other.values(); }
};

// The multiplier with this name, own or torch; nothing for another name.
std::optional<Multiplier> find_multiplier(const std::string& name);

// Adds the file's answers to `answers`. Where both have one, that of `answers` stays.
void read_cache_file(std::map<Question, Multiplier>& answers);

// Does nothing if the file cannot be written.
void append_to_cache_file(const Question& question, Multiplier answer);

}  // namespace lcw_ops
