// `row_maps`: words own query rows, their maps run over keys. The contract and the formulas: lavender/kernels/row_maps/api.py.
//
// Every output has one writer and every sum a fixed order. Indices outside their ranges, which a GPU's callers are not asked about,
// read and write nothing of others. Where a kernel walks along the keys, the entries (one row of one word
// each) of all heads that share a key head are stacked: stacked row s is entry s % num_rows of the group's head s / num_rows, so
// that a key is loaded once for them; keys are split over blocks, and the parts are added up afterwards.

#include "tiles.cuh"

struct RowMaps {
  const half_t* query;        // [B, H, T, WIDTH] by its strides
  const half_t* key;          // [B, G, N, WIDTH] by its strides
  const index_t* rows;        // [B, R] entries' rows, -1 is padding
  const index_t* words;       // [B, R]
  const float* weights;       // [B, R], zero for padding
  const index_t* columns;     // [B, M], -1 is padding
  const float* bias;          // [B, H, R, N] by its strides, or null
  const float* head_weights;  // [H], or null where heads are kept
  const float* lse;           // [B, H, R] in base 2, +inf where nothing is seen
  const float* delta;         // [B, H, R]
  const float* gradient;      // of the maps [B, C, W, M]; the gradients of query and key: over every key, [B, C, W, N]
  const float* grad_scale;    // what gradients were divided by, one number
  float* partial;             // [splits, B, H, R], of the query's gradient [.., WIDTH]
  float* maps;                // [B, parts, W, M], zeros before
  half_t* out;                // the finished gradient, contiguous
  index_t query_b;
  index_t query_h;
  index_t query_t;
  index_t key_b;
  index_t key_g;
  index_t key_n;
  index_t bias_b;
  index_t bias_h;
  index_t bias_r;
  index_t bias_n;
  index_t gradient_b;
  index_t gradient_h;  // zero where heads are summed
  int num_heads;
  int num_groups;
  int num_queries;
  int num_rows;
  int num_keys;
  int num_columns;
  int num_words;
  int heads_per_part;
  int num_splits;
  int causal;
  float scale;
};

struct Memory {
  half_t rows[ROWS * STRIDE];
  half_t keys[KEYS * STRIDE];
  float scores[ROWS * SCORE_STRIDE];
};
static_assert(sizeof(Memory) == SHARED_BYTES, "the launch gives a block what this file lays out");
static_assert(sizeof(Memory::scores) >= WARPS * 256 * sizeof(float), "sums leave through the place of the scores");

// An entry of one head: what a lane knows of the row of scores that it works on.
struct Entry {
  bool exists;
  int head, row, word;
  index_t place;  // among all [B, H, R]
  float weight;
  const float* bias;

  DEVICE Entry(const RowMaps& call, int b, int h, int r, bool valid) : exists(valid), head(h) {
    const index_t i = index_t(b) * call.num_rows + r;
    row = exists ? min(max(int(call.rows[i]), 0), call.num_queries - 1) : 0;
    word = exists ? int(call.words[i]) : -1;
    weight = exists ? call.weights[i] : 0;
    place = (index_t(b) * call.num_heads + h) * call.num_rows + r;
    bias = call.bias ? call.bias + b * call.bias_b + h * call.bias_h + r * call.bias_r : nullptr;
  }
};

DEVICE Entry stacked_entry(const RowMaps& call, int b, int g, int number) {
  const int group = call.num_heads / call.num_groups;
  const bool exists = number < group * call.num_rows;
  number = exists ? number : 0;
  return Entry(call, b, g * group + number / call.num_rows, number % call.num_rows, exists);
}

DEVICE Entry lanes_entry(const RowMaps& call, int b, int g, int block) {
  return stacked_entry(call, b, g, block * ROWS + threadIdx.x / LANES);
}

DEVICE void load_stacked(const RowMaps& call, half_t* tile, int b, int g, int block) {
  load_tile<ROWS>(tile, [&](int r) -> const half_t* {
    const Entry entry = stacked_entry(call, b, g, block * ROWS + r);
    return entry.exists ? call.query + b * call.query_b + entry.head * call.query_h + entry.row * call.query_t : nullptr;
  });
}

