#!/bin/bash
# Llama-2-7B, legacy names, on MMLU or another TASK.
# Copies of the model share the questions. A run that was interrupted goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/llama-2-7b-legacy}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/llama-2-7b-hf}
TASK=${TASK:-mmlu}
DATA_PATH=${DATA_PATH:-./mmlu/test}
RESULTS=${RESULTS:-./results/llama-2-7b-legacy-$TASK}
TP=${TP:-1} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}}

launch evaluation.py \
    --load "$CHECKPOINT" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --task "$TASK" --task-data-path "$DATA_PATH" --save "$RESULTS" --bf16 \
    "$@"
