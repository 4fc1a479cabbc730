#!/usr/bin/env bash
# Pretrain a model; run it again to go on where it stopped.
#
#   bash slurm/pretrain.sh [CONFIG] [--name NAME] [--dotted.key value …]       on this machine
#   sbatch [options] slurm/pretrain.sh [CONFIG] [--name NAME] [--key value …]  on a cluster
#
# CONFIG defaults to launcher/configs/demo.yaml. Under Slurm the job saves before its time limit,
# queues itself again until runs/NAME/DONE exists, and tries again after a crash. `touch
# runs/NAME/STOP` ends it. Useful options: --nodes=2 --gres=gpu:8 --exclusive --time=24:00:00
#
#SBATCH --job-name=tiny-onn
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Under sbatch $0 is a copy in a spool folder: ask Slurm for the script that was submitted.
repository() {
  local command="" folder
  if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
    command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n "s/^ *Command=//p" | head -n 1) || true
    # Some versions add the arguments.
    while [[ $command == *" "* && ! -f $command ]]; do command=${command% *}; done
  fi
  for folder in "$(dirname "$0")/.." "$(dirname "${command:-$0}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    if [[ -f $folder/slurm/job.sh && -f $folder/launcher/__main__.py ]]; then
      (cd "$folder" && pwd)
      return
    fi
  done
  echo "tiny-onn: cannot find the checkout: neither the submitted script (${command:-unknown to Slurm}) nor the" \
    "folder of the sbatch call (${SLURM_SUBMIT_DIR:-$PWD}) is in one; call sbatch from the checkout" >&2
  return 1
}

REPO=$(repository)
CONFIG=launcher/configs/demo.yaml
if [[ $# -gt 0 && $1 != -* ]]; then
  CONFIG=$1
  shift
  # The working directory becomes the checkout; a path relative to the caller's stays valid.
  if [[ -f $CONFIG ]]; then CONFIG=$(realpath "$CONFIG"); fi
fi
cd "$REPO"

# Inside a step (srun --pty bash) there is no second step to start: that is a machine like any other.
# The shell that salloc opens is a step in name only, with this number.
JOB=1 RUN=$REPO/.cache/jobs
if [[ -z ${SLURM_JOB_ID:-} || ${SLURM_STEP_ID:-4294967290} != 4294967290 ]]; then JOB=0; fi
if [[ $JOB == 1 ]]; then
  # shellcheck source=slurm/job.sh
  source slurm/job.sh
  guard_start slurm/pretrain.sh "$CONFIG" "$@"
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh --
if [[ $JOB == 0 ]]; then exec "$PYTHON" -m launcher pretrain "$CONFIG" "$@"; fi
run_job
