"""Pictures of the reports for the documentation, by headless Chromium: ``python -m docs.screenshots``."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"desktop": 1280, "phone": 390}


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium, driven over a pipe by the DevTools protocol.

    ``errors`` are what the page wrote to the console as an error or warning, or threw; ``requests`` what it asked for.
    """

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="bitsmith-chromium-", ignore_cleanup_errors=True)
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--disable-dev-shm-usage"]
        # The protocol wants the descriptors 3 and 4: the shell moves them there.
        moved = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", executable, *flags, "about:blank"], pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def open(self, page: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Load a page at a width, and wait until its plots are drawn."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width, height)
        self.call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + 60
        while self.run("document.documentElement?.dataset.drawn") is None:
            if time.monotonic() > until:
                raise TimeoutError(f"{page} was not drawn within a minute: {self.errors}")
            time.sleep(0.1)
        time.sleep(0.3)  # a resize of the plots is under way after the first layout

    def resize(self, width: int, height: int) -> None:
        """The size of the window."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None) -> Path:
        """A PNG of the page from its top: all of it, or ``height`` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        tall = min(size["height"], height or size["height"])
        clip = {"x": 0, "y": 0, "width": size["width"], "height": tall, "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 16)
            if not piece:
                raise RuntimeError("Chromium ended: it may lack memory or libraries")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        found, method = event.get("params", {}), event.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.errors.append(f"{found['entry']['level']}: {found['entry']['text']}")
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(str(found["args"]))


def demo_report(folder: Path) -> Path:
    """A report of the demo's network at four bits, with everything a report can show."""
    import torch

    import bitsmith as bs
    from bitsmith.demo import digits, digits_net
    from bitsmith.evaluate import ArrayData
    from bitsmith.evaluate.job import Job, JobSettings, run_job
    from bitsmith.report.page import write_page

    train, test = digits()
    calibration, validation = ArrayData(*train, name="digits, train"), ArrayData(*test, name="digits, test")
    settings = JobSettings(recipe="w4a8-fast", latency_seconds=0.5)
    result = run_job(Job(digits_net(), calibration, validation, settings), folder / "out")
    result.sensitivity = bs.sensitivity(digits_net(), [torch.as_tensor(train[0])], recipe="w4a8-fast")
    return write_page(result, folder / "report.html")


def demo_sweep(folder: Path) -> Path:
    """The page of the sweep in examples/, which takes about a minute."""
    from bitsmith.sweep import Store, load_sweep, run_sweep, write_sweep_page

    run_sweep(load_sweep(HERE.parent / "examples" / "demo_sweep.yaml"), folder)
    return write_sweep_page(Store(folder).rows(), folder / "report.html")


def main() -> None:
    """Write docs/images."""
    from PIL import Image

    executable = find_chromium()
    if executable is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is installed: apt-get install chromium")
    images = HERE / "images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Browser(executable) as browser:
        page = demo_report(Path(scratch))
        for name, width in WIDTHS.items():
            for dark in (False, True):
                browser.open(page, width, dark=dark)
                browser.screenshot(images / f"report-{name}-{'dark' if dark else 'light'}.png")
        page = demo_sweep(Path(scratch))
        for name, width in WIDTHS.items():
            browser.open(page, width)
            browser.screenshot(images / f"sweep-{name}-light.png", height=1400)
        for picture in images.glob("*.png"):
            Image.open(picture).quantize(64).save(picture, optimize=True)  # a fifth of the bytes
        print(f"{len(list(images.glob('*.png')))} pictures in {images}; errors: {browser.errors or 'none'}")


if __name__ == "__main__":
    main()
