#!/usr/bin/env bash
# One row of docs/versions.md: the tests that tell most about a version of Python, megatron-core and torch.
#   tests/versions.sh 3.12 0.19.2 [torch's version, default 2.13.0]
# Environments are kept below $VENVS, by default .versions: one for each Python, whose megatron-core is changed in place.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -lt 2 ]]; then
    echo "usage: tests/versions.sh PYTHON MEGATRON-CORE [TORCH], for example tests/versions.sh 3.12 0.19.2" >&2
    exit 2
fi
venv=${VENVS:-.versions}/py$1

[[ -d $venv ]] || "python$1" -m venv "$venv"
"$venv/bin/pip" install --quiet "torch==${3:-2.13.0}" "megatron-core==$2" -e . pytest hypothesis peft

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD
"$venv/bin/python" -c '
import importlib.metadata as m, platform
print("Python", platform.python_version(), *(f"{n} {m.version(n)}" for n in ("megatron-core", "torch", "numpy", "transformers", "peft")))'

parity=tests/parity/test_training_parity.py
tests=(
    tests/unit/megatron
    "tests/parity/test_family_logits.py::test_logits_equal_transformers[tp1]"
    "$parity::test_losses_and_adapters_equal_peft[qwen2-untied-tp2-sp]"
    "$parity::test_losses_and_adapters_equal_peft[llama-tied-pp2-vpp2]"
    "$parity::test_losses_and_adapters_equal_peft[llama-tied-dp2-distributed-optimizer-overlapped]"
    "$parity::test_the_fused_path_equals_peft_as_the_plain_one_does[llama-tied-tp2]"
    "tests/distributed/test_graphs.py::test_losses_and_adapters_are_those_of_ordinary_steps[tp2-sp]"
    "tests/distributed/test_resume.py::test_low_precision_resumes_bit_by_bit"
    tests/distributed/test_torch_dist.py::test_a_model_saved_at_tp2_is_read
)
exec "$venv/bin/python" -m pytest -q --tb=short "${tests[@]}"
