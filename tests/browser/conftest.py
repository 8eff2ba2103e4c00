"""A headless Chromium with a page in it, its console messages and its requests.

Without Chromium and chromedriver on the PATH the tests here are skipped, unless WANCLI_BROWSER=required, as
`make browser` says.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--autoplay-policy=no-user-gesture-required",
)


class Browser:
    """One window. `open` loads a file; `console_messages` and `requests` return what came of it."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver
        self.requested: list[str] = []

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> WebDriver:
        """Open a file and return when its scripts are done."""
        self.driver.get("about:blank")
        self.console_messages()
        self.requests()
        self.requested = []
        self.resize(width)
        self.set_theme(dark=dark)
        self.driver.get(path.resolve().as_uri())
        return self.driver

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)  # type: ignore[attr-defined]

    def set_theme(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})  # type: ignore[attr-defined]

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page in its current width."""
        width, height = self.driver.execute_script(
            "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        self.resize(width, height)
        time.sleep(0.3)  # pictures and videos are painted a little later
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})  # type: ignore[attr-defined]
        path.write_bytes(base64.b64decode(found["data"]))

    def console_messages(self) -> list[str]:
        """Return the console messages since the last call: errors and refusals by the policy of the page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[attr-defined]

    def requests(self) -> list[str]:
        """Return every address requested since `open`."""
        for entry in self.driver.get_log("performance"):  # type: ignore[attr-defined]
            message: dict[str, Any] = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
        return list(self.requested)

    def wait_until(self, condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Return the result of the condition as soon as it is true; fail the test if it never is."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "it never became true"
            time.sleep(0.02)
        return found


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, started once."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        if os.environ.get("WANCLI_BROWSER") == "required":
            pytest.fail("no chromium and chromedriver on the PATH; apt-get install chromium chromium-driver")
        pytest.skip("no chromium and chromedriver on the PATH; `make browser` insists on them")
    options = Options()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
