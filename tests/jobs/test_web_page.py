"""The web page in a real browser: a question typed, both answers seen, the buttons pressed."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.answering import address, inference, made_pair
from tests.helpers.jobs import TORCHRUN, Job

pytest.importorskip("gradio", reason="needs gradio: pip install -e .[web]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason="needs a chromium")


@pytest.fixture
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One visitor's page, with what went wrong in it and where it asked."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(30_000)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def set(self, slider: str, value: object) -> None:
        self.page.fill(f"#{slider} input[type=number]", str(value))
        self.page.press(f"#{slider} input[type=number]", "Tab")

    def answers(self) -> list[list[str]]:
        """What the models have said so far: of the base, of the adapter."""
        return [self.page.locator(f"#answers-{n} .message.bot").all_inner_texts() for n in (0, 1)]

    def until(self, script: str) -> None:
        self.page.wait_for_function(f"() => {script}")


_BOTH_DONE = "[...document.querySelectorAll('.count')].every(e => e.innerText.includes('{}'))"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made_pair(tmp_path_factory.mktemp("pair"))


def looked_at(job: Job, browser: Any, picture: Path) -> None:
    url = address(job)
    visit = Visit(browser, url)
    visit.set("temperature", 0)
    visit.ask("Red, yellow")
    visit.until(_BOTH_DONE.format("8 tokens"))
    (base,), (tuned,) = visit.answers()
    assert base and tuned and base != tuned
    assert "Red, yellow" in visit.page.inner_text("#answers-0") and "Red, yellow" in visit.page.inner_text("#answers-1")
    visit.page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000
    visit.page.click("#clear button, button#clear")
    visit.until("!document.querySelector('.message.bot')")
    visit.set("scale", 0)
    visit.ask("Red, yellow")
    visit.until(_BOTH_DONE.format("8 tokens"))
    assert visit.answers() == [[base], [base]], "an adapter of strength 0 is the base, and nothing is remembered"
    assert visit.hosts == {url} and visit.errors == []


def test_a_question_is_answered_by_base_and_adapter_side_by_side(
    pair: tuple[Path, Path], browser: Any, tmp_path: Path
) -> None:
    with inference(pair, "--task", "web", "--port", 0, "--max-new-tokens", 8, log=tmp_path / "log") as job:
        looked_at(job, browser, tmp_path / "page.png")
        job.process.send_signal(signal.SIGINT)
        assert job.ends(within=20) == 0
        assert "the web page has ended" in job.text and "Traceback" not in job.text


@pytest.mark.slow
def test_the_page_works_over_two_processes(pair: tuple[Path, Path], browser: Any, tmp_path: Path) -> None:
    words = ("--task", "web", "--port", 0, "--max-new-tokens", 8, "--tensor-model-parallel-size", 2)
    with inference(pair, *words, log=tmp_path / "log", launcher=TORCHRUN) as job:
        looked_at(job, browser, tmp_path / "page.png")
        job.process.send_signal(signal.SIGINT)
        job.ends(within=25)
