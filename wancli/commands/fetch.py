"""`wancli fetch`: weights from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.commands._common import create_display, hashes_path, print_json, print_result
from wancli.commands._options import CacheDir, Json, ProgressMode, ProgressOption, Quiet
from wancli.errors import ExitStatus, JobError

if TYPE_CHECKING:
    from wancli.progress import Progress
    from wancli.weights.hub.fetch import Download


def fetch_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REPOSITORY...",
            help="ORG/NAME, with @REVISION or :FILE, as `model:` and `path:` of a LoRA name it.",
        ),
    ] = None,
    list_known: Annotated[
        bool, typer.Option("--list", help="List models and LoRAs that people use, with size and licence.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files, with their exact sizes.")
    ] = False,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    progress: ProgressOption = ProgressMode.auto,
    quiet: Quiet = False,
) -> int:
    """Fetch weights from the Hugging Face hub into its cache.

    Takes only the files that a render reads, resumes what was interrupted, and compares sizes and
    SHA-256 with what the hub says. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
    Prints one path per name.
    """
    from wancli.report import fetch_text, terminal

    if list_known:
        rows = fetch_text.known_rows()
        print_json(rows) if as_json else terminal.show(fetch_text.format_known(rows))
        return ExitStatus.OK
    if not names:
        raise JobError(
            "no repository to fetch", hint="`wancli fetch --list` lists models, and what to write here."
        )
    return _fetch(names, dry_run, as_json, hashes_path(cache_dir), create_display(progress.value, quiet))


def _fetch(names: list[str], dry_run: bool, as_json: bool, hashes: Path, display: Progress) -> int:
    from wancli.report import fetch_text, terminal
    from wancli.weights.hub import fetch, lookup

    wanted = [lookup.require_name(text, "wancli fetch") for text in names]
    downloads = fetch.plan_downloads([part for name in wanted for part in lookup.list_parts(name)])
    if dry_run:
        rows = fetch_text.download_rows(downloads)
        print_json(rows) if as_json else terminal.show(fetch_text.format_downloads(rows))
        return ExitStatus.OK
    fetch.require_space(downloads)
    _fetch_files(downloads, hashes, display)
    paths = [str(lookup.require_path(name, "wancli fetch")) for name in wanted]
    if as_json:
        documents: list[dict[str, Any]] = [
            {"name": str(name), "path": path} for name, path in zip(wanted, paths, strict=True)
        ]
        print_json(documents)
    else:
        for path in paths:
            print_result(path)
    return ExitStatus.OK


def _fetch_files(downloads: list[Download], hashes: Path, display: Progress) -> None:
    """Fetch the files one after the other, then let each revision mean its commit."""
    from wancli.report import fetch_text
    from wancli.weights import fingerprint
    from wancli.weights.hub import fetch

    display.note(fetch_text.describe_start(downloads))
    for download in downloads:
        if not download.missing:
            path = fetch.fetch(download, lambda _: None)
            fingerprint.fingerprint([path], hashes)  # reads a file once that another program fetched
            continue
        with display.phase("fetch", [download.path], fetch.in_mebibytes(download.missing)) as phase:
            path = fetch.fetch(download, fetch.count_mebibytes(phase.advance))
        if len(download.digest) == 64:
            fingerprint.remember(path, download.digest, hashes)
    for repository in {download.repository.repo: download.repository for download in downloads}.values():
        fetch.finish(repository)
