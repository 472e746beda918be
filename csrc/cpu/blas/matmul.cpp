// Chooses between our own matrix product and torch's, mostly by measuring both (matmul.h has the exceptions). torch
// multiplies with the BLAS that it was built with, mostly MKL. For few samples, MKL reads a weight slowly, and on some
// processors it does not use the full width of the vectors. Which product is faster differs too much between processors
// to be written down in a table.
//
// oneDNN, which also comes with torch, is not offered: its sums of 1024 numbers err up to four times as much as those
// of torch's matmul. When the sums were cut into parts short enough to be as exact, oneDNN was slower.
#include "matmul.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <mutex>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <pthread.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "cache_file.h"

namespace lcw_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The part of a product that is multiplied in its place, and the number of such parts. They are multiplied in turns, so
// that a weight comes from memory if the whole product's weight would, and not from a cache.
struct Parts {
  LayerSize size;
  int64_t count;
};

// The largest part of a product: multiply-adds and bytes of the weight, each for one thread, and the fewest rows of the
// weight. Each takes a few milliseconds. On fewer rows, copying the samples would take a larger share of the time than
// it takes in the whole product. A gradient of a weight may always have gradient_bytes, because our kernels let the
// system give it large pages, of 2 MB.
struct Limits {
  int64_t products, bytes, rows, gradient_bytes;
};
constexpr Limits fine{int64_t(1) << 26, int64_t(8) << 20, 512, int64_t(8) << 20},
    rough{fine.products / 8, fine.bytes / 8, 128, 0};

// All parts of a weight together have at most this many bytes. They exceed most caches.
constexpr int64_t most_bytes = int64_t(64) << 20;

