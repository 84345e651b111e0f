// Attention with entropy on a CPU: tiles as in blockwise/, without an operator of torch for every
// pass over them. A thread takes some blocks of rows of a head (backward: some stripes of its keys),
// so that nothing waits for all threads; a stripe of keys and values stays in the cache while the
// blocks of rows pass by. Products are torch's own BLAS, inside torch's own OpenMP threads.
//
// Compiled where it runs (build.py) and called through ctypes (passes.py), so there is nothing of
// torch's or Python's here, nothing is allocated and nothing can be thrown. Scores are in base 2.

#include <atomic>
#include <cstdint>
#include <cstring>

extern "C" {

using Product = void (*)(const char*, const char*, const int*, const int*, const int*,
                         const float*, const float*, const int*, const float*, const int*,
                         const float*, float*, const int*);
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

// [batch, heads, positions, dim]; the last dimension is contiguous, strides count elements.
struct View {
  void* data;  // null: not wanted
  int64_t batch, head, position;
};

// One call. passes.py has the same fields in the same order.
struct Call {
  Product product;             // sgemm_
  Parallel parallel;           // GOMP_parallel
  ThreadNumber thread_number;  // omp_get_thread_num
  float* scratch;              // `threads` times scratch_floats()
  int64_t threads;

  int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
  int64_t rows;       // of a block, of each query head
  int64_t depth;      // forward: blocks that share a pass over the keys
  int64_t stripe;     // keys that stay in the cache, a multiple of 16
  int64_t tile;       // keys that meet a block at once at most, likewise
  int64_t segments;   // backward: into how many parts the stripes of a head are dealt
  int64_t precision;  // of inputs, outputs and gradients: 0 float32, 1 bfloat16, 2 float16
  float scale, log2_scale;

  // Row i of batch entry b sees the keys first[b][i] <= j < stop[b][i] whose id is its own, and
  // the rows of a block none outside lowest[b][block] <= j < highest[b][block].
  const int64_t *first, *stop, *lowest, *highest;
  int64_t limits_stride, blocks_stride;   // from one batch entry to the next; 0 if they share
  const int64_t *row_id, *key_id;  // null: all keys
  int64_t row_id_stride, key_id_stride;

  View query, key, value, output;
  float *largest, *total, *weighted;  // forward: [batch, heads, queries]

  View d_output, d_key, d_value;
  void* d_query;     // contiguous; null: not wanted
  float* d_queries;  // if there are several segments their sums, [segments, ...], in its place
  const float *log2_normalizer, *log2_slope;  // backward: [batch, heads, queries]
  float* delta;
};
}

namespace {

constexpr float MASKED = -1e22f;  // problem.MASKED_SCORE
constexpr int64_t MULTIPLE = 16;  // cutting.MULTIPLE

// 2^x for x < 127 to a unit in the last place: 0 where it would be denormal; NaN for NaN and inf.
inline float power_of_2(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: its last bits are the integer
  const float rest = x - (shifted - 12582912.0f);
  float power = 0.00015345809515565634f;  // minimax on [-1/2, 1/2]
  power = power * rest + 0.0013399930903688073f;
  power = power * rest + 0.009618489071726799f;
  power = power * rest + 0.05550328642129898f;
  power = power * rest + 0.24022646248340607f;
  power = power * rest + 0.6931471824645996f;
  power = power * rest + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000u + 127u) << 23;
  float whole;
  std::memcpy(&whole, &bits, 4);
  return x < -126.0f ? 0.0f : power * whole;
}

