"""What ``--serve`` does: the page on this machine's own address, renewed in place while the run goes on."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from orion_unet.errors import InputError
from orion_unet.monitor.live import terminate_cleanly
from orion_unet.monitor.page import body, document, waiting_body
from orion_unet.monitor.page_script import policy
from orion_unet.monitor.report import Run
from orion_unet.monitor.watch import Outputs, Request, exit_code
from orion_unet.text import clean

HOST = "127.0.0.1"
# Names under which a browser may ask: a page from elsewhere whose name leads here must not read the run.
NAMES = (HOST, "localhost")
IDLE_S = 30.0


def serve(request: Request, port: int) -> int:
    """Serve the page until Ctrl-C; returns the exit code. Raises InputError where the port cannot be used."""
    run = Run(request.run_dir, request.thresholds, request.interval_s)
    outputs = Outputs(request)
    try:
        server = Server(port, clean(request.run_dir.name or str(request.run_dir)), request.interval_s)
    except OSError as error:
        raise InputError(f"--serve {port}: cannot be used ({error.strerror or error}); give another port") from None
    report = None
    with suppress(KeyboardInterrupt), terminate_cleanly(), server:
        print(f"http://{HOST}:{server.server_port}/   Ctrl-C to leave", flush=True)
        while True:
            try:
                report = run.poll()
            except InputError as error:
                server.show(waiting_body(str(error)))
            else:
                outputs.write(report)
                server.show(body(report, outputs.png, outputs.panels(report), request.x))
            time.sleep(request.interval_s)
    return exit_code(report, request.fail_on) if report is not None else 0


class Server(ThreadingHTTPServer):
    """Answers with the text last given to ``show``, on the loopback address, from a thread; a context manager."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, title: str, interval_s: float) -> None:
        self.title = title
        self.interval_s = interval_s
        self.shown: tuple[str, str] = ("", "")
        self.show(waiting_body("the first look at the run"))
        super().__init__((HOST, port), _Handler)

    def show(self, text: str) -> None:
        """Answer with this body of the page from now on."""
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
        self.shown = text, f'"{digest[:32]}"'

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, name="page", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_S
    server_version, sys_version = "orion-unet", ""

    def do_GET(self) -> None:
        """The page, or its body alone."""
        name = self.headers.get("Host", "").rpartition(":")
        if name[0] not in NAMES or name[2] != str(self.server.server_port):
            self._answer(403, "text/plain", "ask by the address that the monitor has printed\n")
            return
        text, tag = self.server.shown
        if self.path == "/":
            whole = document(self.server.title, [text], poll_s=self.server.interval_s, tag=tag)
            self._answer(200, "text/html", whole)
        elif self.path != "/body":
            self._answer(404, "text/plain", "only / is served\n")
        elif self.headers.get("If-None-Match") == tag:
            self._answer(304, "text/html", "", tag)
        else:
            self._answer(200, "text/html", text, tag)

    def _answer(self, code: int, kind: str, text: str, tag: str = "") -> None:
        content = text.encode("utf-8", "backslashreplace")
        self.send_response(code)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Security-Policy": policy(served=True),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        if code != 304:
            headers["Content-Length"] = str(len(content))
        if tag:
            headers["ETag"] = tag
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        # The browser may have left.
        with suppress(OSError):
            self.wfile.write(content)

    def log_message(self, format: str, *words: Any) -> None:
        """Requests are no news."""
