"""A real browser for tests: headless Chromium over its own debugging pipe, no library in between."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


class Browser:
    """One page, of a file or at an address. Calling it evaluates JavaScript there and returns the value; `problems` are its errors
    and console messages.
    """

    def __init__(self, page: Path | str) -> None:
        self.problems: list[str] = []
        self._profile = tempfile.mkdtemp()
        wire = 'exec chromium "$@" 3<&0 4>&1 </dev/null >/dev/null'  # it reads and writes at the pipes 3 and 4
        command = ["sh", "-c", wire, "sh", *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, bufsize=0, **pipes)
        self._rest, self._number, self._session = b"", 0, None
        (target,) = [t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._ask(f"{domain}.enable")
        self._ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __call__(self, script: str) -> Any:
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until `condition`, JavaScript, holds; a minute at most."""
        look = f"look = left => ({condition}) ? done() : left ? setTimeout(look, 100, left - 1) : failed(Error('never'))"
        self(f"new Promise((done, failed) => {{ const {look}; look(600) }})")

    def narrow(self, width: int) -> None:
        """Show the page on a screen of `width` pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        while True:
            said = self._read()
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.problems.append(json.dumps(said["params"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._process.stdout.read(65536)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)
