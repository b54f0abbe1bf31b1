#!/bin/bash
# Answers of Llama-2-13B and its adapter, not merged, legacy names.
# All of greedy, sampling and beams; `--task greedy --prompt "…"` gives one answer, `--task chat` a chat.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/llama-2-13b-legacy}
CHECKPOINT_LORA=${CHECKPOINT_LORA:-./ckpt/llama-2-13b-lora-legacy}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/llama-2-13b-hf}
TP=${TP:-2} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-$((TP * PP))}}

launch inference.py \
    --load "$CHECKPOINT" --lora-load "$CHECKPOINT_LORA" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" --prompt-type llama2 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --max-new-tokens 256 --bf16 \
    "$@"
