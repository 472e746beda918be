// The orthogonal-filter recurrence on the CPU, forward and backward.
//
//   h_l = alpha_l O_l h_{l-1} + beta_l act(W_l h_{l-1} + b_l + u_l)
//   P_l = beta_l act'(A_l) * G_l      G_{l-1} = alpha_l G_l O_l + P_l W_l      dW_l = P_l^T H_{l-1}
//
// Cost per step and row, forward: 4 N^2 operations (2 N^2 with a permutation filter), W_l read once per thread;
// backward: the forward again, 4 N^2 for G, 2 N^2 for dW. Bound by arithmetic from about 16 rows, below by reading W.
// A. Ceni, arXiv 2210.01245 (forward); backward in the same notation as lcw_ops/reference/orthogonal_filter.py.
//
// Rows are independent: each thread carries its slice of the batch through all layers; where there are fewer rows than
// threads, several threads carry the same rows and share the units. Backward works segment by segment from the end:
// recompute the states of the segment and run G back through it (rows in parallel), then the weight gradients of the
// segment (layers in parallel). Every sum has a fixed order.

#include "orthogonal_filter.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "large_pages.h"
#include "products.h"
#include "vector_math.h"

namespace lcw_ops {
namespace {

// Terms of one partial sum. Products with a state are added up like a plain matrix product; gradients of weights run over
// all samples, whose number has no bound.
constexpr int64_t state_terms = 128, sample_terms = 32;

// The product in partial sums of so many terms: rounding grows like sqrt(terms) + sqrt(depth / terms) instead of
// sqrt(depth).
template <class Products, typename T>
void multiply_in_parts(Product<T> product, int64_t terms) {
  const int64_t depth = product.depth;
  const T* shift = product.shift;
  for (int64_t k = 0; k < depth; k += terms) {
    product.depth = std::min(terms, depth - k);
    product.shift = k + terms < depth ? nullptr : shift;
    Products::multiply(product);
    product.a += terms * product.a_k, product.b += terms * product.ldb;
    if (product.ahead) product.ahead += product.depth * product.rows;
    product.accumulate = true;
  }
}

// The weights in the state's type: as they lie, or widened from 16 bits into a buffer of the thread's own.
template <class Products, typename T>
class Weights {
 public:
  explicit Weights(const Recurrence<T>& r)
      : r_(r), native_(sizeof(T) == 8 || r.weight_type == ScalarType::Float), wide_(native_ ? 0 : r.width * r.width) {}

  LCW_INLINE const T* at(int64_t l) {
    if (native_) return r_.template weight_at<T>(l);
    const uint16_t* narrow = r_.template weight_at<uint16_t>(l);
    if (narrow != last_) Products::widen(last_ = narrow, r_.weight_type, wide_.data(), r_.width * r_.width);
    return wide_.data();
  }

  // Where the matrix of another step lies, if it is worth fetching early; nullptr if not, or if there is no such step.
  LCW_INLINE const T* ahead(int64_t l) const {
    return native_ && r_.weight_stride > 0 && l >= 0 && l < r_.steps ? r_.template weight_at<T>(l) : nullptr;
  }

 private:
  const Recurrence<T>& r_;
  const bool native_;
  Buffer<T> wide_;
  const uint16_t* last_ = nullptr;
};

// p with (O h)_i = h_{p_i}, and its inverse for O^T.
struct Permutation {
  const int64_t* forward;
  std::vector<int64_t> inverse;

  template <typename T>
  explicit Permutation(const Recurrence<T>& r) : forward(r.permutation), inverse(r.permutation ? r.width : 0) {
    for (size_t i = 0; i < inverse.size(); ++i) inverse[forward[i]] = i;
  }
};

// A slice of the units; all of them, except where threads share rows.
struct Slice {
  int64_t begin, end;
};

// Two ways of holding some rows of the state, with the same members. Many rows: (units, rows) in panels of two vectors
// of rows, so that a vector holds one unit of neighbouring rows and W is read as it lies, number by number. Rows are
// padded to whole vectors; what the padding holds is never read back.
template <class Products, typename T>
struct ManyRows {
  static constexpr int64_t lanes = Products::lanes, widest = 2 * lanes;
  static constexpr bool is_row_major = false;
  int64_t rows, width;
  Slice units;  // always all