// Keys n, n + 1, ... of one key head, as far as they are below `stop`.
DEVICE void load_keys(const RowMaps& call, half_t* tile, int b, int g, int start, int stop) {
  load_tile<KEYS>(tile, [&](int n) -> const half_t* {
    return start + n < stop ? call.key + b * call.key_b + g * call.key_g + (start + n) * call.key_n : nullptr;
  });
}

// The key of a column; -1 where there is none.
DEVICE int column(const RowMaps& call, int b, int m) {
  const int n = m < call.num_columns ? int(call.columns[index_t(b) * call.num_columns + m]) : -1;
  return n < call.num_keys ? n : -1;
}

DEVICE void load_columns(const RowMaps& call, half_t* tile, int b, int g, int start) {
  load_tile<KEYS>(tile, [&](int m) -> const half_t* {
    const int n = column(call, b, start + m);
    return n >= 0 ? call.key + b * call.key_b + g * call.key_g + n * call.key_n : nullptr;
  });
}

// A product of row and key as a score in base 2, -inf where the row does not see the key (n < 0: there is none).
DEVICE float masked(const RowMaps& call, const Entry& entry, int n, float product) {
  if (!entry.exists || n < 0 || n >= call.num_keys || (call.causal && n > entry.row)) return -infinity();
  const float score = product * (call.scale * LOG2E);
  return entry.bias ? score + entry.bias[n * call.bias_n] * LOG2E : score;
}

// This lane's elements of a tile of scores, LANES apart; nobody else reads or writes them before a barrier.
DEVICE float* lanes_scores(Memory& memory) {
  return memory.scores + threadIdx.x / LANES * SCORE_STRIDE + threadIdx.x % LANES;
}

// Where a split of `length` begins, in whole tiles.
DEVICE int split_start(int length, int split) {
  const int tiles = (length + KEYS - 1) / KEYS;
  return (tiles + gridDim.x - 1) / gridDim.x * split * KEYS;
}

// partial[split, b, h, r]: base-2 log-sum-exp over one split of the keys; -inf where nothing is seen.
KERNEL(THREADS) row_lse(const RowMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int b = blockIdx.z / call.num_groups, g = blockIdx.z % call.num_groups, lane = threadIdx.x % LANES;
  const Entry entry = lanes_entry(call, b, g, blockIdx.y);
  load_stacked(call, memory.rows, b, g, blockIdx.y);
  LogSumExp sum;
  const int stop = min(call.num_keys, split_start(call.num_keys, blockIdx.x + 1));
  for (int start = split_start(call.num_keys, blockIdx.x); start < stop; start += KEYS) {
    load_keys(call, memory.keys, b, g, start, stop);
    score_tile(memory.scores, memory.rows, memory.keys);
    float scores[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
      scores[j] = masked(call, entry, start + lane + j * LANES, lanes_scores(memory)[j * LANES]);
    sum.add(scores);
  }
  const float lse = sum.value();
  const index_t size = index_t(gridDim.z / call.num_groups) * call.num_heads * call.num_rows;
  if (entry.exists && lane == 0) call.partial[blockIdx.x * size + entry.place] = lse;
}

// maps[b, part, w, m]: the sum over a part's heads and a word's entries, for one tile of columns.
KERNEL(THREADS) row_word_maps(const RowMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int start = blockIdx.x * KEYS, part = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % LANES;
  const int group = call.num_heads / call.num_groups;
  const int last = min((part + 1) * call.heads_per_part, call.num_heads);
  float* maps = call.maps + (index_t(b) * gridDim.y + part) * call.num_words * call.num_columns;
  int seen[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) seen[j] = column(call, b, start + lane + j * LANES);
  for (int first = 0; first < call.num_rows; first += ROWS) {
    const int r = first + threadIdx.x / LANES;
    float shares[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) shares[j] = 0;
    int loaded = -1;  // the key head whose columns are in memory
    for (int h = part * call.heads_per_part; h < last; ++h) {
      const Entry entry(call, b, h, r < call.num_rows ? r : 0, r < call.num_rows);
      load_tile<ROWS>(memory.rows, [&](int i) -> const half_t* {
        if (first + i >= call.num_rows) return nullptr;
        const int row = min(max(int(call.rows[index_t(b) * call.num_rows + first + i]), 0), call.num_queries - 1);
        return call.query + b * call.query_b + h * call.query_h + row * call.query_t;
      });
      if (h / group != loaded) load_columns(call, memory.keys, b, loaded = h / group, start);
      score_tile(memory.scores, memory.rows, memory.keys);
      const float lse = entry.exists ? call.lse[entry.place] : infinity();
      const float factor = call.head_weights ? call.head_weights[h] * entry.weight : entry.weight;
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j)
        shares[j] += factor * exp2f(masked(call, entry, seen[j], lanes_scores(memory)[j * LANES]) - lse);
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) lanes_scores(memory)[j * LANES] = shares[j];
    __syncthreads();
    const int m = start + threadIdx.x;
    if (threadIdx.x < KEYS && m < call.num_columns) {  // one thread a column: the order of the sum is the order of the entries
      int word = -1;  // whose entries are being added up
      float sum = 0;
      for (int i = 0; i <= min(ROWS, call.num_rows - first); ++i) {
        const bool ends = i == min(ROWS, call.num_rows - first);
        const int next = ends ? -1 : int(call.words[index_t(b) * call.num_rows + first + i]);
        if (next != word) {
          if (word >= 0 && word < call.num_words) maps[index_t(word) * call.num_columns + m] += sum;
          word = next;
          sum = 0;
        }
        if (!ends) sum += memory.scores[i * SCORE_STRIDE + threadIdx.x];
      }
    }
  }
}

