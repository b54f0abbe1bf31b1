#!/bin/bash
# Tokens of conversations in ShareGPT's form for Llama 2: six files that begin with OUTPUT_PREFIX.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

DATA_FILE=${DATA_FILE:-./dataset/sharegpt.jsonl}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/llama-2-7b-hf}
OUTPUT_PREFIX=${OUTPUT_PREFIX:-./finetune_dataset/llama-2-7b/sharegpt}

single preprocess_data.py \
    --input "$DATA_FILE" --output-prefix "$OUTPUT_PREFIX" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --handler-name SharegptStyleInstructionHandler --prompt-type llama2 \
    --workers 4 --log-interval 1000 \
    "$@"
