"""A headless Chromium with a page in it, and what it complained about or asked for.

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
    """One window. `opened` loads a file, and `said` and `asked` tell what came of it."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver
        self.asked: list[str] = []

    def opened(self, path: Path, *, width: int = 1280, dark: bool = False) -> WebDriver:
        """The page of a file, once its scripts are done."""
        self.driver.get("about:blank")
        self.said()
        self.requests()
        self.asked = []
        self.sized(width)
        self.themed(dark=dark)
        self.driver.get(path.resolve().as_uri())
        return self.driver

    def sized(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)  # type: ignore[attr-defined]

    def themed(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})  # type: ignore[attr-defined]

    def picture(self, path: Path) -> None:
        """The whole page, however long, as wide as it is."""
        width, height = self.driver.execute_script(
            "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        self.sized(width, height)
        time.sleep(0.3)  # pictures and videos are painted a little later
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})  # type: ignore[attr-defined]
        path.write_bytes(base64.b64decode(found["data"]))

    def said(self) -> list[str]:
        """What is in the console since the last call: errors, and what the policy of the page refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[attr-defined]

    def requests(self) -> list[str]:
        """Every address that was asked for since `opened`."""
        for entry in self.driver.get_log("performance"):  # type: ignore[attr-defined]
            message: dict[str, Any] = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
        return list(self.asked)

    def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> Any:
        """What the condition gives as soon as that is true; the test fails if it never is."""
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
