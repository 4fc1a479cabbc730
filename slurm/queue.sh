# shellcheck shell=bash
# What follows a try: the queue again, without bad nodes if need be, a successor, or the end.
# Sourced after nodes.sh; uses SCRIPT and ARGUMENTS (the job's command), RUN and TINY_ONN_TRY.
#
#   TINY_ONN_CRASHES=3        crashes without a new checkpoint between them that are tried again

# The newest committed step, 0 when there is none.
committed_step() {
  local marker newest=0 step
  for marker in "$RUN"/checkpoints/step-*/COMMITTED; do
    [[ -e $marker ]] || continue
    step=$(basename "$(dirname "$marker")")
    step=${step#step-}
    # One that is being replaced still counts; what was set aside under another name does not.
    step=${step%.replaced}
    [[ $step =~ ^[0-9]+$ ]] || continue
    step=$((10#$step))
    if ((step > newest)); then newest=$step; fi
  done
  echo "$newest"
}

# Before there is a run folder, and while the environment is being installed: from now on a time
# limit that comes puts the job, script $1 and its arguments, in the queue again. RUN/logs has its notes.
guard_start() {
  SCRIPT=$1 ARGUMENTS=("${@:2}") ARRAY_IS_ONE_RUN=1
  export TINY_ONN_TRY=job$SLURM_JOB_ID-try${SLURM_RESTART_COUNT:-0}
  mkdir -p "$RUN/logs"
  trap limit_before_ranks USR1
}

limit_before_ranks() {
  local allowed=${TINY_ONN_CRASHES:-3}
  # No checkpoint counts here; what the next try finds installed is its progress.
  if ((${SLURM_RESTART_COUNT:-0} >= allowed)); then
    die "the time limit came before the ranks were started, after $allowed tries, and gave up: ask for more --time"
  fi
  queue_again "the time limit came before the ranks were started"
}

# Put this job in the queue again because of $1, in its own name where the cluster allows it; $2 are
# nodes that it must not get again.
queue_again() {
  local reason=$1 avoid=${2:-} refusal
  if [[ ${ENVIRONMENT:-} != BATCH ]]; then
    say "$reason; the same command goes on from there"
    exit 1
  fi
  say "$reason; going back to the queue"
  if [[ -n $avoid ]]; then avoid=$(excluded_with "$avoid"); fi
  # Slurm ends this script as soon as it has queued the job. What is left to do here is quick.
  trap '' TERM
  if refusal=$(scontrol requeue "$(job_name)" 2>&1); then
    # Only a waiting job's list can be changed. It waits for two minutes.
    if [[ -n $avoid ]]; then exclude "$avoid"; fi
    exit 0
  fi
  local next
  if next=$(waiting_successor); then
    say "this job may not be queued again ($refusal); job $next waits already and goes on"
    exit 0
  fi
  say "this job may not be queued again ($refusal), submitting a successor"
  submit_successor "$avoid" ||
    die "could not submit a successor; to go on: sbatch [options] $SCRIPT ${ARGUMENTS[*]@Q}"
  exit 0
}

# The nodes that this job already avoids, and those in $1, as Slurm writes lists.
excluded_with() {
  local before
  before=$(job_field ExcNodeList)
  echo "${before:+$before,}$1"
}

exclude() {
  local said
  for _ in 1 2 3 4 5; do
    if said=$(scontrol update JobId="$(job_name)" ExcNodeList="$1" 2>&1); then
      say "node(s) $1 are excluded from the next try"
      return
    fi
    sleep 0.5
  done
  say "could not exclude $1 from the next try: $said"
}

# The job that goes on in any case when this one has ended: a later element of the same array, or one
# that depends on this job. Fails when there is none.
waiting_successor() {
  local id waits
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} && $ARRAY_IS_ONE_RUN == 1 ]]; then
    id=$(squeue -h -t PD -r -j "$SLURM_ARRAY_JOB_ID" -o %i 2>/dev/null | head -n 1)
    if [[ -n $id ]]; then echo "$id"; return 0; fi
  fi
  while read -r id waits; do
    if [[ $waits =~ (^|[:,?])(after|afterany|afternotok|afterok):$SLURM_JOB_ID([^0-9]|$) ]]; then
      echo "$id"
      return 0
    fi
  done < <(squeue -h -t PD --user="$(id -un)" -o '%i %E')
  return 1
}

