"""Our calls of torch_npu fit its live schemas and its C++ checks, and a layer launches the operators it should.

Everything runs in one process on the null device (tests/distributed/npu_null.py), whose operators compute nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.npu import run_on_null_npu, skip_without_simulator
from tests.helpers.npu_calls import PACKAGE, uses

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "npu_operators.txt"
UPDATE = "python -m tests.distributed.test_npu_operators  # writes the list anew; look at the difference"


@pytest.fixture(scope="module")
def output() -> str:
    skip_without_simulator()
    return everything()


def everything() -> str:
    done = run_on_null_npu("tests.distributed.npu_null", ["bindings", "fakes", "refusals", "step", "joined"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def section(output: str, program: str) -> str:
    """What a program printed; fails the test when it failed."""
    assert f"done {program}\n" in output, output
    before = output.partition(f"done {program}\n")[0]
    return before.rpartition("done ")[2].partition("\n")[2] if "done " in before else before


def words(text: str, first: str) -> set[str]:
    return {word for line in text.splitlines() if line.startswith(first) for word in line.split()[1:]}


def test_every_call_of_torch_npu_binds_to_the_live_schema(output: str) -> None:
    assert len(words(section(output, "bindings"), "operators")) >= 6


def test_every_operator_that_is_called_was_run_on_fake_tensors_and_gives_the_shapes_of_plain_pytorch(
    output: str,
) -> None:
    written = words(section(output, "bindings"), "operators")
    assert words(section(output, "fakes"), "called") == written


def test_what_the_cpp_of_torch_npu_refuses_was_refused_by_us_before(output: str) -> None:
    section(output, "refusals")


def test_a_layer_and_a_pair_of_joined_products_launch_the_operators_of_the_golden_list(output: str) -> None:
    found = launched(output)
    expected = GOLDEN.read_text().partition("\n\n")[2].rstrip("\n")
    assert found == expected, f"other operators than before; if that is meant:\n{UPDATE}"


def test_fused_operators_are_called_in_one_file_only() -> None:
    operators = {use.where.partition(":")[0] for use in uses() if use.name.startswith("npu_")}
    assert operators == {"device/fused_npu.py"}
    importing = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if "torch_npu." in f.read_text()}
    assert all(name.startswith("device/") or name == "checkpoint/unpickle.py" for name in importing), importing


def launched(output: str) -> str:
    printed = section(output, "step") + section(output, "joined")
    return "\n".join(line for line in printed.splitlines() if line.startswith(("#", " ")))


if __name__ == "__main__":
    head = GOLDEN.read_text().partition("\n\n")[0]
    GOLDEN.write_text(f"{head}\n\n{launched(everything())}\n")