  ManyRows(int64_t rows_, int64_t width_, Slice units_) : rows(rows_), width(width_), units(units_) {}

  LCW_INLINE static int64_t padded(int64_t rows) { return (rows + lanes - 1) / lanes * lanes; }
  LCW_INLINE static int64_t size(int64_t rows, int64_t width) { return padded(rows) * width; }

  // f(first row, rows, padded rows, where the panel begins)
  template <typename F>
  LCW_INLINE void for_each_panel(const F& f) const {
    for (int64_t first = 0; first < rows; first += widest) {
      const int64_t count = std::min(widest, rows - first);
      f(first, count, padded(count), first * width);
    }
  }

  // f(begin, count) for the elements that are this thread's.
  template <typename F>
  LCW_INLINE void for_each_run(const F& f) const {
    f(int64_t(0), size(rows, width));
  }

  LCW_INLINE void load(const T* source, T* state) const {
    for_each_panel([&](int64_t first, int64_t count, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      Products::transpose(source + first * width, width, state + offset, columns, count, width);
      for (int64_t i = 0; i < width; ++i)
        for (int64_t r = count; r < columns; ++r) state[offset + i * columns + r] = T(0);
    });
  }

  LCW_INLINE void store(const T* state, T* target) const {
    for_each_panel([&](int64_t first, int64_t count, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      Products::transpose(state + offset, columns, target + first * width, width, width, count);
    });
  }

  // out = W h + b; `bias` may be nullptr, and so may `ahead`, the matrix that comes next.
  LCW_INLINE void multiply(const T* matrix, const T* bias, const T* state, T* out, const T* ahead) const {
    product(matrix, width, 1, bias, state, out, ahead);
  }

  // out = W^T h
  LCW_INLINE void multiply_transposed(const T* matrix, const T* state, T* out, const T* ahead) const {
    product(matrix, 1, width, nullptr, state, out, ahead);
  }

  LCW_INLINE void product(
      const T* matrix, int64_t row, int64_t k, const T* bias, const T* state, T* out, const T* ahead) const {
    for_each_panel([&](int64_t first, int64_t, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      multiply_in_parts<Products, T>(
          {matrix, row, k, state + offset, columns, out + offset, columns, width, columns, width, false, bias,
           first == 0 ? ahead : nullptr},
          state_terms);
    });
  }

  // out_i = h_{index_i}
  LCW_INLINE void permute(const int64_t* index, const T* state, T* out) const {
    for_each_panel([&](int64_t, int64_t, int64_t columns, int64_t offset) LCW_LAMBDA_INLINE {
      for (int64_t i = 0; i < width; ++i)
        for (int64_t r = 0; r < columns; ++r) out[offset + i * columns + r] = state[offset + index[i] * columns + r];
    });
  }

  LCW_INLINE const T* row_major(const T* state, T* scratch) const {
    store(state, scratch);
    return scratch;
  }

  // out += source, which is row-major; `scratch` has the size of a state.
  LCW_INLINE void add_rows(const T* source, T* scratch, T* out) const {
    load(source, scratch);
    for (int64_t i = 0; i < size(rows, width); ++i) out[i] += scratch[i];
  }
};

// Few rows: row-major. Products with W run along its rows, so that it need not be transposed either.
template <class Products, typename T>
struct FewRows {
  static constexpr bool is_row_major = true;
  int64_t rows, width;
  Slice units;

  FewRows(int64_t rows_, int64_t width_, Slice units_) : rows(rows_), width(width_), units(units_) {}

  LCW_INLINE static int64_t size(int64_t rows, int64_t width) { return rows * width; }

  template <typename F>
  LCW_INLINE void for_each_run(const F& f) const {
    const int64_t count = units.end - units.begin;
    if (count == width) return f(int64_t(0), rows * width);
    for (int64_t m = 0; m < rows; ++m) f(m * width + units.begin, count);
  }

