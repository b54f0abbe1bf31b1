"""Draws docs/figures/peft_parity.png: one fine-tuning by transformers + PEFT and by this program on four layouts.

    python docs/figures/peft_parity.py

from the root of the repository, with the packages of `make test`; takes about two minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import peft_reference
from tests.helpers.tiny import tiny_model
from tests.helpers.training import hf_to_megatron, write_corpus
from tests.parity.test_training_parity import ALPHA, LR, SEED, Case, R, ours, reference_batches

LAYOUTS = {"tp1": "TP1", "tp2-sp": "TP2 + SP", "pp2": "PP2", "tp2-pp2-sp": "TP2 x PP2 + SP"}


def main() -> None:
    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = write_corpus(folder / "data")
        hf = tiny_model("llama", folder / "hf", layers=4, tied=True)
        base = hf_to_megatron(hf, folder / "mg")
        peft, adapter = peft_reference.train(hf, reference_batches(prefix), r=R, alpha=ALPHA, lr=LR, seed=SEED)
        case = Case(base, prefix, peft, adapter)
        curves = {label: ours(case, folder / layout, layout)[0] for layout, label in LAYOUTS.items()}
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(peft) + 1)
    top.plot(steps, peft, color="black", linewidth=4, alpha=0.3, label="transformers + PEFT, one process")
    for label, losses in curves.items():
        top.plot(steps, losses, linewidth=1, label=f"modellink_lora, {label}")
        error = [abs(a - b) / b for a, b in zip(losses, peft, strict=True)]
        bottom.semilogy(steps, [max(e, 1e-9) for e in error], linewidth=1)
    bottom.set_ylim(5e-10, 1e-4)
    bottom.axhline(1e-5, color="grey", linestyle="--", linewidth=1)
    bottom.text(1, 1.2e-5, "held to 1e-5 by the tests", color="grey", fontsize=8, va="bottom")
    top.set(ylabel="loss", title="A 4-layer Llama, r 4, AdamW, fp32: the same losses on every layout")
    bottom.set(xlabel="step", ylabel="relative difference")
    top.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
