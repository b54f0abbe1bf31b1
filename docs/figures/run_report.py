"""Takes docs/figures/run_report.png: the top of the report of a small run on four CPU processes (TP 2 x PP 2).

    python docs/figures/run_report.py

from the root of the repository, with the packages of `make test` and Chromium; takes about two minutes on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.spawn import run
from tests.helpers.training import TARGETS, fine_tune_here, train_flags, write_corpus

MODEL = dict(
    num_layers=4, hidden_size=192, num_attention_heads=4, ffn_hidden_size=512, num_query_groups=2,
    max_position_embeddings=256, vocab_size=512, normalization="RMSNorm", swiglu=True, position_embedding_type="rope",
)  # fmt: skip


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        save = Path(folder) / "tiny-tp2-pp2"
        run(
            fine_tune_here, world_size=4,
            train=train_flags(train_iters=150, lr=5e-3, min_lr=1e-4, lr_decay_style="cosine", lr_warmup_iters=10,
                              global_batch_size=8, log_interval=5, eval_iters=2, eval_interval=25, save=str(save)),
            data=dict(data_path=(write_corpus(Path(folder) / "data", samples=400, longest=120),), seq_length=128,
                      split="90,10,0"),
            parallel=dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
            lora=dict(r=8, target_modules=TARGETS), model=MODEL,
        )  # fmt: skip
        photograph(browser, save / "report.html", Path(__file__).with_suffix(".png"))


def photograph(browser: str, page: Path, picture: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1160,1500"]
    subprocess.run([browser, *flags, f"--screenshot={picture}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
