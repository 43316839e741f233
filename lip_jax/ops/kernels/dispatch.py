"""Local importance-based pooling with its gradient, by the best form for the platform.

Kernels on TPU (Pallas) and on NVIDIA GPUs (CUDA C++), plain XLA elsewhere and for what the kernels
do not support; on CPUs by the range that the logits have, where it is not given. The choice of the
form is made when a program is compiled, among those for the devices of this process and, if it
compiles for devices that are not there (`jax.experimental.topologies`), for those.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from lip_jax.ops.kernels import by_range, gate, gpu, tpu, xla
from lip_jax.ops.kernels.gate import Affine
from lip_jax.ops.normalization import (
  explicit,
  input_gradient,
  moments,
  not_before,
  not_before_on_cpu,
  varying_axes,
)
from lip_jax.ops.windows import Geometry

Form = Literal["auto", "xla", "pallas"]

_KERNELS = {"tpu": tpu, "cuda": gpu}


def supports(x: jax.Array, h: jax.Array | jax.ShapeDtypeStruct, geometry: Geometry) -> bool:
  """Whether there is a kernel, of any platform, for these arrays."""
  return bool(_kernels(x, h, geometry, "pallas"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lip_pool(
  x: jax.Array, logits: jax.Array, geometry: Geometry, shift: float | None, form: Form
) -> jax.Array:
  """`lip_jax.lip_pool` of valid arguments.

  `shift` is what to subtract from all logits, None for each window's largest; `form` is "pallas"
  only where `supports`: off TPU and GPU the former's kernel is interpreted, slowly.
  """
  return _lip_pool_fwd(x, logits, geometry, shift, form)[0]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # one program where there is no jit around
def _lip_pool_fwd(x, logits, geometry, shift, form):
  y, windows = _forward(x, logits, None, geometry, shift, form)
  return y, (x, logits, windows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lip_pool_bwd(geometry, shift, form, residuals, g):
  x, logits, windows = residuals
  dx, dlogits, _ = _backward(x, logits, None, windows, g, geometry, shift, form)
  return dx, dlogits


lip_pool.defvjp(_lip_pool_fwd, _lip_pool_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def gated_lip_pool(
  x: jax.Array,
  source: jax.Array,
  kernel: jax.Array | None,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  geometry: Geometry,
  form: Form,
) -> jax.Array:
  """`lip_jax.gated_lip_pool` of valid arguments; with a kernel `lip_jax.projected_lip_pool`."""
  return _gated_fwd(x, source, kernel, scale, bias, epsilon, geometry, form)[0]


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _gated_fwd(x, source, kernel, scale, bias, epsilon, geometry, form):
  h = project(source, kernel)
  mean, var = moments(h, (1, 2))
  mean, rstd = mean.squeeze((1, 2)), lax.rsqrt(var.squeeze((1, 2)) + epsilon)
  scale_, bias_ = (jnp.broadcast_to(a.astype(mean.dtype), mean.shape) for a in (scale, bias))
  affine = Affine(mean, rstd * scale_, bias_)
  y, windows = _forward(x, h, affine, geometry, gate.MIDDLE, form)
  return y, (x, source, kernel, scale, bias, affine, rstd, windows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gated_bwd(epsilon, geometry, form, residuals, g):
  """Of the kernels' du (with respect to what the gate gets), back through the instance norm."""
  del epsilon
  x, source, kernel, scale, bias, affine, rstd, windows = residuals
  if kernel is not None:
    # With the same kernel XLA would find the two convolutions equal and keep the first's result.
    (kernel,) = not_before(g, kernel)
  h, back = jax.vjp(project, source, kernel)
  h, rstd, *statistics = not_before_on_cpu(g, h, rstd, *affine)
  affine = Affine(*statistics)
  dx, du, sums = _backward(x, h, affine, windows, g, geometry, gate.MIDDLE, form)
  of_du, of_product = sums  # of du, and of du * (h - mean), over the pixels
  pixels = h.shape[1] * h.shape[2]
  dh = input_gradient(
    du.astype(rstd.dtype),
    _over_pixels(affine.gain),
    _over_pixels(of_du / pixels),
    h.astype(rstd.dtype) - _over_pixels(affine.mean),
    _over_pixels(jnp.square(rstd) * of_product / pixels),
  )
  dscale, dbias = (of_product * rstd).sum(axis=0), of_du.sum(axis=0)
  return dx, *back(dh.astype(h.dtype)), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


gated_lip_pool.defvjp(_gated_fwd, _gated_bwd)


