#!/usr/bin/env bash
# Set up what the tests need, then run every check and test: `bash tests/run.sh`.
# With arguments, only set up and run pytest on them: `bash tests/run.sh tests/launcher -k lock`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .cache

# Bash reads a script while it runs it: in braces it is read first, and may be edited meanwhile.
{

# What is missing here that Debian's packages bring.
missing=()
need() { eval "$1" >/dev/null 2>&1 || missing+=("$2"); }
need 'command -v g++' g++
need 'command -v gcc' gcc
need 'command -v ninja' ninja-build
need 'test -e /usr/include/libaio.h' libaio-dev
need 'command -v slurmctld && command -v slurmd' slurm-wlm
need 'command -v munged' munge
need 'command -v ip' iproute2
need 'command -v python3 && python3 -c "import ensurepip, venv"' python3-venv
need 'python3 -c "import os, sysconfig; os.stat(os.path.join(sysconfig.get_path(\"include\"), \"Python.h\"))"' \
  python3-dev
if ((${#missing[@]})); then
  if ((EUID != 0)); then
    echo "tests: missing here: ${missing[*]}; as root: apt-get install -y ${missing[*]}" >&2
  else
    echo "tests: installing ${missing[*]} (log: .cache/apt.log)"
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      "${missing[@]}"; } >.cache/apt.log 2>&1; then
      tail -n 20 .cache/apt.log >&2
      exit 1
    fi
  fi
fi

# shellcheck source=slurm/env.sh
source slurm/env.sh --test
if (($#)); then exec "$PYTHON" -m pytest "$@"; fi

step() {
  local start=$SECONDS code=0
  echo "== $1"
  "${@:2}" || code=$?
  echo "== $1: $((SECONDS - start)) s, exit $code"
  return "$code"
}

# DeepSpeed compiles this for minutes; no test's time limit should have to bear it.
"$PYTHON" -c 'from parallel.deepspeed_env import compile_op; compile_op("AsyncIOBuilder", "pin_memory", "async_io")' \
  >.cache/async_io.log 2>&1 &
compiling=$!
trap 'kill "$compiling" 2>/dev/null || true' EXIT

status=0
step "ruff check" "$PYTHON" -m ruff check . || status=1
step "ruff format" "$PYTHON" -m ruff format --check . || status=1
step "mypy" "$PYTHON" -m mypy || status=1
if ! step "async_io" wait "$compiling"; then
  tail -n 20 .cache/async_io.log >&2
  status=1
fi

options=(--durations=15)
# The cluster of the Slurm tests needs root; without it, and without a GPU, there is less to run.
if ((EUID == 0)); then options+=(--no-skips); fi
step "tests" "$PYTHON" -m pytest -n 2 --dist loadfile -m "not slurm" "${options[@]}" || status=1
step "Slurm tests" "$PYTHON" -m pytest -m slurm "${options[@]}" || status=1
echo "== all: $SECONDS s"
exit $status
}
