"""A headless Chromium, driven by its DevTools protocol over two pipes: no package beside the browser is needed."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# The names of Chromium and its relatives; Debian's package is called chromium.
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. ``errors`` collects exceptions of scripts, ``requests`` the addresses that the page asked for."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_commands, write_commands = os.pipe()
        read_answers, write_answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen(
            # The browser reads commands from descriptor 3 and answers on 4.
            ["bash", "-c", f'exec "$@" 3<&{read_commands} 4>&{write_answers}', "browser", find(), *options],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._commands, self._answers = os.fdopen(write_commands, "wb"), os.fdopen(read_answers, "rb")
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self._commands.close()
        self._process.terminate()
        self._process.wait(10)
        self._answers.close()
        self._folder.cleanup()

    def call(self, method: str, **parameters) -> dict:
        """The result of a command of the protocol. Events that arrive before it are noted."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _receive(self) -> dict:
        parts = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            parts += byte
        message = json.loads(parts)
        method = message.get("method")
        if method == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message

    def open(self, path: Path) -> None:
        """Open a file, and wait for its load event."""
        self._loaded = False
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"].get("exception", {}).get("description"))
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression holds, for at most 20 s."""
        wait = (
            "new Promise((done, failed) => { const end = Date.now() + 20000; (function look() {"
            f"if ({condition}) done(true); else if (Date.now() > end) failed(new Error('not within 20 s')); "
            "else setTimeout(look, 5); })(); })"
        )
        self.evaluate(wait)

    def resize(self, width: int, height: int, is_phone: bool = False) -> None:
        ratio = 2 if is_phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=is_phone
        )

    def prefer(self, scheme: str) -> None:
        """The system's colour scheme: "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the left button at one place, move, and release it at the other."""
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            button = {"button": "left", "clickCount": 1, "buttons": 1}
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))
