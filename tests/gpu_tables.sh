#!/usr/bin/env bash
# Row tables on GPUs, the most telling part first, each within its own time:
#   bash tests/gpu_tables.sh RESULTS [tests kernels host keep ranks nvme large device zero3]
# `ranks` needs two GPUs; `large` needs host memory for a table of 103 GB (--vocab 32768 x 16), and is
# where a checkpoint of it is written beside steps. Needs torch with CUDA in $PYTHON (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
results=$1
parts=("${@:2}")
if ((${#parts[@]} == 0)); then parts=(tests kernels host keep ranks nvme large device zero3); fi
python=${PYTHON:-python3}
mkdir -p "$results"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# bench NAME SECONDS options...: JSON lines go to a file, the table is printed.
bench() {
  local name=$1 seconds=$2
  timeout "$seconds" "$python" -m launcher bench tables "${@:3}" --nvme "$scratch" --json "$results/$name.json" \
    >"$results/$name.log" 2>&1
  local code=$?
  grep -v '^rows-.*{\|^zero3.*{\|UserWarning\|_warn_once' "$results/$name.log" | tail -n 25 | cut -c1-250
  # Out of time: what was finished by then.
  if ((code == 124)); then grep -o '^[a-z0-9 /-]* {"ms.*"high": [0-9.]*' "$results/$name.log"; fi
  return $code
}

tests() {
  timeout 110 "$python" -m pytest -m gpu -q tests/kernels/test_rows.py tests/parallel/test_tables_gpu.py \
    tests/parallel/test_checkpoint_gpu.py tests/tiny_onn/test_activations.py \
    -k 'rows or tables or table or modulate or segment or kept' -p no:cacheprovider >"$results/tests.log" 2>&1
  local code=$?
  tail -n 15 "$results/tests.log" | cut -c1-250
  return $code
}
kernels() { timeout 40 "$python" -m kernels.modulate_bench 2>&1 | tee "$results/kernels.txt"; }
host() { bench host 80 --variants rows-host --turns 10 --steps 6; }
keep() { bench keep 80 --variants rows-host --turns 10 --steps 6 --keep-output; }
nvme() { bench nvme 80 --variants rows-nvme --turns 6 --steps 5 --warm 12; }
device() { bench device 60 --variants rows-device --turns 6 --steps 5; }
large() {
  bench large 130 --variants rows-host --vocab 32768 --spreads 1 16 --turns 6 --steps 4 --save "$scratch"
}
ranks() { bench ranks 80 --ranks 2 --variants rows-host --turns 8 --steps 6; }
zero3() { bench zero3 100 --layers 6 --variants zero3 zero3-cpu rows-host --turns 3 --steps 3; }

status=0
for part in "${parts[@]}"; do
  start=$SECONDS
  "$part" || status=1
  echo "== $part: $((SECONDS - start)) s, status so far $status"
done
exit $status
