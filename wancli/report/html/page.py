"""Pages: one self-contained HTML file that opens from a folder, without a network.

The template writes the frame and the table of shots; the scripts of `assets` draw the rest from the JSON
document in the page. Scripts and styles run by their hashes and nothing else does, so that no text of a
job can become code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.report.html import collect, given_pictures, page_data
from wancli.report.html.attention_panel import panel_entry
from wancli.report.html.collect import ReportInputs
from wancli.report.shots_table import COLUMNS
from wancli.storage import disk, sidecars
from wancli.video import thumbnails

if TYPE_CHECKING:
    from jinja2 import Template

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "base", "figures", "memory_formulas", "overview", "explorer", "heatmap", "attention", "memory_section",
    "prompts", "timing", "choices", "playback", "videos", "table", "main",
)  # fmt: skip
MAX_WITH_MAPS = 40  # shots whose attention maps a page has, the first ones
MAX_SAFE_INTEGER = 2**53 - 1  # Number.MAX_SAFE_INTEGER
MARK = b"<!DOCTYPE html>\n<!-- wancli page -->"


def write_page(report: Path, poster_folder: Path) -> Path:
    """Write the page beside a report, with the posters that `poster_folder` has already."""
    path = report.with_suffix(".html")
    publish_page(path, render_page(collect.collect_report(report), path, poster_folder, make=False))
    return path


def render_page(inputs: ReportInputs, path: Path, poster_folder: Path, *, make: bool) -> bytes:
    """Render the page at `path`. With `make`, posters that are not in `poster_folder` are made.

    Copies of given pictures always are: a page after a render shows them.
    """
    posters, pictures = {}, {}
    maps: dict[int, dict[str, Any]] = {}
    for index, (_, entry) in enumerate(inputs.entries):
        if entry.record:
            posters[index] = thumbnails.thumbnail_uri(
                Path(entry.output), entry.record, poster_folder, create=make
            )
            pictures[index] = given_pictures.picture_entries(entry.record, poster_folder)
            if len(maps) < MAX_WITH_MAPS and (found := panel_entry(entry.record, Path(entry.output))):
                maps[index] = found
    shown = {index: uri for index, uri in posters.items() if uri}
    return render_html(page_data.page_document(inputs, path, shown, pictures, maps))


def publish_page(path: Path, page: bytes) -> None:
    """Write a page. An earlier page is replaced; another file of that name moves aside."""
    sidecars.write_sidecar(path, page, MARK, len(MARK))


def render_html(data: Mapping[str, Any]) -> bytes:
    """Render the page of a document."""
    from markupsafe import Markup

    styles = disk.read_text(ASSETS / "page.css")
    script = "\n".join(disk.read_text(ASSETS / f"{name}.js") for name in SCRIPTS)
    columns, constants = _table_columns(data)
    text = _load_template().render(
        data=data,
        columns=columns,
        constants=constants,
        policy=_security_policy(styles, script),
        styles=Markup(styles),
        script=Markup(script),
        json=Markup(_embeddable_json(data)),
    )
    return text.encode(errors="backslashreplace")


@cache
def _load_template() -> Template:
    """Compile the template; it takes longer than to render it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.from_string(disk.read_text(ASSETS / "page.html.j2"))


def _table_columns(data: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the columns of the table of shots, and the values that all of several shots have, by label.

    The job is left out if there is only one.
    """
    rows = [shot.get("row", {}) for shot in data["shots"]]
    columns, constants = {"star": "★", "video": "video"}, {}
    for key, label in (COLUMNS | page_data.SCORES | {"note": "note"}).items():
        values = {row.get(key) for row in rows}
        if key in ("shot", "status", "note") or len(values) > 1 or (len(rows) == 1 and key != "job"):
            columns[key] = label
        elif key != "job" and values - {None}:
            constants[label] = values.pop()
    return columns, constants


def _embeddable_json(data: Mapping[str, Any]) -> str:
    """Write JSON that no text in it can end: ASCII, without `<`. Integers that browsers round are texts."""
    return json.dumps(_exact_in_browsers(data), separators=(",", ":")).replace("<", "\\u003c")


def _exact_in_browsers(value: Any) -> Any:
    """Write integers beyond 2^53 as text: JavaScript knows only the nearest float of them."""
    if isinstance(value, dict):
        return {key: _exact_in_browsers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_exact_in_browsers(inner) for inner in value]
    return str(value) if isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER else value


def _security_policy(styles: str, script: str) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashed(script)}",
            f"style-src {hashed(styles)}",
            "img-src data:",
            "media-src 'self' file:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
