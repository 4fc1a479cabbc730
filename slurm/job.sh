# shellcheck shell=bash
# One try of a run as a Slurm job: where the nodes meet, one launcher per node, and what follows.
# Sourced by pretrain.sh, which sets PYTHON and REPO and works in the checkout.
#
# What follows is decided by files in the run folder (DONE, STOP, committed checkpoints, the try's
# own .stop and .refused), never by srun's exit code, which cannot tell a crash from a preemption.
#
#   TINY_ONN_CRASHES=3        crashes without a new checkpoint between them that are tried again

say() { printf '%(%F %T)T %s: %s\n' -1 "${TINY_ONN_TRY:-job $SLURM_JOB_ID}" "$*"; }
die() { say "$*" >&2; exit 1; }

# Export where the nodes meet. Nothing here falls back to this machine: a job that trains alone on
# each of its nodes looks well and is worthless.
set_rendezvous() {
  local hosts nodes
  [[ -n ${SLURM_JOB_NODELIST:-} ]] ||
    die "Slurm gave no node list (SLURM_JOB_NODELIST is empty), so the nodes cannot meet;" \
      "submit with sbatch, or unset SLURM_JOB_ID to train on this machine alone"
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
    die "scontrol cannot expand the node list '$SLURM_JOB_NODELIST', so the nodes cannot meet"
  mapfile -t nodes <<<"$hosts"
  export NNODES=${#nodes[@]} TINY_ONN_NODES="${nodes[*]}"
  unset MASTER_ADDR MASTER_PORT
  if ((NNODES == 1)); then return; fi
  MASTER_ADDR=${nodes[0]}
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    [[ -n $MASTER_ADDR ]] || die "neither the name resolver nor Slurm knows an address of node ${nodes[0]}"
  fi
  MASTER_PORT=$(rendezvous_port) || die "no free port for the rendezvous on ${nodes[0]}"
  export MASTER_ADDR MASTER_PORT
}

# A port that jobs sharing this node do not also pick, below the range of outgoing connections.
rendezvous_port() {
  "$PYTHON" - "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" <<'PY'
import socket, sys
job, restart = map(int, sys.argv[1:])
for i in range(64):
    port = 12000 + (job * 67 + restart * 7 + i) % 20000
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            continue
    print(port)
    sys.exit()
sys.exit("64 ports are all taken")
PY
}

# The newest committed step, 0 when there is none.
committed_step() {
  local marker newest=0 step
  for marker in "$RUN"/checkpoints/step-*/COMMITTED; do
    [[ -e $marker ]] || continue
    step=$(basename "$(dirname "$marker")")
    step=$((10#${step#step-}))
    if ((step > newest)); then newest=$step; fi
  done
  echo "$newest"
}

# Put this job in the queue again, in its own name where the cluster allows it.
queue_again() {
  if [[ ${ENVIRONMENT:-} != BATCH ]]; then
    say "$1; the same command goes on from there"
    exit 1
  fi
  say "$1; going back to the queue"
  # Slurm ends this script as soon as it has queued the job.
  trap 'exit 0' TERM
  local refusal
  if refusal=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then exit 0; fi
  say "this job may not be queued again ($refusal), submitting a successor"
  submit_successor || die "could not submit a successor; to go on: sbatch [options] slurm/pretrain.sh ${ARGUMENTS[*]}"
  exit 0
}

# Submit the same command with the same resources, to start when this job has ended.
submit_successor() {
  local job option name
  local -a options=(--dependency="afterany:$SLURM_JOB_ID" --chdir="$SLURM_SUBMIT_DIR") clean=()
  job=$(scontrol show job -o "$SLURM_JOB_ID") || return
  field() { sed -n "s|.* $1=\([^ ]*\).*|\1|p" <<<"$job"; }
  for option in job-name=JobName partition=Partition account=Account qos=QOS time=TimeLimit nodes=NumNodes \
    cpus-per-task=CPUs/Task mem=MinMemoryNode mem-per-cpu=MinMemoryCPU constraint=Features \
    reservation=Reservation gres=TresPerNode exclude=ExcNodeList output=StdOut; do
    name=$(field "${option#*=}")
    case ${option%%=*}:$name in
    *: | *:'(null)' | *:N/A | mem*:0) ;;
    qos:normal) ;;
    gres:*) options+=("--gres=${name//gres:/}") ;;
    output:*)
      local file=${name##*/}
      options+=("--output=${name%/*}/${file//$SLURM_JOB_ID/%j}")
      ;;
    *) options+=("--${option%%=*}=$name") ;;
    esac
  done
  if [[ $(field OverSubscribe) == NO ]]; then options+=(--exclusive); fi
  if [[ $(field Requeue) == 0 ]]; then options+=(--no-requeue); fi
  # What Slurm told this job about itself must not reach the next one.
  for name in $(compgen -e); do
    case $name in
    SLURM_CONF) ;;
    SLURM_* | SLURMD_* | MASTER_* | NNODES | TINY_ONN_TRY | TINY_ONN_NODES) clean+=(-u "$name") ;;
    esac
  done
  env "${clean[@]}" sbatch "${options[@]}" "$REPO/slurm/pretrain.sh" "${ARGUMENTS[@]}"
}

