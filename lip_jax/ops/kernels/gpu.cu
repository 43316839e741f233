// `lip_pool` for NVIDIA GPUs: one pass forward, one backward. What gpu.py says of them is not repeated
// here. Names in capitals are macros that it sets: shapes, dtypes, tiles; compiled anew for each.

#ifdef __CUDACC_RTC__  // tests run this file on a CPU, with functions of their own
__device__ inline float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
__device__ inline unsigned float_to_bits(float x) { return __float_as_uint(x); }
__device__ inline float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline unsigned floats_to_halves(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ inline unsigned floats_to_bfloat16s(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Loads and stores that happen only if `there` are in assembly: the compiler makes branches of them.
__device__ inline void load_bytes(const void* from, bool there, unsigned else_, unsigned (&w)[4]) {
  asm("{ .reg .pred p; setp.ne.b32 p, %4, 0; mov.b32 %0, %6; mov.b32 %1, %6; mov.b32 %2, %6; mov.b32 %3, %6; "
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5]; }"
      : "=&r"(w[0]), "=&r"(w[1]), "=&r"(w[2]), "=&r"(w[3]) : "r"((int)there), "l"(from), "r"(else_));
}
__device__ inline void load_bytes(const void* from, bool there, unsigned else_, unsigned (&w)[2]) {
  asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, %4; mov.b32 %1, %4; "
      "@p ld.global.nc.v2.b32 {%0, %1}, [%3]; }"
      : "=&r"(w[0]), "=&r"(w[1]) : "r"((int)there), "l"(from), "r"(else_));
}
__device__ inline void load_bytes(const void* from, bool there, unsigned else_, unsigned (&w)[1]) {
  asm("{ .reg .pred p; setp.ne.b32 p, %1, 0; mov.b32 %0, %3; @p ld.global.nc.b32 %0, [%2]; }"
      : "=&r"(w[0]) : "r"((int)there), "l"(from), "r"(else_));
}
__device__ inline void store_bytes(void* to, bool there, const unsigned (&w)[4]) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }"
               :: "r"((int)there), "l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]));
}
__device__ inline void store_bytes(void* to, bool there, const unsigned (&w)[2]) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3}; }"
               :: "r"((int)there), "l"(to), "r"(w[0]), "r"(w[1]));
}
__device__ inline void store_bytes(void* to, bool there, const unsigned (&w)[1]) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b32 [%1], %2; }"
               :: "r"((int)there), "l"(to), "r"(w[0]));
}
#endif

struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

enum { SAFE, SHIFTED, GATED };  // MODE
constexpr int LEFT = (KW - 1) / SW + 1, UP = (KH - 1) / SH + 1;  // cells that a window reaches into
constexpr int KEPT = KH > SH ? KH - SH : 0;  // rows that a window shares with the next
constexpr int REACH = KEPT + SH;             // rows that a thread has of its column at a time
constexpr int PITCH = WIDTH * CHANNELS;      // numbers of a row of the image
constexpr int PAD = (LEFT - 1) * GROUPS;     // threads that would be beside those of a program

#define UNROLL _Pragma("unroll")
#define EACH UNROLL for (int k = 0; k < VECTOR; ++k)

struct alignas(VECTOR % 4 ? 4 : 16) Floats { float of[VECTOR]; };

// Channels that a thread works on, as they are in memory.
__device__ inline float number(float, const unsigned* words, int k) { return bits_to_float(words[k]); }
__device__ inline float number(Bfloat16, const unsigned* words, int k) {
  return bits_to_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
}
__device__ inline float number(Float16, const unsigned* words, int k) {
  return half_to_float(words[k / 2] >> k % 2 * 16);
}
__device__ inline unsigned word(float, const Floats& x, int i) { return float_to_bits(x.of[i]); }
__device__ inline unsigned word(Bfloat16, const Floats& x, int i) {
  return floats_to_bfloat16s(x.of[2 * i], 2 * i + 1 < VECTOR ? x.of[2 * i + 1] : 0.0f);
}
__device__ inline unsigned word(Float16, const Floats& x, int i) {
  return floats_to_halves(x.of[2 * i], 2 * i + 1 < VECTOR ? x.of[2 * i + 1] : 0.0f);
}

