#!/usr/bin/env bash
# Host time of the training step on a machine of two GPUs: settings beside each other, each part with
# a limit, lines as they come, figures and traces in the folder given.
#   bash tests/gpu_step.sh OUT [PART ...]     parts: dense two sparse pair sparse1b group long alone
#                                             quiet attention test
set -u
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
small="launcher/configs/125m.yaml --skip 3 --steps 6 --train.global_batch"
large="launcher/configs/1b.yaml --skip 2 --steps 4 --model.activation_checkpointing none"

# Two runs beside each other have half of the cores each: a step's launches suffer from strangers.
cores=$(nproc)
half=$((cores / 2))
step() { # LIMIT GPUS NAME arguments of bench step
    local limit=$1 gpus=$2 name=$3 own=0-$((cores - 1))
    shift 3
    case $gpus in 0) own=0-$((half - 1)) ;; 1) own=$half-$((cores - 1)) ;; esac
    echo "== $name (at $SECONDS s)"
    CUDA_VISIBLE_DEVICES=$gpus timeout "$limit" taskset -c "$own" "$python" -m launcher bench step "$@" \
        --json "$out/$name.json" 2>"$out/$name.err" | tee "$out/$name.log" | cut -c1-260
    local rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || { echo "$name: rc $rc after $SECONDS s"; tail -5 "$out/$name.err"; }
}

[ $# -gt 0 ] || set -- dense two sparse pair
for part in "$@"; do
    case $part in
    dense) # 125m on one GPU beside 1 B parameters on the other
        # shellcheck disable=SC2086
        step 100 0 dense125m $small 8 --train.micro_batch 4 --variants 'all dense' \
            --settings gathered resident compiled 'gathered, compiled' --trace "$out/trace" &
        # shellcheck disable=SC2086
        step 100 1 dense1b $large --train.global_batch 4 --train.micro_batch 2 \
            --variants 'all dense' --settings resident compiled --trace "$out/trace1b" &
        wait ;;
    two) # the same on both
        # shellcheck disable=SC2086
        step 60 0,1 dense125m-2 $small 16 --train.micro_batch 4 --variants 'all dense' \
            --settings gathered resident compiled --gpus 2 ;;
    sparse) # NSA's kernels compile in the first
        # shellcheck disable=SC2086
        step 130 0 sparse125m $small 8 --train.micro_batch 4 --variants sparse \
            --settings resident gathered compiled --trace "$out/trace" &
        # shellcheck disable=SC2086
        step 130 1 others125m $small 8 --train.micro_batch 4 --settings resident \
            --variants 'full attention' 'no surprise' 'no deepembed' &
        wait ;;
    pair)
        # shellcheck disable=SC2086
        step 90 0,1 sparse125m-2 $small 16 --train.micro_batch 4 --gpus 2 \
            --variants 'no deepembed' sparse --settings resident gathered --trace "$out/trace2" ;;
    sparse1b) # 8 experts, or the states of 5.6 B weights would not fit on one GPU
        # shellcheck disable=SC2086
        step 150 0 sparse1b $large --train.global_batch 2 --train.micro_batch 1 \
            --model.ffn.experts 8 --variants 'no deepembed' --settings resident compiled \
            --trace "$out/trace1b" &
        # shellcheck disable=SC2086
        step 150 1 long1b $large --train.global_batch 1 --train.micro_batch 1 \
            --data.seq_len 65536 --model.activation_checkpointing recompute \
            --model.ffn.experts 8 --variants 'no deepembed' --settings resident &
        wait ;;
    group) # one sequence on both, against one of its own each
        # shellcheck disable=SC2086
        step 90 0,1 long1b-group $large --train.global_batch 1 --train.micro_batch 1 \
            --data.seq_len 65536 --mesh.group 2 --model.activation_checkpointing recompute \
            --model.ffn.experts 8 --variants 'no deepembed' --settings resident --gpus 2 ;;
    long)
        # shellcheck disable=SC2086
        step 90 0,1 long1b-128k $large --train.global_batch 1 --train.micro_batch 1 \
            --data.seq_len 131072 --mesh.group 2 --model.activation_checkpointing recompute \
            --model.ffn.experts 8 --variants 'no deepembed' --settings resident --gpus 2 ;;
    alone) # what the table and the size of a pass cost, nothing else on the machine
        # shellcheck disable=SC2086
        step 120 0 alone125m $small 16 --train.micro_batch 4 --settings compiled --trace "$out/alone" \
            --variants sparse 'no deepembed' 'one thread=--model.deepembed.threads 1' \
            'on the device=--model.deepembed.tier device'
        # shellcheck disable=SC2086
        step 90 0 alone125m-16 $small 16 --train.micro_batch 16 --variants sparse 'no deepembed' \
            --settings compiled ;;
    quiet) # compiled blocks, larger passes, attention of equal documents by cuDNN; one GPU
        # shellcheck disable=SC2086
        step 40 0 quiet1b $large --train.global_batch 4 --train.micro_batch 2 \
            --variants 'all dense' --settings compiled
        # shellcheck disable=SC2086
        step 60 0 quiet125m $small 8 --train.micro_batch 8 --variants 'all dense' sparse \
            --settings compiled ;;
    test) # right or wrong only: other work may run beside it
        timeout 100 "$python" -m pytest -x -s -m gpu tests/tiny_onn/test_group_gpu.py 2>&1 | tail -30 ;;
    attention)
        timeout 60 "$python" -m pytest -x -q -m gpu tests/kernels/test_full_attention.py 2>&1 | tail -5 ;;
    *) echo "no part $part" ; exit 2 ;;
    esac
done
echo "done after $SECONDS s"