inline float widen(uint16_t given) {  // bfloat16
  const uint32_t bits = static_cast<uint32_t>(given) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline float widen_half(uint16_t given) {  // float16; compilers convert _Float16 one by one
  const uint32_t magnitude = given & 0x7FFFu;
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &tiny, 4);
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  bits = magnitude < 0x0400u ? bits : magnitude < 0x7C00u ? normal : normal | 0x7F800000u;
  bits |= static_cast<uint32_t>(given & 0x8000u) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline uint16_t narrow_half(float given) {  // to float16: nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &given, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  float positive;
  std::memcpy(&positive, &magnitude, 4);
  const float shifted = positive + 0.5f;  // its last bit is float16's smallest number
  uint32_t tiny;
  std::memcpy(&tiny, &shifted, 4);
  const uint32_t normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t half = magnitude > 0x7F800000u    ? 0x7E00u
                        : magnitude >= 0x477FF000u ? 0x7C00u  // 65520 and more
                        : magnitude < 0x38800000u  ? tiny - 0x3F000000u
                                                   : normal;
  return static_cast<uint16_t>(sign | half);
}

inline uint16_t narrow(float given) {  // to bfloat16: nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &given, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return given != given ? 0x7FC0u : static_cast<uint16_t>(rounded);
}

void load(float* to, const void* from, int64_t at, int64_t count, int64_t precision) {
  if (precision == 0) {
    std::memcpy(to, static_cast<const float*>(from) + at, count * sizeof(float));
  } else if (precision == 1) {
    const uint16_t* source = static_cast<const uint16_t*>(from) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = widen(source[j]);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = widen_half(source[j]);
  }
}

void store(void* to, int64_t at, const float* from, float factor, int64_t count,
           int64_t precision) {
  if (precision == 0) {
    float* target = static_cast<float*>(to) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) target[j] = from[j] * factor;
  } else if (precision == 1) {
    uint16_t* target = static_cast<uint16_t*>(to) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) target[j] = narrow(from[j] * factor);
  } else {
    uint16_t* target = static_cast<uint16_t*>(to) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) target[j] = narrow_half(from[j] * factor);
  }
}

// A matrix of floats, row by row.
struct Matrix {
  float* data;
  int64_t stride;

  float* row(int64_t r) const { return data + r * stride; }
  Matrix from(int64_t r) const { return {row(r), stride}; }
};

// A half-open range of keys.
struct Span {
  int64_t start, stop;

  int64_t count() const { return stop - start; }
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t up(int64_t count) { return (count + MULTIPLE - 1) / MULTIPLE * MULTIPLE; }
int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
int64_t width(int64_t whole, int64_t most) {  // of tiles that leave no small rest
  return whole > 0 ? up(parts(whole, parts(whole, most))) : MULTIPLE;
}
int64_t blocks(const Call& call) { return parts(call.queries, call.rows); }

// Whether the sums for the query's gradient are kept aside, because it is in low precision.
bool narrow_sums(const Call& call) {
  return call.d_query && call.precision != 0 && call.segments == 1;
}

// The scratch of one thread.
struct Scratch {
  Matrix query, d_output, sum, d_query, sums, score, d_score, key, value, d_key, d_value;
  int64_t floats = 0;

  Scratch(const Call& call, float* start) {
    const int64_t rows = call.heads / call.key_heads * call.rows;
    auto take = [&](int64_t count, int64_t width) -> Matrix {
      Matrix here = {start + floats, width};
      floats += up(count * width);
      return here;
    };
    query = take(rows, call.dim);
    d_output = take(rows, call.value_dim);
    sum = take(rows * call.depth, call.value_dim);
    d_query = take(rows, call.dim);
    sums = take(narrow_sums(call) ? call.heads / call.key_heads * call.queries : 0, call.dim);
    score = take(rows, call.tile);
    d_score = take(rows, call.tile);
    key = take(call.stripe, call.dim);
    value = take(call.stripe, call.value_dim);
    d_key = take(call.stripe, call.dim);
    d_value = take(call.stripe, call.value_dim);
  }
};

// One key head of one batch entry, with the query heads that share it.
struct Unit {
  const Call& call;
  int64_t batch, key_head, group;

  Unit(const Call& given, int64_t number)
      : call(given),
        batch(number / given.key_heads),
        key_head(number % given.key_heads),
        group(given.heads / given.key_heads) {}

  int64_t place(const View& view, int64_t key) const {
    return batch * view.batch + key_head * view.head + key * view.position;
  }

