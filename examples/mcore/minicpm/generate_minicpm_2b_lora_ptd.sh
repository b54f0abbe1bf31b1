#!/bin/bash
# Answers of MiniCPM-2B and its adapter, not merged, mcore names.
# All of greedy, sampling and beams; `--task greedy --prompt "…"` gives one answer, `--task chat` a chat.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/minicpm-2b-mcore}
CHECKPOINT_LORA=${CHECKPOINT_LORA:-./ckpt/minicpm-2b-lora}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/minicpm-2b-hf}
TP=${TP:-1} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-$((TP * PP))}}

launch inference.py \
    --use-mcore-models \
    --load "$CHECKPOINT" --lora-load "$CHECKPOINT_LORA" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" --prompt-type default \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --max-new-tokens 256 --bf16 \
    "$@"
