// `column_maps`: words own key columns, their maps run over queries. The contract and the formulas: lavender/kernels/column_maps/api.py.
//
// Every output has one writer and every sum a fixed order. One tile holds the keys of a text encoder's window; then each score is
// computed once, and heads are summed in registers. With more keys a query's log-sum-exp comes first, and scores a second time.

#include "tiles.cuh"

struct ColumnMaps {
  const half_t* query;            // [B, H, Q, WIDTH] by its strides
  const half_t* key;              // [B, H, N, WIDTH] by its strides
  const half_t* value;            // [B, H, N, WIDTH] by its strides, or null where maps alone are wanted
  const float* word_weights;      // [B, W, N]
  const float* bias;              // [B, H, Q, N] by its strides, or null
  const float* head_weights;      // [H], or null where heads are kept
  const float* gradient;          // of the maps [B, C, W, Q]
  const half_t* output_gradient;  // [B, H, Q, WIDTH]
  const float* delta;             // [B, H, Q]
  const float* grad_scale;        // what the maps' gradient was divided by, one number
  const float* output_scale;      // what the output's gradient was divided by, one number
  half_t* output;                 // [B, H, Q, WIDTH]
  float* maps;                    // [B, parts, W, Q], zeros before
  float* lse;                     // [B, H, Q] in base 2, +inf where nothing is seen
  half_t* query_gradient;         // [B, H, Q, WIDTH]
  float* new_delta;               // [B, H, Q]
  float* head_delta;              // [B, H, Q], delta's part by the maps, the head's weight left out
  float* key_partial;             // [splits, B, H, N, WIDTH]
  float* value_partial;           // [splits, B, H, N, WIDTH]
  index_t query_b;
  index_t query_h;
  index_t query_i;
  index_t key_b;
  index_t key_h;
  index_t key_n;
  index_t value_b;
  index_t value_h;
  index_t value_n;
  index_t bias_b;
  index_t bias_h;
  index_t bias_i;
  index_t bias_n;
  index_t gradient_b;
  index_t gradient_h;  // zero where heads are summed
  int num_heads;
  int num_queries;
  int num_keys;
  int num_words;
  int heads_per_part;
  float scale;
};

struct Memory {
  half_t rows[ROWS * STRIDE];
  half_t pulls[ROWS * STRIDE];  // gradients of the output
  half_t keys[KEYS * STRIDE];   // or values
  float scores[ROWS * SCORE_STRIDE];
};
static_assert(sizeof(Memory) == SHARED_BYTES, "the launch gives a block what this file lays out");
// Sums leave through the place of rows and pulls, which no product of theirs reads while they do.
static_assert(2 * sizeof(Memory::rows) >= Sums<KEYS, PADDED>::SCRATCH_BYTES, "sums have a place to leave through");

// A query of one head: what a lane knows of the row of scores that it works on.
struct Query {
  bool exists;
  int number;
  index_t place;  // among all [B, H, Q]
  const float* bias;

  DEVICE Query(const ColumnMaps& call, int b, int h, int block) {
    number = block * ROWS + threadIdx.x / LANES;
    exists = number < call.num_queries;
    place = (index_t(b) * call.num_heads + h) * call.num_queries + number;
    bias = call.bias ? call.bias + b * call.bias_b + h * call.bias_h + number * call.bias_i : nullptr;
  }
};

DEVICE void load_queries(const ColumnMaps& call, half_t* tile, int b, int h, int block) {
  load_tile<ROWS>(tile, [&](int r) -> const half_t* {
    const int i = block * ROWS + r;
    return i < call.num_queries ? call.query + b * call.query_b + h * call.query_h + i * call.query_i : nullptr;
  });
}

DEVICE void load_pulls(const ColumnMaps& call, half_t* tile, int b, int h, int block) {
  load_tile<ROWS>(tile, [&](int r) -> const half_t* {
    const int i = block * ROWS + r;
    return i < call.num_queries
               ? call.output_gradient + ((index_t(b) * call.num_heads + h) * call.num_queries + i) * WIDTH
               : nullptr;
  });
}

