// Loops over the units of a layer, on all threads: the gradients of their rows, and sums over the samples.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "widening.h"

namespace lcw_ops {

// Calls work(isa, first, last) for ranges of units. A unit takes as long as a loop over `elements` elements.
template <typename Work>
void for_each_unit(int64_t units, int64_t elements, const Work& work) {
  for_each_part(units, grain_of(elements), work);
}

// Turns the gradients (n, m) of the rows into the gradients of their parameters. `Rows` has make(unit, kept, row) and
// backward(unit, kept, row, gradient).
template <template <typename> class Rows, typename T>
void backward_rows(const Rows<T>& rows, const Source<T>& grad, int64_t n) {
  const int64_t m = rows.m;
  for_each_unit(n, m, [=](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    Buffer<T> kept(rows.kept()), direction(padded<T>(m)), g(padded<T>(m));
    for (int64_t unit = begin; unit < end; ++unit) {
      rows.template make<decltype(isa)>(unit, kept.data(), direction.data());
      const T* row = grad.template read<decltype(isa)>(unit * m, m, g.data());
      if (row != g.data()) std::copy(row, row + m, g.data());
      std::fill(g.data() + m, g.data() + padded<T>(m), T(0));
      rows.template backward<decltype(isa)>(unit, kept.data(), direction.data(), g.data());
    }
  });
}

// For a layer y = scale act(z): computes dL/dz = scale dL/dy act'(z) for every unit and sample and, for every unit, the
// sums over the samples of dL/dy act(z), dL/dz and dL/dy, in float64 and in a fixed order. A result without a target is
// left out.
template <typename T>
struct UnitGradients {
  int64_t samples, n;
  Source<T> grad, activated;  // dL/dy and act(z); the latter has no data if neither act' nor a sum needs it
  const T* scale;
  bool relu;
  std::atomic<bool>* overflowed = nullptr;  // set to true if scale dL/dy is not finite although dL/dy is

  void compute(
      const Target<T>& grad_product, const Target<T>& with_activated, const Target<T>& of_product,
      const Target<T>& of_grad) const {
    // The sums are a cascade: it adds 16 terms, then 16 of these sums, and so on. Its error is at most 16 roundings per
    // level, of T in the first level and of float64 in the others.
    constexpr int64_t width = 32, terms = 16;
    constexpr int levels = 4, sums = 3;
    constexpr T largest = std::numeric_limits<T>::max();
    const int64_t grain = std::max(width, grain_of(samples));
    for_each_part(n, grain, [=, *this](auto isa, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
      using Isa = decltype(isa);
      for (int64_t j = begin; j < end; j += width) {
        const int64_t count = std::min(width, end - j);
        // A block at the end of the range is padded with units of 0, so that all loops run over `width` units.
        T factor[width] = {}, grad_buffer[width] = {}, activated_buffer[width] = {}, dz[width];
        std::copy(scale + j, scale + j + count, factor);
        const auto whole = [&](const T* row, T* buffer) LCW_LAMBDA_INLINE {
          if (count == width || row == buffer) return row;
          std::copy(row, row + count, buffer);
          return static_cast<const T*>(buffer);
        };
        T part[sums][width] = {};
        double total[levels][sums][width] = {};
        int infinite = 0;
        for (int64_t i = 0; i < samples; ++i) {
          const T* dy = whole(grad.template read<Isa>(i * n + j, count, grad_buffer), grad_buffer);
          const T* a = activated_buffer;
          if (activated.data)
            a = whole(activated.template read<Isa>(i * n + j, count, activated_buffer), activated_buffer);
          for (int64_t u = 0; u < width; ++u) {
            // A NaN passes the ReLU.
            dz[u] = relu && a[u] <= T(0) ? T(0) : factor[u] * dy[u];
            infinite |= int(!(std::abs(dz[u]) <= largest)) & int(std::abs(dy[u]) <= largest);
            part[0][u] += dy[u] * a[u];
            part[1][u] += dz[u];
            part[2][u] += dy[u];
          }
          if (grad_product) grad_product.template write<Isa>(dz, i * n + j, count);
          const bool is_last = i + 1 == samples;
          if ((i + 1) % terms != 0 && !is_last) continue;
          for (int s = 0; s < sums; ++s)
            for (int64_t u = 0; u < width; ++u) total[0][s][u] += double(part[s][u]), part[s][u] = 0;
          int64_t done = (i + 1) / terms;
          for (int level = 0; level < levels - 1 && (done % terms == 0 || is_last); ++level, done /= terms)
            for (int s = 0; s < sums; ++s)
              for (int64_t u = 0; u < width; ++u) {
                total[level + 1][s][u] += total[level][s][u];
                total[level][s][u] = 0;
              }
        }
        if (infinite && overflowed) *overflowed = true;
        const Target<T> targets[sums] = {with_activated, of_product, of_grad};
        for (int s = 0; s < sums; ++s) {
          T rounded[width];
          for (int64_t u = 0; u < count; ++u) rounded[u] = T(total[levels - 1][s][u]);
          if (targets[s]) targets[s].template write<Isa>(rounded, j, count);
        }
      }
    });
  }
};

}  // namespace lcw_ops