template <typename T> struct Pack {
  static constexpr int WORDS = (VECTOR * sizeof(T) + 3) / 4;
  static constexpr bool WHOLE = VECTOR * sizeof(T) % 4 == 0;  // else one number of two bytes
  unsigned words[WORDS];

  __device__ float operator[](int k) const { return number(T(), words, k); }

  __device__ static Pack load(const T* from, bool there, float else_ = 0) {
    Pack pack;
    Floats others;
    EACH others.of[k] = else_;
    unsigned other = else_ == 0 ? 0 : word(T(), others, 0);
    if constexpr (WHOLE) load_bytes(from, there, other, pack.words);
    else pack.words[0] = there ? from->bits : other;
    return pack;
  }
  __device__ static void store(T* to, bool there, const Floats& x) {
    unsigned words[WORDS];
    UNROLL for (int i = 0; i < WORDS; ++i) words[i] = word(T(), x, i);
    if constexpr (WHOLE) store_bytes(to, there, words);
    else if (there) to->bits = words[0];
  }
};

constexpr float LOG2E = 1.44269504f;
__device__ inline float exponential(float x) { return FAST ? fast_exp2(x * LOG2E) : expf(x); }
// 1 / x for x >= 1e-37, and 0 for infinity.
__device__ inline float inverse(float x) { return FAST ? fast_inverse(x) : 1 / x; }
// Keeps the denominator of a window that does not exist from being zero.
__device__ inline float inverse_total(float x) { return inverse(fmaxf(x, 1e-37f)); }

// Also -inf, of a mask, becomes finite; what is not a number stays so.
__device__ inline float finite(float logit) { return logit < LOWEST ? LOWEST : logit; }

// Sums over pixels of a window.
struct Sums {
  Floats weighted, total, largest;  // of x exp(l - largest), of exp(l - largest); SAFE: the logits'
};

__device__ inline Sums join(const Sums& one, const Sums& other) {
  Sums sums;
  EACH {
    float scale = 1, other_scale = 1, largest = LOWEST;
    if (MODE == SAFE) {
      largest = fmaxf(one.largest.of[k], other.largest.of[k]);
      scale = exponential(one.largest.of[k] - largest);
      other_scale = exponential(other.largest.of[k] - largest);
    }
    sums.weighted.of[k] = scale * one.weighted.of[k] + other_scale * other.weighted.of[k];
    sums.total.of[k] = scale * one.total.of[k] + other_scale * other.total.of[k];
    sums.largest.of[k] = largest;
  }
  return sums;
}

__device__ inline float weight(float h, float closed) {
  if (MODE == GATED)
    return FAST ? fast_exp2(MIDDLE * LOG2E - GATE * LOG2E * closed) : expf(MIDDLE - GATE * closed);
  return FAST ? fast_exp2(h * LOG2E - SHIFT * LOG2E) : expf(finite(h) - SHIFT);
}

// Pixels of one row of the image in this thread's cells.
struct Row {
  Pack<X> x[SW];
  Pack<H> h[SW];
  Floats closed[SW], weight[SW];  // GATED: sigmoid(-u) of u, what the gate gets; not SAFE
  bool inside;
};

// Column of cells and channels of one image that a thread works on.
struct Column {
  const X* x;  // its first pixel in the image's first row
  const H* h;
  bool inside[SW];
  // GATED. If FAST, in powers of 2, and the mean is part of the bias: h was rounded by more.
  Floats mean, gain, bias;

  __device__ Row load_row(int row) const {
    Row pixels;
    pixels.inside = 0 <= row && row < HEIGHT;
    UNROLL for (int q = 0; q < SW; ++q) {
      bool there = pixels.inside && inside[q];
      pixels.x[q] = Pack<X>::load(x + row * PITCH + q * CHANNELS, there);
      // What is not there weighs nothing.
      float logit = MODE == SHIFTED ? LOWEST : 0;
      pixels.h[q] = Pack<H>::load(h + row * PITCH + q * CHANNELS, there, logit);
    }
    return pixels;
  }