DEVICE void load_keys(const ColumnMaps& call, half_t* tile, int b, int h, int start) {
  load_tile<KEYS>(tile, [&](int n) -> const half_t* {
    return start + n < call.num_keys ? call.key + b * call.key_b + h * call.key_h + (start + n) * call.key_n : nullptr;
  });
}

DEVICE void load_values(const ColumnMaps& call, half_t* tile, int b, int h, int start) {
  load_tile<KEYS>(tile, [&](int n) -> const half_t* {
    return start + n < call.num_keys ? call.value + b * call.value_b + h * call.value_h + (start + n) * call.value_n : nullptr;
  });
}

// This lane's elements of a tile of scores, LANES apart; nobody else reads or writes them before a barrier.
DEVICE float* lanes_scores(Memory& memory) {
  return memory.scores + threadIdx.x / LANES * SCORE_STRIDE + threadIdx.x % LANES;
}

// This lane's scores in base 2 of the tile of keys that begins at `start`, -inf where nothing is seen.
DEVICE void masked_scores(float (&scores)[PER_LANE], const ColumnMaps& call, Memory& memory, const Query& query, int start) {
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int n = start + threadIdx.x % LANES + j * LANES;
    const bool seen = query.exists && n < call.num_keys;
    scores[j] = seen ? lanes_scores(memory)[j * LANES] * (call.scale * LOG2E) : -infinity();
    if (seen && query.bias) scores[j] += query.bias[n * call.bias_n] * LOG2E;
  }
}

// Whether any word has a share of the keys of a tile; the same answer in every thread.
DEVICE bool words_have(const float* word_weights, const ColumnMaps& call, int start) {
  bool any = false;
  for (int e = threadIdx.x; e < call.num_words * KEYS; e += THREADS) {
    const int n = start + e % KEYS;
    if (n < call.num_keys && word_weights[index_t(e / KEYS) * call.num_keys + n] != 0) any = true;
  }
  return __syncthreads_or(any);
}

// maps[w, i] += what the words' shares make of this lane's probabilities, for one tile of keys; by the whole block.
DEVICE void add_to_maps(
    float* maps, const float (&shares)[PER_LANE], const float* word_weights, const ColumnMaps& call, Memory& memory, int block, int start) {
  __syncthreads();  // what the scores' place held has been read
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) lanes_scores(memory)[j * LANES] = shares[j];
  __syncthreads();
  const int r = threadIdx.x % ROWS, i = block * ROWS + r, count = min(KEYS, call.num_keys - start);
  if (i >= call.num_queries) return;
  for (int w = threadIdx.x / ROWS; w < call.num_words; w += THREADS / ROWS) {
    const float* weights = word_weights + index_t(w) * call.num_keys + start;
    float sum = 0;
    for (int n = 0; n < count; ++n)
      if (weights[n] != 0) sum += weights[n] * memory.scores[r * SCORE_STRIDE + n];
    maps[index_t(w) * call.num_queries + i] += sum;
  }
}

