// Gradients of weight, bias and the scales alpha and beta, from the gradients G_l of h_l and P_l of the pre-activation
// A_l in a segment.
//
//   dW_l = P_l^T h_{l-1}      db_l = sum_rows P_l      dalpha_l = <G_l, O h_{l-1}>      dbeta_l = <G_l, act(A_l)>
//
// All of them are sums over samples, and run in parallel. Cost of dW per layer, for M rows of N units: 2 M N^2
// operations in tiles of 64 x 64. P and h (M N numbers each) are read N / 64 times, and N^2 numbers are written. So dW
// is bound by arithmetic. A chunk of 32 samples is summed in the state's type, the chunk sums are added in float64 (one
// addition for 32 multiply-adds), and the total is rounded at the end. No atomics: every sum has a fixed order.
#pragma once

#include "orthogonal_filter_common.h"

namespace lcw_ops {

constexpr int tile_size = 64;
// 16 x 16 threads, each with 4 x 4 numbers of the tile: for 16 multiply-adds it reads 8 numbers from shared memory.
constexpr int tile_side = 16, thread_tile = tile_size / tile_side;
constexpr int tile_threads = tile_side * tile_side;
constexpr int column_warps = 8;

// Computes a tile of dW. Each blockIdx.z takes a slice of the segment's samples. If every layer has its own weight, a
// slice is one layer's samples. If all layers share a weight, a slice is a part of all samples, and its result is a
// partial sum.
template <typename T, typename W>
__global__ void __launch_bounds__(tile_threads)
    weight_gradients(const Backward<T> pass, int64_t slices, double* partials) {
  const int64_t n = pass.recurrence.width, samples = pass.count * pass.recurrence.rows;
  const int64_t first_o = int64_t(blockIdx.y) * tile_size, first_i = int64_t(blockIdx.x) * tile_size;
  T* grad_pre = dynamic_shared<T>();
  T* states = grad_pre + chunk_terms * tile_size;
  const int o = threadIdx.x / tile_side * thread_tile, i = threadIdx.x % tile_side * thread_tile;
  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z) {
    const int64_t end = (slice + 1) * samples / slices;
    double sum[thread_tile][thread_tile] = {};
    for (int64_t begin = slice * samples / slices; begin < end; begin += chunk_terms) {
      __syncthreads();
      for (int entry = threadIdx.x; entry < chunk_terms * tile_size; entry += tile_threads) {
        const int64_t sample = begin + entry / tile_size, column = entry % tile_size;
        const bool inside = sample < end;
        grad_pre[entry] = inside && first_o + column < n ? pass.grad_pre[sample * n + first_o + column] : T(0);
        states[entry] = inside && first_i + column < n ? pass.states[sample * n + first_i + column] : T(0);
      }
      __syncthreads();
      T chunk[thread_tile][thread_tile] = {};
      for (int k = 0; k < chunk_terms; ++k)
        for (int a = 0; a < thread_tile; ++a)
          for (int b = 0; b < thread_tile; ++b)
            chunk[a][b] += grad_pre[k * tile_size + o + a] * states[k * tile_size + i + b];
      for (int a = 0; a < thread_tile; ++a)
        for (int b = 0; b < thread_tile; ++b) sum[a][b] += chunk[a][b];
    }
    for (int a = 0; a < thread_tile; ++a)
      for (int b = 0; b < thread_tile; ++b) {
        const int64_t row = first_o + o + a, column = first_i + i + b;
        if (row >= n || column >= n) continue;
        if (partials)
          partials[(slice * n + row) * n + column] = sum[a][b];
        else
          static_cast<W*>(pass.grad_weight)[((pass.first + slice) * n + row) * n + column] = static_cast<W>(
              static_cast<T>(sum[a][b]));
      }
  }
}