  __device__ float closed(float h, int k) const {
    float u = (FAST ? h : h - mean.of[k]) * gain.of[k] + bias.of[k];
    // The logit is 12 up to rounding from u = 80 on, where exp(u) does not overflow yet.
    return inverse(1 + (FAST ? fast_exp2(u) : expf(u > 80.0f ? 80.0f : u)));
  }

  __device__ void weigh(Row& row) const {
    UNROLL for (int q = 0; q < SW; ++q) {
      // A product, as a condition would become a branch.
      float counts = MODE != GATED || (row.inside && inside[q]);
      EACH {
        float h = row.h[q][k], gate = MODE == GATED ? closed(h, k) : 0.0f;
        row.closed[q].of[k] = gate, row.weight[q].of[k] = weight(h, gate) * counts;
      }
    }
  }

  // Of the first `count` pixels.
  __device__ Sums sum(const Row& row, int count) const {
    Sums sums;
    EACH {
      float largest = LOWEST, weighted, total;
      if (MODE == SAFE) {
        UNROLL for (int q = 0; q < SW; ++q)
          if (q < count && row.inside && inside[q]) largest = fmaxf(largest, row.h[q][k]);
      }
      UNROLL for (int q = 0; q < SW; ++q) {
        if (q >= count) continue;
        float weight = row.weight[q].of[k];
        if (MODE == SAFE) {  // LOWEST - LOWEST weighs one where nothing is in the row, and x is 0
          bool there = row.inside && inside[q];
          weight = exponential((there ? finite(row.h[q][k]) : LOWEST) - largest);
        }
        weighted = q ? weighted + weight * row.x[q][k] : weight * row.x[q][k];
        total = q ? total + weight : weight;
      }
      sums.weighted.of[k] = weighted, sums.total.of[k] = total, sums.largest.of[k] = largest;
    }
    return sums;
  }
};

// What threads tell each other: numbers of each, in shared memory.
constexpr int NUMBERS = MODE == SAFE ? 3 : 2;
typedef Floats Told[NUMBERS][THREADS + PAD];
// What a thread tells itself: its pixels, until all windows that hold them are there.
struct Kept {
  Pack<X> x;
  Pack<H> h;
};

