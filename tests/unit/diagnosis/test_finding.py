"""What many ranks found becomes one table that names ranks and hosts where they differ."""

from __future__ import annotations

from modellink_lora.diagnosis.finding import Finding, merged, problems

HOSTS = ["a", "a", "b", "b"]


def test_what_all_ranks_found_is_one_line() -> None:
    same = Finding("versions", "torch", "2.13.0")
    assert [f.found for f in merged([[same]] * 4, HOSTS)] == ["2.13.0"]


def test_what_some_ranks_found_names_them_and_their_hosts() -> None:
    good, bad = Finding("operators", "swiglu", "fine"), Finding("operators", "swiglu", "WRONG", "problem", "replace it")
    lines = merged([[good], [good], [good], [bad]], HOSTS)
    assert [f.found for f in lines] == ["ranks 0 1 on host a, rank 2 on host b: fine", "rank 3 on host b: WRONG"]
    assert [f.what for f in problems(lines)] == ["swiglu"]


def test_numbers_that_differ_say_whose_they_are() -> None:
    lines = merged([[Finding("host", "memory", "1 GiB")], [Finding("host", "memory", "2 GiB")]], ["a", "b"])
    assert [f.found for f in lines] == ["1 GiB (rank 0; others differ)"]
