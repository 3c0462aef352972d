"""Chromium, driven by its DevTools protocol, and a server of static files."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--use-fake-ui-for-media-stream",
]
FLAGS += ["--use-fake-device-for-media-stream", "--no-first-run", "--disable-background-networking"]
READ, WRITE = 3, 4  # file descriptors at which Chromium expects commands and writes answers
SECONDS = 120


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, says nothing, and remembers in its server what was asked for."""

    def log_message(self, *_: Any) -> None:
        self.server.asked.append(self.path)


@contextmanager
def served(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """A server of a folder; `server.url`, and `server.asked`, the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class Page:
    """A page of a browser.

    Args:
        profile: New folder for what the browser stores.
        width, height: Of the window in pixels.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        self.numbers, self.events, self.session = itertools.count(1), [], None
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]
        commands_out, commands_in, answers_out, answers_in = ends

        def put_in_place() -> None:
            os.dup2(commands_out, READ)
            os.dup2(answers_in, WRITE)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=put_in_place, pass_fds=(READ, WRITE), **quiet)
        os.close(commands_out)
        os.close(answers_in)
        self.commands, self.answers = os.fdopen(commands_in, "wb"), os.fdopen(answers_out, "rb")
        self.buffer = b""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: Any) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(SECONDS)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its answer; events that come meanwhile are kept in `events`."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.answers.fileno(), 2**20)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, url: str) -> None:
        """Opens an address."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a script, or of the promise that it gives."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of a script once it is neither false nor empty."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{script}; the page says: {self.run('document.body.innerText')}")

    def choose_file(self, path: Path, selector: str = "input[type=file]") -> None:
        """Puts a file into an input of the page."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])

    def screenshot(self, path: Path) -> None:
        """Saves what the window shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    @property
    def errors(self) -> list[str]:
        """What the browser complained of: exceptions, and errors in its console."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
                found.append(json.dumps(parameters["args"]))
        return found
