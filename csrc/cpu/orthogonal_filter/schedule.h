// The order in which threads do the parts of a backward pass.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace lcw_ops {

// A backward pass goes through its segments from the last to the first. A segment has three kinds of parts: pieces of
// slopes, one carry for each group of rows, and pieces of weight gradients. A carry needs all slopes of its segment and
// the same group's carry in the segment before. A piece of gradients needs all carries of its segment. The buffers have
// room for `slots` segments, so a segment begins when the one that had its slot has ended.
//
// Every thread asks for one part at a time. A thread that another program holds up delays only the part that it has:
// the others go on, up to `slots` segments ahead. Which thread does a part, and when, does not change any result.
class Schedule {
 public:
  enum class Kind { none, slopes, carry, gradients };

  // `segment` counts from the last segment, which is 0. `index` is the number of the piece or of the group of rows.
  struct Part {
    Kind kind;
    int64_t segment, index;
  };

  struct Counts {
    int64_t slopes, gradients;  // pieces of each segment
  };

  // With `in_order`, the gradients of a segment wait for those of the segment before, because both add to one sum.
  Schedule(std::vector<Counts> counts, int64_t groups, int64_t slots, bool in_order)
      : counts_(std::move(counts)), slots_(slots), in_order_(in_order), groups_(groups), segments_(counts_.size()) {
    skip_empty();
  }

  // Waits until a part can be done, and returns it. Returns Kind::none if no part is left for this thread.
  Part next() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const Part part = claim();
      if (part.kind != Kind::none || has_stopped_ || nothing_is_left()) return part;
      ++waiting_;
      changed_.wait(lock);
      --waiting_;
    }
  }

  void finish(const Part& part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Segment& segment = segments_[part.segment];
    if (part.kind == Kind::slopes) ++segment.slopes_done;
    if (part.kind == Kind::gradients) ++segment.gradients_done;
    if (part.kind == Kind::carry) ++segment.carried, groups_[part.index].is_carried = false;
    skip_empty();
    if (waiting_ > 0) changed_.notify_all();
  }

  // After an error in one thread, the others get no further parts.
  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    has_stopped_ = true;
    changed_.notify_all();
  }

 private:
  struct Segment {
    int64_t slopes_claimed = 0, slopes_done = 0, carried = 0, gradients_claimed = 0, gradients_done = 0;
  };

  // A group of rows: the segment that is carried next, and whether a thread carries the group now.
  struct Group {
    int64_t next = 0;
    bool is_carried = false;
  };

  int64_t count() const { return counts_.size(); }

  // The segments that have a slot.
  int64_t begun() const { return std::min(count(), ended_ + slots_); }

  bool is_carried(int64_t s) const { return segments_[s].carried == int64_t(groups_.size()); }

  bool nothing_is_left() const {
    return slopes_from_ == count() && gradients_from_ == count() &&
        std::all_of(groups_.begin(), groups_.end(), [&](const Group& group) { return group.next == count(); });
  }

  // Moves past the segments that have ended, and past those all of whose pieces have been claimed.
  void skip_empty() {
    while (ended_ < count() && is_carried(ended_) && segments_[ended_].gradients_done == counts_[ended_].gradients)
      ++ended_;
    while (slopes_from_ < count() && segments_[slopes_from_].slopes_claimed == counts_[slopes_from_].slopes)
      ++slopes_from_;
    while (gradients_from_ < count() &&
           segments_[gradients_from_].gradients_claimed == counts_[gradients_from_].gradients)
      ++gradients_from_;
  }

  // A group that is behind another one goes first: the carries are the longest chain of parts that wait for each other.
  // Then gradients, whose operands are still in the caches. Then a group ahead of the others, and slopes last.
  Part claim() {
    if (has_stopped_) return {Kind::none, 0, 0};
    int64_t ahead = 0, behind = -1;
    for (int64_t g = 0; g < int64_t(groups_.size()); ++g) {
      const Group& group = groups_[g];
      ahead = std::max(ahead, group.next);
      const bool can_go = !group.is_carried && group.next < begun() &&
          segments_[group.next].slopes_done == counts_[group.next].slopes;
      if (can_go && (behind < 0 || group.next < groups_[behind].next)) behind = g;
    }
    if (behind >= 0 && groups_[behind].next < ahead) return carry(behind);
    const int64_t g = gradients_from_;
    if (g < count() && is_carried(g) && (!in_order_ || ended_ == g)) {
      const Part part{Kind::gradients, g, segments_[g].gradients_claimed++};
      skip_empty();
      return part;
    }
    if (behind >= 0) return carry(behind);
    if (slopes_from_ < begun()) {
      const Part part{Kind::slopes, slopes_from_, segments_[slopes_from_].slopes_claimed++};
      skip_empty();
      return part;
    }
    return {Kind::none, 0, 0};
  }

  Part carry(int64_t g) {
    groups_[g].is_carried = true;
    return {Kind::carry, groups_[g].next++, g};
  }

  const std::vector<Counts> counts_;
  const int64_t slots_;
  const bool in_order_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Group> groups_;
  std::vector<Segment> segments_;
  // The first segment that has not ended, and the first ones with slopes and gradients that nobody has claimed.
  int64_t ended_ = 0, slopes_from_ = 0, gradients_from_ = 0, waiting_ = 0;
  bool has_stopped_ = false;
};

}  // namespace lcw_ops
