#!/bin/bash
# Export Index, mcore names, to Hugging Face in CKPT_SAVE_DIR/mg2hg.
# CKPT_SAVE_DIR is the folder of the original model: its config.json and tokenizer go with the weights.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/index-1.9b-mcore}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./model_from_hf/index-1.9b-hf}

single convert_ckpt.py \
    --model-type GPT --load-model-type mg --save-model-type hf --use-mcore-models \
    --load-dir "$CKPT_LOAD_DIR" --save-dir "$CKPT_SAVE_DIR" \
    --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1 \
    "$@"
