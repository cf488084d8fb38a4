"""A folder served over HTTP on a loopback port, with byte ranges and with faults on demand."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WebServer(http.server.ThreadingHTTPServer):
    """`faults` are taken from the front, one a GET request: a status, "cut", "short", "whole" or "" for none."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.served: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes, and the second would wait 40 ms

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer with the size."""
        self._answer(has_body=False)

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        with self.server.lock:
            fault = self.server.faults.pop(0) if has_body and self.server.faults else ""
            if has_body:
                self.server.served.append(f"{self.path} {self.headers.get('Range', '')}")
        path = self.server.folder / self.path.lstrip("/")
        if fault.isdigit() or not path.is_file():
            self._send(int(fault or 404), b"", has_body)
            return
        start, stop, status, size = 0, path.stat().st_size, 200, path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and fault != "whole":
            start, stop, status = int(wanted[1]), int(wanted[2]) + 1, 206
            if start >= size:
                self._send(416, b"", has_body)
                return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if fault == "short":
            data = data[: len(data) // 2]
        self._send(status, data, has_body, cut=fault == "cut")

    def _send(self, status: int, data: bytes, has_body: bool, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if has_body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """Serve a folder until the end of the block."""
    server = WebServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