  LCW_INLINE void load(const T* source, T* state) const {
    for_each_run([&](int64_t begin, int64_t count) LCW_LAMBDA_INLINE {
      std::copy(source + begin, source + begin + count, state + begin);
    });
  }

  LCW_INLINE void store(const T* state, T* target) const { load(state, target); }

  LCW_INLINE void multiply(const T* matrix, const T* bias, const T* state, T* out, const T* ahead) const {
    const int64_t count = units.end - units.begin;
    Products::multiply_by_rows(
        state, matrix + units.begin * width, width, out + units.begin, width, rows, count,
        ahead ? ahead + units.begin * width : nullptr);
    if (!bias) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = units.begin; i < units.end; ++i) out[m * width + i] += bias[i];
  }

  LCW_INLINE void multiply_transposed(const T* matrix, const T* state, T* out, const T*) const {
    multiply_in_parts<Products, T>(
        {state, width, 1, matrix + units.begin, width, out + units.begin, width, rows, units.end - units.begin, width},
        state_terms);
  }

  LCW_INLINE void permute(const int64_t* index, const T* state, T* out) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = units.begin; i < units.end; ++i) out[m * width + i] = state[m * width + index[i]];
  }

  LCW_INLINE const T* row_major(const T* state, T*) const { return state; }

  LCW_INLINE void add_rows(const T* source, T*, T* out) const {
    for_each_run([&](int64_t begin, int64_t count) LCW_LAMBDA_INLINE {
      for (int64_t i = begin; i < begin + count; ++i) out[i] += source[i];
    });
  }
};

// Many rows and one matrix for all steps, a recurrence over time: row-major too, since here the matrix can be put in
// order once, in panels of two vectors of columns (`pack`), and neither states nor inputs are transposed in any step.
template <class Products, typename T>
struct PackedRows : FewRows<Products, T> {
  static constexpr int64_t panel = 2 * Products::lanes;  // and the least width
  using FewRows<Products, T>::FewRows;

  LCW_INLINE static int64_t panels(int64_t width) { return (width + panel - 1) / panel; }
  LCW_INLINE static int64_t packed_size(int64_t width) { return panels(width) * panel * width; }

  // f(first column, where the panel lies); the last panel ends with the matrix.
  template <typename F>
  LCW_INLINE static void for_each_panel(int64_t width, const F& f) {
    for (int64_t p = 0; p < panels(width); ++p) f(std::min(p * panel, width - panel), p * panel * width);
  }

  // For products of a row with the matrix or, `transposed`, with its transpose.
  LCW_INLINE static void pack(const T* matrix, int64_t width, bool transposed, T* packed) {
    for_each_panel(width, [&](int64_t column, int64_t offset) LCW_LAMBDA_INLINE {
      if (transposed) return Products::transpose(matrix + column * width, width, packed + offset, panel, panel, width);
      for (int64_t k = 0; k < width; ++k)
        std::copy(matrix + k * width + column, matrix + k * width + column + panel, packed + offset + k * panel);
    });
  }

  LCW_INLINE void multiply(const T* packed, const T* bias, const T* state, T* out, const T*) const {
    const int64_t rows = this->rows, width = this->width;
    for_each_panel(width, [&](int64_t column, int64_t offset) LCW_LAMBDA_INLINE {
      Product<T> product{state, width, 1, packed + offset, panel, out + column, width, rows, panel, width};
      product.is_near = true;
      multiply_in_parts<Products, T>(product, state_terms);
    });
    if (!bias) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < width; ++i) out[m * width + i] += bias[i];
  }

  LCW_INLINE void multiply_transposed(const T* packed, const T* state, T* out, const T* ahead) const {
    multiply(packed, nullptr, state, out, ahead);
  }
};

// Threads that carry the same rows and wait for each other after every step. Whoever comes within a moment is in;
// nobody waits for a thread that the pool may never start, and when waiting goes on to be slow, because somebody else
// has the processors, one member goes on alone. The results do not depend on who did what.
class Team {
 public:
  explicit Team(int64_t expected) : expected_(expected) {}

  // This thread's number, or -1 when the others have begun; `slots` are the calls it stands for.
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