// partial[split, b, h, r]: the sum over one split of the columns of P Ghat, the head's weight left out.
KERNEL(THREADS) row_delta(const RowMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int b = blockIdx.z / call.num_groups, g = blockIdx.z % call.num_groups, lane = threadIdx.x % LANES;
  const Entry entry = lanes_entry(call, b, g, blockIdx.y);
  load_stacked(call, memory.rows, b, g, blockIdx.y);
  const bool wanted = entry.exists && entry.word >= 0 && entry.word < call.num_words;
  const float* gradient =
      wanted ? call.gradient + b * call.gradient_b + entry.head * call.gradient_h + index_t(entry.word) * call.num_columns : nullptr;
  const float lse = entry.exists ? call.lse[entry.place] : infinity();
  float delta = 0;
  const int stop = min(call.num_columns, split_start(call.num_columns, blockIdx.x + 1));
  for (int start = split_start(call.num_columns, blockIdx.x); start < stop; start += KEYS) {
    load_columns(call, memory.keys, b, g, start);
    score_tile(memory.scores, memory.rows, memory.keys);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int m = start + lane + j * LANES, n = column(call, b, m);
      if (wanted && n >= 0) delta += exp2f(masked(call, entry, n, lanes_scores(memory)[j * LANES]) - lse) * gradient[m];
    }
  }
  delta = sum_over_row(delta);
  const index_t size = index_t(gridDim.z / call.num_groups) * call.num_heads * call.num_rows;
  if (entry.exists && lane == 0) call.partial[blockIdx.x * size + entry.place] = delta * entry.weight;
}

