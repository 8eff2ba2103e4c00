"""`wancli cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from wancli.commands._common import open_store, print_json
from wancli.commands._options import CacheDir, Json
from wancli.errors import ExitStatus

app = typer.Typer(help="List, verify or shrink the embedding cache.")


@app.command("ls")
def cache_ls(as_json: Json = False, cache_dir: CacheDir = None) -> int:
    """List the embeddings in the cache, last used first."""
    from wancli.report import plan_document, prompt_text, terminal

    rows = plan_document.cache_rows(open_store(cache_dir))
    if as_json:
        print_json(rows)
    else:
        terminal.show(prompt_text.format_cache(rows))
    return ExitStatus.OK


@app.command("verify")
def cache_verify(as_json: Json = False, cache_dir: CacheDir = None) -> int:
    """Read every entry back.

    Lists damaged entries and exits with 4; a render computes them again.
    """
    store = open_store(cache_dir)
    count, damaged = len(store.entries()), [str(entry.path) for entry in store.verify()]
    if as_json:
        print_json({"entries": count, "damaged": damaged})
    else:
        print(*damaged, f"{count - len(damaged)} of {count} entries verify", sep="\n")
    return ExitStatus.INTEGRITY if damaged else ExitStatus.OK


@app.command("prune")
def cache_prune(
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep the newest entries up to this size: 500MiB, 2GiB."),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Remove entries that were not used for this many days."),
    ] = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> int:
    """Remove old or surplus entries.

    Damaged entries, the oldest beyond a size, those not used for some days.
    """
    from wancli.units import format_bytes, parse_size, pluralize

    limit = None if max_size is None else parse_size(max_size, "--max-size")
    removed = open_store(cache_dir).prune(limit, older_than)
    total = sum(entry.bytes for entry in removed)
    if as_json:
        print_json({"removed": [entry.key for entry in removed], "bytes": total})
    else:
        print(f"removed {pluralize(len(removed), 'entry', 'entries')}, {format_bytes(total)}")
    return ExitStatus.OK
