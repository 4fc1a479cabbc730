#!/usr/bin/env bash
# Evaluate a run's checkpoints as a job of its own: each once, new ones as they appear, until the run
# is DONE.
#
#   bash slurm/eval.sh RUN [--once] [--sequences N] [--patience SECONDS]              on this machine
#   sbatch [options] slurm/eval.sh RUN [--once] [--sequences N] [--patience SECONDS]  on a cluster
#
# RUN is the run's folder (runs/NAME). Results: RUN/evaluation/evaluation.jsonl and TensorBoard. The
# job is queued again before its time limit; `touch RUN/evaluation/STOP` ends it. It ends by itself
# when no checkpoint appears for --patience (3600) seconds.
#
#SBATCH --job-name=tiny-onn-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Under sbatch $0 is a copy in a spool folder: pretrain.sh explains where the checkout is looked for.
command=""
if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
  command=$(scontrol show job "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" 2>/dev/null | sed -n "s/^ *Command=//p" | head -n 1) || true
  while [[ $command == *" "* && ! -f $command ]]; do command=${command% *}; done
fi
for folder in "$(dirname "$0")/.." "$(dirname "${command:-$0}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
  if [[ -f $folder/slurm/queue.sh && -f $folder/launcher/__main__.py ]]; then
    REPO=$(cd "$folder" && pwd)
    break
  fi
done
if [[ -z ${REPO:-} ]]; then
  echo "tiny-onn: cannot find the checkout; call sbatch from it" >&2
  exit 1
fi
if [[ $# == 0 || $1 == -* || ! -e $1/config.yaml ]]; then
  echo "tiny-onn: usage: slurm/eval.sh RUN [--once] [--sequences N] [--patience SECONDS];" \
    "RUN is a run's folder and has a config.yaml (found: ${1:-nothing})" >&2
  exit 2
fi
TRAINED=$(realpath "$1")
shift
cd "$REPO"
# A step of a job (srun --pty bash) is a machine like any other, as in pretrain.sh.
JOB=1 RUN=$TRAINED/evaluation
if [[ -z ${SLURM_JOB_ID:-} || ${SLURM_STEP_ID:-4294967290} != 4294967290 ]]; then JOB=0; fi
if [[ $JOB == 1 ]]; then
  # shellcheck source=slurm/nodes.sh
  source slurm/nodes.sh
  # shellcheck source=slurm/queue.sh
  source slurm/queue.sh
  guard_start slurm/eval.sh "$TRAINED" "$@"
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh --
if [[ $JOB == 0 ]]; then exec "$PYTHON" -m launcher eval "$TRAINED" --follow "$@"; fi

# The step evaluated last: what counts as progress here.
committed_step() {
  local step
  step=$(sed -n '$s/.*"step": *\([0-9]*\).*/\1/p' "$RUN/evaluation.jsonl" 2>/dev/null) || true
  echo "${step:-0}"
}

on_limit() {
  ENDING=limit
  touch "$RUN/logs/$TINY_ONN_TRY.stop"
}

on_term() {
  if [[ $ENDING == limit ]]; then queue_again "the time limit came after the evaluation of step $(committed_step)"; fi
  ENDING=cancelled
  touch "$RUN/logs/$TINY_ONN_TRY.stop"
}

set_container
set_rendezvous
ENDING=""
trap on_limit USR1
trap on_term TERM
say "evaluating $TRAINED on $NNODES node(s): $TINY_ONN_NODES; results: $RUN/evaluation.jsonl"
attended on_nodes "$RUN/logs/$TINY_ONN_TRY-node%n.log" 1 "$PYTHON" -m launcher eval "$TRAINED" --follow "$@"
trap '' USR1
if [[ -e $RUN/logs/$TINY_ONN_TRY.finished ]]; then say "$(cat "$RUN/logs/$TINY_ONN_TRY.finished")"; exit 0; fi
if [[ -e $RUN/STOP ]]; then say "stopped by $RUN/STOP"; exit 0; fi
if [[ -e $RUN/logs/$TINY_ONN_TRY.refused ]]; then die "not tried again: $(cat "$RUN/logs/$TINY_ONN_TRY.refused")"; fi
case $ENDING in
limit) queue_again "the time limit is near; step $(committed_step) was evaluated last" ;;
cancelled) after_cancellation ;;
*)
  tail -n 5 "$RUN/logs/$TINY_ONN_TRY"-node*.log || true
  queue_again_within_budget "the evaluation crashed"
  ;;
esac