  // Some keys or values as floats, in place if they are.
  Matrix load_keys(const View& view, Span keys, Matrix scratch) const {
    if (call.precision == 0)
      return {static_cast<float*>(view.data) + place(view, keys.start), view.position};
    for (int64_t j = 0; j < keys.count(); ++j)
      load(scratch.row(j), view.data, place(view, keys.start + j), scratch.stride,
           call.precision);
    return scratch;
  }

  void store_keys(const View& view, Span keys, Matrix from) const {
    if (!view.data) return;
    for (int64_t j = 0; j < keys.count(); ++j)
      store(view.data, place(view, keys.start + j), from.row(j), 1.0f, from.stride,
            call.precision);
  }
};

// Some positions of the query heads of a unit. Row r is query `start + r % rows` of head
// `r / rows` of the group.
struct Block {
  const Call& call;
  const Unit& unit;
  int64_t place, start, rows, all;

  Block(const Unit& owner, int64_t number) : call(owner.call), unit(owner), place(number) {
    start = place * call.rows;
    rows = least(call.rows, call.queries - start);
    all = unit.group * rows;
  }

  int64_t position(int64_t r) const { return start + r % rows; }
  int64_t head(int64_t r) const { return unit.key_head * unit.group + r / rows; }
  int64_t row(int64_t r) const {  // in what is [batch, heads, queries]
    return (unit.batch * call.heads + head(r)) * call.queries + position(r);
  }
  int64_t place_of(const View& view, int64_t r) const {
    return unit.batch * view.batch + head(r) * view.head + position(r) * view.position;
  }

  // The part of some keys outside which the block sees none.
  Span within(Span keys) const {
    const int64_t at = unit.batch * call.blocks_stride + place;
    const int64_t start = greatest(keys.start, call.lowest[at]);
    return {start, greatest(start, least(keys.stop, call.highest[at]))};
  }

  // The columns of some keys that row r may see.
  Span columns(int64_t r, Span keys) const {
    const int64_t at = unit.batch * call.limits_stride + position(r);
    const int64_t from = greatest(0, least(keys.count(), call.first[at] - keys.start));
    return {from, greatest(from, least(keys.count(), call.stop[at] - keys.start))};
  }

  // The ids of the keys from `key` on, and that of row r; null if ids do not matter.
  const int64_t* ids(int64_t r, int64_t key, int64_t* own) const {
    if (!call.key_id) return nullptr;
    *own = call.row_id[unit.batch * call.row_id_stride + position(r)];
    return call.key_id + unit.batch * call.key_id_stride + key;
  }

