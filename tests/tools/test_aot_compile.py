"""Figures of compiled programs: on fake CPU devices, and for TPUs and GPUs where compilers are."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lip_jax
from lip_jax import cli
from lip_jax.classification.task import Classification
from lip_jax.cli import configuration
from lip_jax.errors import UsageError
from lip_jax.models import cost
from lip_jax.tools import aot_compile, hlo, ptx
from lip_jax.tools.chips import Chip
from lip_jax.tools.collectives import Collective, collectives
from lip_jax.tools.traffic import Traffic, kernels_of, traffic
from lip_jax.training.train_step import Program

ROOT = Path(__file__).parents[2]
TINY = f"{ROOT}/configs/imagenet.py:resnet18,tiny"
# Groups of batch norm, of 4 images, fit on a device.
CHANGES = ("data.dataset=fake", "global_batch_size=32", "eval_batch_size=32")

needs_tpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, of the tpu extra, is not installed"
)
needs_gpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="jax-cuda13-plugin, of the gpu-compile extra, is not installed",
)


@pytest.fixture
def command(capsys, monkeypatch):
  """Runs `lip-jax compile` -> (status, error)."""
  for name in (
    *("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"),
    *("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "XLA_FLAGS"),
  ):
    monkeypatch.setenv(name, "")  # put back afterwards

  def run(*arguments):
    status = cli.main(["compile", f"--config={TINY}", "--topology=v5e:2x2", *arguments])
    return status, capsys.readouterr().err

  return run


def test_every_kind_is_counted_with_its_bytes_and_the_rounds_of_loops():
  mesh = Mesh(jax.devices(), "i")

  def program(x):  # float32 [4, 16] on each device
    x = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "i")), None), x, length=5)[0]
    return (
      jax.lax.all_gather(x, "i"),
      jax.lax.psum_scatter(jnp.cos(x).reshape(8, 8), "i"),
      jax.lax.all_to_all(x.reshape(8, 8), "i", 0, 0),
      jax.lax.ppermute(x, "i", [(0, 1), (1, 0)]),
      jax.lax.pmax(jnp.arange(3), "i"),
    )

  sharding = NamedSharding(mesh, PartitionSpec("i"))
  step = jax.jit(
    jax.shard_map(
      program, mesh=mesh, in_specs=sharding.spec, out_specs=PartitionSpec("i"), check_vma=False
    )
  )
  text = step.lower(jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding)).compile()
  size = 4 * 16 * 4
  assert sorted(collectives(hlo.read(text.as_text()))) == [
    Collective("all-gather", "f32", 1, 8 * size),
    Collective("all-reduce", "f32", 5, 5 * size),
    Collective("all-reduce", "s32", 1, 3 * 4),
    Collective("all-to-all", "f32", 1, size),
    Collective("collective-permute", "f32", 1, size),
    Collective("reduce-scatter", "f32", 1, size),
  ]


def test_asynchronous_operations_count_once():
  """In the notation of the compiler for TPUs."""
  text = """
%body (p.0: f32[8,256]) -> f32[64,256] {
  %p.0 = f32[8,256]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %all-gather.4 = f32[64,256]{1,0:T(8,128)} all-gather(%p.0), dimensions={0}
}

ENTRY %main.1_spmd (param.1: f32[8,256]) -> f32[8,256] {
  %param.1 = f32[8,256]{1,0:T(8,128)} parameter(0)
  %convert.1 = bf16[8,256]{1,0:T(8,128)(2,1)} convert(%param.1)
  %permute.1 = (f32[8,256]{1,0}, f32[8,256]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%param.1), source_target_pairs={{0,1}}
  %gather.1 = (bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}) \
