// A 64-bit hash of a tensor's bytes, computed as fast as they can be read. If it differs, the bytes have changed.
//
// It shows whether values that were computed from a parameter and cached are still current: edits through .data leave
// no other trace. Words of 32 bits are mixed into 32 lanes by multiplying, rotating and multiplying, as in xxHash; the
// lanes do not wait for each other. A change of a single word always changes its lane. A change of several words goes
// unseen with probability 2^-32 if all of them are in one lane, and with at most 2^-64 if they are in several. The
// tensor is hashed in blocks of a fixed size, so that the hash does not depend on the number of threads.

#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "simd/dispatch.h"

namespace lcw_ops {
namespace {

// A block is mixed into 4 vectors of 8 words each. A multiplication takes 10 cycles, and the second multiplication of a
// step has to wait for the first. Meanwhile the other vectors are multiplied.
constexpr int64_t lanes = 32, block_bytes = 1 << 16;
constexpr uint32_t odd_1 = 2246822519u, odd_2 = 2654435761u;

LCW_INLINE void mix(uint32_t* state, const uint32_t* words) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const uint32_t sum = state[lane] + words[lane] * odd_1;
    state[lane] = (sum << 13 | sum >> 19) * odd_2;
  }
}

LCW_INLINE uint64_t finish(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
  return hash ^ hash >> 29;
}

LCW_INLINE uint64_t hash_block(const unsigned char* bytes, int64_t count) {
  uint32_t state[lanes], words[lanes];
  for (int64_t lane = 0; lane < lanes; ++lane) state[lane] = uint32_t(lane + 1) * odd_1;
  int64_t at = 0;
  for (; at + int64_t(sizeof(words)) <= count; at += sizeof(words)) {
    std::memcpy(words, bytes + at, sizeof(words));
    mix(state, words);
  }
  if (at < count) {
    std::memset(words, 0, sizeof(words));
    std::memcpy(words, bytes + at, count - at);
    mix(state, words);
  }
  uint64_t hash = uint64_t(count);
  for (int64_t lane = 0; lane < lanes; lane += 2) hash = finish(hash, uint64_t(state[lane]) << 32 | state[lane + 1]);
  return hash;
}

int64_t fingerprint(torch::stable::Tensor tensor) {
  const int64_t count = tensor.numel() * tensor.element_size();
  const int64_t blocks = (count + block_bytes - 1) / block_bytes;
  if (blocks == 0) return 0;
  STD_TORCH_CHECK(tensor.is_contiguous(), "fingerprint: tensor is not contiguous; expected a contiguous tensor");
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  std::vector<uint64_t> hashes(blocks);
  for_each_part(blocks, 1, [&](auto, int64_t begin, int64_t end) LCW_LAMBDA_INLINE {
    for (int64_t b = begin; b < end; ++b)
      hashes[b] = hash_block(bytes + b * block_bytes, std::min(block_bytes, count - b * block_bytes));
  });
  uint64_t hash = uint64_t(count);
  for (const uint64_t one : hashes) hash = finish(hash, one);
  return int64_t(hash);
}

}  // namespace
}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CPU, m) { m.impl("fingerprint.cpp", TORCH_BOX(&lcw_ops::fingerprint)); }
