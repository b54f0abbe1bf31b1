"""The key of server and web page, where it comes from, and what of the web page is open to whom.

Uploads and requests through a page's own server: CVE-2024-47167 and others of gradio.

Seen in public as gradio-app/gradio#8337: a CVE about a malicious upload.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modellink_lora.cli.infer import _with_key, inference_parser
from modellink_lora.config.errors import UserError
from modellink_lora.config.infer import InferConfig
from tests.helpers.http_server import Letters, Served, served

KEY = "s3cret: ключ"
BEARER = f"Authorization: Bearer {KEY}".encode().decode("latin-1")


def basic(key: str, user: str = "me") -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()


WRONG = [
    (), ("Authorization: Bearer",), ("Authorization: Bearer s3cret",), (BEARER + "x",), ("Authorization: Basic !!",),
    (basic("s3cret"),), (basic(""),), (f"Authorization: {KEY.encode().decode('latin-1')}",), (BEARER, BEARER),
    ("Authorization: Basic " + base64.b64encode(KEY.encode()).decode()[:-8],),
]  # fmt: skip


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "key"


@pytest.mark.parametrize("content", [KEY, KEY + "\n", KEY + "\r\n"])
def test_a_key_comes_from_a_file(content: str, key_file: Path) -> None:
    key_file.write_bytes(content.encode())
    assert _with_key(InferConfig(api_key_file=str(key_file))).api_key == KEY


def test_flags_go_before_the_environment(monkeypatch: pytest.MonkeyPatch, key_file: Path) -> None:
    assert _with_key(InferConfig()).api_key is None
    monkeypatch.setenv("MODELLINK_LORA_API_KEY", "from the environment")
    key_file.write_text("from the file")
    assert _with_key(InferConfig()).api_key == "from the environment"
    assert _with_key(InferConfig(api_key_file=str(key_file))).api_key == "from the file"
    assert _with_key(InferConfig(api_key="from the flag")).api_key == "from the flag"
    with pytest.raises(UserError, match="--api-key and --api-key-file exclude each other"):
        InferConfig(api_key="a", api_key_file="b")


@pytest.mark.parametrize("key", ["", " ", "\n", "a\n\n", "a\nb", "a ", "\ta", "a\x00b", "a\x1bb", "a" * 1025])
def test_a_key_that_nobody_could_send_is_one_line_that_does_not_show_it(
    key: str, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    key_file.write_bytes(key.encode())
    with pytest.raises(UserError) as caught:
        _with_key(InferConfig(api_key_file=str(key_file)))
    said.append(str(caught.value).replace(str(key_file), "FILE"))
    with pytest.raises(UserError) as caught:
        InferConfig(api_key=key)
    said.append(str(caught.value))
    if "\x00" not in key:
        monkeypatch.setenv("MODELLINK_LORA_API_KEY", key)
        with pytest.raises(UserError, match=r"^MODELLINK_LORA_API_KEY in the environment: "):
            _with_key(InferConfig())
    for line in said:
        assert line.startswith("--api-key") and line.isprintable() and (len(key) < 9 or key not in line)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "cannot be read"), (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_without_a_key_is_one_line(make: Any, reason: str, key_file: Path) -> None:
    make(key_file)
    with pytest.raises(UserError, match=f"{key_file}.*{reason}"):
        _with_key(InferConfig(api_key_file=str(key_file)))


def test_help_says_that_a_key_on_the_command_line_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inference_parser().parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--api-key-file" in text and "MODELLINK_LORA_API_KEY" in text and "see it in `ps`" in text


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    pytest.importorskip("fastapi", reason="needs fastapi and uvicorn: pip install -e .[web]")
    with served(api_key=KEY) as server:
        yield server


@pytest.mark.parametrize("headers", WRONG)
def test_the_server_refuses_who_has_not_the_key(server: Served, headers: tuple[str, ...]) -> None:
    for path in ("/v1/models", "/v1/completions", "/nowhere"):
        status, body = server.request(path, b"" if "completions" in path else None, headers=headers)
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert server.request("/health", headers=headers)[0] == 200


@pytest.mark.parametrize("header", [BEARER, BEARER.replace("Bearer", "bearer"), basic(KEY), basic(KEY, user="")])
def test_the_server_answers_who_has_it(server: Served, header: str) -> None:
    assert server.request("/v1/models", headers=[header])[0] == 200


@contextlib.contextmanager
def page(**flags: Any) -> Iterator[Served]:
    """The web page over an engine without a model, as `served` is the server."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -e .[web]")
    from modellink_lora.inference.listening import Limits, Listening, open_socket
    from modellink_lora.inference.web import Page
    from modellink_lora.inference.worker import Worker

    logging.getLogger("httpx").setLevel(logging.ERROR)
    engine = Letters()
    config, worker, stopping = InferConfig(**flags), Worker(engine, most=8), threading.Event()
    application = Page(config, engine, engine, worker, seed=1).application()
    computing = threading.Thread(target=worker.run, args=(stopping.is_set,), kwargs={"closing": lambda: None})
    with open_socket("127.0.0.1", 0) as listener, Listening(application, listener, Limits()):
        computing.start()
        try:
            yield Served(listener.getsockname()[1], [])
        finally:
            stopping.set()
            computing.join()


