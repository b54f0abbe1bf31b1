#!/bin/bash
# A chat with Llama-2-7B, mcore names.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/llama-2-7b-mcore}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/llama-2-7b-hf}
TP=${TP:-1} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-$((TP * PP))}}

launch inference.py \
    --use-mcore-models \
    --load "$CHECKPOINT" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" --prompt-type llama2 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --task chat --history-turns 3 --top-k 50 --top-p 0.95 --temperature 0.7 --max-new-tokens 256 --bf16 \
    "$@"
