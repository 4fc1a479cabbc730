# shellcheck shell=bash
# What a job knows of its nodes: where they meet, and how a command runs on each of them.
# Sourced by pretrain.sh and eval.sh, which set PYTHON and REPO and work in the checkout.
#
#   TINY_ONN_CONTAINER=IMAGE  run everything in a container (srun --container-image, a plugin such as
#                             Pyxis); TINY_ONN_PYTHON then names the interpreter in it (python3)
#   TINY_ONN_MOUNTS=A:B,C:D   what the container sees beside the checkout (corpus, runs, scratch)

say() { printf '%(%F %T)T %s: %s\n' -1 "${TINY_ONN_TRY:-job $SLURM_JOB_ID}" "$*"; }
die() { say "$*" >&2; exit 1; }

# What Slurm calls this job alone: the number of an array's last element stands for the whole array.
job_name() {
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# The field $1 of `scontrol show job`, or of what it said before ($2); empty when it is not set.
job_field() {
  local shown=${2:-} value
  if [[ -z $shown ]]; then shown=$(scontrol show job "$(job_name)") || return; fi
  value=$(sed -n "s|^\(.* \)\?$1=||p" <<<"$shown" | head -n 1)
  case $1 in
  # Names and paths may have spaces in them; each ends its line.
  JobName | StdOut | StdErr | WorkDir | Command) ;;
  *) value=${value%%[[:space:]]*} ;;
  esac
  case $value in '(null)' | N/A | None) ;; *) echo "$value" ;; esac
}

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
  on_first_node "$PYTHON" -c '
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
' "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}"
}

# Set CONTAINER to srun's options for the container, none without one.
set_container() {
  CONTAINER=()
  if [[ -n ${TINY_ONN_CONTAINER:-} ]]; then
    CONTAINER=(--container-image="$TINY_ONN_CONTAINER" --container-workdir="$REPO"
      --container-mounts="$REPO:$REPO${TINY_ONN_MOUNTS:+,$TINY_ONN_MOUNTS}")
  fi
}

# Run a short command where this script runs, in the container if there is one.
on_first_node() {
  if ((${#CONTAINER[@]} == 0)); then
    "$@"
  else
    srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --overlap --mpi=none --input=none "${CONTAINER[@]}" "$@"
  fi
}

# Run a command once per node, its output in the log file $1 (%n is the node's number); NODE_RANK and
# NODE_NAME tell the nodes apart. $2 is 1 when one node's failure ends the others.
# Bound to no core: the launcher shares the node's cores among its ranks itself.
on_nodes() {
  # shellcheck disable=SC2016  # expands on the node
  srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit="$2" --mpi=none --cpu-bind=none \
    --input=none --open-mode=append --output="$1" "${CONTAINER[@]}" \
    bash -c 'if ! [ -x "$(command -v "$1")" ]; then
        echo "$(hostname) has no $1: the checkout must be on a file system that all nodes share"
        exit 1
      fi
      NODE_RANK=$SLURM_NODEID NODE_NAME=$SLURMD_NODENAME exec "$@"' launcher "${@:3}"
}

# Run a command in the background and wait for it; signals of this job are heeded meanwhile.
attended() {
  "$@" &
  local child=$!
  # A trap runs only between commands, and interrupts this wait.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
}