// Computes db of one layer at a time. Each lane takes a column; the warps divide the rows among them.
template <typename T>
__global__ void __launch_bounds__(column_warps* warp_size) bias_gradients(const Backward<T> pass, double* partials) {
  const int64_t n = pass.recurrence.width, rows = pass.recurrence.rows;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int64_t i = int64_t(blockIdx.x) * warp_size + lane;
  double* sums = dynamic_shared<double>();
  for (int64_t s = blockIdx.y; s < pass.count; s += gridDim.y) {
    double sum = 0;
    if (i < n)
      for (int64_t m = warp; m < rows; m += column_warps) sum += double(pass.grad_pre[(s * rows + m) * n + i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && i < n) {
      for (int other = 1; other < column_warps; ++other) sum += sums[other * warp_size + lane];
      if (partials)
        partials[s * n + i] = sum;
      else
        pass.grad_bias[(pass.first + s) * n + i] = static_cast<T>(sum);
    }
    __syncthreads();
  }
}

// Sums each row of `filtered` and `activated`, in which the cluster kernel has replaced O h and act(A_l) by their
// elementwise products with G_l. One warp sums a row.
template <typename T>
__global__ void scale_products(const Backward<T> pass) {
  const int64_t n = pass.recurrence.width, rows = pass.recurrence.rows;
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / warp_size;
  if (row >= pass.count * rows) return;
  double alpha_product = 0, beta_product = 0;
  for (int64_t i = threadIdx.x % warp_size; i < n; i += warp_size) {
    alpha_product += double(pass.filtered[row * n + i]);
    beta_product += double(pass.activated[row * n + i]);
  }
  alpha_product = warp_sum(alpha_product);
  beta_product = warp_sum(beta_product);
  if (threadIdx.x % warp_size != 0) return;
  pass.alpha_products[pass.first * rows + row] = alpha_product;
  pass.beta_products[pass.first * rows + row] = beta_product;
}

static __global__ void add_partials(double* target, const double* partials, int64_t slices, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double sum = target[i];
  for (int64_t slice = 0; slice < slices; ++slice) sum += partials[slice * size + i];
  target[i] = sum;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) { return unsigned((items + per_block - 1) / per_block); }

inline void launch_add_partials(double* target, const Tensor& partials, const Tensor& like) {
  constexpr int threads = 256;
  const int64_t slices = partials.size(0), size = partials.numel() / slices;
  launch(
      launch_config(dim3(blocks_for(size, threads)), dim3(threads), 0, like), add_partials, target,
      partials.const_data_ptr<double>(), slices, size);
}

template <typename T, typename W>
void launch_weight_gradients(const Backward<T>& pass, const Tensor& like) {
  const int64_t width = pass.recurrence.width, samples = pass.count * pass.recurrence.rows;
  const unsigned tiles = blocks_for(width, tile_size);
  // For a shared weight, cut the samples into enough slices to fill the GPU, but not so many that adding their sums
  // dominates.
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, like.get_device_index());
  const int64_t shares = std::min<int64_t>(2 * processors / (tiles * tiles), samples / (4 * chunk_terms));
  const int64_t slices = pass.weight_sum ? std::max<int64_t>(shares, 1) : pass.count;
  Tensor partials = stable::new_empty(like, {pass.weight_sum ? slices : 0, width, width}, ScalarType::Double);
  const size_t bytes = 2 * chunk_terms * tile_size * sizeof(T);
  const dim3 grid(tiles, tiles, unsigned(std::min(slices, most_blocks)));
  launch(
      launch_config(grid, dim3(tile_threads), bytes, like), weight_gradients<T, W>, pass, slices,
      pass.weight_sum ? partials.mutable_data_ptr<double>() : nullptr);
  if (pass.weight_sum) launch_add_partials(pass.weight_sum, partials, like);
}

template <typename T>
void launch_bias_gradients(const Backward<T>& pass, const Tensor& like) {
  const int64_t width = pass.recurrence.width;
  Tensor partials = stable::new_empty(like, {pass.bias_sum ? pass.count : 0, width}, ScalarType::Double);
  const dim3 grid(blocks_for(width, warp_size), unsigned(std::min(pass.count, most_blocks)));
  const int threads = column_warps * warp_size;
  launch(
      launch_config(grid, dim3(threads), threads * sizeof(double), like), bias_gradients<T>, pass,
      pass.bias_sum ? partials.mutable_data_ptr<double>() : nullptr);
  if (pass.bias_sum) launch_add_partials(pass.bias_sum, partials, like);
}

template <typename T, typename W>
void launch_parameter_gradients(const Backward<T>& pass, const Tensor& like) {
  if (pass.grad_weight || pass.weight_sum) launch_weight_gradients<T, W>(pass, like);
  if (pass.grad_bias || pass.bias_sum) launch_bias_gradients(pass, like);
}

template <typename T>
void launch_scale_products(const Backward<T>& pass, const Tensor& like) {
  constexpr int threads = 256;
  const int64_t rows = pass.count * pass.recurrence.rows;
  launch(launch_config(dim3(blocks_for(rows * warp_size, threads)), dim3(threads), 0, like), scale_products<T>, pass);
}

}  // namespace lcw_ops