  int64_t count() const { return count_.load(std::memory_order_relaxed); }

  // Everything that any member wrote before is visible to every member after. Afterwards the members from count() on
  // have nothing left to do.
  void wait() {
    const int64_t count = this->count();
    if (count == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      if (slow_rounds_.load(std::memory_order_relaxed) > slow_rounds_at_first + round / rounds_per_slow_one) count_.store(1);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    const int64_t usual = usual_spins_.load(std::memory_order_relaxed), most = least_slow_spins + 8 * usual;
    int64_t spins = 0;
    for (; round_.load(std::memory_order_acquire) == round; ++spins) spins < most ? pause() : std::this_thread::yield();
    if (spins >= most) slow_rounds_.fetch_add(1, std::memory_order_relaxed);
    // An average over about eight rounds, whoever waits.
    usual_spins_.store(usual + (std::min(spins, most) - usual) / 8, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t closed = int64_t(1) << 32;
  // At least some 50 microseconds, and many times what is usual: a processor was taken away.
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

// What the members of a team have in common: a state or gradient, the next one, and the slopes of a segment.
template <typename T>
struct Shared {
  Team team;
  Buffer<T> now, next, slopes;

  Shared(int64_t expected, int64_t size, int64_t slope_count)
      : team(expected), now(size), next(size), slopes(slope_count * size) {}

  // The units of a member: none for those that the team goes on without. Slices begin with a whole vector, so that every
  // unit meets the same instructions however many members there are.
  Slice slice(int64_t number, int64_t width) const {
    constexpr int64_t vector = 64 / sizeof(T);
    const int64_t count = team.count();
    if (number >= count) return {0, 0};
    return {width * number / count / vector * vector, number + 1 < count ? width * (number + 1) / count / vector * vector : width};
  }
};

// <G_l, O h_{l-1}> and <G_l, act(A_l)> of each row, in float64: the gradients of alpha and beta.
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

// One thread carrying rows begin..end-1, or some of their units, through the steps.
template <class Products, class Layout, typename T>
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
        number_(shared.team.join(slots)),
        layout_(end - begin, r.width, number_ < 0 ? Slice{0, 0} : shared.slice(number_, r.width)) {}

  // False when the others began without this thread.
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
      with_activation(r_.activation, [&](auto act) LCW_LAMBDA_INLINE {
        layout_.for_each_run([&](int64_t first, int64_t count) LCW_LAMBDA_INLINE {
          for (int64_t i = first; i < first + count; ++i) next[i] = alpha * filtered[i] + beta * act.value(pre[i]);
        });
      });
      if (!meet()) return;
      std::swap(state, next);
      if (pass.return_states) store(pass.output, l + 1);
    }
    if (!pass.return_states) store(pass.output, 0);
  }

  // The states and slopes of a segment from the checkpoint at its start. False when the others go on without this thread.
  LCW_INLINE bool recompute(const Backward<T>& pass) {
    T *state = shared_.now.data(), *next = shared_.next.data();
    layout_.load(pass.checkpoint() + begin_ * r_.width, state);
    if (!meet()) return false;
    for (int64_t s = 0; s < pass.count; ++s) {
      const int64_t l = pass.first + s;
      layout_.store(state, rows_of(pass.states, s));
      // The state after the segment is known to nobody and needed by nobody.
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
            next[i] = alpha * filtered[i] + beta * y;
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

  // G from the end of a segment to its start, given the slopes.
  LCW_INLINE void carry_back(const Backward<T>& pass) {
    T *gradient = shared_.now.data(), *next = shared_.next.data();
    Buffer<T> grad_pre(size_);
    layout_.load(pass.gradient + begin_ * r_.width, gradient);
    if (!meet()) return;
    for (int64_t s = pass.count - 1; s >= 0; --s) {
      const int64_t l = pass.first + s;
      if (pass.grad_states) layout_.store(gradient, rows_of(pass.grad_states, l + 1));
      if (pass.filtered && number_ == 0)
        scale_products(pass, layout_.row_major(gradient, scratch_.data()), s, begin_, end_);
      const T* slopes = slopes_of(pass, s);
      for (int64_t i = 0; i < size_; ++i) grad_pre[i] = slopes[i] * gradient[i];
      layout_.store(grad_pre.data(), rows_of(pass.grad_pre, s));
      if (r_.permutation)
        layout_.permute(permutation_.inverse.data(), gradient, filtered_.data());
      else
        layout_.multiply_transposed(r_.filter_at(l), gradient, filtered_.data(), nullptr);
      // A sum of its own: added term by term onto the far larger filter branch, every term would be rounded at its scale.
      layout_.multiply_transposed(weights_.at(l), grad_pre.data(), pre_.data(), weights_.ahead(l - 1));
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
  // False when the others go on without this thread.
  LCW_INLINE bool meet() {
    shared_.team.wait();
    layout_.units = shared_.slice(number_, r_.width);
    return layout_.units.end > 0;
  }

  // This thread's rows of entry `index` of (L, M, N).
  template <typename Pointer>
  LCW_INLINE Pointer rows_of(Pointer buffer, int64_t index) const {
    return buffer + (index * r_.rows + begin_) * r_.width;
  }

  LCW_INLINE T* slopes_of(const Backward<T>& pass, int64_t s) const {
    return Layout::is_row_major ? rows_of(pass.slopes, s) : shared_.slopes.data() + s * size_;
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
  Weights<Products, T> weights_;
  const Permutation permutation_;
  Buffer<T> filtered_, pre_, scratch_;
  const int64_t number_;
  Layout layout_;
};

template <class Products, class Layout, typename T>
LCW_INLINE void forward_rows(const Forward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Products, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in()) carrier.forward(pass);
}

// Recompute the segment's states and slopes for some rows, then carry G back through it.
template <class Products, class Layout, typename T>
LCW_INLINE void backward_rows(const Backward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Products, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in() && carrier.recompute(pass)) carrier.carry_back(pass);
}

// The latter alone.
template <class Products, class Layout, typename T>
LCW_INLINE void carry_back_rows(const Backward<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {
  Carrier<Products, Layout, T> carrier(pass.recurrence, begin, end, shared, slots);
  if (carrier.is_in()) carrier.carry_back(pass);
}

// The slopes of samples begin..end-1 of a segment whose states are known: no step waits for another. `packed` are the
// matrices for multiplying by W^T and O^T.
template <class Products, typename T>
LCW_INLINE void known_slopes(const Backward<T>& pass, const Recurrence<T>& packed, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  constexpr int64_t most = 48;  // whole tiles for every instruction set
  const Permutation permutation(r);
  Buffer<T> pre(most * n);
  for (int64_t first = begin; first < end; first += most) {
    const int64_t count = std::min(most, end - first);
    const PackedRows<Products, T> layout(count, n, {0, n});
    const T* states = pass.states + first * n;
    layout.multiply(packed.template weight_at<T>(0), nullptr, states, pre.data(), nullptr);
    if (pass.filtered && r.permutation)
      layout.permute(permutation.forward, states, pass.filtered + first * n);
    else if (pass.filtered)
      layout.multiply(packed.filter, nullptr, states, pass.filtered + first * n, nullptr);
    for (int64_t m = first; m < first + count; ++m) {
      const int64_t l = pass.first + m / r.rows;
      T *row = pre.data() + (m - first) * n, *slopes = pass.slopes + m * n;
      T* activated = pass.activated ? pass.activated + m * n : row;
      if (r.bias)
        for (int64_t i = 0; i < n; ++i) row[i] += r.bias[l * r.bias_stride + i];
      if (r.inputs)
        for (int64_t i = 0; i < n; ++i) row[i] += r.inputs[(pass.first * r.rows + m) * n + i];
      const T beta = r.beta_at(l);
      with_activation(r.activation, [&](auto act) LCW_LAMBDA_INLINE {
        for (int64_t i = 0; i < n; ++i) {
          const T a = row[i], y = act.value(a);
          slopes[i] = beta * act.slope(a, y);
          activated[i] = y;
        }
      });
    }
  }
}

// dW_l = P_l^T H_{l-1} and db_l for some layers of the segment. Biases are summed in float64.
template <class Products, typename T>
LCW_INLINE void weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width;
  const bool narrow = sizeof(T) == 4 && r.weight_type != ScalarType::Float;
  Buffer<T> wide(pass.grad_weight && narrow ? n * n : 0);
  std::vector<double> bias_sum(n);
  for (int64_t s = begin; s < end; ++s) {
    const T* grad_pre = pass.grad_pre + s * r.rows * n;
    const T* state = pass.states + s * r.rows * n;
    const int64_t l = pass.first + s;
    if (pass.grad_weight) {
      T* target = narrow ? wide.data() : static_cast<T*>(pass.grad_weight) + l * n * n;
      multiply_in_parts<Products, T>({grad_pre, 1, n, state, n, target, n, n, n, r.rows}, sample_terms);
      if (narrow) Products::round(target, r.weight_type, static_cast<uint16_t*>(pass.grad_weight) + l * n * n, n * n);
    }
    if (pass.grad_bias) {
      std::fill(bias_sum.begin(), bias_sum.end(), 0.0);
      for (int64_t m = 0; m < r.rows; ++m)
        for (int64_t i = 0; i < n; ++i) bias_sum[i] += double(grad_pre[m * n + i]);
      for (int64_t i = 0; i < n; ++i) pass.grad_bias[l * n + i] = static_cast<T>(bias_sum[i]);
    }
  }
}

// The same for a weight or bias shared by all steps: output units begin..end-1, added up over the segment's samples.
template <class Products, typename T>
LCW_INLINE void shared_weight_gradients(const Backward<T>& pass, int64_t begin, int64_t end) {
  const Recurrence<T>& r = pass.recurrence;
  const int64_t n = r.width, samples = pass.count * r.rows;
  if (pass.weight_sum) {
    // Short sums in T, long ones in float64: terms of one sign were off by up to 80 times eager torch's error otherwise.
    constexpr int64_t block_samples = 16 * sample_terms;
    Buffer<T> sum((end - begin) * n);
    for (int64_t first = 0; first < samples; first += block_samples) {
      const int64_t count = std::min(block_samples, samples - first);
      multiply_in_parts<Products, T>(
          {pass.grad_pre + first * n + begin, 1, n, pass.states + first * n, n, sum.data(), n, end - begin, n, count},
          sample_terms);
      for (int64_t i = 0; i < (end - begin) * n; ++i) pass.weight_sum[begin * n + i] += double(sum[i]);
    }
  }
  if (pass.bias_sum) {
    for (int64_t m = 0; m < samples; ++m)
      for (int64_t i = begin; i < end; ++i) pass.bias_sum[i] += double(pass.grad_pre[m * n + i]);
  }
}

// The same functions for each instruction set; which one runs is decided once, by the processor, and for tests by
// LCW_OPS_CPU_CAPABILITY=avx2 or portable. Rows begin..end-1, held in one of the two ways.
template <typename T>
struct Kernels {
  int64_t lanes;
  void (*forward_many)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*forward_few)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*backward_many)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*backward_few)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*forward_packed)(const Forward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*carry_back_few)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*carry_back_packed)(const Backward<T>&, int64_t begin, int64_t end, Shared<T>&, int64_t slots);
  void (*pack)(const Recurrence<T>&, bool transposed, T* weight, T* filter);
  void (*known_slopes)(const Backward<T>&, const Recurrence<T>& packed, int64_t begin, int64_t end);
  void (*weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
  void (*shared_weight_gradients)(const Backward<T>&, int64_t begin, int64_t end);
};

