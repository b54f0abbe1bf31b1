"""JSON files and replies hold neither NaN nor infinity, which JSON has no form for and strict readers refuse.

Such numbers made a server answer with status 500 (sgl-project/sglang#5984).
"""

from __future__ import annotations

import json
from pathlib import Path

from modellink_lora.config.document import to_json

NAN, INF = float("nan"), float("inf")


def test_json_has_no_nan() -> None:
    value = {"loss": NAN, "a": [INF, (-INF, 1.5)], "é": True, "n": 3}
    assert to_json(value) == '{"loss": null, "a": [null, [null, 1.5]], "é": true, "n": 3}'
    assert to_json({"a": "é"}, indent=1, ensure_ascii=True) == '{\n "a": "\\u00e9"\n}'


def test_what_is_written_as_json_is_written_by_one_function() -> None:
    root = Path(__file__).resolve().parents[2] / "modellink_lora"
    # digests, messages, headers of integers, texts inside of this program
    others = {
        "evaluation/tasks/human_eval.py", "evaluation/progress.py", "evaluation/item.py", "config/document.py",
        "training/state.py", "inference/api_error.py", "inference/logits.py", "cli/ending.py", "data/check.py",
        "data/tools.py", "diagnosis/ranks.py", "checkpoint/checksums.py", "checkpoint/peft_import.py",
        "checkpoint/fileset.py", "checkpoint/hf.py",
    }  # fmt: skip
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "json.dump" in path.read_text()}
    assert found - others == set(), "write with to_json, which knows no NaN"


def test_metrics_of_a_step_without_a_finite_loss_are_json(tmp_path: Path) -> None:
    from modellink_lora.reporting.report import Reporter, draw_losses
    from modellink_lora.reporting.run_report import read_metrics

    reporter = Reporter.__new__(Reporter)
    reporter.metrics, reporter._trackers = tmp_path / "metrics.jsonl", []
    reporter.record(1, {"lm loss": NAN, "grad norm": INF, "tokens/s": 3.5})
    text = reporter.metrics.read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "iteration": 1,
        "lm loss": None,
        "grad norm": None,
        "tokens/s": 3.5,
    }
    (tmp_path / "metrics.jsonl").write_text(text + '{"iteration": 2, "lm loss": NaN}\n')  # as earlier versions wrote
    assert len(read_metrics(reporter.metrics)) == 2 and draw_losses(reporter.metrics).is_file()