#if MODE_IS_GATED
#define AFFINE const float *mean, const float *gain, const float *bias,
#define SUMS , float *of_du, float *of_product
#else
#define AFFINE
#define SUMS
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if BACKWARD
lip_pool_backward(const X* x, const H* h, AFFINE const X* g, X* dx, H* dh SUMS) {
  __shared__ Told windows[UP];  // of this row of cells and those above
  __shared__ Kept kept[REACH][SW][THREADS];
  __shared__ Floats gates[REACH][SW][MODE == GATED ? THREADS : 1];
  auto keep = [&](const Row& pixels, int row) {
    UNROLL for (int q = 0; q < SW; ++q) {
      kept[row % REACH][q][threadIdx.x] = {pixels.x[q], pixels.h[q]};
      if (MODE == GATED) gates[row % REACH][q][threadIdx.x] = pixels.closed[q];
    }
  };
#else
lip_pool_forward(const X* x, const H* h, AFFINE X* y) {
#endif
  __shared__ Told parts[BACKWARD ? 1 : 2][LEFT > 1 ? LEFT - 1 : 1];
  int me = threadIdx.x, across = me / GROUPS, rest = blockIdx.x;
  int channel = (rest % CHANNEL_BLOCKS * GROUPS + me % GROUPS) * VECTOR;
  rest /= CHANNEL_BLOCKS;
  int tile = rest % (DOWN * ACROSS), image = rest / (DOWN * ACROSS);
  int column = tile % ACROSS * OWN - BEFORE + across, first = tile / ACROSS * ROWS;
  bool exists = channel < CHANNELS, own = BEFORE <= across && across < BEFORE + OWN;
  bool has_window = exists && 0 <= column && column < OUT_WIDTH;
  int left = column * SW - PW;  // pixel
  long long begin = (long long)image * HEIGHT * PITCH + left * CHANNELS + channel;
  long long out = ((long long)image * OUT_HEIGHT * OUT_WIDTH + column) * CHANNELS + channel;

  Floats none = {};
  Column cells = {x + begin, h + begin};
  UNROLL for (int q = 0; q < SW; ++q)
    cells.inside[q] = exists && 0 <= left + q && left + q < WIDTH;
#if MODE_IS_GATED
  EACH {
    int statistic = image * CHANNELS + (exists ? channel : 0) + k;
    cells.mean.of[k] = mean[statistic], cells.gain.of[k] = gain[statistic];
    cells.bias.of[k] = bias[statistic];
    if (FAST) {
      cells.bias.of[k] = (cells.bias.of[k] - cells.mean.of[k] * cells.gain.of[k]) * LOG2E;
      cells.gain.of[k] *= LOG2E;
    }
  }
#endif

#if BACKWARD
  int row = first < UP ? 0 : first - (UP - 1), end = first + ROWS < CELLS_DOWN ? first + ROWS : CELLS_DOWN;
  Floats sum_du = {}, sum_product = {}, highest;
  EACH highest.of[k] = -LOWEST;  // of windows that do not exist, in which a pixel weighs nothing
  dx += begin, dh += begin, g += out;
  for (int one = me; one < THREADS + PAD; one += THREADS) {
    UNROLL for (int u = 0; u < UP; ++u) {
      windows[u][0][one] = none, windows[u][1][one] = none;
      if (MODE == SAFE) windows[u][NUMBERS - 1][one] = highest;
    }
  }
#else
  y += out;
  int row = first, end = first + ROWS < OUT_HEIGHT ? first + ROWS : OUT_HEIGHT;
#endif
  if (me < PAD) {  // what the last ones ask for
    Floats lowest;
    EACH lowest.of[k] = LOWEST;
    UNROLL for (int d = 1; d < LEFT; ++d) {
      UNROLL for (int i = 0; i < (BACKWARD ? 1 : 2); ++i) {
        parts[i][d - 1][0][THREADS + me] = none, parts[i][d - 1][1][THREADS + me] = none;
        if (MODE == SAFE) parts[i][d - 1][NUMBERS - 1][THREADS + me] = lowest;
      }
    }
  }
  Row next[SH];
  Sums sums[KH][LEFT];  // of a row, what the window that begins here, or so many cells to the left, has
  UNROLL for (int r = 0; r < SH; ++r) next[r] = cells.load_row(row * SH - PH + KEPT + r);
  UNROLL for (int r = 0; r < KEPT; ++r) {
    Row pixels = cells.load_row(row * SH - PH + r);
    cells.weigh(pixels);
    UNROLL for (int d = 0; d < LEFT; ++d) sums[r][d] = cells.sum(pixels, KW - d * SW);
#if BACKWARD
    keep(pixels, row * SH + r);
#endif
  }
  for (; row < end; ++row) {
#if BACKWARD
    bool is_window = has_window && row < OUT_HEIGHT;
    Pack<X> gradient = Pack<X>::load(g + row * OUT_WIDTH * CHANNELS, is_window);
#endif
    UNROLL for (int r = 0; r < SH; ++r) {
      cells.weigh(next[r]);
#if BACKWARD
      keep(next[r], row * SH + KEPT + r);
#endif
      if (KEPT + r >= KH) continue;
      UNROLL for (int d = 0; d < LEFT; ++d) sums[KEPT + r][d] = cells.sum(next[r], KW - d * SW);
    }
    if (row + 1 < end) {
      UNROLL for (int r = 0; r < SH; ++r) next[r] = cells.load_row((row + 1) * SH - PH + KEPT + r);
    }
    Sums window;
    UNROLL for (int d = LEFT - 1; d >= 0; --d) {
      window = sums[0][d];
      UNROLL for (int r = 1; r < KH; ++r) window = join(window, sums[r][d]);
      if (d == 0) break;
      Told& told = parts[BACKWARD ? 0 : row % 2][d - 1];
      told[0][me] = window.weighted, told[1][me] = window.total;
      if (MODE == SAFE) told[NUMBERS - 1][me] = window.largest;
    }
    if (LEFT > 1) __syncthreads();
    UNROLL for (int d = 1; d < LEFT; ++d) {
      const Told& told = parts[BACKWARD ? 0 : row % 2][d - 1];
      int other = me + d * GROUPS;
      window = join(window, {told[0][other], told[1][other], told[NUMBERS - 1][other]});
    }
    UNROLL for (int r = 0; r < KEPT; ++r) {
      UNROLL for (int d = 0; d < LEFT; ++d) sums[r][d] = sums[r + KH - KEPT][d];
    }
#if !BACKWARD
    Floats mean_here;
    EACH mean_here.of[k] = window.weighted.of[k] * inverse_total(window.total.of[k]);
    Pack<X>::store(y + row * OUT_WIDTH * CHANNELS, own && has_window, mean_here);
#else
    Told& told = windows[row % UP];
    Floats a, b;
    EACH {
      float share = inverse_total(window.total.of[k]), y = window.weighted.of[k] * share;
      a.of[k] = gradient[k] * share, b.of[k] = a.of[k] * y;
    }
    told[0][PAD + me] = is_window ? a : none, told[1][PAD + me] = is_window ? b : none;
    if (MODE == SAFE) told[NUMBERS - 1][PAD + me] = is_window ? window.largest : highest;
    __syncthreads();
    if (row >= first) UNROLL for (int r = 0; r < SH; ++r) {
      int image_row = row * SH - PH + r;
      bool inside = 0 <= image_row && image_row < HEIGHT;
      UNROLL for (int q = 0; q < SW; ++q) {
        Kept pixel = kept[(row * SH + r) % REACH][q][me];
        Floats closed = gates[(row * SH + r) % REACH][q][MODE == GATED ? me : 0];
        Floats share = {}, offset = {};
        UNROLL for (int u = 0; u < UP; ++u) {
          if (r + u * SH >= KH) continue;
          const Told& told = windows[(row + UP - u) % UP];
          Floats of_row = {}, offset_of_row = {};
          UNROLL for (int d = 0; d < LEFT; ++d) {
            if (q + d * SW >= KW) continue;
            int other = PAD + me - d * GROUPS;
            Floats a = told[0][other], b = told[1][other], top = told[NUMBERS - 1][other];
            EACH {
              float scale = 1;
              if (MODE == SAFE) scale = exponential(finite(pixel.h[k]) - top.of[k]);
              of_row.of[k] = d ? of_row.of[k] + scale * a.of[k] : scale * a.of[k];
              offset_of_row.of[k] = d ? offset_of_row.of[k] + scale * b.of[k] : scale * b.of[k];
            }
          }
          EACH {
            share.of[k] = u ? share.of[k] + of_row.of[k] : of_row.of[k];
            offset.of[k] = u ? offset.of[k] + offset_of_row.of[k] : offset_of_row.of[k];
          }
        }
        bool there = inside && cells.inside[q] && own;
        Floats dx_here, dh_here;
        EACH {
          float h = pixel.h[k], p = closed.of[k], one = MODE == SAFE ? 1.0f : weight(h, p);
          float du = one * (pixel.x[k] * share.of[k] - offset.of[k]);
          if (MODE == GATED) du *= GATE * (p - p * p);  // the logit's derivative is 12 p (1 - p)
          dx_here.of[k] = one * share.of[k], dh_here.of[k] = du;
          if (MODE == GATED) {
            float counted = there ? du : 0.0f;
            sum_du.of[k] += counted, sum_product.of[k] += counted * (FAST ? h : h - cells.mean.of[k]);
          }
        }
        int place = image_row * PITCH + q * CHANNELS;
        Pack<X>::store(dx + place, there, dx_here), Pack<H>::store(dh + place, there, dh_here);
      }
    }
#endif
  }
#if BACKWARD && MODE_IS_GATED
  __syncthreads();
  windows[0][0][me] = sum_du, windows[0][1][me] = sum_product;
  __syncthreads();
  if (me >= 2 * GROUPS || !exists) return;
  bool product = me >= GROUPS;  // each of these threads adds up one of the two, for a group
  Floats total = {};
  for (int one = me % GROUPS; one < THREADS; one += GROUPS) {
    EACH {
      total.of[k] += windows[0][product][one].of[k];
      if (FAST && product) total.of[k] -= windows[0][0][one].of[k] * cells.mean.of[k];
    }
  }
  float* to = (product ? of_product : of_du) + (image * DOWN * ACROSS + tile) * CHANNELS;
  EACH to[channel + k] = total.of[k];
#endif
}