  // The block's rows of a tensor as floats, in place if they are.
  Matrix load_rows(const View& view, Matrix scratch) const {
    if (call.precision == 0 && unit.group == 1)
      return {static_cast<float*>(view.data) + place_of(view, 0), view.position};
    for (int64_t r = 0; r < all; ++r)
      load(scratch.row(r), view.data, place_of(view, r), scratch.stride,
           call.precision);
    return scratch;
  }
};

// c = factor * a b + keep * c for matrices row by row: [rows, inner] [inner, columns]. BLAS counts
// column by column, so it is asked for the transposed product.
enum Transposed { NEITHER, LEFT, RIGHT };
void multiply(const Call& call, Transposed which, int64_t rows, int64_t columns, int64_t inner,
              float factor, Matrix a, Matrix b, float keep, Matrix c) {
  const char of_a = which == LEFT ? 'T' : 'N', of_b = which == RIGHT ? 'T' : 'N';
  const int m = rows, n = columns, k = inner, lda = a.stride, ldb = b.stride, ldc = c.stride;
  call.product(&of_b, &of_a, &n, &m, &k, &factor, b.data, &ldb, a.data, &lda, &keep, c.data,
               &ldc);
}

void clear_outside(float* row, Span columns, int64_t count) {
  std::memset(row, 0, columns.start * sizeof(float));
  std::memset(row + columns.stop, 0, (count - columns.stop) * sizeof(float));
}

// Turn scores into 2^(s - m) and add to (m, l, t) of MATHEMATICS; return the factor that brings
// earlier sums to the new maximum: with a = 2^(m - m'), t <- a (t + (m - m') l), l <- a l.
float add_scores(float* score, int64_t count, float* largest, float* total, float* weighted) {
  float raised = *largest;
#pragma omp simd reduction(max : raised)
  for (int64_t j = 0; j < count; ++j) raised = score[j] > raised ? score[j] : raised;
  float sum = 0.0f, moment = 0.0f;
#pragma omp simd reduction(+ : sum, moment)
  for (int64_t j = 0; j < count; ++j) {
    const float below = score[j] - raised;
    const float probability = power_of_2(below);
    sum += probability;
    moment += probability * below;
    score[j] = probability;
  }
  if (sum == 0.0f && raised == MASKED) sum = __builtin_nanf("");  // -inf, or below what is masked
  const float shift = *largest - raised, factor = power_of_2(shift);
  *weighted = factor * (*weighted + shift * *total) + moment;
  *total = factor * *total + sum;
  *largest = *total != *total ? *total : raised;  // a comparison passes over NaN
  return factor;
}

void forward_tile(const Block& block, Span keys, Matrix key, Matrix value, Matrix sum,
                  Scratch& scratch) {
  const Call& call = block.call;
  const Matrix query = block.load_rows(call.query, scratch.query), score = scratch.score;
  const int64_t count = keys.count();
  multiply(call, RIGHT, block.all, count, call.dim, call.log2_scale, query, key, 0.0f, score);
  for (int64_t r = 0; r < block.all; ++r) {
    const Span seen = block.columns(r, keys);
    clear_outside(score.row(r), seen, count);
    if (seen.count() == 0) continue;
    float* row = score.row(r) + seen.start;
    int64_t own;
    if (const int64_t* ids = block.ids(r, keys.start + seen.start, &own)) {
#pragma omp simd
      for (int64_t j = 0; j < seen.count(); ++j) row[j] = ids[j] == own ? row[j] : MASKED;
    }
    const int64_t at = block.row(r);
    const float factor = add_scores(row, seen.count(), call.largest + at, call.total + at,
                                    call.weighted + at);
    if (factor != 1.0f)
      for (int64_t d = 0; d < call.value_dim; ++d) sum.row(r)[d] *= factor;
  }
  multiply(call, NEITHER, block.all, call.value_dim, count, 1.0f, score, value, 1.0f, sum);
}

void begin_rows(const Block& block, Matrix sum) {
  const Call& call = block.call;
  std::memset(sum.data, 0, block.all * sum.stride * sizeof(float));
  for (int64_t r = 0; r < block.all; ++r) {
    const int64_t at = block.row(r);
    call.largest[at] = MASKED;
    call.total[at] = call.weighted[at] = 0.0f;
  }
}

void finish_rows(const Block& block, Matrix sum) {
  const Call& call = block.call;
  for (int64_t r = 0; r < block.all; ++r) {
    const float factor = 1.0f / call.total[block.row(r)];  // inf without keys, see passes.py
    store(call.output.data, block.place_of(call.output, r), sum.row(r), factor, sum.stride,
          call.precision);
  }
}

int64_t forward_items(const Call& call) {
  return call.batch * call.key_heads * parts(blocks(call), call.depth);
}

// A few blocks of rows pass over the keys together. The last ones first: if the rows are causal,
// they see the most keys.
void forward_item(const Call& call, int64_t item, Scratch& scratch) {
  const int64_t of_head = parts(blocks(call), call.depth);
  const Unit unit(call, item / of_head);
  const int64_t begin = (of_head - 1 - item % of_head) * call.depth;
  const int64_t end = least(begin + call.depth, blocks(call));
  auto sum_of = [&](int64_t place) {
    return scratch.sum.from((place - begin) * unit.group * call.rows);
  };
  Span all = {call.keys, 0};
  for (int64_t place = begin; place < end; ++place) {
    begin_rows(Block(unit, place), sum_of(place));
    const Span seen = Block(unit, place).within({0, call.keys});
    if (seen.count() > 0) all = {least(all.start, seen.start), greatest(all.stop, seen.stop)};
  }
  const int64_t step = width(all.count(), call.stripe);
  for (int64_t start = all.start; start < all.stop; start += step) {
    const Span stripe = {start, least(start + step, all.stop)};
    const Matrix key = unit.load_keys(call.key, stripe, scratch.key);
    const Matrix value = unit.load_keys(call.value, stripe, scratch.value);
    for (int64_t place = begin; place < end; ++place) {
      const Block block(unit, place);
      const Span seen = block.within(stripe);
      const int64_t across = width(seen.count(), call.tile);
      for (int64_t at = seen.start; at < seen.stop; at += across)
        forward_tile(block, {at, least(at + across, seen.stop)}, key.from(at - start),
                     value.from(at - start), sum_of(place), scratch);
    }
  }
  for (int64_t place = begin; place < end; ++place)
    finish_rows(Block(unit, place), sum_of(place));
}

// Turn scores into p, and dp = dO.v into dS = p (dp - delta - g (s - lse)), all of one row.
void score_gradient(float* score, float* d_score, int64_t count, float normalizer, float slope,
                    float delta) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float log2_probability = score[j] - normalizer;
    const float probability = power_of_2(log2_probability);
    d_score[j] = probability * (slope * log2_probability - delta + d_score[j]);
    score[j] = probability;
  }
}

