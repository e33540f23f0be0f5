#!/usr/bin/env bash
# What only a GPU can show, in at most 10 minutes on one card: PASS and FAIL lines with their numbers.
#   benchmarks/gpu.sh                 on a GPU of 80 GB, with this package and its extra [quantized] installed
#   benchmarks/gpu.sh --tiny          the same steps at a tiny size, on a CPU
#   benchmarks/gpu.sh memory speed    only these
# PYTHON names the Python to use. The output goes to build/gpu/report.txt too.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/gpu
export OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
"${PYTHON:-python}" benchmarks/gpu.py "$@" 2>build/gpu/stderr.txt | tee build/gpu/report.txt
