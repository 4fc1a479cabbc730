#!/usr/bin/env bash
# Checks and times NSA's kernels on one Hopper GPU, in about three minutes: bash tests/gpu_nsa.sh OUT
# Compilation goes first and side by side; what is timed then finds its kernels compiled.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:?usage: bash tests/gpu_nsa.sh OUT}"
python="${PYTHON:-python3}"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$out"
checks="$python -m kernels.nsa.gpu_checks"
bench="$python -m kernels.nsa.bench --rounds 3 --dense cudnn"
others='{"grad_q_any": true, "score_halves": true}'

seconds=$SECONDS
timeout 110 $checks > "$out/checks.txt" 2>&1 &
timeout 110 $checks --workers 6 --table "$others" 0 1 3 4 5 7 8 10 11 12 13 14 > "$out/checks_others.txt" 2>&1 &
for shape in "64 4 128 128" "32 8 128 128" "64 4 192 128"; do
  read -r heads groups dim value <<< "$shape"
  timeout 110 $bench --profile --lengths 1024 --heads "$heads" --groups "$groups" --dim "$dim" \
    --value-dim "$value" > "$out/warm-$heads-$dim.txt" 2>&1 &
done
wait
echo "checks: $((SECONDS - seconds)) s, $(grep -c ': ok' "$out/checks.txt") ok," \
  "with $others $(grep -c ': ok' "$out/checks_others.txt") ok"
grep -hA3 -e FAILED -e 'Error' "$out"/checks*.txt "$out"/warm*.txt | cut -c1-230 | head -30
grep -h 'magnitude' "$out/checks.txt" | cut -c1-200

timeout 90 $python -m pytest -q tests/kernels/test_nsa_triton_gpu.py -m gpu -k 'not errors_stay' \
  > "$out/pytest.txt" 2>&1
tail -n 3 "$out/pytest.txt"
timeout 100 $python -m kernels.nsa.sweep --rounds 3 --only score_halves selected_forward partial_rows --stages \
  --whole 65536,64,4 32768,64,4 8192,64,4 --json "$out/sweep.json" > "$out/sweep.txt" 2>&1
grep -B1 -A22 'T=65536' "$out/sweep.txt" | tail -n 24
grep -e ' by ' -e ' ms ' -e WRONG -e 'T=' -e ' nsa ' -e cudnn "$out/sweep.txt" | grep -v TFLOP
timeout 80 $python -m kernels.nsa.sweep --heads 32 --groups 8 --rounds 3 --only grad_q_any \
  --whole 65536,32,8 --json "$out/sweep32.json" > "$out/sweep32.txt" 2>&1
grep -e ' by ' -e ' ms ' -e WRONG -e 'T=' -e ' nsa ' -e cudnn "$out/sweep32.txt"
timeout 40 $bench --lengths 16384 --dim 192 --value-dim 128 > "$out/wide.txt" 2>&1
grep -e 'T=' -e ' nsa ' -e cudnn -e rror "$out/wide.txt" | cut -c1-150
timeout 40 $bench --lengths --documents 64 > "$out/packed.txt" 2>&1
grep -e 'T=' -e ' nsa ' -e pack -e rror "$out/packed.txt" | cut -c1-150
if command -v ncu > /dev/null; then
  metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,lts__t_sector_hit_rate.pct,sm__inst_executed_pipe_tensor.sum
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed
  timeout 70 ncu --profile-from-start off --csv --metrics "$metrics" -c 16 \
    -k regex:'selected_forward|selected_backward|merge_forward|importance' \
    $bench --lengths 32768 --profile > "$out/ncu.csv" 2>&1
  grep -c selected_backward "$out/ncu.csv"
fi
if command -v compute-sanitizer > /dev/null; then
  timeout 60 compute-sanitizer --tool memcheck $checks --here 18 > "$out/memcheck.txt" 2>&1
  tail -n 2 "$out/memcheck.txt" | cut -c1-200
fi
echo "all: $((SECONDS - seconds)) s"
