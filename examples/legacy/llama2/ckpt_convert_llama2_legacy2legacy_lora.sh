#!/bin/bash
# Merge an adapter into Llama 2, legacy names: a base without adapter, at any layout.
# Rank, alpha and targets are read from the adapter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/llama-2-7b-legacy}
LORA_CHECKPOINT=${LORA_CHECKPOINT:-./ckpt/llama-2-7b-lora-legacy}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_weights/llama-2-7b-lora2legacy}
TP=${TP:-1}
PP=${PP:-1}

single convert_ckpt.py \
    --model-type GPT --load-model-type mg --save-model-type mg \
    --load-dir "$CKPT_LOAD_DIR" --lora-load "$LORA_CHECKPOINT" --save-dir "$CKPT_SAVE_DIR" \
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
    "$@"