#define LCW_ROWS(attributes, pass_type, function, name, Layout)                                                  \
  attributes static void name(                                                                                   \
      const pass_type<T>& pass, int64_t begin, int64_t end, Shared<T>& shared, int64_t slots) {                  \
    function<Products, Layout<Products, T>>(pass, begin, end, shared, slots);                                    \
  }
#define LCW_KERNELS(Isa, attributes)                                                                             \
  template <typename T>                                                                                          \
  struct Isa##Kernels {                                                                                          \
    using Products = Isa##Products<T>;                                                                           \
    LCW_ROWS(attributes, Forward, forward_rows, forward_many, ManyRows)                                          \
    LCW_ROWS(attributes, Forward, forward_rows, forward_few, FewRows)                                            \
    LCW_ROWS(attributes, Backward, backward_rows, backward_many, ManyRows)                                       \
    LCW_ROWS(attributes, Backward, backward_rows, backward_few, FewRows)                                         \
    LCW_ROWS(attributes, Forward, forward_rows, forward_packed, PackedRows)                                      \
    LCW_ROWS(attributes, Backward, carry_back_rows, carry_back_few, FewRows)                                     \
    LCW_ROWS(attributes, Backward, carry_back_rows, carry_back_packed, PackedRows)                               \
    attributes static void pack(const Recurrence<T>& r, bool transposed, T* weight, T* filter) {                 \
      using Rows = PackedRows<Products, T>;                                                                      \
      Rows::pack(Weights<Products, T>(r).at(0), r.width, transposed, weight);                                    \
      if (r.filter) Rows::pack(r.filter, r.width, transposed, filter);                                           \
    }                                                                                                            \
    attributes static void slopes(                                                                               \
        const Backward<T>& pass, const Recurrence<T>& packed, int64_t begin, int64_t end) {                      \
      known_slopes<Products>(pass, packed, begin, end);                                                          \
    }                                                                                                            \
    attributes static void weights(const Backward<T>& pass, int64_t begin, int64_t end) {                        \
      weight_gradients<Products>(pass, begin, end);                                                              \
    }                                                                                                            \
    attributes static void shared_weights(const Backward<T>& pass, int64_t begin, int64_t end) {                 \
      shared_weight_gradients<Products>(pass, begin, end);                                                       \
    }                                                                                                            \
    static constexpr Kernels<T> all{                                                                             \
        Products::lanes, forward_many,   forward_few,       backward_many, backward_few, forward_packed,         \
        carry_back_few,  carry_back_packed, pack,           slopes,        weights,      shared_weights};        \
  };

