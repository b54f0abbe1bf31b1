#!/bin/bash
# Merge a LoRA adapter into a legacy checkpoint and export a Hugging Face model into CKPT_SAVE_DIR/mg2hg.
# CKPT_SAVE_DIR holds config.json and tokenizer of the original model, unless they were kept at its conversion.
set -euo pipefail
CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/llama-2-7b-legacy}
LORA_CHECKPOINT=${LORA_CHECKPOINT:-./ckpt/llama-2-7b-lora}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_from_hf/llama-2-7b-hf}

python "$(dirname "$0")/../../../convert_ckpt.py" \
    --model-type GPT \
    --loader megatron \
    --saver megatron \
    --save-model-type save_huggingface_llama \
    --target-tensor-parallel-size 1 \
    --target-pipeline-parallel-size 1 \
    --load-dir "$CKPT_LOAD_DIR" \
    --lora-load "$LORA_CHECKPOINT" \
    --save-dir "$CKPT_SAVE_DIR" \
    "$@"
