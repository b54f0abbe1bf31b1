"""Seven files that belong together, in a folder with others: killed anywhere, the old set is there or the new one.

Seen in public as facebookresearch/fairseq#2589: preprocessing was killed and left token files without their index.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modellink_lora.checkpoint.fileset import finish_replacing
from modellink_lora.config.errors import UserError
from modellink_lora.data.corpus import KEYS, InstructionCorpus, data_file, sidecar_file, writing_corpus


def write(prefix: str, token: int) -> None:
    with writing_corpus(prefix, {"token": token}) as writer:
        for length in (3, 2 + token):
            writer.add([token] * length, [1] * length, [token] * length)


def written(prefix: str) -> int:
    """The token of a set, all of whose files are of one run."""
    corpus = InstructionCorpus(prefix)
    assert corpus.sidecar is not None
    token: int = corpus.sidecar["token"]
    assert [list(corpus[i][0]) for i in range(len(corpus))] == [[token] * 3, [token] * (2 + token)]
    return token


def killed_at(step: int, prefix: str, token: int) -> bool:
    """Whether a child process that writes was killed before its `step`-th renaming, removal or commit."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(real):  # type: ignore[no-untyped-def]
            def call(*args, **options):  # type: ignore[no-untyped-def]
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in ("replace", "unlink", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
        write(prefix, token)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_killed_at_any_step_the_old_or_the_new_set_is_whole(tmp_path: Path) -> None:
    prefix, seen = str(tmp_path / "a"), []
    (tmp_path / "other.txt").write_text("mine")
    step, killed = 0, True
    while killed:
        step += 1
        write(prefix, 1)
        killed = killed_at(step, prefix, 2)
        seen.append(written(prefix))
        write(prefix, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [*(data_file("a", key, end).name for key in KEYS for end in ("bin", "idx")), "a_packed.json", "other.txt"]
        ), f"leftovers of step {step}"
    assert step > 20 and seen == sorted(seen) and set(seen) == {1, 2}


def test_a_failure_leaves_the_old_set_and_no_leftovers(tmp_path: Path) -> None:
    prefix = str(tmp_path / "a")
    write(prefix, 1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), writing_corpus(prefix, {}) as writer:
        writer.add([1], [1], [1])
        raise ZeroDivisionError
    assert written(prefix) == 1 and sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_the_old_set(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), 1)
    (tmp_path / "d.json").write_text(
        "[" + ",".join(['{"instruction": "q", "input": "", "output": "aaaaaaaaaa"}'] * 500) + "]"
    )
    from tests.helpers.tiny import tiny_tokenizer

    tokenizer = tmp_path / "t"
    tokenizer.mkdir()
    tiny_tokenizer(tokenizer)
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "from modellink_lora.cli.main import run; from modellink_lora.cli.preprocess import main;"
        "sys.exit(run(lambda: main(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--input", tmp_path / "d.json", "--output-prefix", tmp_path / "a",
         "--tokenizer-name-or-path", tokenizer, "--handler-name", "AlpacaStyleInstructionHandler",
         "--prompt-type", "empty"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert written(str(tmp_path / "a")) == 1 and not list(tmp_path.glob(".*"))


def test_a_commit_of_somebody_else_renames_nothing(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("x")
    (tmp_path / ".c.commit").write_text('{"private": "public"}')
    with pytest.raises(UserError, match="was not written by this program"):
        finish_replacing(tmp_path / ".c.commit")
    assert (tmp_path / "private").exists()
    assert sidecar_file(str(tmp_path / "a")).name == "a_packed.json"
