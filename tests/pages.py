"""Reports to make pages of: entries as a render leaves them, many and strange; and pages taken apart."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from jobs import tiny_job, write_job

from wancli.cli import run
from wancli.report.html.collect import ReportInputs
from wancli.report.shot_entry import ShotEntry
from wancli.storage import manifest
from wancli.storage.report_schema import EntryRecord

HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
    "<!-- {{ 7 * 7 }} {% raw %} ${alert(1)} \" ' ` \\u003c/script> ]]> </title></style><svg onload=x>"
)


def render(folder: Path, model: Path, **changes: Any) -> Path:
    """A rendered job of two shots, its injection measured. The folder of the outputs."""
    items = [
        {"id": "plain"},
        {"id": "fish", "labels": {"take": 1}, "inject": [injection()]},
    ]
    job = tiny_job(model, output="out/{id}.mp4", items=items, measure=True) | changes
    assert run(["render", str(write_job(folder, job)), "-q"]) == 0
    return folder / "out"


def injection() -> dict[str, Any]:
    return {
        "prompt": "Schools of tropical fish swim between corals.",
        "blocks": "1-2",
        "strength": [0.25, 0.75],
        "steps": "0-0",
        "branch": "both",
        "blend": "output-mix",
    }


def entries(out: Path, name: str = "fish") -> dict[str, Any]:
    """The entry of one shot, to be changed."""
    body = manifest.read_json(out / f"{name}.manifest.json")
    assert body is not None
    return {
        **body,
        "id": name,
        "labels": body["shot"]["labels"],
        "output": str(out / f"{name}.mp4"),
        "status": "rendered",
    }


def typed(entry: dict[str, Any]) -> ShotEntry:
    """The entry as a report or a manifest gives it."""
    path = Path("job.report.json")
    return ShotEntry.from_record(EntryRecord.parse(entry, path), path)


def hostile(entry: dict[str, Any]) -> dict[str, Any]:
    """The same shot with every text of the user replaced."""
    changed = copy.deepcopy(entry)
    changed |= {"id": HOSTILE, "labels": {HOSTILE: HOSTILE}}
    for prompt in changed["prompts"]:
        prompt |= {"text": HOSTILE, "pieces": [HOSTILE] * len(prompt["pieces"])}
    for rule in changed["injection"]:
        rule["difference"]["hints"] = [HOSTILE] * len(rule["difference"]["hints"])
        for side in ("a", "b"):
            rule["difference"][side]["text"] = HOSTILE
    return changed


def many(entry: dict[str, Any], count: int) -> ReportInputs:
    """A sweep of so many shots: 40 blocks measured at each of 50 steps."""
    found = ReportInputs("sweep")
    blocks = {str(block): 0.123456789 * (block + 1) for block in range(40)}
    for index in range(count):
        one = copy.deepcopy(entry)
        one |= {"id": f"shot-{index:03d}", "labels": {"seed": index % 10, "take": index // 10}}
        one["model"]["sizes"]["num_layers"] = 40
        one["shot"] |= {
            "id": one["id"],
            "seed": index,
            "steps": 50,
            "sigmas": [1 - i / 50 for i in range(51)],
        }
        one["effects"] = [
            {
                "step": step,
                "branch": "cond",
                "velocity": 0.01 * step + 0.001 * index,
                "blocks": {b: v * (1 + 0.01 * index + step) for b, v in blocks.items()},
                "changed_percent": blocks,
            }
            for step in range(50)
        ]
        found.entries.append(("sweep", typed(one)))
    return found


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, in order, and their texts."""

    def __init__(self, html: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def tree(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def inside(self, tag: str) -> list[str]:
        """The texts of all elements of this tag."""
        return [text for name, text in self.texts if name == tag]

    @property
    def document(self) -> dict[str, Any]:
        """The JSON that the page carries."""
        found: dict[str, Any] = json.loads(next(t for t in self.inside("script") if t.startswith("{")))
        return found
