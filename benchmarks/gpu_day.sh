#!/usr/bin/env bash
# What a machine with a GPU is asked first; at most nine minutes, no network.
#
#   bash benchmarks/gpu_day.sh [FOLDER]          # runs/gpu_day; FOLDER/page.md is the result
#   TINY=1 bash benchmarks/gpu_day.sh FOLDER     # does it work? On a CPU, in some minutes
#
# Python needs JAX (0.10 to 0.12) with a GPU, flax, and what lip_jax.training imports; PyTorch where it
# is to be compared with. A step that fails or takes longer than its part is noted, and the next begins.
set -u
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_day}
python=${PYTHON:-python}
mkdir -p "$out"
: > "$out/status"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false

step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$python" "$@" --json "$out/$name.json" > "$out/$name.log" 2>&1
  echo "$name $? $((SECONDS - start))" >> "$out/status"
}

if [ -n "${TINY:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true}"
  step kernel_check 300 benchmarks/kernel_check.py --batch 1 --shapes 7x7x3 --dtypes bfloat16 --modes fused
  step pool 300 benchmarks/pool.py --batch 1 --shapes 8x8x8 --repeats 1
  step train_step 300 benchmarks/train_step.py --networks lip_resnet_small --batch 2 --image-size 32 --steps 1
  step inference 300 benchmarks/inference.py --networks lip_resnet_small --batches 1 --image-size 32 --repeats 1
  step detectors 300 benchmarks/detection.py --networks retinanet_lip_resnet50,tiny --seconds 0.1
else
  step kernel_check 80 benchmarks/kernel_check.py --shapes 112x112x64 28x28x512 13x9x3 7x7x24
  step pool 100 benchmarks/pool.py --dtype bfloat16 --shapes 112x112x64 56x56x256 28x28x512
  step train_step 260 benchmarks/train_step.py --dtype bfloat16 --networks lip_resnet50 resnet50 --steps 5
  step inference 55 benchmarks/inference.py --dtype bfloat16 --networks lip_resnet50 resnet50 --batches 1 64
  step detectors 45 benchmarks/detection.py --networks retinanet_lip_resnet50 --set dtype=bfloat16
fi
"$python" benchmarks/gpu_page.py "$out"
