#!/bin/bash
# Merge an adapter into Index, mcore names: a base without adapter, at any layout.
# Rank, alpha and targets are read from the adapter.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/index-1.9b-mcore}
LORA_CHECKPOINT=${LORA_CHECKPOINT:-./ckpt/index-1.9b-lora}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_weights/index-1.9b-lora2mcore}
TP=${TP:-1}
PP=${PP:-1}

single convert_ckpt.py \
    --model-type GPT --load-model-type mg --save-model-type mg --use-mcore-models \
    --load-dir "$CKPT_LOAD_DIR" --lora-load "$LORA_CHECKPOINT" --save-dir "$CKPT_SAVE_DIR" \
    --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" \
    "$@"
