// The orthogonal-filter recurrence on the CPU, forward and backward.
//
//   h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
//   P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T h_{l-1}
//
// The state h has M rows (samples) of N units. O_l is the filter, and u_l the input of step l, if there is one. A_l is
// the argument of act; G_l and P_l are the gradients of h_l and A_l.
//
// Cost per step and row: forward takes 4 N^2 operations (2 N^2 with a permutation), and each thread reads W_l once.
// Backward repeats this, then takes 4 N^2 for G and 2 N^2 for dW. A step is bound by arithmetic from about 16 rows on,
// and by reading W_l below that.
// A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
//
// Rows are independent, so each thread carries its slice of the batch through all steps. If there are fewer rows than
// threads, several threads carry the same rows and share the units. Backward goes through the segments (the steps
// between two checkpoints) from the last to the first. A segment's rows are carried back, which recomputes the states
// and propagates G, and then its weight gradients are computed, with steps in parallel. Threads take these parts in
// turn (schedule.h), so that none waits for another at the end of a segment. Every sum has a fixed order.

#include "../../orthogonal_filter.h"

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "../simd/instruction_sets.h"
#include "../tensors.h"
#include "carrier.h"
#include "gradients.h"
#include "schedule.h"

namespace lcw_ops {
namespace {

// The functions of one instruction set. Most of them work on rows begin..end-1 in one of the layouts of layouts.h; the
// last three work on samples, steps or units begin..end-1.
template <typename T>
struct Kernels {
  int64_t lanes;
  void (*forward_many)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*forward_few)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*backward_many)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*backward_few)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*forward_packed)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*carry_back_many)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*carry_back_few)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*carry_back_packed)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*pack)(const Recurrence<T>&, bool transposed, T* weight, T* filter);
  void (*known_slopes)(const Backward<T>&, const Recurrence<T>& packed, int64_t begin, int64_t end);
  void (*weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
  void (*shared_weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
};

template <class Isa, typename T>
struct KernelsOf {
  using Tiles = Products<Isa, T>;
  using Many = ManyRows<Tiles, T>;
  using Few = FewRows<Tiles, T>;
  using Packed = PackedRows<Tiles, T>;
  static constexpr Kernels<T> all{
      Tiles::lanes,
      compiled<Isa, forward_rows<Tiles, Many, T>>,
      compiled<Isa, forward_rows<Tiles, Few, T>>,
      compiled<Isa, backward_rows<Tiles, Many, T>>,
      compiled<Isa, backward_rows<Tiles, Few, T>>,
      compiled<Isa, forward_rows<Tiles, Packed, T>>,
      compiled<Isa, carry_back_rows<Tiles, Many, T>>,
      compiled<Isa, carry_back_rows<Tiles, Few, T>>,
      compiled<Isa, carry_back_rows<Tiles, Packed, T>>,
      compiled<Isa, pack_matrices<Tiles, T>>,
      compiled<Isa, known_slopes<Tiles, T>>,
      compiled<Isa, weight_gradients<Tiles, T>>,
      compiled<Isa, shared_weight_gradients<Tiles, T>>};
};

template <typename T>
const Kernels<T>& kernels() {
  return *with_instruction_set([](auto isa) { return &KernelsOf<decltype(isa), T>::all; });
}

struct Cpu {
  static constexpr bool keeps_slopes = true, keeps_activated = true;

  // With fewer units than this, a thread spends more time waiting for the others than sharing the work saves.
  static constexpr int64_t least_units = 32;
  static constexpr int64_t least_packed_rows = 4;  // rows per thread from which on the matrices are packed
  static constexpr uintptr_t page = large_page, small_page = 4096;

  // The buffers of the backward pass: two segments at once, if these fit into so many bytes. The threads can then go on
  // while another program holds one of them up. More segments at once were slower, on a quiet machine and on a busy
  // one: 8 of them took 1.1 times as long at 32 rows of 64 units (Zen 4, 2 cores). Their buffers leave the nearer
  // caches.
  static constexpr int64_t buffer_bytes = int64_t(32) << 20, most_slots = 2;
  // The operations of a piece of slopes or gradients, which take about 50 microseconds: many times as long as to take
  // the piece from the schedule.
  static constexpr int64_t piece_operations = 4'000'000;
  static constexpr int64_t whole_tiles = 48, least_piece_units = 16;

  // torch's threads, but at most as many as there are processors. With 8 threads on 2 processors, 32 rows of 64 units
  // took 1.7 times as long as with 2: single rows were chosen, and they only pay off if all threads run.
  static int64_t threads() {
    static const int64_t processors = [] {
      const char* told = std::getenv("LCW_OPS_PROCESSORS");
      const int64_t number = told ? std::atoll(told) : 0;
      return number > 0 ? number : int64_t(std::thread::hardware_concurrency());
    }();
    const int64_t wanted = stable::get_num_threads();
    return processors > 0 ? std::min(wanted, processors) : wanted;
  }

  static int64_t divide(int64_t number, int64_t by) { return (number + by - 1) / by; }

  static Tensor new_large(const Tensor& like, const std::vector<int64_t>& sizes) {
    return lcw_ops::new_large(like, sizes);
  }

  // Whether vectors of rows are faster than single rows. A vector of rows costs the same however many of its lanes are
  // in use; a single row uses all lanes, because its vectors run along the units. A whole vector costs as much as 0.4
  // times as many single rows with AVX-512, and 0.5 times as many with AVX2 (64 units, Zen 4).
  static bool are_many(int64_t rows, int64_t lanes) {
    const auto busiest = [](int64_t items) { return divide(items, threads()); };
    return 5 * busiest(rows) > 2 * lanes * busiest(divide(rows, lanes));
  }

  // Whether packing the matrices is possible, because they fill at least one panel, and worthwhile, because all steps
  // share them.
  template <typename T>
  static bool packs(const Recurrence<T>& r) {
    return r.weight_stride == 0 && r.filter_stride == 0 && r.width >= 2 * kernels<T>().lanes;
  }

  // Whether there are enough rows for packed matrices to be faster than rows that are carried one by one.
  static bool are_several(int64_t rows) { return rows >= least_packed_rows * threads(); }

  // A copy of a recurrence with its matrices in panels, and the memory of the panels.
  template <typename T>
  struct Packed {
    Buffer<T> memory;
    Recurrence<T> recurrence;

    Packed(const Recurrence<T>& r, bool transposed) : memory(2 * padded_size(r.width)), recurrence(r) {
      T *weight = memory.data(), *filter = weight + padded_size(r.width);
      kernels<T>().pack(r, transposed, weight, filter);
      recurrence.weight = weight, recurrence.weight_type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
      if (r.filter) recurrence.filter = filter;
    }

    static int64_t padded_size(int64_t width) { return (width + 2 * kernels<T>().lanes) * width; }
  };

  // Calls rows(begin, end, shared, slots) for all rows, in groups of `together` that each stay on one thread. `slots`
  // is explained at Team::join.
  template <typename T, typename Rows>
  static void split_rows(const Recurrence<T>& r, int64_t together, int64_t slope_count, const Rows& rows) {
    stable::parallel_for(0, (r.rows + together - 1) / together, 1, [&](int64_t first, int64_t last) {
      Shared<T> shared(1, (last - first) * together * r.width, slope_count);
      rows(first * together, std::min(last * together, r.rows), shared, 1);
    });
  }

  // The number of threads that share a row, if rows are carried one by one.
  template <typename T>
  static int64_t members_of(const Recurrence<T>& r) {
    return std::max<int64_t>(1, std::min(threads() / std::max<int64_t>(r.rows, 1), r.width / least_units));
  }

  // Calls rows(begin, end, shared, slots) for all rows, one by one, with as many threads for each row as it has
  // members.
  template <typename T, typename Rows>
  static void share_rows(const Recurrence<T>& r, int64_t members, const Rows& rows) {
    if (members == 1) return split_rows(r, 1, 0, rows);
    std::vector<std::unique_ptr<Shared<T>>> teams;
    for (int64_t m = 0; m < r.rows; ++m) teams.push_back(std::make_unique<Shared<T>>(members, r.width, 0));
    stable::parallel_for(0, r.rows * members, 1, [&](int64_t first, int64_t last) {
      for (int64_t m = first / members; m * members < last; ++m) {
        const int64_t slots = std::min(last, (m + 1) * members) - std::max(first, m * members);
        rows(m, m + 1, *teams[m], slots);
      }
    });
  }

  // Lets the system map fresh memory that all threads are about to write step by step. One thread touches each page. If
  // several threads were the first to touch a page, each of them would clear 2 MB, all but one of these pages would be
  // thrown away, and the other threads would wait at the end of the segment.
  static void map(void* memory, int64_t bytes) {
#ifdef __linux__
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes, first = begin / page * page;
    stable::parallel_for(0, (end - first + page - 1) / page, 1, [&](int64_t from, int64_t to) {
      const uintptr_t start = std::max(begin, first + from * page), stop = std::min(end, first + to * page);
      // Write a byte of every small page. The contents of the pages are about to be overwritten.
      for (uintptr_t at = start; at < stop; at = (at / small_page + 1) * small_page)
        *reinterpret_cast<volatile char*>(at) = 0;
    });
#endif
  }

  // Returns the kernel with its first argument, the pass, filled in.
  template <typename Pass, typename Kernel>
  static auto bind(const Pass& pass, Kernel kernel) {
    return [&pass, kernel](int64_t begin, int64_t end, auto& shared, int64_t slots) {
      kernel(pass, begin, end, shared, slots);
    };
  }

  template <typename T>
  static void run(Forward<T> pass, const Tensor&) {
    const Kernels<T>& all = kernels<T>();
    const Recurrence<T> r = pass.recurrence;
    const int64_t state_bytes = r.rows * r.width * sizeof(T);
    if (pass.return_states) map(pass.output, (r.steps + 1) * state_bytes);
    if (pass.activated) map(pass.activated, r.steps * state_bytes);
    if (packs(r) && are_several(r.rows)) {
      const Packed<T> packed(r, true);
      pass.recurrence = packed.recurrence;
      split_rows(r, 1, 0, bind(pass, all.forward_packed));
    } else if (are_many(r.rows, all.lanes)) {
      split_rows(r, all.lanes, 0, bind(pass, all.forward_many));
    } else {
      share_rows(r, members_of(r), bind(pass, all.forward_few));
    }
  }

  // Which kernels carry the rows back, and what they need.
  template <typename T>
  struct Way {
    bool states_known, needs_slopes, is_packed;
    int64_t members;   // threads that share a row
    int64_t together;  // rows of a group, which one thread carries
    void (*carry)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
    int64_t slope_count;  // steps whose slopes the kernel keeps in the memory of its thread

    explicit Way(const Backward<T>& pass) {
      const Kernels<T>& all = kernels<T>();
      const Recurrence<T>& r = pass.recurrence;
      const bool packable = pass.checkpoint_every == 1 && packs(r);
      states_known = packable || pass.known;
      needs_slopes = packable && !pass.known;
      is_packed = packable && are_several(r.rows);
      const bool many = !packable && are_many(r.rows, all.lanes);
      members = is_packed || many ? 1 : members_of(r);
      const int64_t lanes = many ? all.lanes : 1;
      together = divide(divide(r.rows, lanes), threads()) * lanes;
      carry = is_packed ? all.carry_back_packed
          : many        ? (states_known ? all.carry_back_many : all.backward_many)
                        : (states_known ? all.carry_back_few : all.backward_few);
      slope_count = many && !states_known ? r.segment : 0;
    }
  };

  // Checkpoints are as far apart as the caller wants. The states in memory allow for any length of a segment.
  template <typename T>
  static Segments segments(const Backward<T>& pass, bool needs_scales) {
    const Recurrence<T>& r = pass.recurrence;
    const Way<T> way(pass);
    const int64_t buffers = pass.known ? 1 : needs_scales ? 5 : 3;
    const int64_t step_bytes = std::max<int64_t>(1, buffers * r.rows * r.width * sizeof(T));
    if (way.members > 1)
      return {
          way.states_known ? std::clamp(buffer_bytes / step_bytes, r.segment, std::max(r.segment, r.steps)) : r.segment,
          1};
    return {r.segment, std::clamp<int64_t>(buffer_bytes / (r.segment * step_bytes), 1, most_slots)};
  }

  // Sets up the pass of a segment.
  template <typename T>
  static Backward<T> segment(const Backward<T>& all, int64_t number, const Way<T>& way) {
    Backward<T> pass = all.of_segment(number);
    const int64_t state_size = pass.recurrence.rows * pass.recurrence.width;
    // The gradients of the inputs are the P_l, which are written directly into the result.
    if (pass.grad_inputs) pass.grad_pre = pass.grad_inputs + pass.first * state_size;
    if (way.states_known) pass.states = const_cast<T*>(pass.checkpoint());
    return pass;
  }

  template <typename T>
  static void run(const Backward<T>& all, const Tensor&) {
    const Way<T> way(all);
    if (all.grad_inputs)
      map(all.grad_inputs, all.recurrence.steps * all.recurrence.rows * all.recurrence.width * sizeof(T));
    std::optional<Packed<T>> transposed, in_order;
    if (way.needs_slopes) transposed.emplace(all.recurrence, true);
    if (way.is_packed) in_order.emplace(all.recurrence, false);
    const Recurrence<T>& for_slopes = transposed ? transposed->recurrence : all.recurrence;
    const Recurrence<T>& for_carry = in_order ? in_order->recurrence : all.recurrence;
    if (way.members > 1)
      carry_together(all, way, for_slopes);
    else
      carry_by_schedule(all, way, for_slopes, for_carry);
  }

  // One segment after the other, where several threads share a row.
  template <typename T>
  static void carry_together(const Backward<T>& all, const Way<T>& way, const Recurrence<T>& for_slopes) {
    const Kernels<T>& functions = kernels<T>();
    const Recurrence<T>& r = all.recurrence;
    for (int64_t number = 0; number < all.segments; ++number) {
      const Backward<T> pass = segment(all, number, way);
      if (way.needs_slopes)
        stable::parallel_for(0, pass.count * r.rows, 1, [&](int64_t begin, int64_t end) {
          functions.known_slopes(pass, for_slopes, begin, end);
        });
      share_rows(r, way.members, bind(pass, way.carry));
      if (pass.grad_weight || pass.grad_bias)
        stable::parallel_for(0, pass.count, 1, [&](int64_t begin, int64_t end) {
          functions.weight_gradients(pass, begin, end);
        });
      if (pass.weight_sum || pass.bias_sum)
        stable::parallel_for(0, r.width, 1, [&](int64_t begin, int64_t end) {
          functions.shared_weight_gradients(pass, begin, end);
        });
    }
  }

  // One parallel region for all segments, in which every thread takes the next part from the schedule.
  template <typename T>
  static void carry_by_schedule(
      const Backward<T>& all, const Way<T>& way, const Recurrence<T>& for_slopes, const Recurrence<T>& for_carry) {
    const Kernels<T>& functions = kernels<T>();
    const Recurrence<T>& r = all.recurrence;
    const bool own = all.grad_weight || all.grad_bias, shared = all.weight_sum || all.bias_sum;
    // The numbers of samples, steps and output units in one piece.
    const int64_t product = 2 * r.width * r.width;
    const int64_t samples = divide(divide(piece_operations, product), whole_tiles) * whole_tiles;
    const int64_t steps = divide(piece_operations, product * r.rows);
    const int64_t units = divide(divide(r.width, 2 * threads()), least_piece_units) * least_piece_units;
    std::vector<Schedule::Counts> counts(all.segments);
    for (int64_t number = 0; number < all.segments; ++number) {
      const int64_t count = all.of_segment(number).count;
      counts[number].slopes = way.needs_slopes ? divide(count * r.rows, samples) : 0;
      // A segment has pieces of steps first, then pieces of units.
      counts[number].gradients = (own ? divide(count, steps) : 0) + (shared ? divide(r.width, units) : 0);
    }
    const int64_t groups = divide(r.rows, way.together);
    // Segment 0, which has the last steps, may be far shorter than the others.
    const Schedule::Counts& most = counts.back();
    const int64_t useful = std::max({groups, most.slopes, most.gradients});
    Schedule schedule(std::move(counts), groups, all.slots, shared);
    const auto work = [&](int64_t, int64_t) {
      Shared<T> memory(1, way.together * r.width, way.slope_count);
      for (Schedule::Part part; (part = schedule.next()).kind != Schedule::Kind::none; schedule.finish(part)) {
        Backward<T> pass = segment(all, part.segment, way);
        const auto in_pieces = [&](int64_t index, int64_t size, int64_t end, const auto& run) {
          run(index * size, std::min((index + 1) * size, end));
        };
        if (part.kind == Schedule::Kind::slopes) {
          in_pieces(part.index, samples, pass.count * r.rows, [&](int64_t begin, int64_t end) {
            functions.known_slopes(pass, for_slopes, begin, end);
          });
        } else if (part.kind == Schedule::Kind::carry) {
          pass.recurrence = for_carry;
          memory.team.reopen();
          in_pieces(part.index, way.together, r.rows, [&](int64_t begin, int64_t end) {
            way.carry(pass, begin, end, memory, 1);
          });
        } else if (const int64_t own_pieces = own ? divide(pass.count, steps) : 0; part.index < own_pieces) {
          in_pieces(part.index, steps, pass.count, [&](int64_t begin, int64_t end) {
            functions.weight_gradients(pass, begin, end);
          });
        } else {
          in_pieces(part.index - own_pieces, units, r.width, [&](int64_t begin, int64_t end) {
            functions.shared_weight_gradients(pass, begin, end);
          });
        }
      }
    };
    stable::parallel_for(0, std::min<int64_t>(threads(), useful), 1, [&](int64_t begin, int64_t end) {
      try {
        work(begin, end);
      } catch (...) {
        schedule.stop();
        throw;
      }
    });
  }
};

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("orthogonal_filter.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter<lcw_ops::Cpu>));
  m.impl("orthogonal_filter_backward.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter_backward<lcw_ops::Cpu>));
}