# Write $2, as Slurm shows it (gres:gpu:h100:4,gres:nvme:1 or cpu=2,gres/gpu=1), the way sbatch's
# option $1 wants it: everything for gres, the GPUs' part alone for gpus and the like.
tres_named() {
  local item out=""
  for item in ${2//,/ }; do
    item=${item#gres[:/]} item=${item/=/:}
    if [[ $1 != gres ]]; then
      [[ $item == gpu:* ]] || continue
      item=${item#gpu:}
    fi
    out+=${out:+,}$item
  done
  echo "$out"
}

# A file of this job as a pattern for the next one.
file_pattern() {
  local file=${1##*/}
  echo "${1%/*}/${file//$SLURM_JOB_ID/%j}"
}

# The --signal of this job as an option; empty for the script's own. Only the accounting keeps it.
signal_option() {
  local line
  command -v sacct >/dev/null || return 0
  line=$(timeout 5 sacct -n -X -P -j "$(job_name)" -o SubmitLine 2>/dev/null | head -n 1) || return 0
  if [[ $line =~ [[:space:]]--signal[=[:space:]]+([^[:space:]]+) ]]; then echo "--signal=${BASH_REMATCH[1]}"; fi
}

# Submit the same command with the same resources, to start when this job has ended, once; without the
# nodes in $1.
submit_successor() {
  local option name shown output="" taken="" submitted
  # Of a job that lost a node Slurm would name fewer nodes.
  local -a options=(--nodes="$NNODES" --dependency="afterany:$(job_name)" --chdir="$SLURM_SUBMIT_DIR") clean=()
  if [[ -e $RUN/logs/$TINY_ONN_TRY.successor ]]; then return 0; fi
  shown=$(scontrol show job "$(job_name)") || return
  # What goes by GPU comes first: what Slurm made of it must not be asked for beside it.
  for option in cpus-per-gpu=CpusPerTres mem-per-gpu=MemPerTres gpus=TresPerJob gpus-per-task=TresPerTask \
    gpus-per-socket=TresPerSocket gres=TresPerNode job-name=JobName partition=Partition account=Account qos=QOS \
    time=TimeLimit ntasks-per-node=NtasksPerN:B:S:C cpus-per-task=CPUs/Task mem=MinMemoryNode \
    mem-per-cpu=MinMemoryCPU constraint=Features reservation=Reservation output=StdOut error=StdErr; do
    name=$(job_field "${option#*=}" "$shown")
    option=${option%%=*}
    case $option:$name in
    *: | qos:normal | mem-per-cpu:0 | ntasks-per-node:0:*) continue ;;
    cpus-per-task:*) if [[ $taken == *' --cpus-per-gpu'* ]]; then continue; fi ;;
    mem:* | mem-per-cpu:*) if [[ $taken == *' --mem-per-gpu'* ]]; then continue; fi ;;
    ntasks-per-node:*) name=${name%%:*} ;;
    *per-gpu:* | gpus*:* | gres:*) name=$(tres_named "$option" "$name") ;;
    output:*) output=$name name=$(file_pattern "$name") ;;
    error:*) if [[ $name == "$output" ]]; then continue; else name=$(file_pattern "$name"); fi ;;
    esac
    if [[ -n $name ]]; then options+=("--$option=$name") taken+=" --$option"; fi
  done
  name=$(signal_option)
  if [[ -n $name ]]; then options+=("$name"); fi
  name=${1:-$(job_field ExcNodeList "$shown")}
  if [[ -n $name ]]; then options+=(--exclude="$name"); fi
  if [[ $(job_field OverSubscribe "$shown") == NO ]]; then options+=(--exclusive); fi
  if [[ $(job_field Requeue "$shown") == 0 ]]; then options+=(--no-requeue); fi
  # What Slurm told this job about itself must not reach the next one.
  for name in $(compgen -e); do
    case $name in
    SLURM_CONF) ;;
    SLURM_* | SLURMD_* | MASTER_* | NNODES | TINY_ONN_TRY | TINY_ONN_NODES) clean+=(-u "$name") ;;
    esac
  done
  submitted=$(env "${clean[@]}" sbatch --parsable "${options[@]}" "$REPO/$SCRIPT" "${ARGUMENTS[@]}") || return
  say "job $submitted goes on"
  echo "$submitted" >"$RUN/logs/$TINY_ONN_TRY.successor"
}

# Queue again after a crash, a bad node or a time limit that came too soon, described by $1, without
# the nodes in $2, unless the run has made no progress for several tries.
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
  queue_again "$1 at committed step $step ($count of $allowed tries without progress)" "${2:-}"
}

# Slurm ended this try. Where it queues the job again itself nothing is to be done; where that is
# forbidden and nobody asked for the end, a successor goes on.
after_cancellation() {
  local reason
  # Slurm kills this script soon: what is sure comes first.
  say "cancelled or preempted at committed step $(committed_step)"
  if [[ $(job_field Requeue) == 0 ]]; then
    # The state itself only says COMPLETING until this script has ended.
    reason=$(job_field Reason)
    if [[ -n $(job_field PreemptTime) ]]; then reason=preempted; fi
    if [[ $reason =~ ^(NodeDown|preempted)$ ]] && ! waiting_successor >/dev/null; then
      submit_successor || say "could not submit a successor; to go on: sbatch [options] $SCRIPT ${ARGUMENTS[*]@Q}"
    fi
  fi
  exit 143
}