def project(source: jax.Array, kernel: jax.Array | None) -> jax.Array:
  """1x1 convolution of `source`, [N, H, W, S], by `kernel`, [1, 1, S, C], in the former's dtype.

  The source itself without a kernel.
  """
  if kernel is None:
    return source
  return lax.conv_general_dilated(
    source, kernel.astype(source.dtype), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _over_pixels(statistic: jax.Array) -> jax.Array:
  return statistic[:, None, None, :]


def _forward(x, h, affine, geometry, shift, form):
  """(y, what the backward pass of the XLA form needs of each window)."""

  def default(x, h, affine):
    if _looks(x, h, shift):
      return _look_forward(x, h, geometry)
    return xla.forward(x, h, affine, geometry, shift)

  kernels = _kernels(x, h, geometry, form)
  if not kernels:
    return default(x, h, affine)
  kept = jax.eval_shape(default, x, h, affine)[1]

  def result(x, h, affine):
    return xla.forward(x, h, affine, geometry, shift)[0]

  def call(module, **options):
    def kernel(x, h, affine):
      if not module.supports(x, h, geometry):  # a device's part, or more than one batch
        return result(x, h, affine)
      return module.forward(x, h, affine, geometry, shift, **options)

    run = _transformable(kernel, f"n h w c, n h w c{_statistics(affine)} -> n i j c", result)
    # The kernels compute again what the XLA form keeps; nobody reads these zeros.
    return lambda x, h, affine: (
      run(x, h, affine),
      () if form == "pallas" else jax.tree.map(jnp.zeros_like, kept),
    )

  elsewhere = default
  if form == "pallas":
    elsewhere = _interpreted(call, kernels) or (lambda *args: (result(*args), ()))
  return _by_platform(call, kernels, elsewhere)(x, h, affine)


def _backward(x, h, affine, windows, g, geometry, shift, form):
  """(dx, dh, sums of dh and of dh * (h - mean)), the last with an affine only."""

  def default(x, h, affine, windows, g):
    if _looks(x, h, shift):
      return *_look_backward(x, h, windows, g, geometry), None
    return xla.backward(x, h, affine, windows, g, geometry, shift)

  kernels = _kernels(x, h, geometry, form)
  if not kernels:
    return default(x, h, affine, windows, g)

  def from_inputs(x, h, g, affine):
    windows = xla.forward(x, h, affine, geometry, shift)[1]
    return xla.backward(x, h, affine, windows, g, geometry, shift)

  def call(module, **options):
    def kernel(x, h, g, affine):
      if not module.supports(x, h, geometry):
        return from_inputs(x, h, g, affine)
      return module.backward(x, h, affine, g, geometry, shift, **options)

    rule = f"n h w c, n h w c, n i j c{_statistics(affine)} -> n h w c, n h w c"
    rule += ", n c, n c" if affine else ""
    run = _transformable(kernel, rule, from_inputs)
    return lambda x, h, affine, windows, g: run(x, h, g, affine)

  elsewhere = default
  if form == "pallas":  # the forward pass has kept nothing
    elsewhere = _interpreted(call, kernels) or (
      lambda x, h, affine, _, g: from_inputs(x, h, g, affine)
    )
  return _by_platform(call, kernels, elsewhere)(x, h, affine, windows, g)


def _statistics(affine: Affine | None) -> str:
  """Their axes in a sharding rule."""
  return ", n c" * len(affine or ())


def _looks(x: jax.Array, h: jax.Array, shift: float | None) -> bool:
  """Whether the form may depend on the logits' range: unknown, and not in an exported program."""
  return shift is None and not symbolic(x, h)


def _look_forward(x, h, geometry):
  rule = "n h w c, n h w k -> n i j c, n i j k, n i j k, n p q k"
  windows = _on_cpu(by_range.forward, by_range.safe_forward, rule, geometry, x, h)
  return windows.y.astype(x.dtype), windows


def _look_backward(x, h, windows, g, geometry):
  rule = "n h w c, n h w k, n i j c, n i j k, n i j k, n p q k, n i j c -> n h w c, n h w k"
  return _on_cpu(by_range.backward, by_range.safe_backward, rule, geometry, x, h, windows, g)


def _on_cpu(looking, safe, rule, geometry, *args):
  """`looking(*args, geometry)` on CPUs, each device by its part; elsewhere `safe`."""
  x, h, *_ = args
  if x.shape[3] == h.shape[3]:
    rule = rule.replace("k", "c")

  def same(*args):
    return safe(*args, geometry)

  def here(*args):
    return looking(*args, geometry)

  # `jax.shard_map` has divided the arrays; in `jax.set_mesh` shardings come without axes' names.
  typed = not jax.sharding.get_abstract_mesh().empty or explicit(x) or explicit(h)
  run = here if typed else _transformable(here, rule, same)
  return lax.platform_dependent(*args, cpu=run, default=same)


def _transformable(
  kernel: Callable[..., Any], rule: str, same: Callable[..., Any]
) -> Callable[..., Any]:
  """`kernel`, with what JAX's transformations need; `rule` as for `_sharded`.

  `same` is the same function in plain XLA, whose derivatives are taken for the kernel's.
  """

  @custom_vmap
  def mapped(*args):
    return _sharded(kernel, rule, *args)

  @mapped.def_vmap
  def _(size, batched, *args):  # the mapped axis becomes part of the batch
    def join(a, is_batched):
      a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
      return a.reshape(-1, *a.shape[2:])

    out = mapped(*jax.tree.map(join, args, tuple(batched)))
    out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  run = jax.custom_jvp(mapped)
  run.defjvp(lambda primals, tangents: jax.jvp(same, primals, tangents))
  return run


def _kernels(x, h, geometry, form) -> dict[str, Any]:
  """Modules by platform.

  Exported programs whose batch is a symbol stay with XLA, as do arrays whose type says how they are
  spread over devices, which kernels cannot express.
  """
  arrays = [a for a in (x, h) if not isinstance(a, jax.ShapeDtypeStruct)]
  if form == "xla" or symbolic(x, h) or any(varying_axes(a) or explicit(a) for a in arrays):
    return {}
  names = targets() | ({"tpu"} if form == "pallas" else set())
  return {name: _KERNELS[name] for name in names if _KERNELS[name].supports(x, h, geometry)}


def symbolic(*arrays: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether a size is a symbol, as the batch of exported programs is."""
  return not all(isinstance(size, int) for a in arrays for size in a.shape)


def targets() -> set[str]:
  """Platforms with forms of their own that a program may be compiled for.

  Only those, as tracing a kernel takes a tenth of a second.
  """
  targets: set[str] = {"tpu": {"tpu"}, "gpu": {"cuda"}}.get(jax.default_backend(), set())
  if "cuda" in targets and not gpu.runs_on(jax.local_devices()):
    targets = set()
  if "jax.experimental.topologies" not in sys.modules:
    return targets
  # To compile for devices that are not there: for any whose compiler JAX has loaded.
  for_gpus = any(name.startswith("jax_plugins.xla_cuda") for name in sys.modules)
  return targets | ({"tpu", "cuda"} if for_gpus else {"tpu"})


def _interpreted(call, kernels) -> Callable[..., Any] | None:
  """The kernel for TPU on other platforms, if there is one; those for GPUs run nowhere else."""
  return call(kernels["tpu"], interpret=True) if "tpu" in kernels else None


def _by_platform(call, kernels, default) -> Callable[..., Any]:
  branches = {name: call(module) for name, module in kernels.items()}
  return lambda *args: lax.platform_dependent(*args, default=default, **branches)


def _sharded(kernel: Callable[..., Any], rule: str, *args: Any) -> Any:
  """`kernel(*args)` of arrays that may be split over devices along the batch and the channels.

  The compiler cannot divide a kernel; it is told here that each device runs it for its part. The
  rule names the axes of arguments and results: n and c, rows and columns by h and w, i and j, p and
  q; by k the one channel of logits that all channels share, which then stay together, too.
  """
  leaves, tree = jax.tree.flatten(args)
  whole = "hwckijpq" if "k" in rule else "hwijpq"  # in the order in which rules name them

  def flat(*leaves):
    return kernel(*jax.tree.unflatten(tree, leaves))

  def partition(mesh, arg_shapes, result_shape):
    n, *_, c = arg_shapes[0].sharding.spec  # x's, which all others follow
    channels = None if "k" in rule else c

    def place(shape):
      spec = (n, None, None, channels) if len(shape.shape) == 4 else (n, c)
      return NamedSharding(mesh, PartitionSpec(*spec))

    return mesh, flat, jax.tree.map(place, result_shape), tuple(map(place, arg_shapes))

  call = custom_partitioning(flat)
  call.def_partition(
    partition,
    sharding_rule=rule,
    need_replication_factors=tuple(axis for axis in whole if axis in rule),
  )
  return call(*leaves)
