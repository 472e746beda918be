// One thread carries its rows through the steps: the state forward, the gradient backward. The symbols are those of
// orthogonal_filter.cpp.
#pragma once

#include "../vector_math.h"
#include "team.h"

namespace lcw_ops {

// Computes <G_l, O h_{l-1}> and <G_l, act(A_l)> of each row, in float64. Their sums over the rows are the gradients of
// alpha and beta.
template <typename T>
LCW_INLINE void scale_products(const Backward<T>& pass, const T* gradient, int64_t s, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const T* filtered = pass.filtered + s * r.rows * r.width;
  const T* activated = pass.activated + s * r.rows * r.width;
  for (int64_t m = begin; m < end; ++m) {
    const T* row = gradient + (m - begin) * r.width;
    double alpha_product = 0, beta_product = 0;
    for (int64_t i = 0; i < r.width; ++i) {
      alpha_product += double(row[i]) * double(filtered[m * r.width + i]);
      beta_product += double(row[i]) * double(activated[m * r.width + i]);
    }
    pass.alpha_products[(pass.first + s) * r.rows + m] = alpha_product;
    pass.beta_products[(pass.first + s) * r.rows + m] = beta_product;
  }
}

// Carries rows begin..end-1, or some of their units, through the steps on one thread.
template <class Tiles, class Layout, typename T>
class Carrier {
 public:
  LCW_INLINE Carrier(const Recurrence<T>& r, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots)
      : r_(r),
        begin_(begin),
        end_(end),
        size_(Layout::size(end - begin, r.width)),
        shared_(shared),
        weights_(r),
        permutation_(r),
        filtered_(size_),
        pre_(size_),
        scratch_(size_),
        grad_pre_(size_),
        number_(shared.team.join(slots)),
        layout_(end - begin, r.width, number_ < 0 ? Slice{0, 0} : shared.slice(number_, r.width)) {}

  // False if the other threads began without this one.
  LCW_INLINE bool is_in() const { return number_ >= 0; }

  LCW_INLINE void forward(const Forward<T>& pass) {
    const int64_t n = r_.width;
    T *state = shared_.now.data(), *next = shared_.next.data();
    const auto store = [&](T* states, int64_t index) { layout_.store(state, rows_of(states, index)); };

    layout_.load(pass.h0 + begin_ * n, state);
    if (!meet()) return;
    if (pass.return_states) store(pass.output, 0);
    for (int64_t l = 0; l < r_.steps; ++l) {
      if (pass.checkpoints && l % r_.segment == 0) store(pass.checkpoints, l / r_.segment);
      apply_filter(l, state);
      pre_activation(l, state);
      const T alpha = r_.alpha_at(l), beta = r_.beta_at(l);
      const T *filtered = filtered_.data(), *pre = pre_.data();
      T* activated = pass.activated ? own_rows(pass.activated, l) : nullptr;
      with_activation(r_.activation, [&](auto act) LCW_LAMBDA_INLINE {
        layout_.for_each_run([&](int64_t first, int64_t count) LCW_LAMBDA_INLINE {
          if (!activated) {
            for (int64_t i = first; i < first + count; ++i) next[i] = add(alpha, filtered[i], beta, act.value(pre[i]));
            return;
          }
          for (int64_t i = first; i < first + count; ++i) {
            const T y = act.value(pre[i]);
            activated[i] = y;
            next[i] = add(alpha, filtered[i], beta, y);
          }
        });
      });
      if (pass.activated && !Layout::is_row_major) layout_.store(activated, rows_of(pass.activated, l));
      if (!meet()) return;
      std::swap(state, next);
      if (pass.return_states) store(pass.output, l + 1);
    }
    if (!pass.return_states) store(pass.output, 0);
  }

  // Recomputes the states and slopes (beta act'(A_l)) of a segment from the checkpoint at its start. Returns false if
  // the other threads go on without this one.
  LCW_INLINE bool recompute(const Backward<T>& pass) {
    T *state = shared_.now.data(), *next = shared_.next.data();
    layout_.load(pass.checkpoint() + begin_ * r_.width, state);
    if (!meet()) return false;
    for (int64_t s = 0; s < pass.count; ++s) {
      const int64_t l = pass.first + s;
      layout_.store(state, rows_of(pass.states, s));
      // The state after the segment is not needed.
      if (s + 1 < pass.count || pass.filtered) apply_filter(l, state);
      pre_activation(l, state);
      const T alpha = r_.alpha_at(l), beta = r_.beta_at(l);
      const T* filtered = filtered_.data();
      T *pre = pre_.data(), *slopes = slopes_of(pass, s);
      with_activation(r_.activation, [&](auto act) LCW_LAMBDA_INLINE {
        layout_.for_each_run([&](int64_t first, int64_t count) LCW_LAMBDA_INLINE {
          for (int64_t i = first; i < first + count; ++i) {
            const T a = pre[i], y = act.value(a);
            slopes[i] = beta * act.slope(a, y);
            next[i] = add(alpha, filtered[i], beta, y);
            pre[i] = y;
          }
        });
      });
      if (pass.filtered) {
        layout_.store(filtered, rows_of(pass.filtered, s));
        layout_.store(pre, rows_of(pass.activated, s));
      }
      if (!meet()) return false;
      std::swap(state, next);
    }
    return true;
  }

