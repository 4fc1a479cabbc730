# shellcheck shell=bash
# One try of a run as a Slurm job: the pre-flight, one launcher per node, and what follows.
# Sourced by pretrain.sh, which sets REPO and, before run_job, PYTHON, and works in the checkout.
#
# What follows is decided by files in the run folder (DONE, STOP, committed checkpoints, the try's
# own .stop and .refused), never by srun's exit code, which cannot tell a crash from a preemption.
#
#   TINY_ONN_PREFLIGHT=0      start without checking the nodes first

# shellcheck source=slurm/nodes.sh
source "$REPO/slurm/nodes.sh"
# shellcheck source=slurm/queue.sh
source "$REPO/slurm/queue.sh"

after_limit() {
  if (($(committed_step) > FIRST_STEP)); then
    queue_again "saved step $(committed_step) before the time limit"
  fi
  queue_again_within_budget "nothing new was saved before the time limit"
}

on_limit() {
  ENDING=limit
  say "the time limit is near: asking the ranks to save and stop"
  touch "$RUN/logs/$TINY_ONN_TRY.stop"
}

on_term() {
  # The limit itself: what was saved before is where the next try goes on.
  if [[ $ENDING == limit ]]; then after_limit; fi
  ENDING=cancelled
  touch "$RUN/logs/$TINY_ONN_TRY.stop"
}

# Look at every node before the ranks start; goes back to the queue without those that are not fit.
preflight() {
  local bad status=0 log="$RUN/logs/$TINY_ONN_TRY-preflight"
  if [[ ${TINY_ONN_PREFLIGHT:-1} == 0 ]]; then return; fi
  attended on_nodes "$log-node%n.log" 0 timeout --kill-after=10 "${TINY_ONN_PREFLIGHT_SECONDS:-300}" \
    "$PYTHON" -m launcher preflight "${ARGUMENTS[@]}"
  if [[ -n $ENDING ]]; then return; fi
  bad=$(on_first_node "$PYTHON" -m launcher.preflight_judge "$RUN/logs" "$TINY_ONN_TRY") || status=$?
  case $status in
  0) ;;
  3) queue_again_within_budget "the pre-flight failed through no single node's fault" ;;
  4) queue_again_within_budget "the pre-flight found node(s) $bad unfit" "$bad" ;;
  *) die "the pre-flight could not be judged (exit code $status); see $log-node*.log" ;;
  esac
}

# run_job: runs ARGUMENTS, which guard_start has set (CONFIG [overrides]); does not return.
run_job() {
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} && "${ARGUMENTS[*]}" == *%a* ]]; then
    # Every element trains a run of its own.
    ARGUMENTS=("${ARGUMENTS[@]//%a/$SLURM_ARRAY_TASK_ID}") ARRAY_IS_ONE_RUN=0
  fi
  set_container
  RUN=$(on_first_node "$PYTHON" -m launcher path "${ARGUMENTS[@]}") || die "cannot tell the run folder of ${ARGUMENTS[0]}"
  mkdir -p "$RUN/logs"
  if [[ -e $RUN/DONE ]]; then say "$RUN is done"; exit 0; fi
  if [[ -e $RUN/STOP ]]; then say "$RUN/STOP asks this run not to run; remove it to go on"; exit 0; fi
  set_rendezvous
  FIRST_STEP=$(committed_step)
  say "step $FIRST_STEP of $RUN is committed; starting on $NNODES node(s): $TINY_ONN_NODES"
  say "logs: $RUN/logs/$TINY_ONN_TRY-*.log"

  ENDING=""
  trap on_limit USR1
  trap on_term TERM
  preflight
  if [[ -z $ENDING ]]; then
    attended on_nodes "$RUN/logs/$TINY_ONN_TRY-node%n.log" 1 "$PYTHON" -m launcher pretrain "${ARGUMENTS[@]}"
  fi
  trap '' USR1

  if [[ -e $RUN/DONE ]]; then say "done"; exit 0; fi
  if [[ -e $RUN/STOP ]]; then say "stopped at step $(committed_step) by $RUN/STOP"; exit 0; fi
  if [[ -e $RUN/logs/$TINY_ONN_TRY.refused ]]; then die "not tried again: $(cat "$RUN/logs/$TINY_ONN_TRY.refused")"; fi
  case $ENDING in
  limit) after_limit ;;
  cancelled) after_cancellation ;;
  *)
    # Which rank ended and how, or the last words of a launcher that came to no ranks.
    grep -hE '^rank [0-9]+ ' "$RUN/logs/$TINY_ONN_TRY"-node*.log ||
      tail -n 5 "$RUN/logs/$TINY_ONN_TRY"-node*.log || true
    queue_again_within_budget "crashed"
    ;;
  esac
}
