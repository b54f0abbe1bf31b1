#!/bin/bash
# Tokens of instructions in Alpaca's form for MiniCPM: six files that begin with OUTPUT_PREFIX.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

DATA_FILE=${DATA_FILE:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/minicpm-2b-hf}
OUTPUT_PREFIX=${OUTPUT_PREFIX:-./finetune_dataset/minicpm-2b/alpaca}

single preprocess_data.py \
    --input "$DATA_FILE" --output-prefix "$OUTPUT_PREFIX" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --handler-name AlpacaStyleInstructionHandler --prompt-type default \
    --workers 4 --log-interval 1000 --overwrite-cache \
    "$@"
