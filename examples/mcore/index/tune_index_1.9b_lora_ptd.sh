#!/bin/bash
# LoRA on Index-1.9B, mcore names, on 8 devices of 64 GB.
# Started again, it goes on from its newest checkpoint in CKPT_SAVE_DIR.
# Where the publisher's tokenizer is Python code, add --trust-remote-code once you have read it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-./model_weights/index-1.9b-mcore}
CKPT_SAVE_DIR=${CKPT_SAVE_DIR:-./ckpt/index-1.9b-lora}
DATA_PATH=${DATA_PATH:-./finetune_dataset/index-1.9b/alpaca}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-./model_from_hf/index-1.9b-hf}
LORA_CHECKPOINT=${LORA_CHECKPOINT:-$(resumable "$CKPT_SAVE_DIR")} # an adapter to go on from
TP=${TP:-1} # devices that share each layer
PP=${PP:-1} # stages that share the layers
GPUS_PER_NODE=${GPUS_PER_NODE:-${NPUS_PER_NODE:-8}}
LOG=${LOG:-./logs/tune_index_1.9b_lora_ptd.log}

launch posttrain_gpt.py \
    --stage sft --use-mcore-models \
    --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" ${LORA_CHECKPOINT:+--lora-load "$LORA_CHECKPOINT"} \
    --data-path "$DATA_PATH" --split 100,0,0 --prompt-type default \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_MODEL" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel \
    --lora-r 16 --lora-alpha 32 --lora-fusion \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 \
    --seq-length 2048 --variable-seq-lengths --micro-batch-size 2 --global-batch-size 64 \
    --train-iters 1000 --lr 5e-5 --min-lr 1.25e-6 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 \
    --save-interval 500 --eval-iters 0 --log-interval 1 --log-throughput \
    "$@"
