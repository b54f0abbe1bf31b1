#!/bin/bash
# A grid of learning rates and LoRA ranks, one array element each, on one host each.
#   RATES="2e-5 5e-5 1e-4" RANKS="8 16" sbatch --array=0-5 --gpus-per-node 8 examples/slurm/sweep.sh [FLAG...]
# Each element trains into SWEEP_DIR/lr-RATE-r-RANK. Elements beyond the grid do nothing.
#SBATCH --job-name=sweep
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
TUNE=${TUNE:-examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh}
SWEEP_DIR=${SWEEP_DIR:-./ckpt/sweep}
read -ra rates <<<"${RATES:-2e-5 5e-5 1e-4}"
read -ra ranks <<<"${RANKS:-8 16 32}"
export GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}}

element=${SLURM_ARRAY_TASK_ID:?submit this script with sbatch --array}
if [ "$element" -ge $((${#rates[@]} * ${#ranks[@]})) ]; then
    echo "element $element is beyond the grid of ${#rates[@]} rates and ${#ranks[@]} ranks"
    exit 0
fi
rate=${rates[element / ${#ranks[@]}]} rank=${ranks[element % ${#ranks[@]}]}
export CKPT_SAVE_DIR=$SWEEP_DIR/lr-$rate-r-$rank LOG=$SWEEP_DIR/lr-$rate-r-$rank.log

source examples/slurm/step.sh
# the grid comes last: it is what the element is about
step bash "$TUNE" "$@" --lr "$rate" --lora-r "$rank" --lora-alpha $((2 * rank))
