import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from megabatch.data.fetching.download import DownloadError, download
from megabatch.errors import UserError

CONTENT = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()


class Server(ThreadingHTTPServer):
    """Serves CONTENT. Each request uses up one entry of `faults`: "status 503", or "hang up after 1000" (bytes)."""

    faults: list[str]
    ranges: list[str | None]
    understands_ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault.startswith("status"):
            self.send_error(int(fault.split()[1]))
            return
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.understands_ranges else 0
        if first >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        end = first + int(fault.rsplit(" ", 1)[1]) if fault.startswith("hang up after") else len(CONTENT)
        self.wfile.write(CONTENT[first:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.faults, server.ranges = [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, target: Path, **options: object) -> Path:
    return download(f"http://127.0.0.1:{server.server_port}/file.bin", target, **{"pause_s": 0.0, **options})


def test_a_file_is_downloaded_completely_and_no_partial_file_remains(server, tmp_path):
    target = get(server, tmp_path / "file.bin")
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def test_a_connection_that_ends_early_is_resumed_at_the_last_byte(server, tmp_path):
    server.faults = ["hang up after 300000", "hang up after 100000"]
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_a_partial_file_of_an_earlier_process_is_resumed(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:123_456])
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == ["bytes=123456-"]


def test_a_server_without_range_support_sends_the_whole_file_again(server, tmp_path):
    server.understands_ranges = False
    server.faults = ["hang up after 300000"]
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_partial_file_longer_than_the_file_is_deleted(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT


def test_an_existing_file_is_not_requested(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"here")
    assert get(server, tmp_path / "file.bin").read_bytes() == b"here"
    assert server.ranges == []


def test_server_errors_are_retried_and_a_missing_file_is_not(server, tmp_path):
    server.faults = ["status 503", "status 500"]
    assert get(server, tmp_path / "file.bin").read_bytes() == CONTENT
    server.faults, server.ranges = ["status 404"], []
    with pytest.raises(DownloadError, match=r"file\.bin: 404 Not Found"):
        get(server, tmp_path / "other.bin")
    assert len(server.ranges) == 1


def test_after_the_last_attempt_the_error_gives_the_reason_and_the_partial_file_is_kept(server, tmp_path):
    server.faults = ["hang up after 1000"] * 3
    with pytest.raises(DownloadError, match="the connection ended after 3000 of 700000 bytes"):
        get(server, tmp_path / "file.bin", attempts=3)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:3000]
    assert not (tmp_path / "file.bin").exists()


def test_the_error_for_an_unreachable_server_names_it(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/x: .*refused"):
        download("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, pause_s=0.0)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_only_http_urls_are_opened(url, tmp_path):
    with pytest.raises(DownloadError, match="is not an http URL"):
        download(url, tmp_path / "x")


def test_progress_is_reported_as_lines_of_text(server, tmp_path, monkeypatch):
    monkeypatch.setattr("megabatch.data.fetching.download._PROGRESS_EVERY_BYTES", 300_000)
    lines = []
    get(server, tmp_path / "file.bin", on_progress=lines.append)
    assert len(lines) == 2
    assert all(line.endswith("of 0 MiB") for line in lines)


@pytest.mark.parametrize("given", [{"attempts": 0}, {"timeout_s": 0.0}, {"pause_s": -1.0}])
def test_numbers_out_of_range_are_refused_with_one_that_works(tmp_path, given):
    (name,) = given
    with pytest.raises(UserError, match=f"{name}=.* works"):
        download("http://127.0.0.1:9/x", tmp_path / "x", **given)
