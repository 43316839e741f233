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
__device__ inline unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ inline unsigned short float_to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
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
// In assembly, as the compiler makes single words of it otherwise.
__device__ inline void store_words(void* to, const unsigned (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :: "l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
__device__ inline void store_words(void* to, const unsigned (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(to), "r"(w[0]), "r"(w[1]) : "memory");
}
__device__ inline void store_words(void* to, const unsigned (&w)[1]) {
  *reinterpret_cast<unsigned*>(to) = w[0];
}
#endif

struct Bfloat16 { unsigned short bits; };
struct Float16 { unsigned short bits; };

__device__ inline float number(float x) { return x; }
__device__ inline float number(Bfloat16 x) { return bits_to_float((unsigned)x.bits << 16); }
__device__ inline float number(Float16 x) { return half_to_float(x.bits); }
__device__ inline unsigned bits(float, float x) { return float_to_bits(x); }
__device__ inline unsigned bits(Bfloat16, float x) { return float_to_bfloat16(x); }
__device__ inline unsigned bits(Float16, float x) { return float_to_half(x); }

enum { SAFE, SHIFTED, GATED };  // MODE
constexpr int KEPT = KH > SH ? KH - SH : 0;  // rows that a window shares with the next

// Channels that a thread works on, loaded and stored at once.
template <typename T> struct alignas(VECTOR * sizeof(T)) Pack { T of[VECTOR]; };
struct alignas(VECTOR % 4 ? 4 : 16) Floats { float of[VECTOR]; };

#define EACH _Pragma("unroll") for (int k = 0; k < VECTOR; ++k)

__device__ inline float exponential(float x) { return FAST ? fast_exp2(x * 1.44269504f) : expf(x); }
// 1 / x for x >= 1e-37, and 0 for infinity.
__device__ inline float inverse(float x) { return FAST ? fast_inverse(x) : 1 / x; }
// Keeps the denominator of a window that does not exist from being zero.
__device__ inline float inverse_total(float x) { return inverse(fmaxf(x, 1e-37f)); }

// One image and the channels of this thread.
struct Image {
  const X* x;
  const H* h;
  Floats mean, gain, bias;  // GATED

  __device__ bool inside(int row, int column) const {
    return 0 <= row && row < HEIGHT && 0 <= column && column < WIDTH;
  }
  __device__ static int place(int row, int column) { return (row * WIDTH + column) * CHANNELS; }

  // Also -inf, of a mask, becomes finite; what is not a number stays so.
  __device__ static float finite(float logit) { return logit < LOWEST ? LOWEST : logit; }

  // The weight and, if GATED, the derivative of the logit with respect to what the gate gets.
  __device__ float weight(float h, int k, float* slope = nullptr) const {
    if (MODE != GATED) return exponential(finite(h) - SHIFT);
    float u = (h - mean.of[k]) * gain.of[k] + bias.of[k];
    // The logit is 12 up to rounding from u = 80 on, where exp(u) does not overflow yet.
    float e = exponential(u > 80.0f ? 80.0f : u), p = inverse(1 + e);
    if (slope) *slope = GATE * (e * p) * p;
    return exponential(MIDDLE - GATE * p);
  }
};

template <typename T> __device__ inline Pack<T> load(const T* from, bool there) {
  Pack<T> pack = {};
  return there ? *reinterpret_cast<const Pack<T>*>(from) : pack;
}

template <typename T> __device__ inline unsigned word(const Floats& x, int i) {
  if constexpr (sizeof(T) == 4) return bits(T(), x.of[i]);
  else return bits(T(), x.of[2 * i]) | bits(T(), x.of[2 * i + 1]) << 16;
}
template <typename T> __device__ inline void store(T* to, const Floats& x) {
  if constexpr (VECTOR * sizeof(T) % 4 != 0) {
    to->bits = bits(T(), x.of[0]);
  } else {
    unsigned words[VECTOR * sizeof(T) / 4];
#pragma unroll
    for (int i = 0; i < VECTOR * sizeof(T) / 4; ++i) words[i] = word<T>(x, i);
    store_words(to, words);
  }
}

// Sums over a window or one row of it.
struct Sums {
  Floats weighted, total, largest;  // of x exp(l - largest), of exp(l - largest); SAFE: the logits'
};

__device__ inline Sums row_sums(const Image& image, int row, int left) {
  Pack<X> xs[KW];
  Pack<H> hs[KW];
  bool inside[KW];
#pragma unroll
  for (int tap = 0; tap < KW; ++tap) {
    inside[tap] = image.inside(row, left + tap);
    int place = Image::place(row, left + tap);
    xs[tap] = load(image.x + place, inside[tap]);
    hs[tap] = load(image.h + place, inside[tap]);
  }
  Sums sums;
  EACH {
    float largest = LOWEST, weighted = 0, total = 0;
    if (MODE == SAFE) {
#pragma unroll
      for (int tap = 0; tap < KW; ++tap)
        if (inside[tap]) largest = fmaxf(largest, number(hs[tap].of[k]));
    }
#pragma unroll
    for (int tap = 0; tap < KW; ++tap) {
      float h = number(hs[tap].of[k]), weight;
      if (MODE == SAFE)  // LOWEST - LOWEST weighs one where nothing is in the row, and x is 0
        weight = exponential((inside[tap] ? Image::finite(h) : LOWEST) - largest);
      else
        weight = inside[tap] ? image.weight(h, k) : 0.0f;
      weighted += weight * number(xs[tap].of[k]);
      total += weight;
    }
    sums.weighted.of[k] = weighted, sums.total.of[k] = total, sums.largest.of[k] = largest;
  }
  return sums;
}

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

struct Program {
  int image, down, across, channel;  // the last: the first one of this thread
  __device__ Program() {
    int rest = blockIdx.x;
    channel = (rest % CHANNEL_BLOCKS * GROUPS + threadIdx.x % GROUPS) * VECTOR;
    rest /= CHANNEL_BLOCKS;
    across = rest % ACROSS, rest /= ACROSS;
    down = rest % DOWN, image = rest / DOWN;
  }
  __device__ long long first(int height, int width) const {
    return (long long)image * height * width * CHANNELS + channel;
  }
};

#if MODE_IS_GATED
#define AFFINE const float *mean, const float *gain, const float *bias,
#define SUMS , float *of_du, float *of_product
#else
#define AFFINE
#define SUMS
#endif

__device__ inline Image image_of(const Program& program, const X* x, const H* h, AFFINE int) {
  Image image;
  image.x = x + program.first(HEIGHT, WIDTH), image.h = h + program.first(HEIGHT, WIDTH);
#if MODE_IS_GATED
  int place = program.image * CHANNELS + program.channel;
  EACH {
    image.mean.of[k] = mean[place + k], image.gain.of[k] = gain[place + k];
    image.bias.of[k] = bias[place + k];
  }
#endif
  return image;
}

#if BACKWARD

constexpr int LEFT = (KW - 1) / SW + 1, UP = (KH - 1) / SH + 1;  // windows of a pixel, at most
constexpr int ACROSS_TILE = COLUMNS + LEFT - 1, WINDOWS = (ROWS + UP - 1) * ACROSS_TILE;

extern "C" __global__ void __launch_bounds__(THREADS, 4)
lip_pool_backward(const X* x, const H* h, AFFINE const X* g, X* dx, H* dh SUMS) {
  __shared__ Floats ys[WINDOWS * GROUPS], as[WINDOWS * GROUPS], largest[MODE == SAFE ? WINDOWS * GROUPS : 1];
  __shared__ Floats sums[MODE == GATED ? 2 * THREADS : 1];
  Program program;
  bool exists = program.channel < CHANNELS;
  int group = threadIdx.x % GROUPS;
#if MODE_IS_GATED
  Image image = {};
  if (exists) image = image_of(program, x, h, mean, gain, bias, 0);
#else
  Image image = image_of(program, x, h, 0);
#endif
  int first_row = program.down * ROWS - (UP - 1), first_column = program.across * COLUMNS - (LEFT - 1);
  g += program.first(OUT_HEIGHT, OUT_WIDTH);

  for (int one = threadIdx.x / GROUPS; one < WINDOWS; one += THREADS / GROUPS) {
    int row = first_row + one / ACROSS_TILE, column = first_column + one % ACROSS_TILE;
    Floats y = {}, a = {}, top;
    EACH top.of[k] = -LOWEST;  // of a window that does not exist, in which a pixel weighs nothing
    if (exists && 0 <= row && row < OUT_HEIGHT && 0 <= column && column < OUT_WIDTH) {
      Sums window = row_sums(image, row * SH - PH, column * SW - PW);
#pragma unroll 1
      for (int i = 1; i < KH; ++i)
        window = join(window, row_sums(image, row * SH - PH + i, column * SW - PW));
      Pack<X> gradient = load(g + (row * OUT_WIDTH + column) * CHANNELS, true);
      EACH {
        float share = inverse_total(window.total.of[k]);
        y.of[k] = window.weighted.of[k] * share, a.of[k] = number(gradient.of[k]) * share;
        top.of[k] = window.largest.of[k];
      }
    }
    ys[one * GROUPS + group] = y, as[one * GROUPS + group] = a;
    if (MODE == SAFE) largest[one * GROUPS + group] = top;
  }
  __syncthreads();

  Floats sum_du = {}, sum_product = {};
  constexpr int PIXELS = ROWS * SH * COLUMNS * SW;
  for (int one = threadIdx.x / GROUPS; one < PIXELS; one += THREADS / GROUPS) {
    int r = one / (COLUMNS * SW), q = one % (COLUMNS * SW);
    int row = program.down * ROWS * SH - PH + r, column = program.across * COLUMNS * SW - PW + q;
    if (!exists || !image.inside(row, column)) continue;
    int place = Image::place(row, column);
    Pack<X> x_pack = load(image.x + place, true);
    Pack<H> h_pack = load(image.h + place, true);
    Floats share = {}, change = {};
#pragma unroll
    for (int i = 0; i < UP; ++i) {
#pragma unroll
      for (int j = 0; j < LEFT; ++j) {
        if (r % SH + i * SH >= KH || q % SW + j * SW >= KW) continue;
        int place = ((r / SH + UP - 1 - i) * ACROSS_TILE + q / SW + LEFT - 1 - j) * GROUPS + group;
        Floats y = ys[place], a = as[place], top;
        if (MODE == SAFE) top = largest[place];
        EACH {
          float part = a.of[k];
          if (MODE == SAFE) part *= exponential(Image::finite(number(h_pack.of[k])) - top.of[k]);
          share.of[k] += part, change.of[k] += part * (number(x_pack.of[k]) - y.of[k]);
        }
      }
    }
    Floats dx_here, dh_here;
    EACH {
      float h = number(h_pack.of[k]), slope = 1, weight = 1;
      if (MODE != SAFE) weight = image.weight(h, k, MODE == GATED ? &slope : nullptr);
      float du = weight * change.of[k] * slope;
      dx_here.of[k] = weight * share.of[k], dh_here.of[k] = du;
      if (MODE == GATED) sum_du.of[k] += du, sum_product.of[k] += du * (h - image.mean.of[k]);
    }
    long long whole = program.first(HEIGHT, WIDTH) + place;
    store(dx + whole, dx_here), store(dh + whole, dh_here);
  }
#if MODE_IS_GATED
  sums[threadIdx.x] = sum_du, sums[THREADS + threadIdx.x] = sum_product;
  __syncthreads();
  if (threadIdx.x >= 2 * GROUPS || !exists) return;
  bool product = threadIdx.x >= GROUPS;  // each of these threads adds up one of the two, for a group
  Floats total = {};
  for (int i = 0; i < THREADS; i += GROUPS) {
    EACH total.of[k] += sums[product * THREADS + i + group].of[k];
  }
  int tile = program.down * ACROSS + program.across;
  float* to = (product ? of_product : of_du) + (program.image * DOWN * ACROSS + tile) * CHANNELS;
  EACH to[program.channel + k] = total.of[k];
#endif
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, 4)
lip_pool_forward(const X* x, const H* h, AFFINE X* y) {
  Program program;
  int column = program.across * COLUMNS + threadIdx.x / GROUPS;
  if (column >= OUT_WIDTH || program.channel >= CHANNELS) return;
#if MODE_IS_GATED
  Image image = image_of(program, x, h, mean, gain, bias, 0);
#else
  Image image = image_of(program, x, h, 0);
#endif
  y += program.first(OUT_HEIGHT, OUT_WIDTH) + column * CHANNELS;
  int first = program.down * ROWS, left = column * SW - PW;
  Sums rows[KH];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) rows[i] = row_sums(image, first * SH - PH + i, left);
  for (int row = first; row < first + ROWS && row < OUT_HEIGHT; ++row) {
#pragma unroll
    for (int i = KEPT; i < KH; ++i) rows[i] = row_sums(image, row * SH - PH + i, left);
    Sums window = rows[0];
#pragma unroll
    for (int i = 1; i < KH; ++i) window = join(window, rows[i]);
    Floats mean_here;
    EACH mean_here.of[k] = window.weighted.of[k] * inverse_total(window.total.of[k]);
    store(y + row * OUT_WIDTH * CHANNELS, mean_here);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) rows[i] = rows[i + KH - KEPT];
  }
}

#endif
