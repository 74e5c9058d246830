"""Downloads from a server on the loopback interface that misbehaves on demand."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import download
from pipeline.download import Gone, Truncated, Unreachable, Wanted, WrongHash

pytestmark = [pytest.mark.network_local, pytest.mark.runs("curl")]

BYTES = bytes(range(256)) * 400
WANTED = Wanted("toy.tar.xz", len(BYTES), hashlib.sha256(BYTES).hexdigest())


@dataclass
class Server:
    """What the handler serves and what it was asked for."""

    address: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            state.requests.append((self.path, asked))
            if self.path == "/gone":
                return self.send_error(404)
            if self.path == "/forbidden":
                return self.send_error(403)
            body = BYTES
            if self.path == "/wrong":
                body = BYTES[:-1] + b"?"
            if self.path == "/short":
                body = BYTES[:1000]
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.path != "/noranges" else 0
            if start and start >= len(body):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            # /cut hangs up after a third of the file, /stuck after the same hundred bytes again and again
            stop = {"/cut": start + len(body) // 3, "/stuck": 100}.get(self.path, len(body))
            if self.command == "GET":
                self.wfile.write(body[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    state.address = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "shelf" / WANTED.filename


def fetch(server: Server, path: str, target: Path) -> None:
    download.fetch(f"{server.address}{path}", WANTED, target, proxy="")


def leave_part(target: Path, content: bytes) -> Path:
    part = download.part_of(target)
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def test_a_whole_file_arrives_and_leaves_no_part(server: Server, target: Path) -> None:
    fetch(server, "/good", target)
    assert target.read_bytes() == BYTES
    assert [p.name for p in target.parent.iterdir()] == [WANTED.filename]


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, target: Path) -> None:
    leave_part(target, BYTES[:70000])
    fetch(server, "/good", target)
    assert target.read_bytes() == BYTES
    assert server.requests == [("/good", "bytes=70000-")]


def test_a_connection_that_breaks_is_taken_up_again(server: Server, target: Path) -> None:
    fetch(server, "/cut", target)
    assert target.read_bytes() == BYTES
    assert len(server.requests) >= 3


@pytest.mark.parametrize("path", ["/short", "/stuck"])
def test_too_few_bytes_are_truncation_and_are_kept(server: Server, target: Path, path: str) -> None:
    with pytest.raises(Truncated, match=rf"truncated, \d+ of {len(BYTES)} bytes"):
        fetch(server, path, target)
    assert not target.exists()
    kept = download.part_of(target).read_bytes()
    assert kept and BYTES.startswith(kept)
    server.requests.clear()
    fetch(server, "/good", target)
    assert server.requests == [("/good", f"bytes={len(kept)}-")]
    assert target.read_bytes() == BYTES


def test_a_wrong_file_is_set_aside_and_never_used(server: Server, target: Path) -> None:
    with pytest.raises(WrongHash, match="wrong hash: sha256 is") as caught:
        fetch(server, "/wrong", target)
    assert WANTED.sha256 in caught.value.message
    assert [p.name for p in target.parent.iterdir()] == [f"{WANTED.filename}.rejected"]
    fetch(server, "/good", target)
    assert target.read_bytes() == BYTES


def test_a_damaged_beginning_is_not_blamed_on_the_server(server: Server, target: Path) -> None:
    leave_part(target, b"?" + BYTES[1:500])
    fetch(server, "/good", target)
    assert target.read_bytes() == BYTES
    assert server.requests == [("/good", "bytes=500-"), ("/good", "")]


def test_a_server_without_ranges_sends_it_all_again(server: Server, target: Path) -> None:
    leave_part(target, BYTES[:500])
    fetch(server, "/noranges", target)
    assert target.read_bytes() == BYTES


def test_a_complete_part_is_done_without_asking(server: Server, target: Path) -> None:
    leave_part(target, BYTES)
    fetch(server, "/good", target)
    assert target.read_bytes() == BYTES
    assert server.requests == []


def test_more_than_the_file_is_no_beginning_of_it(server: Server, target: Path) -> None:
    leave_part(target, BYTES + b"more")
    fetch(server, "/good", target)
    assert server.requests == [("/good", "")]


def test_a_shorter_file_than_the_part_is_truncation(server: Server, target: Path) -> None:
    leave_part(target, BYTES[:2000])  # asking for the rest of 1000 bytes is answered with 416
    with pytest.raises(Truncated, match="truncated, 1000 of"):
        fetch(server, "/short", target)


def test_not_there_and_not_reachable_are_told_apart(server: Server, target: Path) -> None:
    with pytest.raises(Gone, match="HTTP 404"):
        fetch(server, "/gone", target)
    with pytest.raises(Unreachable, match="unreachable: HTTP 403"):
        fetch(server, "/forbidden", target)
    with pytest.raises(Unreachable, match=r"unreachable: curl: .*onnect"):
        download.fetch("http://127.0.0.1:1/x", WANTED, target, proxy="")
    assert not target.parent.exists()


def test_probe(server: Server) -> None:
    assert download.probe(f"{server.address}/good", proxy="")
    assert not download.probe(f"{server.address}/gone", proxy="")
    with pytest.raises(Unreachable):
        download.probe(f"{server.address}/forbidden", proxy="")


def test_copies_from_a_folder(tmp_path: Path, target: Path) -> None:
    source = tmp_path / WANTED.filename
    source.write_bytes(BYTES)
    download.copy(source, WANTED, target)
    assert target.read_bytes() == BYTES
    source.write_bytes(BYTES[:-1] + b"?")
    with pytest.raises(WrongHash):
        download.copy(source, WANTED, target.with_name("other"))
    source.write_bytes(BYTES[:10])
    with pytest.raises(Truncated, match="10 of"):
        download.copy(source, WANTED, target.with_name("other"))
    assert [p.name for p in target.parent.iterdir()] == [WANTED.filename]