void forget_other_ids(float* score, float* d_score, int64_t count, const int64_t* ids,
                      int64_t own) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    score[j] = ids[j] == own ? score[j] : 0.0f;
    d_score[j] = ids[j] == own ? d_score[j] : 0.0f;
  }
}

// Add a block's share to the gradients of some keys and values, and theirs to that of its query.
void backward_tile(const Block& block, Span keys, Matrix key, Matrix value, Matrix d_key,
                   Matrix d_value, Matrix sums, Scratch& scratch) {
  const Call& call = block.call;
  const Matrix query = block.load_rows(call.query, scratch.query);
  const Matrix d_output = block.load_rows(call.d_output, scratch.d_output);
  const Matrix score = scratch.score, d_score = scratch.d_score;
  const int64_t all = block.all, count = keys.count();
  multiply(call, RIGHT, all, count, call.dim, call.log2_scale, query, key, 0.0f, score);
  multiply(call, RIGHT, all, count, call.value_dim, 1.0f, d_output, value, 0.0f, d_score);
  for (int64_t r = 0; r < all; ++r) {
    const Span seen = block.columns(r, keys);
    clear_outside(score.row(r), seen, count);
    clear_outside(d_score.row(r), seen, count);
    float *row = score.row(r) + seen.start, *d_row = d_score.row(r) + seen.start;
    const int64_t at = block.row(r);
    score_gradient(row, d_row, seen.count(), call.log2_normalizer[at], call.log2_slope[at],
                   call.delta[at]);
    int64_t own;
    if (const int64_t* ids = block.ids(r, keys.start + seen.start, &own))
      forget_other_ids(row, d_row, seen.count(), ids, own);
  }
  if (call.d_value.data)
    multiply(call, LEFT, count, call.value_dim, all, 1.0f, score, d_output, 1.0f, d_value);
  if (call.d_key.data)
    multiply(call, LEFT, count, call.dim, all, call.scale, d_score, query, 1.0f, d_key);
  if (!sums.data) return;
  if (block.unit.group == 1) {
    multiply(call, NEITHER, all, call.dim, count, call.scale, d_score, key, 1.0f,
             sums.from(block.start));
    return;
  }
  const Matrix rows = scratch.d_query;
  multiply(call, NEITHER, all, call.dim, count, call.scale, d_score, key, 0.0f, rows);
  for (int64_t r = 0; r < all; ++r) {
    float* sum = sums.row(r / block.rows * call.queries + block.position(r));
    for (int64_t d = 0; d < call.dim; ++d) sum[d] += rows.row(r)[d];
  }
}

