#!/usr/bin/env bash
# The Python environment of this checkout: `bash slurm/env.sh [--test]` makes it or brings it up to
# date, `source slurm/env.sh` also activates it. A call that finds it up to date takes no time.
#
#   TINY_ONN_VENV=DIR         where the environment lives (default: .venv in the checkout)
#   TINY_ONN_PYTHON=python    use this interpreter with what it has (a container's), install nothing
#   TINY_ONN_PIP="…"          more arguments for pip, such as an index with CPU builds of PyTorch
#
# Sets PYTHON for the script that sources it.

tiny_onn_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

tiny_onn_say() { printf 'tiny-onn: %s\n' "$*" >&2; }

# Print the first interpreter that the dependencies support.
tiny_onn_find_python() {
  local candidate
  for candidate in python3 python3.12 python3.13 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        tiny_onn_say "$candidate cannot make virtual environments: apt-get install python3-venv"
        return 1
      fi
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  tiny_onn_say "no Python 3.11 to 3.13 found: apt-get install python3 python3-venv, or load your cluster's module"
  return 1
}

# Check an interpreter that the user brings: everything pyproject.toml asks for has to be there.
tiny_onn_check_python() {
  "$1" - "$tiny_onn_repo/pyproject.toml" <<'PY'
import re, sys
if sys.version_info < (3, 11):
    sys.exit(f"tiny-onn: TINY_ONN_PYTHON is Python {sys.version.split()[0]}; 3.11 or later is needed")
import importlib.metadata, tomllib
with open(sys.argv[1], "rb") as f:
    wanted = tomllib.load(f)["project"]["dependencies"]
have = {re.sub("[-_.]+", "-", d.name or "").lower() for d in importlib.metadata.distributions()}
missing = [w for w in wanted if re.match("[A-Za-z0-9._-]+", w).group().lower() not in have]
if missing:
    names = " ".join(f"'{m}'" for m in missing)
    sys.exit(f"tiny-onn: {sys.executable} lacks packages; install them: {sys.executable} -m pip install {names}")
PY
}

# Make or update the virtual environment $1 with the extras in $2, under a lock that the jobs of a
# shared file system respect.
tiny_onn_install() (
  set -euo pipefail
  venv=$1 extras=$2 stamp=$1/.tiny-onn log=$tiny_onn_repo/.cache/pip.log
  cd "$tiny_onn_repo"
  want=$({ pwd; cat pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1)
  current() {
    local extra
    [[ -f $stamp && $(sed -n 1p "$stamp") == "$want" ]] || return 1
    for extra in ${extras//,/ }; do sed -n 2p "$stamp" | tr , '\n' | grep -qx "$extra" || return 1; done
  }
  current && exit 0
  mkdir -p .cache "$venv"
  exec 9>"$venv/.lock"
  if ! flock -n 9; then
    tiny_onn_say "another set-up of $venv is under way; waiting for it"
    if ! flock 9; then
      tiny_onn_say "cannot lock $venv/.lock: put the environment elsewhere with TINY_ONN_VENV"
      exit 1
    fi
  fi
  # Whoever held the lock may have installed it all meanwhile.
  current && exit 0
  command -v g++ >/dev/null ||
    tiny_onn_say "no C++ compiler: DeepSpeed and Triton build code on first use; apt-get install gcc g++"
  base=$(tiny_onn_find_python)
  start=$SECONDS
  # What an earlier call added (tests, GPU) stays.
  if [[ -f $stamp ]]; then
    extras=$({ echo "$extras"; sed -n 2p "$stamp"; } | tr , '\n' | sed '/^$/d' | sort -u | paste -sd,)
  fi
  rm -f "$stamp"
  tiny_onn_say "installing into $venv: one to four minutes the first time (log: $log)"
  # Half made, when an earlier call was killed.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$venv"
  # One resolution: a second command that names torch again would bring another build of it. Without
  # --no-compile pip compiles 34,000 files, most of which nothing here imports.
  # shellcheck disable=SC2086  # TINY_ONN_PIP holds several arguments
  if ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-input --no-compile -c constraints.txt \
    ${TINY_ONN_PIP:-} -e ".${extras:+[$extras]}" >"$log" 2>&1; then
    tail -n 25 "$log" >&2
    tiny_onn_say "pip failed; all it said is in $log"
    exit 1
  fi
  printf '%s\n%s\n' "$want" "$extras" >"$stamp"
  tiny_onn_say "installed in $((SECONDS - start)) s"
)

# Wait for a process of this shell, whatever signals come; returns its exit code.
tiny_onn_wait() {
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}

tiny_onn_env() {
  local extras="" venv=${TINY_ONN_VENV:-$tiny_onn_repo/.venv} argument
  for argument in "$@"; do
    case $argument in
    --test) extras="test" ;;
    --) ;;
    *) tiny_onn_say "env.sh: unknown argument '$argument'; it takes --test"; return 2 ;;
    esac
  done
  if [[ -n ${TINY_ONN_CONTAINER:-} && -n ${SLURM_JOB_ID:-} ]]; then
    # In the container, which this script does not run in; it brings its own packages.
    PYTHON=${TINY_ONN_PYTHON:-python3}
  elif [[ -n ${TINY_ONN_PYTHON:-} ]]; then
    if ! PYTHON=$(command -v "$TINY_ONN_PYTHON"); then
      tiny_onn_say "TINY_ONN_PYTHON=$TINY_ONN_PYTHON: no such program"
      return 1
    fi
    tiny_onn_check_python "$PYTHON" || return
  else
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then extras=gpu${extras:+,$extras}; fi
    if [[ ${ENVIRONMENT:-} == BATCH ]]; then
      # A job's time limit may come meanwhile: its trap interrupts a wait, but no program.
      tiny_onn_install "$venv" "$extras" &
      tiny_onn_wait $! || return
    else
      tiny_onn_install "$venv" "$extras" || return
    fi
    PYTHON=$venv/bin/python
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  fi
  # Ranks that compile 1,400 modules anew start three times as slowly; who wants no bytecode beside
  # the sources has it in the cache.
  if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$tiny_onn_repo/.cache/bytecode}
  fi
  # Compiled once per checkout, not once per job.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$tiny_onn_repo/.cache/torch_extensions}
  # DeepSpeed's op builder reads "9.0a" as a number and dies.
  if [[ -n ${TORCH_CUDA_ARCH_LIST:-} ]]; then export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST//[af]/}; fi
  export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_NO_ADVISORY_WARNINGS=1
}

tiny_onn_env "$@"
