// Threads that take parts from a Schedule and check the promises in its head. Exits with status 1 and a line for the
// first broken promise. Arguments: seed, threads, segments, groups, slots, pieces of slopes, pieces of gradients,
// in order (0 or 1), the number of parts after which a thread stops all others (-1: none does).
#include "../../csrc/cpu/orthogonal_filter/schedule.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>

using lcw_ops::Schedule;
using Kind = Schedule::Kind;

namespace {

void expect(bool kept, const char* promise, const Schedule::Part& part) {
  if (kept) return;
  std::printf("%s: kind %d, segment %ld, index %ld\n", promise, int(part.kind), long(part.segment), long(part.index));
  std::exit(1);
}

struct Done {
  int64_t slopes = 0, carries = 0, gradients = 0;
};

// The pieces of a segment that have been given out.
struct Begun {
  std::set<int64_t> slopes, gradients;
};

bool is_new(std::set<int64_t>& given, int64_t index, int64_t count) {
  return index >= 0 && index < count && given.insert(index).second;
}

}  // namespace

int main(int, char** argv) {
  const auto argument = [&](int i) { return std::atoll(argv[i]); };
  const int64_t seed = argument(1), thread_count = argument(2), segment_count = argument(3), groups = argument(4);
  const int64_t slots = argument(5), stop_after = argument(9);
  const bool in_order = argument(8);
  std::vector<Schedule::Counts> counts(segment_count, {argument(6), argument(7)});
  if (segment_count > 2) counts[1].gradients = 0, counts[2].slopes = 0;
  Schedule schedule(counts, groups, slots, in_order);

  std::mutex mutex;
  std::vector<Done> done(segment_count);
  std::vector<Begun> begun(segment_count);
  std::vector<int64_t> carried(groups, 0);
  std::vector<bool> is_carried(groups, false);
  int64_t parts = 0;
  const auto has_ended = [&](int64_t s) {
    return done[s].carries == groups && done[s].gradients == counts[s].gradients;
  };
  const auto begin = [&](const Schedule::Part& part) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int64_t s = part.segment;
    for (int64_t before = 0; before <= s - slots; ++before) expect(has_ended(before), "a slot is taken", part);
    if (part.kind == Kind::slopes)
      expect(is_new(begun[s].slopes, part.index, counts[s].slopes), "slopes given out twice", part);
    if (part.kind == Kind::carry) {
      expect(done[s].slopes == counts[s].slopes, "a carry before its slopes", part);
      expect(carried[part.index] == s && !is_carried[part.index], "a carry out of turn", part);
      is_carried[part.index] = true;
    }
    if (part.kind == Kind::gradients) {
      expect(is_new(begun[s].gradients, part.index, counts[s].gradients), "gradients given out twice", part);
      expect(done[s].carries == groups, "gradients before a carry", part);
      for (int64_t before = 0; in_order && before < s; ++before)
        expect(has_ended(before), "gradients out of order", part);
    }
  };
  const auto end = [&](const Schedule::Part& part) {
    const std::lock_guard<std::mutex> lock(mutex);
    Done& segment = done[part.segment];
    if (part.kind == Kind::slopes) ++segment.slopes;
    if (part.kind == Kind::gradients) ++segment.gradients;
    if (part.kind == Kind::carry) ++segment.carries, ++carried[part.index], is_carried[part.index] = false;
    return ++parts;
  };

  std::atomic<bool> has_stopped{false};
  const auto work = [&](int64_t number) {
    std::mt19937_64 random(seed * 1000 + number);
    for (Schedule::Part part; (part = schedule.next()).kind != Kind::none; schedule.finish(part)) {
      begin(part);
      // Some parts take far longer than others, as if another program held the thread up.
      if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      const int64_t so_far = end(part);
      if (stop_after >= 0 && so_far >= stop_after && !has_stopped.exchange(true)) return schedule.stop();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t number = 0; number < thread_count; ++number) threads.emplace_back(work, number);
  for (std::thread& thread : threads) thread.join();
  if (stop_after >= 0) return 0;
  for (int64_t s = 0; s < segment_count; ++s)
    expect(has_ended(s) && done[s].slopes == counts[s].slopes, "a part was left", {Kind::none, s, 0});
  std::printf("%ld parts\n", long(parts));
  return 0;
}