# Queue again after a crash or a time limit that came too soon, described by $1, unless the run has
# made no progress for several tries.
queue_again_within_budget() {
  local step before=-1 count=0 file=$RUN/logs/crashes allowed=${TINY_ONN_CRASHES:-3}
  step=$(committed_step)
  if [[ -f $file ]]; then read -r before count <"$file"; fi
  if ((step > before)); then count=0; fi
  count=$((count + 1))
  echo "$step $count" >"$file"
  if ((count > allowed)); then
    rm -f "$file"
    die "$1 at committed step $step, $count times without progress, and gave up;" \
      "the cause is in $RUN/logs/$TINY_ONN_TRY-*.log"
  fi
  queue_again "$1 at committed step $step ($count of $allowed tries without progress)"
}

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

# run_job CONFIG [overrides]: does not return.
run_job() {
  ARGUMENTS=("$@")
  RUN=$("$PYTHON" -m launcher path "$@") || die "cannot tell the run folder of $1"
  export TINY_ONN_TRY=job$SLURM_JOB_ID-try${SLURM_RESTART_COUNT:-0}
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
  # Bound to no core: the launcher shares the node's cores among its ranks itself.
  # shellcheck disable=SC2016  # expands on the node
  srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --mpi=none --cpu-bind=none \
    --input=none --open-mode=append --output="$RUN/logs/$TINY_ONN_TRY-node%n.log" \
    bash -c 'if ! [ -x "$1" ]; then
        echo "$(hostname) has no $1: the checkout must be on a file system that all nodes share"
        exit 1
      fi
      NODE_RANK=$SLURM_NODEID exec "$@"' launcher "$PYTHON" -m launcher pretrain "$@" &
  local srun=$!
  # A trap runs only between commands, and interrupts this wait.
  while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
  trap '' USR1

  if [[ -e $RUN/DONE ]]; then say "done"; exit 0; fi
  if [[ -e $RUN/STOP ]]; then say "stopped at step $(committed_step) by $RUN/STOP"; exit 0; fi
  if [[ -e $RUN/logs/$TINY_ONN_TRY.refused ]]; then die "not tried again: $(cat "$RUN/logs/$TINY_ONN_TRY.refused")"; fi
  case $ENDING in
  limit) after_limit ;;
  cancelled) say "cancelled or preempted at committed step $(committed_step)"; exit 143 ;;
  *)
    # Which rank ended and how, or the last words of a launcher that came to no ranks.
    grep -hE '^rank [0-9]+ ' "$RUN/logs/$TINY_ONN_TRY"-node*.log ||
      tail -n 5 "$RUN/logs/$TINY_ONN_TRY"-node*.log || true
    queue_again_within_budget "crashed"
    ;;
  esac
}
