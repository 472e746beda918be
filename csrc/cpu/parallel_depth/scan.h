// The scan over all layers, by rows or by chunks of layers on all threads.
//
// Rows are independent, and threads share them. If there are too few rows, threads share the layers, cut into one chunk
// more than there are threads. While the first chunk is solved, all others but the last are summed to their ends from a
// state of 0. Then the state is carried from the end of each chunk to the end of the next, by alpha^C O^C for a chunk
// of C layers, and all chunks but the first are solved at once. That computes every term of the inner chunks twice and
// takes 2 / (threads + 1) of one thread's time. Every sum has a fixed order.
#pragma once

#include "../tensors.h"
#include "filters.h"

namespace lcw_ops::parallel_depth {

// The states (D + 1, M, N) in the order of the steps 0..D-1: the order of the layers or, in the adjoint, the reverse.
template <typename T>
struct Chain {
  int64_t layers, rows, width;
  T* states;
  const T* alpha;
  int64_t alpha_stride;
  bool is_adjoint;

  LCW_INLINE int64_t layer(int64_t step) const { return is_adjoint ? layers - 1 - step : step; }
  LCW_INLINE T* first() const { return states + (is_adjoint ? layers * rows * width : 0); }
  LCW_INLINE T* after(int64_t step) const { return states + (layer(step) + !is_adjoint) * rows * width; }
  LCW_INLINE T alpha_at(int64_t step) const { return alpha[layer(step) * alpha_stride]; }

  // The product of every alpha, clamped because an infinity would turn a state of 0 into NaN.
  double decay(int64_t begin, int64_t end) const {
    constexpr double most = std::numeric_limits<double>::max();
    double product = 1;
    for (int64_t step = begin; step < end; ++step) product = std::clamp(product * double(alpha_at(step)), -most, most);
    return product;
  }
};

// The work of one thread: some rows through some steps.
template <typename Carried>
struct Part {
  int64_t first_row, last_row, begin, end;
  const Carried* carry;  // the states of all rows before the first step
  Carried* last;         // the states after the last step, or nullptr
  bool is_final;         // whether states are written
  double change = 0;     // the largest relative change
};

// Neighbouring rows go through the layers together: as many as have a state of at most this many bytes. Two such states
// fit in the nearest cache.
constexpr int64_t bytes_together = 8192;

template <class Isa, typename T, class Filter, class Terms>
LCW_INLINE void scan_part(
    const Chain<T>& chain, const Filter& filter, const Terms& terms, Part<typename Filter::Carried>& part) {
  using Carried = typename Filter::Carried;
  const int64_t width = chain.width, fitting = std::max<int64_t>(1, bytes_together / (width * int64_t(sizeof(T))));
  const int64_t together = std::min(fitting, part.last_row - part.first_row);
  Buffer<Carried> carried(2 * together * width);
  Buffer<T> added(together * width);
  std::fill_n(added.data(), together * width, T(0));
  double change = 0;
  for (int64_t first = part.first_row; first < part.last_row; first += together) {
    const int64_t rows = std::min(together, part.last_row - first);
    const Carried* before = part.carry + first * width;
    for (int64_t step = part.begin; step < part.end; ++step) {
      const int64_t layer = chain.layer(step);
      const Carried alpha = chain.alpha_at(step);
      const T* row_terms = terms.at(layer, first, rows, added.data());
      T* states = chain.after(step) + first * width;
      Carried* after = carried.data() + (step & 1) * together * width;
      if constexpr (std::is_same_v<Carried, T>)
        if (part.is_final) after = states;
      const auto step_rows = [&](auto is_final) LCW_LAMBDA_INLINE {
        for (int64_t i = 0; i < rows * width; i += width) {
          Largest<T, Filter::template lanes<Isa>> largest;
          filter.template step<Isa, is_final()>(alpha, before + i, row_terms + i, after + i, states + i, largest);
          if (is_final()) largest.raise(change);
        }
      };
      if (part.is_final) {
        step_rows(std::true_type());
        terms.after_step(layer, first, rows, before);
      } else {
        step_rows(std::false_type());
      }
      before = after;
    }
    if (part.last) std::copy(before, before + rows * width, part.last + first * width);
  }
  part.change = change;
}

// With fewer bytes per thread, threads would write to the same cache lines and wait for each other.
constexpr int64_t least_bytes_of_rows = 128;

// Runs all steps on all threads and returns the largest relative change.
template <typename T, class Filter, class Terms>
double scan(const Chain<T>& chain, const Filter& filter, const Terms& terms) {
  using Carried = typename Filter::Carried;
  const int64_t rows = chain.rows, layers = chain.layers, size = rows * chain.width;
  double change = 0;
  if (layers * size == 0) return change;
  const auto run = [&](std::vector<Part<Carried>>& parts) {
    for_each_part(parts.size(), 1, [&](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      for (int64_t p = begin; p < end; ++p) scan_part<decltype(isa)>(chain, filter, terms, parts[p]);
    });
    for (const Part<Carried>& part : parts) raise_to(change, part.change);
  };

  std::vector<Carried> converted;
  const Carried* start;
  if constexpr (std::is_same_v<Carried, T>)
    start = chain.first();
  else
    converted.assign(chain.first(), chain.first() + size), start = converted.data();

  const int64_t worthwhile = layers * size / least_elements;
  const int64_t threads = std::clamp<int64_t>(worthwhile, 1, stable::get_num_threads());
  std::vector<Part<Carried>> parts;
  // Threads that share the layers take 2 / (threads + 1) of one thread's time; with few rows, threads that share the
  // rows take 1 / rows of it.
  const bool are_few = 2 * rows <= threads || size * int64_t(sizeof(T)) < threads * least_bytes_of_rows;
  if (!are_few || threads == 1 || layers <= threads) {
    const int64_t count = std::min(threads, rows);
    for (int64_t p = 0; p < count; ++p)
      parts.push_back({p * rows / count, (p + 1) * rows / count, 0, layers, start, nullptr, true});
    run(parts);
    return change;
  }

  const auto bound = [&](int64_t chunk) { return chunk * layers / (threads + 1); };
  const std::vector<Carried> nothing(size);
  std::vector<Carried> ends(threads * size);
  for (int64_t c = 0; c < threads; ++c)
    parts.push_back({0, rows, bound(c), bound(c + 1), c ? nothing.data() : start, ends.data() + c * size, c == 0});
  run(parts);
  parts.clear();
  for (int64_t c = 1; c <= threads; ++c) {
    Carried* carry = ends.data() + (c - 1) * size;
    if (c > 1) {
      const int64_t begin = bound(c - 1), end = bound(c);
      filter.carry(end - begin, chain.decay(begin, end), rows, carry - size, carry);
    }
    parts.push_back({0, rows, bound(c), bound(c + 1), carry, nullptr, true});
  }
  run(parts);
  return change;
}

}  // namespace lcw_ops::parallel_depth