  // Carries G from the end of a segment to its start. The slopes must be known.
  LCW_INLINE void carry_back(const Backward<T>& pass) {
    T *gradient = shared_.now.data(), *next = shared_.next.data();
    layout_.load(pass.gradient + begin_ * r_.width, gradient);
    if (!meet()) return;
    for (int64_t s = pass.count - 1; s >= 0; --s) {
      const int64_t l = pass.first + s;
      if (pass.grad_states) layout_.store(gradient, rows_of(pass.grad_states, l + 1));
      if (pass.filtered && number_ == 0)
        scale_products(pass, layout_.row_major(gradient, scratch_.data()), s, begin_, end_);
      multiply_by_slopes(pass, s, gradient);
      layout_.store(grad_pre_.data(), rows_of(pass.grad_pre, s));
      if (r_.permutation)
        layout_.permute(permutation_.inverse.data(), gradient, filtered_.data());
      else
        layout_.multiply_transposed(r_.filter_at(l), gradient, filtered_.data(), nullptr);
      // The filter branch and the weight branch have a sum each. If the terms of the weight branch were added to the
      // sum of the filter branch, which is far larger, they would be rounded at its scale.
      layout_.multiply_transposed(weights_.at(l), grad_pre_.data(), pre_.data(), weights_.ahead(l - 1));
      const T alpha = r_.alpha_at(l);
      const T *filtered = filtered_.data(), *pre = pre_.data();
      layout_.for_each_run([&](int64_t first, int64_t count) LCW_LAMBDA_INLINE {
        for (int64_t i = first; i < first + count; ++i) next[i] = alpha * filtered[i] + pre[i];
      });
      if (pass.return_states) layout_.add_rows(rows_of(pass.grad_output, l), scratch_.data(), next);
      if (!meet()) return;
      std::swap(gradient, next);
    }
    layout_.store(gradient, pass.gradient + begin_ * r_.width);
    if (pass.grad_states && pass.first == 0) layout_.store(gradient, rows_of(pass.grad_states, 0));
  }

 private:
  // Waits for the other threads that carry the same rows. Returns false if they go on without this one.
  LCW_INLINE bool meet() {
    shared_.team.wait();
    layout_.units = shared_.slice(number_, r_.width);
    return layout_.units.end > 0;
  }

  // This thread's rows of entry `index` of a buffer (L, M, N).
  template <typename Pointer>
  LCW_INLINE Pointer rows_of(Pointer buffer, int64_t index) const {
    return buffer + (index * r_.rows + begin_) * r_.width;
  }

  LCW_INLINE T* slopes_of(const Backward<T>& pass, int64_t s) const {
    return Layout::is_row_major ? rows_of(pass.slopes, s) : shared_.slopes.data() + s * size_;
  }

  // This thread's rows of an entry of a buffer (L, M, N) in place, or memory of their size in another layout.
  template <typename Pointer>
  LCW_INLINE T* own_rows(Pointer buffer, int64_t index) {
    return Layout::is_row_major ? const_cast<T*>(rows_of(buffer, index)) : scratch_.data();
  }

  // alpha f + beta y. The compiler may fuse either multiplication with the addition, and chooses another one in another
  // loop. The smaller product is rounded here, and every loop gives the same bits.
  LCW_INLINE static T add(T alpha, T filtered, T beta, T y) {
    const T part = beta * y;
    return Tiles::Isa::has_multiply_add ? std::fma(alpha, filtered, part) : alpha * filtered + part;
  }

  // P_l = beta act'(A_l) * G_l
  LCW_INLINE void multiply_by_slopes(const Backward<T>& pass, int64_t s, const T* gradient) {
    T* product = grad_pre_.data();
    if (!pass.known) {
      const T* slopes = slopes_of(pass, s);
      for (int64_t i = 0; i < size_; ++i) product[i] = slopes[i] * gradient[i];
      return;
    }
    const int64_t l = pass.first + s;
    const T beta = r_.beta_at(l);
    const T* activated = own_rows(pass.known, l);
    if (!Layout::is_row_major) layout_.load(rows_of(pass.known, l), scratch_.data());
    with_activation(r_.activation, [&](auto act) LCW_LAMBDA_INLINE {
      for (int64_t i = 0; i < size_; ++i) product[i] = beta * act.slope(activated[i], activated[i]) * gradient[i];
    });
  }

  // filtered = O h
  LCW_INLINE void apply_filter(int64_t l, const T* state) {
    if (r_.permutation)
      layout_.permute(permutation_.forward, state, filtered_.data());
    else
      layout_.multiply(r_.filter_at(l), nullptr, state, filtered_.data(), nullptr);
  }

  // pre = W h + b + u
  LCW_INLINE void pre_activation(int64_t l, const T* state) {
    const T* bias = r_.bias ? r_.bias + l * r_.bias_stride : nullptr;
    layout_.multiply(weights_.at(l), bias, state, pre_.data(), weights_.ahead(l + 1));
    if (r_.inputs) layout_.add_rows(rows_of(r_.inputs, l), scratch_.data(), pre_.data());
  }

  const Recurrence<T>& r_;
  const int64_t begin_, end_, size_;
  Shared<T>& shared_;
  Weights<Tiles, T> weights_;
  const Permutation permutation_;
  // All memory is allocated before the thread joins the team. After an error the others would wait for it for ever.
  Buffer<T> filtered_, pre_, scratch_, grad_pre_;
  const int64_t number_;
  Layout layout_;
};

template <class Tiles, class Layout, typename T>
LCW_INLINE void forward_rows(const Forward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Tiles, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in()) carrier.forward(pass);
}

// Recomputes a segment's states and slopes for some rows, then carries the rows' G back through the segment.
template <class Tiles, class Layout, typename T>
LCW_INLINE void backward_rows(const Backward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Tiles, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in() && carrier.recompute(pass)) carrier.carry_back(pass);
}

// Carries G back through a segment whose states and slopes are known.
template <class Tiles, class Layout, typename T>
LCW_INLINE void carry_back_rows(const Backward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Tiles, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in()) carrier.carry_back(pass);
}

}  // namespace lcw_ops
