"""The CUDA C++ of the GPU kernels, run on the CPU: each thread of a block is one, with barriers."""

import ctypes
import functools
import hashlib
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np

from lip_jax.ops.kernels import gpu

# What the device's compiler has of itself; without headers, which take longest to compile.
DEVICE = r"""
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define expf __builtin_expf
#define fmaxf __builtin_fmaxf
struct Index { unsigned x; };
static thread_local Index blockIdx, threadIdx;
static void (*meet)();
static void __syncthreads() { meet(); }

template <typename To, typename From> static To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
static float bits_to_float(unsigned bits) { return same_bits<float>(bits); }
static unsigned float_to_bits(float x) { return same_bits<unsigned>(x); }
static float half_to_float(unsigned short bits) { return same_bits<_Float16>(bits); }
static unsigned half(float x) { return same_bits<unsigned short>((_Float16)x); }
static unsigned bfloat16(float x) {
  unsigned bits = float_to_bits(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned floats_to_halves(float low, float high) { return half(low) | half(high) << 16; }
static unsigned floats_to_bfloat16s(float low, float high) {
  return bfloat16(low) | bfloat16(high) << 16;
}
static float fast_exp2(float x) { return __builtin_exp2f(x); }
static float fast_inverse(float x) { return 1 / x; }
template <int N>
static void load_bytes(const void* from, bool there, unsigned else_, unsigned (&words)[N]) {
  for (auto& word : words) word = else_;
  if (there) __builtin_memcpy(words, from, sizeof(words));
}
template <int N> static void store_bytes(void* to, bool there, const unsigned (&words)[N]) {
  if (there) __builtin_memcpy(to, words, sizeof(words));
}
"""
# One thread of one block.
STEP = r"""
template <typename... A> struct Call {
  Call(void (*kernel)(A...), A... arguments) { kernel(arguments...); }
};
template <typename... A> static void call(void (*kernel)(A...), void** pointers) {
  Call<A...>{kernel, (A)*pointers++...};  // one after the other, in braces
}
extern "C" void step(void** pointers, unsigned block, unsigned thread, void (*meeting)()) {
  blockIdx.x = block, threadIdx.x = thread, meet = meeting;
  call(KERNEL, pointers);
}
"""
# All threads of all blocks, of which one runs at a time.
RUN = r"""
#include <barrier>
#include <thread>
#include <vector>
static std::barrier<>* barrier;
static void meet() { barrier->arrive_and_wait(); }
extern "C" void run(
    void (*step)(void**, unsigned, unsigned, void (*)()), int count, int blocks, void** pointers) {
  std::barrier<> one(count);
  barrier = &one;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < count; ++thread)
    threads.emplace_back([=] {
      for (int block = 0; block < blocks; ++block) step(pointers, block, thread, meet), meet();
    });
  for (auto& thread : threads) thread.join();
}
"""

COMPILER = shutil.which("g++")


@functools.cache
def _library(folder, source, macros=()):
  name = folder / hashlib.sha256(" ".join((source, *macros)).encode()).hexdigest()
  name.with_suffix(".cpp").write_text(source)
  options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w", "-ffp-contract=off"]
  options += [f"-D{macro}" for macro in macros]
  command = [COMPILER, *options, name.with_suffix(".cpp"), "-o", name.with_suffix(".so")]
  subprocess.run(command, check=True)
  return ctypes.CDLL(str(name.with_suffix(".so")))


def _call(folder, pass_, x, h, affine, geometry, shift, arguments, outputs):
  tiling, macros = gpu.program(pass_, x, h, affine is not None, geometry, shift)
  inputs = [np.array(a) for a in (x, h, *(affine or ()), *arguments)]
  results = [np.full(shape, 7, dtype) for shape, dtype in outputs(tiling)]  # all is overwritten
  arrays = [*inputs, *results]
  pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
  source = DEVICE + gpu.SOURCE.read_text() + STEP
  step = _library(folder, source, (*macros, f"KERNEL=lip_pool_{pass_}")).step
  (threads,) = (int(macro[8:]) for macro in macros if macro.startswith("THREADS="))
  blocks = x.shape[0] * int(np.prod(tiling.blocks))
  _library(folder, RUN).run(step, threads, blocks, pointers)
  return [jnp.asarray(a) for a in results]


def forward(folder, x, h, affine, geometry, shift):
  """As `gpu.forward`; compiles into the folder."""
  shape = (x.shape[0], *geometry.output_size(x.shape[1:3]), x.shape[3])
  return _call(folder, "forward", x, h, affine, geometry, shift, (), lambda _: [(shape, x.dtype)])[
    0
  ]


def backward(folder, x, h, affine, g, geometry, shift):
  """As `gpu.backward`; sums are empty without an affine."""

  def outputs(tiling):
    sums = (x.shape[0], tiling.blocks[0] * tiling.blocks[1], x.shape[3])
    return [(a.shape, a.dtype) for a in (x, h)] + 2 * [(sums, np.float32)] * (affine is not None)

  found = _call(folder, "backward", x, h, affine, geometry, shift, (g,), outputs)
  return *found[:2], [sums.sum(axis=1) for sums in found[2:]]
