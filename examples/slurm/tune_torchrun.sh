#!/bin/bash
# LoRA on several hosts, one task a host: torchrun starts the processes of its host.
#   sbatch --nodes 2 --gpus-per-node 8 examples/slurm/tune_torchrun.sh [FLAG...]
# TUNE is the script to run; its own variables (CKPT_LOAD_DIR, DATA_PATH, TP, ...) are taken from the environment.
#SBATCH --job-name=tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
TUNE=${TUNE:-examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh}
export GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}}

source examples/slurm/step.sh
step bash "$TUNE" "$@"
