#!/bin/bash
# Index from Hugging Face to Megatron, mcore names. Every layout reads every other;
# TP and PP only say how many files there are.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

HF_PATH=${HF_PATH:-./model_from_hf/index-1.9b-hf}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_weights/index-1.9b-mcore}
TP=${TP:-1}
PP=${PP:-1}

single convert_ckpt.py \
    --model-type GPT --load-model-type hf --save-model-type mg --use-mcore-models \
    --model-type-hf index \
    --load-dir "$HF_PATH" --save-dir "$CKPT_SAVE_DIR" \
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
    "$@"
