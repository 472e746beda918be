// Threads that carry the same rows of the state together, each with a slice of the units.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "layouts.h"

namespace lcw_ops {

// Threads that carry the same rows and wait for each other after every step. A thread joins if it arrives within 200
// microseconds of the first one. The team does not wait longer, because the pool may never start the thread. If waiting
// stays slow, because another program uses the processors, one member goes on alone. The results do not depend on how
// the work is shared.
class Team {
 public:
  explicit Team(int64_t expected) : expected_(expected) {}

  // Returns this thread's number, or -1 if the others have begun. `slots` is the number of expected members that this
  // thread stands for.
  int64_t join(int64_t slots) {
    const int64_t number = members_.fetch_add(1);
    if (number >= closed) return -1;
    present_.fetch_add(slots);
    if (number == 0) {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
      while (present_.load() < expected_ && std::chrono::steady_clock::now() < deadline) pause();
      count_.store(members_.fetch_add(closed));
    } else {
      while (count_.load() == 0) pause();
    }
    return number;
  }

  // Lets the only member join again. No other thread may know the team.
  void reopen() {
    for (std::atomic<int64_t>* counter : {&members_, &present_, &count_}) counter->store(0, std::memory_order_relaxed);
  }

  int64_t count() const { return count_.load(std::memory_order_relaxed); }

  // Waits for all members. Writes by any member before the call are visible to every member after it. After the call,
  // members whose number is not below count() have nothing left to do.
  void wait() {
    const int64_t count = this->count();
    if (count == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      if (slow_rounds_.load(std::memory_order_relaxed) > slow_rounds_at_first + round / rounds_per_slow_one)
        count_.store(1);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    const int64_t usual = usual_spins_.load(std::memory_order_relaxed), most = least_slow_spins + 8 * usual;
    int64_t spins = 0;
    for (; round_.load(std::memory_order_acquire) == round; ++spins) spins < most ? pause() : std::this_thread::yield();
    if (spins >= most) slow_rounds_.fetch_add(1, std::memory_order_relaxed);
    // A running average of the spins of all members, over about eight rounds.
    usual_spins_.store(usual + (std::min(spins, most) - usual) / 8, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t closed = int64_t(1) << 32;
  // A wait is slow if it takes at least about 50 microseconds and many times the usual wait: then another program has
  // taken a processor.
  static constexpr int64_t least_slow_spins = 2048, slow_rounds_at_first = 2, rounds_per_slow_one = 512;

  static void pause() {
#ifdef LCW_X86_DISPATCH
    __builtin_ia32_pause();
#endif
  }

  const int64_t expected_;
  std::atomic<int64_t> members_{0}, present_{0}, count_{0}, slow_rounds_{0}, usual_spins_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// The memory that the members of a team share: a state or gradient, the next one, and the slopes of a segment.
template <typename T>
struct Shared {
  Team team;
  Buffer<T> now, next, slopes;

  Shared(int64_t expected, int64_t size, int64_t slope_count)
      : team(expected), now(size), next(size), slopes(slope_count * size) {}

  // The units of a member, or none if the team goes on without that member. A slice begins with a whole vector, so that
  // every unit gets the same instructions however many members there are.
  Slice slice(int64_t number, int64_t width) const {
    constexpr int64_t vector = 64 / sizeof(T);
    const int64_t count = team.count();
    if (number >= count) return {0, 0};
    return {
        width * number / count / vector * vector,
        number + 1 < count ? width * (number + 1) / count / vector * vector : width};
  }
};

}  // namespace lcw_ops
