#!/usr/bin/env bash
# Every Slurm scenario three times in a row, each time on a fresh cluster: `bash tests/soak_slurm.sh
# [TIMES [pytest arguments]]`. Needs root. Ends with a line per round and fails when a round did.
set -euo pipefail
cd "$(dirname "$0")/.."
times=${1:-3}
shift || true
# shellcheck source=slurm/env.sh
source slurm/env.sh --test
failed=0 rounds=()
for ((i = 1; i <= times; i++)); do
  out=.cache/soak-slurm-$i.log
  "$PYTHON" -m pytest -m slurm --no-skips --durations=0 tests/slurm "$@" 2>&1 | tee "$out" | grep -E '^(FAILED|ERROR)' || true
  rounds+=("round $i: $(tail -n 1 "$out" | tr -d '=')")
  if ! tail -n 1 "$out" | grep -q passed || tail -n 1 "$out" | grep -qE 'failed|error'; then failed=1; fi
done
printf '%s\n' "${rounds[@]}"
exit $failed