// output[b, h, i, :], maps[b, part, w, i] and lse[b, h, i] of one block of queries and one part of the heads.
KERNEL(THREADS) column_maps(const ColumnMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int block = blockIdx.x, part = blockIdx.y, b = blockIdx.z, tiles = (call.num_keys + KEYS - 1) / KEYS;
  const float* word_weights = call.word_weights + index_t(b) * call.num_words * call.num_keys;
  float* maps = call.maps + (index_t(b) * gridDim.y + part) * call.num_words * call.num_queries;
  float shares[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) shares[j] = 0;
  for (int h = part * call.heads_per_part; h < min((part + 1) * call.heads_per_part, call.num_heads); ++h) {
    const Query query(call, b, h, block);
    const float head_weight = call.head_weights ? call.head_weights[h] : 1;
    __syncthreads();  // what the tiles held has been read
    load_queries(call, memory.rows, b, h, block);
    float scores[PER_LANE];
    LogSumExp sum;
    for (int tile = 0; tile < tiles; ++tile) {
      load_keys(call, memory.keys, b, h, tile * KEYS);
      score_tile(memory.scores, memory.rows, memory.keys);
      masked_scores(scores, call, memory, query, tile * KEYS);
      sum.add(scores);
    }
    const float value = sum.value(), lse = value == -infinity() ? infinity() : value;
    if (query.exists && threadIdx.x % LANES == 0) call.lse[query.place] = lse;
    Sums<ROWS, PADDED> outputs;
    for (int tile = 0; tile < tiles; ++tile) {
      if (tiles > 1) {
        if (!call.value && !words_have(word_weights, call, tile * KEYS)) continue;
        load_keys(call, memory.keys, b, h, tile * KEYS);
        score_tile(memory.scores, memory.rows, memory.keys);
        masked_scores(scores, call, memory, query, tile * KEYS);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) shares[j] = 0;
      }
      float probabilities[PER_LANE];
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        probabilities[j] = exp2f(scores[j] - lse);
        shares[j] += probabilities[j] * head_weight;
      }
      if (call.value) {
        load_values(call, memory.keys, b, h, tile * KEYS);
        put_halves(memory.scores, probabilities);
        __syncthreads();
        outputs.template add<false, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.keys, STRIDE, KEYS);
      }
      if (tiles > 1) add_to_maps(maps, shares, word_weights, call, memory, block, tile * KEYS);
    }
    if (!call.value) continue;
    outputs.for_each(reinterpret_cast<float*>(memory.rows), [&](int i, int d, float value) {
      if (block * ROWS + i >= call.num_queries || d >= WIDTH) return;
      const index_t place = (index_t(b) * call.num_heads + h) * call.num_queries + block * ROWS + i;
      call.output[place * WIDTH + d] = to_half(value);
    });
  }
  if (tiles == 1) add_to_maps(maps, shares, word_weights, call, memory, block, 0);
}

// For the tile of keys at `start`: this lane's probabilities, dP, and its part by the maps without the head's weight.
//
// Leaves the values in the place of the keys where there are values.
DEVICE void gradients_of_probabilities(
    float (&probabilities)[PER_LANE], float (&wanted)[PER_LANE], float (&by_words)[PER_LANE], const ColumnMaps& call, Memory& memory,
    const Query& query, int b, int h, int start) {
  const float lse = query.exists ? call.lse[query.place] : infinity();
  const float head_weight = call.head_weights ? call.head_weights[h] : 1;
  __syncthreads();  // what the tiles held has been read
  load_keys(call, memory.keys, b, h, start);
  score_tile(memory.scores, memory.rows, memory.keys);
  masked_scores(probabilities, call, memory, query, start);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    probabilities[j] = exp2f(probabilities[j] - lse);
    by_words[j] = 0;
  }
  const float* gradient = call.gradient + b * call.gradient_b + h * call.gradient_h + query.number;
  const float* weights = call.word_weights + index_t(b) * call.num_words * call.num_keys + start + threadIdx.x % LANES;
  for (int w = 0; query.exists && w < call.num_words; ++w) {
    const float pull = gradient[index_t(w) * call.num_queries];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
      if (start + int(threadIdx.x) % LANES + j * LANES < call.num_keys) by_words[j] += pull * weights[index_t(w) * call.num_keys + j * LANES];
  }
  if (call.value) {
    load_values(call, memory.keys, b, h, start);
    score_tile(memory.scores, memory.pulls, memory.keys);
  }
  const float output_weight = call.value ? *call.output_scale / *call.grad_scale : 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) wanted[j] = by_words[j] * head_weight + (call.value ? lanes_scores(memory)[j * LANES] * output_weight : 0);
}

