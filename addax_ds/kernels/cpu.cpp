// The kernels on a CPU, bit by bit what addax_ds/kernels/reference.py defines.
//
// Needs -ffp-contract=off: one fused multiply-add changes the bits of z. LANES, the number of fp32
// values worked on at once, follows the instruction set and does not change the result.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the halves of 64-bit words are combined in little-endian order"
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

typedef float F32 __attribute__((vector_size(4 * LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));
typedef uint64_t U64 __attribute__((vector_size(4 * LANES)));  // LANES / 2 elements
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int TILE = 128;  // elements: 8 rows of 16 lanes
constexpr int TILE_LANES = 16;
constexpr int WORDS = 4;
constexpr int ROUNDS = 10;
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 15;  // fewer are not worth waking another for

template <class V, class T>
INLINE V broadcast(T value) {
  return V{} + value;
}

template <class V, class T>
INLINE V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
INLINE void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class T>
INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// ---- z and rounding bits ------------------------------------------------------------------------

struct Counter {
  uint64_t seed;
  uint32_t parameter_id, step, probe_and_stream;
};

// Product of the low halves of 64-bit elements.
INLINE U64 multiply_low_halves(U64 a, U64 b) {
#if LANES == 16 && defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif LANES == 8 && defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif LANES == 4 && defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Philox4x32-10 of the counters whose first words are c0, c0 + 1, ..., c0 + LANES - 1.
INLINE void philox(uint32_t c0, const Counter& counter, U32 words[WORDS]) {
  // Every 64-bit element carries one counter in its low half; what collects in the high half is
  // ignored by the multiplication and masked off at the end. One array for even lanes, one for odd.
  U64 x[2][WORDS];
  for (int odd = 0; odd < 2; odd++) {
    U64 lane{};
    for (int i = 0; i < LANES / 2; i++) lane[i] = 2 * i + odd;
    x[odd][0] = lane + uint64_t(c0);
    x[odd][1] = broadcast<U64>(uint64_t(counter.parameter_id));
    x[odd][2] = broadcast<U64>(uint64_t(counter.step));
    x[odd][3] = broadcast<U64>(uint64_t(counter.probe_and_stream));
  }
  uint32_t key0 = uint32_t(counter.seed), key1 = uint32_t(counter.seed >> 32);
  const U64 multiplier0 = broadcast<U64>(uint64_t(0xD2511F53));
  const U64 multiplier1 = broadcast<U64>(uint64_t(0xCD9E8D57));
#pragma GCC unroll 10
  for (int round = 0; round < ROUNDS; round++) {
    const U64 k0 = broadcast<U64>(uint64_t(key0)), k1 = broadcast<U64>(uint64_t(key1));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      U64* c = x[odd];
      const U64 product0 = multiply_low_halves(c[0], multiplier0);
      const U64 product1 = multiply_low_halves(c[2], multiplier1);
      c[0] = (product1 >> 32) ^ c[1] ^ k0;
      c[1] = product1;
      c[2] = (product0 >> 32) ^ c[3] ^ k1;
      c[3] = product0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < WORDS; i++) words[i] = (U32)((x[0][i] & 0xffffffffu) | (x[1][i] << 32));
}

INLINE F32 square_root(F32 x) {  // correctly rounded
#if LANES == 16 && defined(__AVX512F__)
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8 && defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif LANES == 4 && defined(__SSE2__)
  return (F32)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

constexpr int RADIUS_BITS = 16;
constexpr int RADIUS_SCALE = RADIUS_BITS + 1;

INLINE F32 radius(U32 word) {
  const I32 n = (I32)(((word << 1) & ((2u << RADIUS_BITS) - 1)) | 1u);
  const I32 bits = (I32)__builtin_convertvector(n, F32);
  const I32 exponent = (bits - (0x3f3504f3 + (RADIUS_SCALE << 23))) >> 23;
  const F32 x = (F32)(bits - ((exponent + RADIUS_SCALE) << 23)) - 1.0f;
  F32 p = x * -0.11896100640296936f + 0.18667858839035034f;
  p = p * x - 0.2049633264541626f;
  p = p * x + 0.24909743666648865f;
  p = p * x - 0.3331450819969177f;
  p = p * x + 0.500011146068573f;
  p = p * x - 1.0000009536743164f;
  return square_root(p * x - __builtin_convertvector(exponent, F32) * 0.6931471805599453f);
}

// The normals of an even row (cosine half) and of the odd row after it.
INLINE void normals(U32 word, F32* z) {
  const I32 angle =
      (I32)(((word >> RADIUS_BITS) << (RADIUS_BITS + 2)) | (1u << (RADIUS_BITS + 1)));
  const F32 theta =
      __builtin_convertvector(angle, F32) * float(0.78539816339744830962 / 2147483648.0);
  const F32 square = theta * theta;
  const F32 sine =
      ((square * 0.008151647634804249f - 0.16662481427192688f) * square + 0.9999985694885254f) *
      theta;
  const F32 cosine =
      ((square * -0.001358591951429844f + 0.041655026376247406f) * square - 0.4999985694885254f) *
          square +
      1.0f;
  const F32 r = radius(word);
  z[0] = (F32)((U32)((cosine - sine) * r) ^ (word & 0x80000000u));
  z[1] = (F32)((U32)((cosine + sine) * r) ^ ((word << 1) & 0x80000000u));
}

// 16 uniform bits for an element of an even row and as many for the odd row after it.
INLINE void rounding_bits(U32 word, U32* bits) {
  bits[0] = word & 0xffffu;
  bits[1] = word >> 16;
}

// ---- types of weights and gradients -------------------------------------------------------------

INLINE U32 extended(U16 x) {
#if LANES == 16 && defined(__AVX512F__)  // which the generic forms below do not become
  return (U32)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

INLINE U16 lower_half(U32 x) {
#if LANES == 16 && defined(__AVX512F__)
  return (U16)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, U16);
#endif
}

INLINE U32 magnitude(F32 x) { return (U32)x & 0x7fffffffu; }

INLINE bool all(I32 mask) {
  int32_t result = -1;
  for (int i = 0; i < LANES; i++) result &= mask[i];
  return result != 0;
}

// fp32 rounded to another type. The bits mean nothing where the result is not finite.
struct Rounded {
  U32 bits;
  I32 finite;
};

// Each type has read and write, between memory and a register of bits; widen, from there to fp32;
// and nearest, from fp32. The narrow ones have stochastic, too, which takes 16 random bits.

struct Float32 {
  typedef uint32_t T;
  INLINE U32 read(const T* from) { return load<U32>(from); }
  INLINE void write(T* to, U32 x) { store(to, x); }
  INLINE F32 widen(U32 x) { return (F32)x; }
  INLINE Rounded nearest(F32 x) { return {(U32)x, magnitude(x) < 0x7f800000u}; }
};

struct BFloat16 {
  typedef uint16_t T;
  INLINE U32 read(const T* from) { return extended(load<U16>(from)) << 16; }
  INLINE void write(T* to, U32 x) { store(to, lower_half(x >> 16)); }
  INLINE F32 widen(U32 x) { return (F32)x; }
  INLINE Rounded nearest(F32 x) {
    const U32 carried = (U32)x + 0x7fffu + (((U32)x >> 16) & 1u);
    return {carried & 0xffff0000u, magnitude(x) < 0x7f7f8000u};  // half a unit above the largest
  }
  // Adding to the 16 bits about to be dropped carries with just the probability they stand for.
  INLINE Rounded stochastic(F32 x, U32 random) {
    return {((U32)x + random) & 0xffff0000u, magnitude(x) + random < 0x7f800000u};
  }
};

struct Float16 {
  typedef uint16_t T;
  static constexpr uint32_t NORMAL = 0x38800000;  // 2^-14 in fp32, the smallest normal number
  INLINE U32 read(const T* from) { return extended(load<U16>(from)); }
  INLINE void write(T* to, U32 x) { store(to, lower_half(x)); }
#if LANES == 16 && defined(__AVX512F__)
  INLINE F32 widen(U32 x) { return (F32)_mm512_cvtph_ps((__m256i)lower_half(x)); }
  INLINE U32 nearest_bits(F32 x) {
    return extended((U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif LANES == 8 && defined(__F16C__)
  INLINE F32 widen(U32 x) { return (F32)_mm256_cvtph_ps((__m128i)lower_half(x)); }
  INLINE U32 nearest_bits(F32 x) {
    return extended((U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  INLINE F32 widen(U32 x) {
    const U32 shifted = (x & 0x7fffu) << 13;
    // As fp32 bits the exponent is too small by 112: exact, for subnormals too. Inf and NaN are not
    // numbers to be scaled.
    const U32 scaled = (U32)((F32)shifted * 0x1p112f);
    return (F32)((shifted < 0x0f800000u ? scaled : shifted | 0x7f800000u) | ((x & 0x8000u) << 16));
  }
  INLINE U32 nearest_bits(F32 x) {
    // Below 2^-14: adding 1/2 puts the unit of fp16 subnormals, 2^-24, at the last bit of the sum.
    const U32 subnormal = (U32)((F32)magnitude(x) + 0.5f) - 0x3f000000u;
    return joined(x, subnormal, 0xfffu + (((U32)x >> 13) & 1u));
  }
#endif
  INLINE Rounded nearest(F32 x) { return {nearest_bits(x), magnitude(x) < 0x477ff000u}; }  // 65520
  // In the same way; below 2^-14 in units of 2^-40, the last 16 bits of which are to be dropped.
  INLINE Rounded stochastic(F32 x, U32 random) {
    const U32 below = magnitude(x) < NORMAL ? magnitude(x) : broadcast<U32>(NORMAL);
    const U32 fixed = (U32)__builtin_convertvector((F32)below * 0x1p40f, I32);
    const U32 carry = random >> 3;
    return {joined(x, (fixed + random) >> 16, carry), magnitude(x) + carry < 0x47800000u};
  }
  // From 2^-14 on: add to the 13 bits that are then dropped, and rebias the exponent.
  INLINE U32 joined(F32 x, U32 subnormal, U32 carry) {
    const U32 normal = (magnitude(x) - 0x38000000u + carry) >> 13;
    return (magnitude(x) < NORMAL ? subnormal : normal) | (((U32)x >> 16) & 0x8000u);
  }
};

// ---- loops over blocks --------------------------------------------------------------------------

struct Slice {
  int64_t start, count;  // start: index of the first element in the whole parameter
  int threads;
};

// Tiles are worked on a block at a time, one stage after the other: in short loops of independent
// iterations more of the processor is busy than along one chain from counter to weight.
constexpr int BLOCK_TILES = 16;
constexpr int BLOCK = BLOCK_TILES * TILE;

struct Block {
  int64_t first;  // index of the block's first element in the whole parameter
  int low, high;  // the block's elements [low, high) belong to the slice
};

// Calls work(block) for each block that the slice touches.
template <class Work>
INLINE void for_each_block(const Slice& slice, const Work& work) {
  if (slice.count == 0) return;
  const int64_t stop = slice.start + slice.count;
  const int64_t useful = 1 + slice.count / ELEMENTS_PER_THREAD;
  const int threads = int(useful < slice.threads ? useful : slice.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = slice.start / BLOCK; i < (stop + BLOCK - 1) / BLOCK; i++) {
    const int64_t first = i * BLOCK;
    const int low = first < slice.start ? int(slice.start - first) : 0;
    const int high = first + BLOCK > stop ? int(stop - first) : BLOCK;
    work(Block{first, low, high});
  }
}

// Fills the tiles that hold elements of the slice; expand(word, pair) makes of the words of 16
// counters the values of an even row and of the odd row after it.
template <class V, class T, class Expand>
INLINE void fill(T* values, const Block& block, const Counter& counter, const Expand& expand) {
  alignas(64) uint32_t words[BLOCK_TILES][WORDS][TILE_LANES];
  const int first = block.low / TILE, stop = (block.high + TILE - 1) / TILE;
#pragma GCC unroll 2
  for (int tile = first; tile < stop; tile++) {
    const uint32_t c0 = uint32_t(block.first / TILE + tile) * TILE_LANES;
    for (int lane = 0; lane < TILE_LANES; lane += LANES) {
      U32 four[WORDS];
      philox(c0 + lane, counter, four);
      for (int i = 0; i < WORDS; i++) store(&words[tile][i][lane], four[i]);
    }
  }
  for (int tile = first; tile < stop; tile++) {
    for (int lane = 0; lane < TILE_LANES; lane += LANES) {
#pragma GCC unroll 4
      for (int i = 0; i < WORDS; i++) {
        V pair[2];
        expand(load<U32>(&words[tile][i][lane]), pair);
        T* to = values + tile * TILE + 2 * i * TILE_LANES + lane;
        store(to, pair[0]);
        store(to + TILE_LANES, pair[1]);
      }
    }
  }
}

INLINE void fill_z(float* z, const Block& block, const Counter& counter) {
  fill<F32>(z, block, counter, normals);
}

INLINE void fill_rounding_bits(uint32_t* bits, const Block& block, Counter counter) {
  counter.probe_and_stream |= 1u;
  fill<U32>(bits, block, counter, rounding_bits);
}

// ---- the two operations -------------------------------------------------------------------------

void gaussian(float* out, const Slice& slice, const Counter& counter) {
  for_each_block(slice, [&](const Block& block) INLINE_LAMBDA {
    alignas(64) float z[BLOCK];
    fill_z(z, block, counter);
    const int64_t at = block.first + block.low - slice.start;
    std::memcpy(out + at, z + block.low, (block.high - block.low) * sizeof *out);
  });
}

struct Coefficients {
  float c0, c1;
  const float* c2;  // `directions` numbers of the caller's; not kept
  int directions;
  float zo_eps;
};

// What a forward pass sees of a shifted weight.
template <class Weight>
INLINE F32 seen(F32 weight, F32 shifted) {
  const Rounded rounded = Weight::nearest(shifted);
  return rounded.finite ? Weight::widen(rounded.bits) : weight;
}

// Writes d[0] * c2[0] + d[1] * c2[1] + ... for the elements of a block; weight points to its first.
// Both arrays are longer than a block by LANES, since whole vectors are read and written. Not
// inlined: all variants of Fused with these weights share it.
template <class Weight, bool REALISED>
__attribute__((noinline)) void sum_directions(float* sum, const typename Weight::T* weight,
                                              const Block& block, Counter counter,
                                              const Coefficients& c) {
  alignas(64) float further[BLOCK + LANES];
  for (int i = 0; i < c.directions; i++) {
    float* const scaled = i == 0 ? sum : further;
    const float scale = REALISED ? c.zo_eps : c.c2[i];
    fill<F32>(scaled, block, counter, [scale](U32 word, F32* pair) INLINE_LAMBDA {
      normals(word, pair);
      pair[0] *= scale;
      pair[1] *= scale;
    });
    counter.probe_and_stream += 2;
    if (!REALISED && i == 0) continue;  // fill has written the first term into sum
    for (int k = block.low; k < block.high; k += LANES) {
      F32 term = load<F32>(scaled + k);
      if constexpr (REALISED) {
        typename Weight::T padded[LANES] = {};
        const bool whole = k + LANES <= block.high;
        if (!whole) std::memcpy(padded, weight + k, (block.high - k) * sizeof *weight);
        const F32 wide = Weight::widen(Weight::read(whole ? weight + k : padded));
        term = (seen<Weight>(wide, wide + term) - seen<Weight>(wide, wide - term)) * c.c2[i];
      }
      store(sum + k, i == 0 ? term : load<F32>(sum + k) + term);
    }
  }
}

template <class Weight, class Gradient, bool HAS_GRADIENT, bool HAS_D, bool STOCHASTIC>
struct Fused {
  typedef typename Weight::T W;
  typedef typename Gradient::T G;

  // out = weight * c0 - (gradient * c1 + sum) on LANES elements, or the weight where that is not
  // finite; there all_finite is cleared.
  INLINE void lanes(W* out, const W* weight_, const G* gradient, const float* sum,
                    const uint32_t* bits, const Coefficients& c, I32& all_finite) {
    const U32 stored = Weight::read(weight_);
    const F32 weight = Weight::widen(stored);
    F32 value = weight * c.c0;
    if constexpr (HAS_GRADIENT) {
      F32 decrement = Gradient::widen(Gradient::read(gradient)) * c.c1;
      if constexpr (HAS_D) decrement += load<F32>(sum);
      value -= decrement;
    } else if constexpr (HAS_D) {
      value -= load<F32>(sum);
    }
    Rounded rounded;
    if constexpr (STOCHASTIC) {
      rounded = Weight::stochastic(value, load<U32>(bits));
    } else {
      rounded = Weight::nearest(value);
    }
    all_finite &= rounded.finite;
    Weight::write(out, rounded.finite ? rounded.bits : stored);
  }

  // The same on fewer than LANES elements: in copies that may be read and written whole.
  INLINE void rest(W* out, const W* weight, const G* gradient, const float* sum,
                   const uint32_t* bits, const Coefficients& c, int count,
                   I32& all_finite) {
    W padded[LANES] = {};
    G padded_gradient[LANES] = {};
    float padded_sum[LANES] = {};
    uint32_t padded_bits[LANES] = {};
    std::memcpy(padded, weight, count * sizeof *weight);
    if constexpr (HAS_GRADIENT) std::memcpy(padded_gradient, gradient, count * sizeof *gradient);
    if constexpr (HAS_D) std::memcpy(padded_sum, sum, count * sizeof *sum);
    if constexpr (STOCHASTIC) std::memcpy(padded_bits, bits, count * sizeof *bits);
    lanes(padded, padded, padded_gradient, padded_sum, padded_bits, c, all_finite);
    std::memcpy(out, padded, count * sizeof *out);
  }

  static void run(void* out_, const void* weight_, const void* gradient_, int32_t* kept,
                  Coefficients c, const Slice& slice, const Counter& counter) {
    W* const out = static_cast<W*>(out_);
    const W* const weight = static_cast<const W*>(weight_);
    const G* const gradient = static_cast<const G*>(gradient_);
    for_each_block(slice, [&, c](const Block& block) INLINE_LAMBDA {
      const int64_t base = block.first - slice.start;  // of the block's first element in the slice
      if constexpr (HAS_GRADIENT) {  // two streams to read: they travel while z is made
        prefetch(weight + base + block.low, block.high - block.low);
        prefetch(gradient + base + block.low, block.high - block.low);
      }
      alignas(64) float sum[BLOCK + LANES];
      alignas(64) uint32_t bits[BLOCK];
      if constexpr (HAS_D) {
        const auto fill_sum = c.zo_eps == 0.0f ? sum_directions<Weight, false>
                                               : sum_directions<Weight, true>;
        fill_sum(sum, weight + base, block, counter, c);
      }
      if constexpr (STOCHASTIC) fill_rounding_bits(bits, block, counter);
      const auto gradient_at = [&](int64_t i) { return HAS_GRADIENT ? gradient + i : nullptr; };
      I32 all_finite = broadcast<I32>(-1);
      int k = block.low;
      for (; k + LANES <= block.high; k += LANES) {
        lanes(out + base + k, weight + base + k, gradient_at(base + k), sum + k, bits + k, c,
              all_finite);
      }
      if (k < block.high) {
        rest(out + base + k, weight + base + k, gradient_at(base + k), sum + k, bits + k, c,
             block.high - k, all_finite);
      }
      if (kept != nullptr && !all(all_finite)) __atomic_store_n(kept, 1, __ATOMIC_RELAXED);
    });
  }
};

typedef void (*Run)(void*, const void*, const void*, int32_t*, Coefficients, const Slice&,
                    const Counter&);

template <class Weight, class Gradient, bool HAS_GRADIENT, bool STOCHASTIC>
Run choose(bool has_d) {
  return has_d ? Fused<Weight, Gradient, HAS_GRADIENT, true, STOCHASTIC>::run
               : Fused<Weight, Gradient, HAS_GRADIENT, false, STOCHASTIC>::run;
}

template <class Weight, bool STOCHASTIC>
Run choose(bool has_gradient, bool same_type, bool has_d) {
  if (!has_gradient) return choose<Weight, Weight, false, STOCHASTIC>(has_d);
  return same_type ? choose<Weight, Weight, true, STOCHASTIC>(has_d)
                   : choose<Weight, Float32, true, STOCHASTIC>(has_d);
}

template <class Weight>
Run choose(bool stochastic, bool has_gradient, bool same_type, bool has_d) {
  return stochastic ? choose<Weight, true>(has_gradient, same_type, has_d)
                    : choose<Weight, false>(has_gradient, same_type, has_d);
}

}  // namespace

// The interface to addax_ds/kernels/cpu.py. The pointers to out, gradients and kept may be null.
extern "C" {

void addax_gaussian(float* out, int64_t start, int64_t count, uint64_t seed, uint32_t step,
                    uint32_t parameter_id, uint32_t probe, int threads) {
  gaussian(out, {start, count, threads}, {seed, parameter_id, step, probe << 1});
}

// A slice of a parameter: operation.py's Slice.row.
struct Row {
  void* weight;
  int64_t start, count;
  uint32_t parameter_id;
  int32_t index;
};

// out: a buffer in which slice i begins at element offsets[i], or null: the weights are overwritten.
// gradients: one for each slice. kept: element `index` of it is a slice's. type: 0 fp32, 1 bf16,
// 2 fp16. same_type: the gradients have the type of the weights, else fp32.
void addax_fused(const Row* rows, int64_t slices, char* out, const int64_t* offsets,
                 const void* const* gradients, int32_t* kept, int type, int same_type,
                 int stochastic, float c0, float c1, const float* c2, int directions, float zo_eps,
                 uint64_t seed, uint32_t step, uint32_t probe, int threads) {
  const bool has_gradient = gradients != nullptr, has_d = directions > 0;
  const Run run = type == 0   ? choose<Float32, false>(has_gradient, same_type, has_d)
                  : type == 1 ? choose<BFloat16>(stochastic, has_gradient, same_type, has_d)
                              : choose<Float16>(stochastic, has_gradient, same_type, has_d);
  for (int64_t i = 0; i < slices; i++) {
    const Row& row = rows[i];
    run(out != nullptr ? out + offsets[i] * (type == 0 ? 4 : 2) : row.weight, row.weight,
        has_gradient ? gradients[i] : nullptr, kept != nullptr ? kept + row.index : nullptr,
        {c0, c1, c2, directions, zo_eps}, {row.start, row.count, threads},
        {seed, row.parameter_id, step, probe << 1});
  }
}

int addax_lanes() { return LANES; }
}
