"""Time writing and opening a page: `python -m scripts.bench.page`. Needs Chromium and chromedriver."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from wancli.cli import run
from wancli.report.html import collect, page
from wancli.report.shot_entry import ShotEntry
from wancli.storage.report_schema import EntryRecord

SHOTS = (100, 2000)
RUNS = 5
JOB = """
prompt: A red circle drifts to the left across dark stripes.
output: {folder}/{{id}}.mp4
frames: 5
sampler: {{steps: 4}}
measure: true
inject: [{{prompt: A blue triangle moves up in front of a white background.}}]
"""
# The time when the page is drawn, counted by the page from the start of the navigation.
DRAWN = """
const done = arguments[0];
requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0));
"""


def copy_shots(folder: Path, count: int) -> collect.ReportInputs:
    """Render a shot and copy it `count` times, with the noise levels and measurements of 50 steps."""
    job = folder / "job.yaml"
    job.write_text(JOB.format(folder=folder))
    assert run(["render", str(job), "-q"]) == 0
    (entry,) = collect.collect_folder(folder).entries
    one = entry[1].as_dict()
    one["shot"] |= {"steps": 50, "sigmas": [1 - step / 50 for step in range(51)]}
    one["effects"] = [effect | {"step": step} for step, effect in enumerate((one["effects"] * 50)[:50])]
    found = collect.ReportInputs("sweep")
    for index in range(count):
        labels = {"seed": index % 10, "take": index // 10}
        copied = one | {"id": f"shot-{index}", "labels": labels}
        found.entries.append(("sweep", ShotEntry.from_record(EntryRecord.parse(copied, job), job)))
    return found


def time_loads(path: Path) -> list[float]:
    """Return milliseconds until the page is drawn, of several loads in a fresh browser."""
    options = Options()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            times = []
            for _ in range(RUNS):
                driver.get(path.as_uri())
                times.append(float(driver.execute_async_script(DRAWN)))
            return times
        finally:
            driver.quit()


def main() -> None:
    """Print seconds and bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = copy_shots(folder, max(SHOTS))
        report = next(folder.rglob("*.report.json"))
        for what in ("with the import of jinja2", "after it"):
            started = time.process_time()
            page.write_page(report, folder)
            took = 1000 * (time.process_time() - started)
            print(f"page of a render of one shot, {what}: {took:.0f} ms of one core")
        path = folder / "page.html"
        for count in SHOTS:
            started = time.perf_counter()
            some = collect.ReportInputs("sweep", found.entries[:count])
            data = page.render_page(some, path, folder / "posters", make=True)
            print(f"page of {count:,} shots: {time.perf_counter() - started:.2f} s, {len(data) / 1e6:.2f} MB")
            path.write_bytes(data)
            print(f"opened in {', '.join(f'{value / 1000:.2f}' for value in time_loads(path))} s")


if __name__ == "__main__":
    main()
