"""A headless Chromium for tests, driven over its DevTools pipe: no further package, and no port that could be taken.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
DEADLINE_S = 30


def find_browser():
    """The path of an installed Chromium; None without one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a browser, and the events it has sent; a context manager."""

    def __init__(self, command):
        self.events = []
        self._number = 0
        self._buffer = b""
        self._session = None
        self._folder = tempfile.mkdtemp(prefix="browser-")
        theirs, self._out = os.pipe()
        self._in, their_out = os.pipe()
        # The browser reads from file 3 and writes to file 4.
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{their_out}'
        words = ["bash", "-c", script, command, *OPTIONS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(
            words,
            pass_fds=(theirs, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(their_out)

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        # Before any script of the page: what the security policy refuses is counted.
        watch = "window.refused = []; addEventListener('securitypolicyviolation', e => refused.push(e.blockedURI));"
        self.call("Page.addScriptToEvaluateOnNewDocument", source=watch)
        return self

    def __exit__(self, *error):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method, **parameters):
        """Call a method of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self):
        deadline = time.monotonic() + DEADLINE_S
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._in], [], [], left)[0], "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "id" not in message:
            self.events.append(message)
        return message

    def open(self, address):
        """Go to a page and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.run(expression):
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {expression}"
            time.sleep(0.05)

    def size(self, width, height=900, dark=False):
        """The size of the window, and whether its user likes dark pages."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def pointer(self, selector, share=0.5, click=False):
        """Move the pointer to an element, ``share`` of its width from its left; click there."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        place = {"x": box[0] + share * box[2], "y": box[1] + box[3] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    @property
    def requests(self):
        """Addresses that the page has asked for since it was opened; without pictures within the page, and without what
        the security policy has stopped before it was sent."""
        sent = {}
        for event in self.events:
            about = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                sent[about["requestId"]] = about["request"]["url"]
            elif event["method"] == "Network.loadingFailed" and about.get("blockedReason") == "csp":
                del sent[about["requestId"]]
        return [address for address in sent.values() if not address.startswith("data:")]

    @property
    def complaints(self):
        """Exceptions of the page's script and errors on its console."""
        thrown = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logged = [e for e in self.events if e["method"] == "Log.entryAdded"]
        return thrown + [e for e in logged if e["params"]["entry"]["level"] in ("error", "warning")]
