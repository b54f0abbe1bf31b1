#!/bin/bash
# Merge a LoRA adapter into a legacy checkpoint, at any layout.
set -euo pipefail
CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/llama-2-7b-legacy}
LORA_CHECKPOINT=${LORA_CHECKPOINT:-./ckpt/llama-2-7b-lora}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_weights/llama-2-7b-lora2legacy}

python "$(dirname "$0")/../../../convert_ckpt.py" \
    --model-type GPT \
    --loader megatron \
    --saver megatron \
    --save-model-type megatron \
    --target-tensor-parallel-size "${TP:-1}" \
    --target-pipeline-parallel-size "${PP:-1}" \
    --load-dir "$CKPT_LOAD_DIR" \
    --lora-load "$LORA_CHECKPOINT" \
    --save-dir "$CKPT_SAVE_DIR" \
    "$@"
