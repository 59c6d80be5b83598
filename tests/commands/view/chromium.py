"""A headless Chromium, driven by the DevTools protocol over two pipes: no port, no package."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "End": 35,
    "Home": 36,
    "PageDown": 34,
    "Tab": 9,
}


class Chromium:
    """One page of a browser. What goes wrong in it, and each address that it asks for, is in `problems`, `asked`."""

    def __init__(self, executable: str, profile: Path) -> None:
        self.problems: list[str] = []
        self.asked: list[str] = []
        read, their_write = os.pipe()
        their_read, write = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command = [executable, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{their_read} 4>&{their_write}', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(their_read, their_write), **quiet)
        os.close(their_read)
        os.close(their_write)
        self._in, self._out, self._number, self._session = os.fdopen(read, "rb"), os.fdopen(write, "wb"), 0, None
        self._buffer = b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters} | session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, page: Path, width: int = 1500, height: int = 1250) -> None:
        """Load a page from disk, and wait until its script has run."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Page.navigate", url=page.absolute().as_uri())
        ready = "new Promise(done => { const look = () => document.documentElement?.dataset.ready"
        self.run(f"{ready} ? done(true) : setTimeout(look, 20); look(); }})")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is waited for."""
        done = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key as a user does, then let the page draw."""
        code = KEYS.get(key)
        facts = {"key": key, "windowsVirtualKeyCode": code} if code else {"key": key, "text": key}
        for _ in range(times):
            self("Input.dispatchKeyEvent", type="keyDown", **facts)
            self("Input.dispatchKeyEvent", type="keyUp", **facts)
        self.draw()

    def draw(self) -> None:
        """Wait until the page has drawn what it was told."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click(self, selector: str) -> None:
        """Click into the middle of the first element that a selector finds."""
        x, y = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def choose(self, selector: str, value: object) -> None:
        """Give an input or a select a value, as a user's choice does."""
        self.run(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)});"
            f"field.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def tree(self) -> list[tuple[str, str]]:
        """Return role and name of all that a screen reader meets."""
        nodes = self("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]

    def picture(self, path: Path) -> None:
        """Write what is in sight as PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(timeout=20)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._in.fileno(), 2**20)
            assert more, "Chromium has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        facts = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(facts["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded":
            self.problems.append(facts["entry"]["text"])
        if event.get("method") == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])
        return event