// dS of the loaded tiles, whose keys begin at `start`, as float16 in the scores' place; the softmax scale and `grad_scale` left out.
DEVICE void put_scores_gradient(const RowMaps& call, Memory& memory, const Entry& entry, int b, int start) {
  score_tile(memory.scores, memory.rows, memory.keys);
  const float lse = entry.exists ? call.lse[entry.place] : infinity();
  const float delta = entry.exists ? call.delta[entry.place] : 0;
  const float head_weight = call.head_weights ? call.head_weights[entry.head] : 1;
  const float* gradient = entry.exists && entry.word >= 0 && entry.word < call.num_words
                              ? call.gradient + b * call.gradient_b + entry.head * call.gradient_h + index_t(entry.word) * call.num_keys
                              : nullptr;
  float gradients[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int n = start + threadIdx.x % LANES + j * LANES;
    const float probability = exp2f(masked(call, entry, n, lanes_scores(memory)[j * LANES]) - lse);
    const float wanted = gradient && n < call.num_keys ? gradient[n] * entry.weight : 0;
    gradients[j] = probability * (wanted - delta) * head_weight;
  }
  put_halves(memory.scores, gradients);
  __syncthreads();
}

// partial[split, b, h, r, :]: the sum over one split of the keys of dS k, the softmax scale left out.
KERNEL(THREADS) row_query_gradient(const RowMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int b = blockIdx.z / call.num_groups, g = blockIdx.z % call.num_groups;
  const Entry entry = lanes_entry(call, b, g, blockIdx.y);
  load_stacked(call, memory.rows, b, g, blockIdx.y);
  Sums<ROWS, PADDED> sums;
  const int stop = min(call.num_keys, split_start(call.num_keys, blockIdx.x + 1));
  for (int start = split_start(call.num_keys, blockIdx.x); start < stop; start += KEYS) {
    load_keys(call, memory.keys, b, g, start, stop);
    put_scores_gradient(call, memory, entry, b, start);
    sums.template add<false, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.keys, STRIDE, KEYS);
    __syncthreads();
  }
  const index_t size = index_t(gridDim.z / call.num_groups) * call.num_heads * call.num_rows;
  sums.for_each(memory.scores, [&](int i, int d, float value) {
    const Entry target = stacked_entry(call, b, g, blockIdx.y * ROWS + i);
    if (target.exists && d < WIDTH) call.partial[(blockIdx.x * size + target.place) * WIDTH + d] = value;
  });
}

// out[b, h, rows[r], :] = scale times the parts of every entry that names this row; such entries all write the same value.
KERNEL(THREADS) row_sum(const RowMaps call) {
  const int r = blockIdx.x, b = blockIdx.y / call.num_heads, h = blockIdx.y % call.num_heads, d = threadIdx.x;
  const index_t* rows = call.rows + index_t(b) * call.num_rows;
  const index_t row = rows[r], size = index_t(gridDim.y) * call.num_rows;
  if (row < 0 || row >= call.num_queries || d >= WIDTH) return;
  float total = 0;
  for (int other = 0; other < call.num_rows; ++other) {
    if (rows[other] != row) continue;
    for (int split = 0; split < call.num_splits; ++split)
      total += call.partial[(split * size + index_t(blockIdx.y) * call.num_rows + other) * WIDTH + d];
  }
  call.out[((index_t(b) * call.num_heads + h) * call.num_queries + row) * WIDTH + d] = to_half(total * call.scale * *call.grad_scale);
}

// out[b, g, n, :]: scale dS^T q over the entries of the group's heads.
KERNEL(THREADS) row_key_gradient(const RowMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int start = blockIdx.x * KEYS, b = blockIdx.y / call.num_groups, g = blockIdx.y % call.num_groups;
  const int stacked = call.num_heads / call.num_groups * call.num_rows;
  load_keys(call, memory.keys, b, g, start, call.num_keys);
  Sums<KEYS, PADDED> sums;
  for (int block = 0; block * ROWS < stacked; ++block) {
    const Entry entry = lanes_entry(call, b, g, block);
    load_stacked(call, memory.rows, b, g, block);
    put_scores_gradient(call, memory, entry, b, start);
    sums.template add<true, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.rows, STRIDE, ROWS);
    __syncthreads();
  }
  sums.for_each(memory.scores, [&](int i, int d, float value) {
    if (start + i >= call.num_keys || d >= WIDTH) return;
    const index_t place = (index_t(b) * call.num_groups + g) * call.num_keys + start + i;
    call.out[place * WIDTH + d] = to_half(value * call.scale * *call.grad_scale);
  });
}
