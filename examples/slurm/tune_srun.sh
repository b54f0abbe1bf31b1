#!/bin/bash
# LoRA on several hosts, one task a device: SLURM starts all processes, torchrun none.
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 examples/slurm/tune_srun.sh [FLAG...]
# TUNE is the script to run; its own variables (CKPT_LOAD_DIR, DATA_PATH, TP, ...) are taken from the environment.
#SBATCH --job-name=tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
TUNE=${TUNE:-examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh}

source examples/slurm/step.sh
step bash "$TUNE" "$@"