LCW_KERNELS(Portable, )
#ifdef LCW_X86_DISPATCH
LCW_KERNELS(Avx2, LCW_AVX2)
LCW_KERNELS(Avx512, LCW_AVX512)
#endif

template <typename T>
const Kernels<T>& kernels() {
  switch (instruction_set()) {
#ifdef LCW_X86_DISPATCH
    case InstructionSet::avx512: return Avx512Kernels<T>::all;
    case InstructionSet::avx2: return Avx2Kernels<T>::all;
#endif
    default: return PortableKernels<T>::all;
  }
}

struct Cpu {
  static constexpr bool keeps_slopes = true;

  // A thread's share of the units below which waiting for the others takes longer than the work saved.
  static constexpr int64_t least_units = 32;
  static constexpr int64_t least_packed_rows = 4;  // per thread
  static constexpr uintptr_t page = large_page, small_page = 4096;

  static void allocated(const Tensor& tensor) { prefer_large_pages(tensor); }

  // Vectors of rows cost the same however many of their lanes are in use; rows one by one use all lanes along the units.
  static bool are_many(int64_t rows, int64_t lanes) {
    const int64_t threads = stable::get_num_threads();
    const int64_t vectors = (rows + lanes - 1) / lanes;
    const auto busiest = [&](int64_t items) { return (items + threads - 1) / threads; };
    return 2 * busiest(rows) > lanes * busiest(vectors);
  }

