// What the kernels share: tiles of half precision in shared memory, sums of their products, softmax rows spread over lanes.
//
// Given at compile time: WIDTH, the heads' width; ROWS and KEYS, the sides of a tile of scores; VECTOR, whether pointers and strides let
// eight elements be loaded at once; SHARED_BYTES, what a block is given.
//
// A tile of scores has ROWS x KEYS elements. LANES neighboring lanes of a warp share a row of it; each has PER_LANE columns, lane +
// LANES * j, and keeps them in registers under the same j from one step to the next.

#pragma once
#include "device.cuh"

typedef long long index_t;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PADDED = (WIDTH + 15) / 16 * 16;  // what a product of tiles takes; the rest is zeros
constexpr int STRIDE = PADDED + 8;              // of a tile's rows: 16 bytes aside, so that neighbors lie in different banks
constexpr int LANES = THREADS / ROWS;
constexpr int PER_LANE = KEYS / LANES;
constexpr int SCORE_STRIDE = KEYS + 4;
constexpr int HALF_STRIDE = 2 * SCORE_STRIDE;  // of rows of float16 in the place of a row of scores
constexpr float LOG2E = 1.4426950408889634f;   // kernels work in base 2: exp(x) = exp2(x * LOG2E)

static_assert(ROWS % 16 == 0 && KEYS % 16 == 0 && LANES <= 32 && KEYS % LANES == 0, "tiles are made of 16 x 16 products");

// The same number in every lane of a row.
DEVICE float sum_over_row(float value) {
  for (int distance = LANES / 2; distance > 0; distance /= 2) value += from_lane(value, distance);
  return value;
}

DEVICE float max_over_row(float value) {
  for (int distance = LANES / 2; distance > 0; distance /= 2) value = fmaxf(value, from_lane(value, distance));
  return value;
}

// COUNT rows of WIDTH elements into a tile, zeros behind them; row(r) points to row r, or is null where there is none.
template <int COUNT, class Row>
DEVICE void load_tile(half_t* tile, Row row) {
  constexpr int PARTS = PADDED / 8;
  for (int i = threadIdx.x; i < COUNT * PARTS; i += THREADS) {
    const int r = i / PARTS, first = i % PARTS * 8;
    const half_t* source = row(r);
    Eight* target = reinterpret_cast<Eight*>(tile + r * STRIDE + first);
    if (VECTOR) {
      *target = source && first < WIDTH ? *reinterpret_cast<const Eight*>(source + first) : Eight{{0, 0, 0, 0}};
    } else {
      for (int d = 0; d < 8; ++d) tile[r * STRIDE + first + d] = source && first + d < WIDTH ? source[first + d] : half_t(0);
    }
  }
}

// A matrix of M x N float32 sums, in 16 x 16 tiles that the block's warps share out.
template <int M, int N>
struct Sums {
  static constexpr int TILES = (M / 16) * (N / 16), COUNT = (TILES + WARPS - 1) / WARPS;
  static constexpr int SCRATCH_BYTES = (TILES < WARPS ? TILES : WARPS) * 256 * sizeof(float);
  Accumulator parts[COUNT];

  DEVICE Sums() {
    for (int c = 0; c < COUNT; ++c)
      for (int e = 0; e < 8; ++e) parts[c].part[e] = 0;
  }

  // Adds a b, or with a and b transposed, over `depth`; see `multiply`.
  template <bool A_TRANSPOSED, bool B_TRANSPOSED>
  DEVICE void add(const half_t* a, int a_stride, const half_t* b, int b_stride, int depth) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const int t = threadIdx.x / 32 + c * WARPS;
      if (t < TILES) {
        const int i = t / (N / 16) * 16, j = t % (N / 16) * 16;
        multiply<A_TRANSPOSED, B_TRANSPOSED>(
            parts[c], a + (A_TRANSPOSED ? i : i * a_stride), a_stride, b + (B_TRANSPOSED ? j * b_stride : j), b_stride, depth);
      }
    }
  }

  DEVICE void store_to(float* target, int stride) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const int t = threadIdx.x / 32 + c * WARPS;
      if (t < TILES) store(target + t / (N / 16) * 16 * stride + t % (N / 16) * 16, stride, parts[c]);
    }
  }

  // visit(i, j, value) once for every element, by some thread; `scratch` has SCRATCH_BYTES that nobody else reads or writes.
  template <class Visit>
  DEVICE void for_each(float* scratch, Visit visit) {
    float* tile = scratch + threadIdx.x / 32 * 256;
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const int t = threadIdx.x / 32 + c * WARPS;
      if (t < TILES) {
        store(tile, 16, parts[c]);
        __syncwarp();
        for (int e = threadIdx.x % 32; e < 256; e += 32) visit(t / (N / 16) * 16 + e / 16, t % (N / 16) * 16 + e % 16, tile[e]);
      }
    }
  }
};

// scores[r][n] = rows[r] . keys[n], by the whole block, which waits before for both tiles, and after for the scores.
DEVICE void score_tile(float* scores, const half_t* rows, const half_t* keys) {
  __syncthreads();
  Sums<ROWS, KEYS> sums;
  sums.add<false, true>(rows, STRIDE, keys, STRIDE, PADDED);
  sums.store_to(scores, SCORE_STRIDE);
  __syncthreads();
}

// This lane's elements of a row of scores, replaced by float16 ones in the row's own place: [r][n] at r * HALF_STRIDE + n.
DEVICE void put_halves(float* scores, const float (&values)[PER_LANE]) {
  half_t* row = reinterpret_cast<half_t*>(scores + threadIdx.x / LANES * SCORE_STRIDE);
  __syncwarp();  // every lane of the row has read what was there
  for (int j = 0; j < PER_LANE; ++j) row[threadIdx.x % LANES + j * LANES] = to_half(values[j]);
}

// One row's log-sum-exp in base 2 as its scores come by, each lane for its own elements.
struct LogSumExp {
  float row_max = -infinity(), total = 0;

  DEVICE void add(const float (&scores)[PER_LANE]) {
    float higher = row_max;
    for (int j = 0; j < PER_LANE; ++j) higher = fmaxf(higher, scores[j]);
    const float base = higher == -infinity() ? 0 : higher;
    total *= exp2f(row_max - base);
    for (int j = 0; j < PER_LANE; ++j) total += exp2f(scores[j] - base);
    row_max = higher;
  }

  // Of all lanes together; -inf where no score was finite, NaN where one was no number.
  DEVICE float value() const {
    const float highest = max_over_row(row_max);
    const float sum = sum_over_row(highest == -infinity() ? total : total * exp2f(row_max - highest));
    return sum == 0 ? -infinity() : highest + log2f(sum);
  }
};
