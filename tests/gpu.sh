#!/usr/bin/env bash
# Run every GPU test and benchmark on this machine: `bash tests/gpu.sh [results folder [tests]]`.
# Needs a CUDA build of torch in $PYTHON (default: python3) with triton and pytest; installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
tests=("${@:2}")
if ((${#tests[@]} == 0)); then tests=(tests); fi
python=${PYTHON:-python3}
mkdir -p "$results"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

"$python" - <<'PY' | tee "$results/machine.txt" || exit 1
import sys
import torch

if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device here")
import triton

device = torch.cuda.get_device_properties(0)
print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}")
print(f"torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}")
PY

status=0
# Most of the time goes into compiling kernels, so several processes share the GPU where they can.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
"$python" -m pytest -m gpu "${tests[@]}" "${workers[@]}" -q -rA --durations=10 --junitxml="$results/tests.xml" \
  >"$results/tests.log" 2>&1 || status=1
tail -n 25 "$results/tests.log"
# What each of them prints and measures: tiny-onn bench NAME --help.
for bench in attention experts tables; do
  "$python" -m launcher bench $bench --check --json "$results/$bench.json" 2>&1 |
    tee "$results/$bench.txt" || status=1
done
# A whole step, by part, on real text.
"$python" -m launcher data build --input stdlib --out "$results/corpus" --vocab_size 32768 --seq_len 4096 \
  >"$results/corpus.log" 2>&1 || status=1
"$python" -m launcher bench train launcher/configs/125m.yaml --json "$results/train.json" --trace "$results" \
  --train.global_batch 8 --train.micro_batch 4 --data.path "$results/corpus" 2>&1 |
  tee "$results/train.txt" || status=1
echo "gpu.sh: results in $results, exit $status"
exit $status