  // One matrix for all steps, which is worth putting in order, and at least one panel of it.
  template <typename T>
  static bool packs(const Recurrence<T>& r) {
    return r.weight_stride == 0 && r.filter_stride == 0 && r.width >= 2 * kernels<T>().lanes;
  }

  // Enough rows for packed matrices to be faster than rows one by one.
  static bool are_several(int64_t rows) { return rows >= least_packed_rows * stable::get_num_threads(); }

  // The same recurrence with its matrices in panels, and the memory they lie in.
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

  // rows(begin, end, shared, slots) for all rows, each on one thread, in groups of `together`.
  template <typename T, typename Rows>
  static void split_rows(const Recurrence<T>& r, int64_t together, int64_t slope_count, const Rows& rows) {
    stable::parallel_for(0, (r.rows + together - 1) / together, 1, [&](int64_t first, int64_t last) {
      Shared<T> shared(1, (last - first) * together * r.width, slope_count);
      rows(first * together, std::min(last * together, r.rows), shared, 1);
    });
  }

  // The same with threads that share a row where there are fewer rows than threads.
  template <typename T, typename Rows>
  static void share_rows(const Recurrence<T>& r, const Rows& rows) {
    const int64_t members = std::max<int64_t>(1, std::min(stable::get_num_threads() / r.rows, r.width / least_units));
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

  // Maps fresh memory that all threads are about to write step by step, every page by one thread: threads that meet in an
  // unmapped page each clear 2 MB, of which all but one is thrown away, and stop the others at the end of the segment.
  static void map(void* memory, int64_t bytes) {
#ifdef __linux__
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes, first = begin / page * page;
    stable::parallel_for(0, (end - first + page - 1) / page, 1, [&](int64_t from, int64_t to) {
      const uintptr_t start = std::max(begin, first + from * page), stop = std::min(end, first + to * page);
      // A byte of every small page: what it holds is about to be overwritten.
      for (uintptr_t at = start; at < stop; at = (at / small_page + 1) * small_page)
        *reinterpret_cast<volatile char*>(at) = 0;
    });
#endif
  }

  // A kernel with its pass.
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
    if (pass.return_states) map(pass.output, (r.steps + 1) * r.rows * r.width * sizeof(T));
    if (packs(r) && are_several(r.rows)) {
      const Packed<T> packed(r, true);
      pass.recurrence = packed.recurrence;
      split_rows(r, 1, 0, bind(pass, all.forward_packed));
    } else if (are_many(r.rows, all.lanes)) {
      split_rows(r, all.lanes, 0, bind(pass, all.forward_many));
    } else {
      share_rows(r, bind(pass, all.forward_few));
    }
  }

