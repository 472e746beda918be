// Chooses between our own matrix product and torch's, mostly by measuring both (matmul.h has the exceptions). torch
// multiplies with the BLAS that it was built with, mostly MKL. For few samples, MKL reads a weight slowly, and on some
// processors it does not use the full width of the vectors. Which product is faster differs too much between processors
// to be written down in a table.
//
// oneDNN, which also comes with torch, is not offered: its sums of 1024 numbers err up to four times as much as those
// of torch's matmul. When the sums were cut into parts short enough to be as exact, oneDNN was slower.
#include "matmul.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <mutex>

#include <pthread.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "cache_file.h"

namespace lcw_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The answers that this process knows: for each question (cache_file.h), the faster multiplier. An answer comes from
// the cache file, or is measured and then appended to the file.
class Answers {
 public:
  Multiplier find(const Question& question, const std::function<Trial(LayerSize)>& prepare) {
    if (const auto answer = known(question)) return *answer;
    // Only one thread measures at a time: two would disturb each other. A thread that knows the answer does not take
    // this lock.
    const std::lock_guard<std::mutex> lock(measuring_);
    read();
    if (const auto answer = known(question)) return *answer;
    const Multiplier answer = measure(question, prepare);
    append_to_cache_file(question, answer);
    read();
    const std::lock_guard<std::mutex> answers_lock(reading_);
    return answers_.emplace(question, answer).first->second;
  }

 private:
  std::optional<Multiplier> known(const Question& question) {
    const std::lock_guard<std::mutex> lock(reading_);
    const auto found = answers_.find(question);
    return found == answers_.end() ? std::nullopt : std::optional<Multiplier>(found->second);
  }

  void read() {
    const std::lock_guard<std::mutex> lock(reading_);
    read_cache_file(answers_);
  }

  // Measures the two multipliers in turns and compares their shortest times, which other programs disturbed least. The
  // first turn is dropped unless it decides clearly. Our own product has to take a twentieth less time than torch's,
  // because a smaller difference may be chance.
  static Multiplier measure(const Question& question, const std::function<Trial(LayerSize)>& prepare) {
    const Trial trial = prepare({question.samples, question.n, question.m});
    using Clock = std::chrono::steady_clock;
    const auto measure_one = [&](Multiplier multiplier) {
      const auto start = Clock::now();
      trial(multiplier);
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    constexpr double enough_seconds = 0.03;
    constexpr int fewest_turns = 3, most_turns = 20;
    double own = measure_one(Multiplier::own), torch = measure_one(Multiplier::torch);
    // If one product took longer than enough_seconds and three times as long as the other, the difference is real: the
    // extra work of a first turn takes less time than that.
    if (std::max(own, torch) > enough_seconds && (own > 3 * torch || torch > 3 * own))
      return own < torch ? Multiplier::own : Multiplier::torch;
    own = torch = std::numeric_limits<double>::infinity();
    const auto start = Clock::now();
    for (int turn = 0; turn < most_turns; ++turn) {
      if (turn >= fewest_turns && std::chrono::duration<double>(Clock::now() - start).count() > enough_seconds) break;
      own = std::min(own, measure_one(Multiplier::own));
      torch = std::min(torch, measure_one(Multiplier::torch));
    }
    return own < 0.95 * torch ? Multiplier::own : Multiplier::torch;
  }

  std::mutex measuring_, reading_;
  std::map<Question, Multiplier> answers_;
};

// After a fork, the child starts with new answers: a thread of the parent, which the child does not have, may have held
// a lock.
std::atomic<Answers*> answers{[] {
  pthread_atfork(nullptr, nullptr, [] { answers = new Answers; });
  return new Answers;
}()};

}  // namespace

Multiplier choose_multiplier(
    Pass pass, ScalarType type, LayerSize size, bool deterministic, const std::function<Trial(LayerSize)>& prepare) {
  if (const char* name = std::getenv("LCW_OPS_MATMUL"); name && *name) {
    const auto requested = find_multiplier(name);
    STD_TORCH_CHECK(requested, "LCW_OPS_MATMUL=", name, ": expected own or torch");
    return *requested;
  }
  if (deterministic) return size.samples <= 16 ? Multiplier::own : Multiplier::torch;
  return answers.load()->find({pass, type, size}, prepare);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  // torch allocates its own result with malloc. The overload that is given memory computes the same bits.
  const char* overload = "";
  if (const auto out = new_pooled(x, {x.size(0), weight.size(0)})) {
    stack[3] = torch::stable::detail::from(*out);
    overload = "out";
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace lcw_ops