int64_t bytes_of(const Question& question) {
  const ScalarType type = ScalarType(question.type);
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

bool is_grad_weight(const Question& question) {
  return Pass(question.pass) == Pass::grad_weight || Pass(question.pass) == Pass::plain_grad_weight;
}

// Takes fewer rows of the weight first, and fewer columns only if the fewest rows are still too large.
Parts parts_of(const Question& question, Limits limits) {
  const int64_t bytes = bytes_of(question);
  int64_t most = question.threads * std::min(limits.products / question.samples, limits.bytes / bytes);
  if (is_grad_weight(question)) most = std::max(most, limits.gradient_bytes / bytes);
  // Whole panels and tiles, for all kernels.
  const auto round_down = [](int64_t size) { return std::max<int64_t>(1, size < 64 ? size : size / 64 * 64); };
  int64_t n = question.n, m = question.m;
  if (n * m > most) n = std::min(n, std::max(limits.rows, round_down(most / m)));
  if (n * m > most) m = round_down(most / n);
  const int64_t whole = question.n * question.m, part = n * m;
  const int64_t count = std::min((whole + part - 1) / part, std::max<int64_t>(1, most_bytes / (bytes * part)));
  return {{question.samples, n, m}, count};
}

// Measures both multipliers in turns and compares their shortest times, which other programs disturbed least.
class Measurement {
 public:
  Measurement(const Question& question, const Prepare& prepare) : question_(question), prepare_(prepare) {}

  Multiplier choose() {
    // Two turns with a small part come first. They take the extra work of a first turn out of the later ones, and end
    // the measurement if one multiplier is far slower: 16-bit numbers can be 50 times as slow.
    const Parts small = parts_of(question_, rough), large = parts_of(question_, fine);
    Trial trial = prepare_(small.size, std::min<int64_t>(small.count, 4));
    Times times;
    const auto begin = Clock::now();
    take_turn(trial, times);
    // The extra work of a first turn takes less time than this.
    if (times.differ_by(3) && times.longer() > enough_seconds) return times.faster();
    // On a machine with much other work, even a small part waits for a core, and a second turn tells little more.
    if (seconds_since(begin) <= enough_seconds) {
      take_turn(trial, times);
      if (times.differ_by(3) && times.longer() > noticeable_seconds) return times.faster();
    }

    const bool clear = times.differ_by(2);
    const Multiplier expected = times.faster();
    if (large.size.n != small.size.n || large.size.m != small.size.m) trial = prepare_(large.size, large.count);
    // Small products are repeated more often, until enough time is over.
    const int64_t part_products = large.size.samples * large.size.n * large.size.m;
    const int64_t most_turns = std::clamp<int64_t>(8 * question_.threads * fine.products / part_products, 3, 20);
    times = {};
    const auto start = Clock::now();
    for (int64_t turn = 1; turn <= most_turns; ++turn) {
      take_turn(trial, times);
      const double seconds = seconds_since(start);
      const bool is_clear = clear && times.differ_by(2) && times.faster() == expected;
      if (seconds > enough_seconds && (turn >= 3 || is_clear)) break;
      if (seconds > 2 * enough_seconds && turn >= 2) break;
    }
    // Our own product has to take a twentieth less time than torch's: a smaller difference may be chance.
    return times.own < 0.95 * times.torch ? Multiplier::own : Multiplier::torch;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr double enough_seconds = 0.03, noticeable_seconds = 0.005;

  struct Times {
    double own = std::numeric_limits<double>::infinity(), torch = own;

    double longer() const { return std::max(own, torch); }
    bool differ_by(double factor) const { return longer() > factor * std::min(own, torch); }
    Multiplier faster() const { return own < torch ? Multiplier::own : Multiplier::torch; }
  };

  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  // Freed memory of more than 32 MB always goes back to the system, so that a gradient of this size consists of new
  // pages at every step. Here the gradient of a part has new pages too.
  void give_back_free_memory() const {
#ifdef __GLIBC__
    const int64_t bytes = question_.n * question_.m * bytes_of(question_);
    if (is_grad_weight(question_) && bytes > int64_t(32) << 20) malloc_trim(0);
#endif
  }

  void take_turn(const Trial& trial, Times& times) const {
    const auto seconds = [&](Multiplier multiplier) {
      give_back_free_memory();
      const auto start = Clock::now();
      trial(multiplier);
      return seconds_since(start);
    };
    times.own = std::min(times.own, seconds(Multiplier::own));
    times.torch = std::min(times.torch, seconds(Multiplier::torch));
  }

  const Question& question_;
  const Prepare& prepare_;
};

// The answers that this process knows: for each question (cache_file.h), the faster multiplier. An answer comes from
// the cache file, or is measured and then appended to the file.
class Answers {
 public:
  Multiplier find(const Question& question, const Prepare& prepare) {
    if (const auto answer = known(question)) return *answer;
    // Only one thread measures at a time: two would disturb each other. A thread that knows the answer does not take
    // this lock.
    const std::lock_guard<std::mutex> lock(measuring_);
    read();
    if (const auto answer = known(question)) return *answer;
    const Multiplier answer = Measurement(question, prepare).choose();
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

Multiplier choose_multiplier(Pass pass, ScalarType type, LayerSize size, bool deterministic, const Prepare& prepare) {
  if (const char* name = std::getenv("LCW_OPS_MATMUL"); name && *name) {
    const auto requested = find_multiplier(name);
    STD_TORCH_CHECK(requested, "LCW_OPS_MATMUL=", name, ": expected own or torch");
    return *requested;
  }
  if (deterministic) return size.samples <= 16 ? Multiplier::own : Multiplier::torch;
  return answers.load()->find({pass, type, size}, prepare);
}

// The samples as torch's matmul may be given them. With AMX, oneDNN multiplies bfloat16 numbers that lie between the
// rows of the first operand by 0, so that a NaN there reaches the result (torch 2.13; 30 samples of 21 numbers).
static Tensor without_gaps(const Tensor& x) {
  const bool has_gaps = x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1 && x.stride(0) > x.size(1);
  return has_gaps ? as_contiguous(x) : x;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(without_gaps(x)), torch::stable::detail::from(weight),
      torch::stable::detail::from(bias)};
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