// query_gradient[b, h, i, :] and, for the key's and the head weights' gradients, new_delta[b, h, i] and head_delta[b, h, i].
KERNEL(THREADS) column_query_gradient(const ColumnMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int block = blockIdx.x, b = blockIdx.y / call.num_heads, h = blockIdx.y % call.num_heads;
  const int tiles = (call.num_keys + KEYS - 1) / KEYS;
  const Query query(call, b, h, block);
  load_queries(call, memory.rows, b, h, block);
  if (call.value) load_pulls(call, memory.pulls, b, h, block);
  float probabilities[PER_LANE], wanted[PER_LANE], by_words[PER_LANE];
  float delta = 0, head_delta = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    gradients_of_probabilities(probabilities, wanted, by_words, call, memory, query, b, h, tile * KEYS);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      delta += probabilities[j] * wanted[j];
      head_delta += probabilities[j] * by_words[j];
    }
  }
  delta = sum_over_row(delta);
  head_delta = sum_over_row(head_delta);
  if (query.exists && threadIdx.x % LANES == 0) {
    call.new_delta[query.place] = delta;
    call.head_delta[query.place] = head_delta;
  }
  Sums<ROWS, PADDED> sums;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tiles > 1) gradients_of_probabilities(probabilities, wanted, by_words, call, memory, query, b, h, tile * KEYS);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) wanted[j] = probabilities[j] * (wanted[j] - delta);
    if (call.value) load_keys(call, memory.keys, b, h, tile * KEYS);
    put_halves(memory.scores, wanted);
    __syncthreads();
    sums.template add<false, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.keys, STRIDE, KEYS);
  }
  sums.for_each(reinterpret_cast<float*>(memory.rows), [&](int i, int d, float value) {
    if (block * ROWS + i >= call.num_queries || d >= WIDTH) return;
    const index_t place = (index_t(b) * call.num_heads + h) * call.num_queries + block * ROWS + i;
    call.query_gradient[place * WIDTH + d] = to_half(value * call.scale * *call.grad_scale);
  });
}

// key_partial and value_partial[split, b, h, n, :]: dk and dv over one split of the queries.
KERNEL(THREADS) column_key_gradient(const ColumnMaps call) {
  SHARED_MEMORY(bytes);
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const int start = blockIdx.x * KEYS, split = blockIdx.y, b = blockIdx.z / call.num_heads, h = blockIdx.z % call.num_heads;
  const int blocks = (call.num_queries + ROWS - 1) / ROWS, reach = (blocks + gridDim.y - 1) / gridDim.y;
  Sums<KEYS, PADDED> keys, values;
  for (int block = split * reach; block < min(blocks, (split + 1) * reach); ++block) {
    const Query query(call, b, h, block);
    load_queries(call, memory.rows, b, h, block);
    if (call.value) load_pulls(call, memory.pulls, b, h, block);
    float probabilities[PER_LANE], wanted[PER_LANE], by_words[PER_LANE];
    gradients_of_probabilities(probabilities, wanted, by_words, call, memory, query, b, h, start);
    if (call.value) {
      put_halves(memory.scores, probabilities);
      __syncthreads();
      values.template add<true, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.pulls, STRIDE, ROWS);
      __syncthreads();
    }
    const float delta = query.exists ? call.delta[query.place] : 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) wanted[j] = probabilities[j] * (wanted[j] - delta);
    put_halves(memory.scores, wanted);
    __syncthreads();
    keys.template add<true, false>(reinterpret_cast<half_t*>(memory.scores), HALF_STRIDE, memory.rows, STRIDE, ROWS);
    __syncthreads();
  }
  const index_t first = ((index_t(split) * (gridDim.z / call.num_heads) + b) * call.num_heads + h) * call.num_keys + start;
  keys.for_each(reinterpret_cast<float*>(memory.rows), [&](int i, int d, float value) {
    if (start + i < call.num_keys && d < WIDTH) call.key_partial[(first + i) * WIDTH + d] = value * call.scale * *call.grad_scale;
  });
  if (!call.value) return;
  values.for_each(reinterpret_cast<float*>(memory.rows), [&](int i, int d, float value) {
    if (start + i < call.num_keys && d < WIDTH) call.value_partial[(first + i) * WIDTH + d] = value * *call.output_scale;
  });
}
