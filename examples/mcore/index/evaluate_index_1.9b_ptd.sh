#!/bin/bash
# Index-1.9B, mcore names, on MMLU or another TASK.
# Copies of the model share the questions. A run that was interrupted goes on where it stopped.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CHECKPOINT=${CHECKPOINT:-./model_weights/index-1.9b-mcore}
TOKENIZER_PATH=${TOKENIZER_PATH:-./model_from_hf/index-1.9b-hf}
TASK=${TASK:-mmlu}
DATA_PATH=${DATA_PATH:-./mmlu/test}
RESULTS=${RESULTS:-./results/index-1.9b-$TASK}
TP=${TP:-1} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}}

launch evaluation.py \
    --use-mcore-models \
    --load "$CHECKPOINT" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
    --task "$TASK" --task-data-path "$DATA_PATH" --save "$RESULTS" --bf16 \
    "$@"