all-gather-start(%convert.1), dimensions={0}
  %gather.2 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather-done(%gather.1)
  %async.1 = ((f32[8,256]{1,0}), f32[64,256]{1,0}, u32[]{:S(2)}) async-start(%param.1), calls=%body
  %async.2 = f32[64,256]{1,0:T(8,128)} async-done(%async.1), calls=%body
  ROOT %permute.2 = f32[8,256]{1,0:T(8,128)} collective-permute-done(%permute.1)
}
"""
  assert collectives(hlo.read(text)) == [
    Collective("all-gather", "f32", 1, 64 * 256 * 4),
    Collective("all-gather", "bf16", 1, 64 * 256 * 2),
    Collective("collective-permute", "f32", 1, 8 * 256 * 4),
  ]


def traffic_of_training(**changes):
  """(collectives on 8 CPU devices, bytes of parameters whole on each, of those split over fsdp)."""
  config = configuration.load(TINY, [*CHANGES, *(f"{k}={v}" for k, v in changes.items())])
  program = Program(Classification(config, num_classes=10), steps_per_epoch=99)
  whole, split = [], []
  for path, leaf in jax.tree.leaves_with_path(program.state.params):
    # The last bias of a block and that of its shortcut have the same gradient: it is sent once.
    if "shortcut" not in jax.tree_util.keystr(path) or leaf.ndim > 1 or "scale" in str(path):
      (split if leaf.sharding.spec else whole).append(4 * leaf.size)
  found = aot_compile.train_step(config, 10, jax.devices(), "all").collectives
  return {(one.kind, one.dtype): one.bytes for one in found}, whole, split


METRICS = 3 * 4  # loss and top-1, and by how many images they are divided
VOTE = {("all-reduce", "s32"): 4}


def test_data_parallel_training_sums_gradients_and_nothing_else():
  found, whole, split = traffic_of_training()
  assert not split
  assert found == {("all-reduce", "f32"): sum(whole) + METRICS} | VOTE


def test_fsdp_gathers_parameters_and_scatters_gradients():
  found, whole, split = traffic_of_training(fsdp=2)
  assert sum(split) > sum(whole)
  norms = 2 * 4 * len(split)  # of gradients and parameters, of each part
  assert (
    found
    == {
      ("all-gather", "f32"): sum(split),
      ("reduce-scatter", "f32"): sum(split),
      ("all-reduce", "f32"): sum(whole) + sum(split) // 2 + METRICS + norms,
    }
    | VOTE
  )


def test_evaluation_sends_no_parameters():
  config = dataclasses.replace(configuration.load(TINY, CHANGES), eval_batch_size=16)
  figures = aot_compile.eval_step(config, 10, jax.devices(), "all")
  assert figures.flops > 0
  assert figures.instructions > 100
  assert sum(one.bytes for one in figures.collectives) < figures.arguments / 100


def test_the_estimate_is_set_by_the_slowest_part():
  figures = aot_compile.Figures(
    *(100, 20, 7, 3, 20),
    flops=2e9,
    bytes_accessed=3e9,
    collectives=(
      Collective("all-reduce", "f32", 1, 4_000_000),
      Collective("all-gather", "f32", 1, 1_000_000),
    ),
    instructions=7,
  )
  chip = Chip(flops=1e12, memory=105, memory_bandwidth=1e12, link_bandwidth=1e9)
  bound = aot_compile.roofline(figures, chip)
  assert bound == pytest.approx((2e-3, 3e-3, 9e-3))
  assert bound.step == bound.communication
  assert figures.peak == 110
  with pytest.raises(UsageError, match=r"does not fit the chip's memory: it needs 0\.00 GiB"):
    aot_compile.check_memory(figures, chip)
  aot_compile.check_memory(figures, chip._replace(memory=110))


def test_classes_of_a_data_set_that_is_not_there():
  config = configuration.load(TINY, ["data.dataset=imagenet2012", "data.data_dir=/nowhere"])
  assert aot_compile.num_classes(config) == 1000


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology=v9:2x2"], "unknown chip 'v9' in topology 'v9:2x2'; expected a TPU, one of v4,"),
    (["--topology=t4:8"], "or a GPU, one of a100, h100, h200, b200, l4, and how many, for example"),
    (["--topology=h100:2x2x2"], "expected how many GPUs, or how many hosts and how many GPUs on"),
    (["--topology=h100:0"], "expected how many GPUs"),
    (["--topology=v5e:2x2x2"], "v5e chips lie along 2 axes; for example v5e:2x4, v5e:16x16"),
    (["--topology=v4:2x2"], "v4 chips lie along 3 axes; for example v4:2x2x2"),
    (["--topology=v5e"], "v5e chips lie along 2 axes"),
    (["--config=none.py"], "there is no configuration file 'none.py'"),
    ([f"--config={TINY}x"], "unknown size 'tinyx'"),
    (["--config.dtyp=bfloat16"], "config has no key 'dtyp'; valid keys: "),
    (["--set=model.depth=3"], "config.model: unknown option depth "),
    (["--set=dtype"], "'dtype' is not of the form KEY=VALUE"),
    (["--config.seed=a"], "config.seed"),
    (["--config.dtype=half"], "config.dtype must be one of float32, bfloat16, got 'half'"),
  ],
)
def test_errors_are_one_line(command, arguments, message):
  status, err = command(*arguments)
  assert status == 1
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert message in err


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("l4:1", "gpu-compile")])
def test_without_the_compiler(command, monkeypatch, topology, extra):
  find, compilers = importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name in compilers else find(name)
  )
  status, err = command(f"--topology={topology}")
  assert status == 1
  assert f"pip install 'lip-jax[{extra}]'" in err


def test_operations_are_counted_by_kind():
  def program(x, kernel, matrix):
    x = jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.lax.scan(lambda y, _: (jnp.sin(y @ matrix), None), x.mean((1, 2)), length=3)[0]

  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 8, 3), (3, 3, 3, 16), (16, 16))]
  found = {
    one.kind: one for one in traffic(hlo.read(jax.jit(program).lower(*arrays).compile().as_text()))
  }
  convolutions, products = found["convolutions"], found["matrix products"]
  assert convolutions.operations == 1
  assert convolutions.flops == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
  assert convolutions.bytes == 4 * (2 * 8 * 8 * 3 + 3 * 3 * 3 * 16 + 2 * 4 * 4 * 16)
  assert products.operations == 3
  assert products.flops == 3 * 2 * (2 * 16) * 16
  assert products.bytes == 3 * 4 * (2 * 16 + 16 * 16 + 2 * 16)
  assert found["reductions, and what is fused with them"].bytes >= 4 * (2 * 4 * 4 * 16 + 2 * 16)


def test_operations_of_gpus():
  """In the notation of their compiler."""
  text = """
