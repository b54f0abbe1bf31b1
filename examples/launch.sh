# shellcheck shell=bash
# Sourced by the scripts of examples/: where the programs are, and on which processes they run.
#
#   launch PROGRAM FLAG...   on every device: of this host, of several hosts, or of a SLURM step
#   single PROGRAM FLAG...   in one process
#   resumable FOLDER         prints FOLDER if it holds a checkpoint to go on from, else nothing
#
# A script hands them its own arguments last, so `tune_….sh --train-iters 10` changes a flag, `generate_….sh
# --hf-chat-template` takes the tokenizer's own template instead of the script's, and `tune_….sh --dry-run` prints the
# command, in one line, and starts nothing. The processes are those of
#
#   one host        GPUS_PER_NODE or NPUS_PER_NODE of them
#   several hosts   the same script on each, with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT), or with NNODES and
#                   RDZV_ENDPOINT=host:port, where the hosts number themselves
#   SLURM           `srun script`, with one task a host (torchrun starts the rest) or one task a rank (no torchrun)
#
# PYTHON is the interpreter, LOG a file that gets a copy of what is printed.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}

# Ascend's variables, where CANN is installed; its script uses variables that may not be set
for _cann in "${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit}" /usr/local/Ascend/cann; do
    if [ -f "$_cann/set_env.sh" ]; then
        set +u
        # shellcheck disable=SC1091
        source "$_cann/set_env.sh"
        set -u
        break
    fi
done
unset _cann

single() {
    local program=$1
    shift
    _start "$PYTHON" "$REPOSITORY/$program" "$@"
}

launch() {
    local program=$1 devices=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}} hosts=${NNODES:-1} host=${NODE_RANK:-0}
    local master=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
    shift
    if [ -n "${SLURM_STEP_ID:-}" ]; then # inside srun
        hosts=$SLURM_STEP_NUM_NODES host=$SLURM_NODEID
        master=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
        port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that share a host must not meet
        if [ "$SLURM_STEP_NUM_TASKS" -gt "$hosts" ]; then
            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
            export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} MASTER_ADDR=$master MASTER_PORT=$port
            single "$program" "$@"
            return
        fi
    fi
    if [ "$hosts" -gt 1 ] && [ -n "${RDZV_ENDPOINT:-}" ]; then
        set -- --nnodes "$hosts" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" \
            --rdzv-id "${RDZV_ID:-modellink_lora}" -- "$REPOSITORY/$program" "$@"
        case " $(hostname -I 2>/dev/null) " in # a host does not know an address for its own if its name stands for another
            *" ${RDZV_ENDPOINT%:*} "*) set -- --rdzv-conf is_host=1 "$@" ;;
        esac
    elif [ "$hosts" -gt 1 ]; then
        : "${master:?of the host with NODE_RANK=0; set MASTER_ADDR on every host}"
        set -- --nnodes "$hosts" --node-rank "$host" --master-addr "$master" --master-port "$port" \
            -- "$REPOSITORY/$program" "$@"
    elif [ "$devices" -eq 1 ]; then
        single "$program" "$@"
        return
    else
        set -- --standalone -- "$REPOSITORY/$program" "$@"
    fi
    _start "$PYTHON" -m torch.distributed.run --nproc-per-node "$devices" "$@"
}

resumable() {
    if [ -f "$1/latest_checkpointed_iteration.txt" ]; then
        echo "$1"
    fi
}

# The command takes the place of the script: signals reach it, and its exit status is the script's.
_start() {
    local word words=() dry='' drop=''
    # a script's own --prompt-type gives way to the --hf-chat-template of its caller
    case " $* " in *" --hf-chat-template "*) drop=1 ;; esac
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry=1 ;;
            --prompt-type) if [ -n "$drop" ]; then drop= && shift; else words+=("$1"); fi ;;
            *) words+=("$1") ;;
        esac
        shift
    done
    if [ -n "$dry" ]; then
        for word in "${words[@]}"; do
            case $word in
                *[!A-Za-z0-9_./:,=+-]* | '') printf '%q ' "$word" ;;
                *) printf '%s ' "$word" ;;
            esac
        done
        echo
        exit 0
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own default; else every process takes every core
    if [ -n "${LOG:-}" ]; then
        mkdir -p "$(dirname "$LOG")"
        # SLURM's SIGTERM reaches this tee too: without it, the program could not print any more, and so not save
        exec "${words[@]}" > >(trap '' HUP INT TERM USR1 && exec tee -a "$LOG") 2>&1
    fi
    exec "${words[@]}"
}
