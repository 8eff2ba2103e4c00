"""The text of `wancli fetch`: the table of known models, files of a repository, how much is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wancli.report.terminal import create_table
from wancli.units import format_bytes, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wancli.weights.hub.fetch import Download


def known_rows() -> list[dict[str, Any]]:
    """Return the table of known models as plain data; `cached` says whether the cache has all files."""
    from wancli.weights.hub import cache, lookup, models

    return [
        {
            "name": model.name,
            "layout": model.layout,
            "gigabytes": model.gigabytes,
            "licence": model.licence,
            "cached": all(cache.find_path(part) for part in lookup.list_parts(model.hub_name)),
        }
        for model in models.KNOWN
    ]


def format_known(rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Format the table, a line per model, with the name last because it is long."""
    layout = ""
    for row in rows:
        if row["layout"] != layout:
            layout = row["layout"]
            yield f"{layout}:"
        state = "cached" if row["cached"] else ""
        yield f"  {row['gigabytes']:>6.1f} GB  {row['licence']}  {state:<6}  {row['name']}"
    yield "Sizes include text encoder and VAE; `wancli fetch NAME --dry-run` asks for the exact ones."


def download_rows(downloads: Sequence[Download]) -> list[dict[str, Any]]:
    return [
        {
            "repository": download.repository.repo,
            "commit": download.repository.commit,
            "licence": download.repository.licence,
            "path": download.path,
            "bytes": download.size,
            "missing": download.missing,
            "digest": download.digest,
        }
        for download in downloads
    ]


def format_downloads(rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    table = create_table(">size", ">missing", "file")
    for row in rows:
        table.add_row(
            format_bytes(row["bytes"]), format_bytes(row["missing"]), f"{row['repository']}:{row['path']}"
        )
    yield table
    total, missing = (sum(row[key] for row in rows) for key in ("bytes", "missing"))
    licences = _list_licences(row["licence"] for row in rows)
    count = pluralize(len(rows), "file")
    yield f"{count}, {format_bytes(total)}; {format_bytes(missing)} to fetch; {licences}"


def describe_start(downloads: Sequence[Download]) -> str:
    """Say how much is fetched, how much the cache has already, and the licences."""
    missing = sum(download.missing for download in downloads)
    size = sum(download.size for download in downloads)
    licences = _list_licences(download.repository.licence for download in downloads)
    have = f", {format_bytes(size - missing)} are in the cache" if missing < size else ""
    return f"{pluralize(len(downloads), 'file')}, {format_bytes(missing)} to fetch{have}; {licences}"


def _list_licences(licences: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(licence or "licence not stated" for licence in licences))
