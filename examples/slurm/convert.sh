#!/bin/bash
# One conversion of a checkpoint as a job of its own; it needs memory for one layer or so, and no device.
#   sbatch examples/slurm/convert.sh [FLAG...]
#   sbatch --dependency=afterok:$(sbatch --parsable examples/slurm/convert.sh) ... examples/slurm/tune_torchrun.sh
# CONVERT is the script to run; its own variables (HF_PATH, CKPT_SAVE_DIR, TP, ...) are taken from the environment.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
CONVERT=${CONVERT:-examples/mcore/llama2/ckpt_convert_llama2_hf2mcore.sh}

srun bash "$CONVERT" "$@"