// Every so many-th stripe of the keys of one head, which share a sum over its keys.
void backward_item(const Call& call, int64_t item, Scratch& scratch) {
  const Unit unit(call, item / call.segments);
  const int64_t segment = item % call.segments;
  const int64_t number = segment * call.batch * call.key_heads + item / call.segments;
  const int64_t size = unit.group * call.queries * call.dim;
  Matrix sums = {nullptr, call.dim};
  if (call.d_query) {
    float* direct = call.segments > 1 ? call.d_queries : static_cast<float*>(call.d_query);
    sums.data = narrow_sums(call) ? scratch.sums.data : direct + number * size;
    std::memset(sums.data, 0, size * sizeof(float));
  }
  const int64_t step = call.segments * call.stripe;
  for (int64_t start = segment * call.stripe; start < call.keys; start += step) {
    const Span stripe = {start, least(start + call.stripe, call.keys)};
    const Matrix key = unit.load_keys(call.key, stripe, scratch.key);
    const Matrix value = unit.load_keys(call.value, stripe, scratch.value);
    std::memset(scratch.d_key.data, 0, stripe.count() * call.dim * sizeof(float));
    std::memset(scratch.d_value.data, 0, stripe.count() * call.value_dim * sizeof(float));
    for (int64_t place = 0; place < blocks(call); ++place) {
      const Block block(unit, place);
      const Span seen = block.within(stripe);
      const int64_t across = width(seen.count(), call.tile);
      for (int64_t at = seen.start; at < seen.stop; at += across) {
        const int64_t skip = at - start;
        backward_tile(block, {at, least(at + across, seen.stop)}, key.from(skip),
                      value.from(skip), scratch.d_key.from(skip), scratch.d_value.from(skip),
                      sums, scratch);
      }
    }
    unit.store_keys(call.d_key, stripe, scratch.d_key);
    unit.store_keys(call.d_value, stripe, scratch.d_value);
  }
  if (narrow_sums(call))
    store(call.d_query, number * size, sums.data, 1.0f, size, call.precision);
}

// Add dO . O to delta, which holds the terms that need no sum over the width.
void delta_item(const Call& call, int64_t item, Scratch& scratch) {
  const Unit unit(call, item / blocks(call));
  const Block block(unit, item % blocks(call));
  const Matrix d_output = block.load_rows(call.d_output, scratch.d_output);
  const Matrix output = block.load_rows(call.output, scratch.sum);
  for (int64_t r = 0; r < block.all; ++r) {
    const float *left = d_output.row(r), *right = output.row(r);
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t d = 0; d < call.value_dim; ++d) product += left[d] * right[d];
    call.delta[block.row(r)] += product;
  }
}

struct Work {
  const Call* call;
  void (*one)(const Call&, int64_t, Scratch&);
  int64_t items;
  std::atomic<int64_t> next;
};

void take_items(void* given) {
  Work& work = *static_cast<Work*>(given);
  const Call& call = *work.call;
  const int64_t thread = call.threads > 1 ? call.thread_number() : 0;
  const int64_t floats = Scratch(call, nullptr).floats;
  Scratch scratch(call, call.scratch + thread * floats);
  for (int64_t item = work.next++; item < work.items; item = work.next++)
    work.one(call, item, scratch);
}

void in_parallel(const Call& call, void (*one)(const Call&, int64_t, Scratch&), int64_t items) {
  Work work{&call, one, items, {0}};
  if (call.threads > 1)
    call.parallel(take_items, &work, static_cast<unsigned>(call.threads), 0);
  else
    take_items(&work);
}

}  // namespace

extern "C" {

// What passes.py and cutting.py must agree with.
int64_t call_bytes() { return sizeof(Call); }
int64_t multiple() { return MULTIPLE; }
float masked_score() { return MASKED; }

int64_t scratch_floats(const Call* call) { return Scratch(*call, nullptr).floats; }

void attention_forward(const Call* call) { in_parallel(*call, forward_item, forward_items(*call)); }

void attention_backward(const Call* call) {
  const int64_t units = call->batch * call->key_heads;
  in_parallel(*call, delta_item, units * blocks(*call));
  in_parallel(*call, backward_item, units * call->segments);
}
}