%fused_slice (p.0: f32[100], p.1: f32[10]) -> f32[10] {
  %p.0 = f32[100]{0} parameter(0)
  %p.1 = f32[10]{0} parameter(1)
  %slice.1 = f32[10]{0} slice(%p.0), slice={[20:30]}
  ROOT %add.1 = f32[10]{0} add(%slice.1, %p.1)
}

%fused_transpose (p.2: bf16[2,3]) -> bf16[3,2] {
  %p.2 = bf16[2,3]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[3,2]{1,0} transpose(%p.2), dimensions={1,0}
}

ENTRY %main (x: bf16[2,8,8,4], g: bf16[2,8,8,16], k: bf16[16,3,3,4], a: f32[100], b: f32[10], \
m: bf16[2,3]) -> bf16[3,2] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %g = bf16[2,8,8,16]{3,2,1,0} parameter(1)
  %k = bf16[16,3,3,4]{3,2,1,0} parameter(2)
  %a = f32[100]{0} parameter(3)
  %b = f32[10]{0} parameter(4)
  %m = bf16[2,3]{1,0} parameter(5)
  %conv.1 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward"
  %conv.2 = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %conv.3 = (bf16[16,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %y = bf16[2,8,8,16]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %pool = bf16[2,4,4,16]{3,2,1,0} custom-call(%y, %g), custom_call_target="__gpu$xla.gpu.ptx", \
backend_config={name = "pool", kernel_type = "ptx", \
kernel_data = ".target \\22sm_80\\22\\0A// \\\\", grid_x = 1}
  %sum = f32[10]{0} fusion(%a, %b), kind=kLoop, calls=%fused_slice
  ROOT %turned = bf16[3,2]{1,0} fusion(%m), kind=kInput, calls=%fused_transpose
}
"""
  image, gradient, kernel = 2 * 8 * 8 * 4, 2 * 8 * 8 * 16, 16 * 3 * 3 * 4
  assert traffic(hlo.read(text)) == [
    Traffic("convolutions", 3, 3 * 2 * (image + gradient + kernel), 3 * 2 * gradient * (3 * 3 * 4)),
    Traffic("custom kernels", 1, 2 * (2 * gradient + gradient // 4), 0),
    Traffic("element by element, and others", 1, 4 * 3 * 10, 0),
    Traffic("copies and transpositions", 1, 2 * 2 * 6, 0),
  ]
  assert kernels_of(text) == ['.target "sm_80"\n// \\']


SCRIPT = """
import sys
from lip_jax import cli
for line in sys.stdin:
  print("status", cli.main(["compile", *line.split()]), flush=True)
"""


def compile_all(lines):
  """`lip-jax compile --json` of each line, in one process -> (outputs, failures, errors)."""
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    input="\n".join(lines),
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": ""},
  )
  assert done.returncode == 0, done.stderr
  *outputs, rest = re.split(r"status 0\n", done.stdout)
  failed = rest.splitlines()
  assert set(failed) <= {"status 1"}
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  return list(map(json.loads, outputs)), len(failed), errors


@needs_tpu_compiler
def test_for_tpus():
  """In a process of its own, which libtpu changes."""
  base = f"--config={ROOT}/configs/imagenet.py:resnet18,tiny --config.data.dataset=fake --json"
  pooled = base.replace("resnet18", "lip_resnet_small")
  lines = [
    f"{base} --topology=v5e:2x4 --per-device-batch=4",
    f"{base} --topology=v5e:8x8 --per-device-batch=4 --only=train",
    f"{base} --topology=v5e:16x16 --per-device-batch=4 --only=train",
    f"{base} --topology=v5e:2x2 --per-device-batch=4 --only=train",
    f"{pooled} --topology=v5e:2x2 --per-device-batch=4 --only=eval",
    f"{base} --topology=v5e:2x2 --per-device-batch=2097152 --only=eval",
    f"{base} --topology=v5e:2x2 --config.global_batch_size=6",
    f"{base} --topology=v5e:3x3",
  ]
  outputs, failed, errors = compile_all(lines)
  assert failed == 3
  assert re.search(r"needs \d+\.\d\d GiB of the chip's 15\.75, .* too much", errors[0])
  assert "config.global_batch_size=6 is not divisible by the 4 devices" in errors[1]
  assert "cannot compile for topology 'v5e:3x3'" in errors[2]

  small, middle, large, least, lip = outputs
  # A device evaluates its own images, also where kernels pool them.
  assert sum(one["bytes"] for one in lip["steps"]["eval"]["collectives"]) == 16 * 4 + 4 * 4
  assert [each["chips"] for each in (least, small, middle, large)] == [4, 8, 64, 256]
  evaluation = small["steps"]["eval"]
  assert sum(one["bytes"] for one in evaluation["collectives"]) == 32 * 4 + 4 * 4  # losses, counts
  train = small["steps"]["train"]
  assert 0 < train["temporaries"] < train["peak"] < 16e9
  assert train["free"] == 1 - train["peak"] / 16e9
  assert train["flops"] > evaluation["flops"] > 0
  assert train["estimate"]["images_per_second"] == pytest.approx(4 / train["estimate"]["step"])

  # Weak scaling: the traffic of a chip is that of one sum of the gradients, on any number of them.
  model = lip_jax.models.abstract_model(**small["model"], num_classes=1000)
  gradients = 4 * cost.count_parameters(model)
  for each in (least, small, middle, large):
    reduced, vote = each["steps"]["train"]["collectives"]
    assert (reduced["kind"], reduced["dtype"]) == ("all-reduce", "f32")
    assert reduced["bytes"] == pytest.approx(gradients, rel=0.05)
    assert vote == {"kind": "all-reduce", "dtype": "s32", "operations": 1, "bytes": 4}


@needs_gpu_compiler
def test_for_gpus():
  """In a process of its own, which JAX's plugin for GPUs changes."""
  base = f"--config={ROOT}/configs/imagenet.py:resnet18,tiny --config.data.dataset=fake --json"
  pooled = f"{base.replace('resnet18', 'lip_resnet_small')} --set=dtype=bfloat16"
  lines = [
    f"{base} --topology=h100:2x4 --per-device-batch=4 --only=train",
    f"{pooled} --topology=h100:1 --per-device-batch=4 --only=eval",
    f"{base} --topology=l4:1 --per-device-batch=4194304 --only=eval",
  ]
  (train, pooling), failed, errors = compile_all(lines)
  assert failed == 1
  assert re.search(r"needs \d+\.\d\d GiB of the chip's 22\.35, .* too much", errors[0])

  assert train["chips"] == 8
  step = train["steps"]["train"]
  assert 0 < step["temporaries"] < step["peak"] < train["memory"] == 80e9
  kinds = {one["kind"]: one for one in step["traffic"]}
  assert {"convolutions", "matrix products", "communication"} <= set(kinds)
  assert step["bytes_accessed"] == sum(one["bytes"] for one in step["traffic"])
  assert step["flops"] == sum(one["flops"] for one in step["traffic"]) > 0
  gradients = 4 * cost.count_parameters(
    lip_jax.models.abstract_model(**train["model"], num_classes=1000)
  )
  reduced, vote = step["collectives"]
  assert (reduced["kind"], reduced["dtype"]) == ("all-reduce", "f32")
  assert reduced["bytes"] == pytest.approx(gradients, rel=0.05)
  assert (vote["kind"], vote["dtype"], vote["bytes"]) == ("all-reduce", "s32", 4)
  # Four GPUs of two hosts: 200 GB/s leave a host.
  assert step["estimate"]["communication"] == pytest.approx(2 * (reduced["bytes"] + 4) / 200e9)

  evaluation = pooling["steps"]["eval"]
  kernels = [one for one in evaluation["traffic"] if one["kind"] == "custom kernels"]
  assert kernels[0]["operations"] == 7
  if ptx.assembler():
    assert len(evaluation["kernels"]) == 7
    assert all(0 < one["registers"] <= 128 and not one["spilled"] for one in evaluation["kernels"])