  template <typename T>
  static void run_segment(Backward<T> pass, const Tensor&) {
    const Kernels<T>& all = kernels<T>();
    const Recurrence<T> r = pass.recurrence;
    const int64_t state_size = r.rows * r.width;
    // The gradients of the inputs are the P_l themselves: written where they are to stay.
    if (pass.grad_inputs) {
      pass.grad_pre = pass.grad_inputs + pass.first * state_size;
      map(pass.grad_pre, pass.count * state_size * sizeof(T));
    }
    const bool states_known = pass.checkpoint_every == 1 && packs(r);
    if (states_known) {
      pass.states = const_cast<T*>(pass.checkpoint());
      const Packed<T> packed(r, true);
      stable::parallel_for(0, pass.count * r.rows, 1, [&](int64_t begin, int64_t end) {
        all.known_slopes(pass, packed.recurrence, begin, end);
      });
    }
    if (states_known && are_several(r.rows)) {
      const Packed<T> packed(r, false);
      pass.recurrence = packed.recurrence;
      split_rows(r, 1, 0, bind(pass, all.carry_back_packed));
      pass.recurrence = r;
    } else if (states_known) {
      share_rows(r, bind(pass, all.carry_back_few));
    } else if (are_many(r.rows, all.lanes)) {
      split_rows(r, all.lanes, pass.count, bind(pass, all.backward_many));
    } else {
      share_rows(r, bind(pass, all.backward_few));
    }
    if (pass.grad_weight || pass.grad_bias)
      stable::parallel_for(0, pass.count, 1, [&](int64_t begin, int64_t end) { all.weight_gradients(pass, begin, end); });
    if (pass.weight_sum || pass.bias_sum)
      stable::parallel_for(
          0, pass.recurrence.width, 1, [&](int64_t begin, int64_t end) { all.shared_weight_gradients(pass, begin, end); });
  }
};

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) {
  m.impl("orthogonal_filter.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter<lcw_ops::Cpu>));
  m.impl("orthogonal_filter_backward.cpp", TORCH_BOX(&lcw_ops::orthogonal_filter_backward<lcw_ops::Cpu>));
}