@pytest.fixture(scope="module")
def open_page() -> Iterator[Served]:
    with page() as server:
        yield server


@pytest.fixture(scope="module")
def closed_page() -> Iterator[Served]:
    with page(api_key=KEY, max_request_bytes=5000) as server:
        yield server


def get(server: Served, path: str, *headers: str) -> tuple[int, bytes]:
    return server.send("\r\n".join([f"GET {path} HTTP/1.0", *headers, "", ""]).encode("latin-1"))


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'


@pytest.mark.parametrize("prefix", ["", "/gradio_api"])
def test_nothing_can_be_uploaded(open_page: Served, prefix: str) -> None:
    for path in (f"{prefix}/upload", f"{prefix}/upload/", f"{prefix}/upload?upload_id=1", f"/{prefix}/upload"):
        got = open_page.request(path, UPLOAD, headers=["Content-Type: multipart/form-data; boundary=x"])
        assert got[0] == 404, path


def test_no_file_of_the_machine_or_of_others_can_be_read_and_no_route_is_open_that_the_page_does_not_use(
    open_page: Served,
) -> None:
    import gradio

    own = Path(gradio.__file__)
    for path in (
        f"/file={own}", f"/gradio_api/file={own}", f"/gradio_api/file/{own}", "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=http://127.0.0.1:1/", "/monitoring", "/gradio_api/vibe-code",
        "/gradio_api/runs", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/gradio_api/upload_progress",
        "/assets/../config", "/static/%2e%2e/%2e%2e/routes.py", "/gradio_api/user", "/gradio_api/token", "/login",
    ):  # fmt: skip
        assert get(open_page, path)[0] == 404, path
    for path in ("call/_send", "run/_send", "api/_send", "component_server", "stream/1", "vibe-edit", "call/v2/_send"):
        assert open_page.request(f"/gradio_api/{path}", b"{}")[0] == 404, path


def ask(server: Served, *headers: str, question: Any = "abc", **changed: Any) -> str:
    """What the page's button does: an event joins the queue, and its stream of answers is read."""
    config = json.loads(get(server, "/config", *headers)[1])
    send = next(d for d in config["dependencies"] if len(d["inputs"]) > 5)
    values = [changed.get(str(n), one) for n, one in enumerate([question, None, "tuned", 1, 0, 8, 1, 0, 1, 0, 1])]
    data = {"data": values, "fn_index": send["id"], "session_hash": "abcdef", "event_data": None, "trigger_id": None}
    status, said = server.request("/gradio_api/queue/join", json.dumps(data).encode(),
                                  headers=["Content-Type: application/json", *headers])  # fmt: skip
    assert status == 200, said
    status, events = get(server, "/gradio_api/queue/data?session_hash=abcdef", *headers)
    assert status == 200
    return events.decode()


def test_the_page_still_answers(open_page: Served) -> None:
    status, text = get(open_page, "/")
    assert status == 200 and b"gradio" in text
    assert get(open_page, "/theme.css")[0] == 200 and get(open_page, "/gradio_api/info")[0] == 200
    events = ask(open_page)
    assert '"success":true' in events and "xxx" in events


@pytest.mark.parametrize(
    "changed",
    [
        {"question": None},
        {"question": ["a\nb"]},
        {"2": "x\nFORGED"},
        {"4": "x"},
        {"5": 1e30},
        {"6": 10**400},
        {"8": "0"},
    ],
)
def test_values_that_no_slider_gives_do_not_end_the_server(open_page: Served, changed: dict[str, Any]) -> None:
    ask(open_page, **changed)
    assert "xxx" in ask(open_page)


@pytest.mark.parametrize("headers", WRONG)
def test_the_page_and_all_its_routes_ask_for_the_key(closed_page: Served, headers: tuple[str, ...]) -> None:
    for path in ("/", "/config", "/theme.css", "/assets/x.js", "/gradio_api/info", "/gradio_api/queue/data", "/upload"):
        assert get(closed_page, path, *headers)[0] == 401, path
    assert closed_page.request("/gradio_api/queue/join", b"{}", headers=headers)[0] == 401


@pytest.mark.parametrize("header", [BEARER, basic(KEY)])
def test_the_page_opens_to_who_has_the_key(closed_page: Served, header: str) -> None:
    assert get(closed_page, "/", header)[0] == 200
    assert "xxx" in ask(closed_page, header)


def test_a_browser_is_told_to_ask_for_the_key(closed_page: Served) -> None:
    with closed_page.connect() as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b'www-authenticate: Basic realm="modellink_lora"' in client.recv(65536).lower().replace(
            b"basic", b"Basic"
        )


def test_the_page_reads_no_long_or_endless_body(closed_page: Served) -> None:
    assert closed_page.request("/gradio_api/queue/join", b"x" * 6000, headers=[BEARER])[0] == 413
    chunked = ["Transfer-Encoding: chunked", BEARER, "Content-Length-Not: 1"]
    head = "\r\n".join(["POST /gradio_api/queue/join HTTP/1.1", "Host: a", "Connection: close", *chunked, "", ""])
    assert closed_page.send(head.encode("latin-1") + b"1\r\n{\r\n0\r\n\r\n")[0] == 411
