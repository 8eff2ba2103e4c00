"""What people read: a shot, the strip of blocks, the summary after a render, the difference table.

Everything is built for 80 columns; colour only where the terminal wants it (rich decides).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.errors import WancliError, describe_error_type
from wancli.injection.table import injected_share_by_block
from wancli.progress import make_printable
from wancli.report.shorten import fitted, shorten_unique
from wancli.units import format_bytes, format_ranges, format_seconds, pluralize

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from wancli.engine.verify import Verdict
    from wancli.plan.schedule import Placement
    from wancli.plan.shot import Shot
    from wancli.text.prompt_distance import PromptDistance
    from wancli.weights.lora.use import LoraUse

LEVELS = " ▁▂▃▄▅▆▇█"


def show(parts: Iterable[RenderableType], *, stderr: bool = False) -> None:
    """Prints tables and lines, without wrapping lines that are longer than the terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, emoji=False)
    for part in parts:
        shown = make_printable(part) if isinstance(part, str) else part
        console.print(shown, markup=False, soft_wrap=isinstance(part, str))


def shot_lines(shot: Shot, placement: Placement) -> Iterator[str]:
    """Everything about one shot: its texts, its noise levels, and the table of injections."""
    yield f"\nshot {shot.id}: {shot.output}"
    names = [
        "prompt",
        *(["negative"] if shot.negative else []),
        *(f"inject.{i}" for i in range(len(shot.rules))),
    ]
    for name, prompt in zip(names, shot.prompts):
        yield f"{name:>16}  {_cut(prompt.tokens.text, 44)} ({len(prompt.tokens.ids)} tokens)"
    if placement.batch_size > 1:
        yield f"{'batch':>16}  one of {placement.batch_size} shots on each pass over the weights"
    for index in range(len(shot.rules)):
        yield f"{f'inject.{index}':>16}  {describe_rule(shot, index)}"
        for choice in (choice for choice in shot.auto_blocks if choice.rule == index):
            yield f"{choice.spec:>16}  is {choice.blocks}, by {choice.map_name}"
    yield from schedule_lines(shot)
    if shot.rules:
        yield from table_strips(shot)


def describe_rule(shot: Shot, index: int) -> str:
    """`27-39 at 0.6, steps 0-11, cond`."""
    rule = shot.rules[index]
    blocks = format_ranges([block for block, _ in rule.blocks])
    values = sorted({round(s, 3) for _, s in rule.blocks})
    strength = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}..{values[-1]:g}"
    steps = format_ranges([step for step, _ in rule.steps])
    return f"{blocks} at {strength}, steps {steps}, {'+'.join(rule.branches)}"


def lora_line(use: LoraUse) -> str:
    """`style.safetensors at 0.7, blocks 27-39, all steps: 130 targets, rank 32, kohya naming`."""
    blocks = "all blocks" if use.blocks is None else f"blocks {format_ranges(use.blocks)}"
    steps = "all steps" if use.steps is None else f"steps {format_ranges(use.steps)}"
    coverage = use.coverage
    rank = f", rank {format_ranges(coverage.ranks)}" if coverage.ranks else ""
    skipped = f", {coverage.skipped} for images skipped" if coverage.skipped else ""
    return (
        f"lora: {make_printable(use.path.name)} at {use.strength:g}, {blocks}, {steps}: "
        f"{coverage.targets} targets{rank}, {coverage.style} naming{skipped}"
    )


def table_strips(shot: Shot) -> Iterator[str]:
    """The injection table, one column per block: how much of what a block reads was injected."""
    depth = shot.model.checkpoint.transformer.num_layers
    yield f"{'block':>16}  {ruler(depth)}"
    for branch in shot.table.branches:
        for cells_of, steps in shot.table.distinct_rows(branch).items():
            cells = injected_share_by_block(cells_of, shot.table.base[branch])
            yield f"{f'{branch} {format_ranges(steps)}':>16}  {bar(cells)}"


def schedule_lines(shot: Shot) -> Iterator[str]:
    """Step, timestep and noise level, seven to a line."""
    pairs = [f"{i}:{sigma:.3f}" for i, sigma in enumerate(shot.sigma_schedule.sigmas)]
    for start in range(0, len(pairs), 7):
        yield f"{'sigma' if start == 0 else '':>16}  " + " ".join(pairs[start : start + 7])


def memory_table(
    phases: Sequence[Mapping[str, Any]], expected: Mapping[str, float | None] | None = None
) -> RenderableType:
    """Model, activation, buffer and the peak of the whole process in each phase, and the expected time; after
    a render also the measured peak and time."""
    measured = any("measured" in phase for phase in phases)
    extra = [">measured", ">expected", ">time"] if measured else [">expected"]
    table = grid("phase", ">model", ">activation", ">buffer", ">peak", *extra)
    for phase in phases:
        parts = ("model", "activation", "buffer", "peak")
        cells = [format_bytes(phase[part]) if part in phase else "-" for part in parts]
        took = phase.get("expected") if expected is None else expected.get(phase["name"])
        cells += [format_bytes(phase["measured"])] if measured else []
        cells += ["?" if took is None else format_seconds(took)]
        cells += [format_seconds(phase["seconds"])] if measured else []
        table.add_row(phase["name"], *cells)
    process = next((phase["process"] for phase in phases if phase.get("process")), 0)
    if process:
        table.add_row("process", "", "", "", format_bytes(process), *("" for _ in extra))
    return table


def summary(
    report: Mapping[str, Any], path: Path | None, *, injections: bool, effects: bool
) -> Iterator[RenderableType]:
    """What a batch did: injections and how far their prompts differ, memory and time, the failures."""
    fresh = [shot for shot in report["shots"] if shot["status"] == "rendered"]
    if injections and any(shot["injection"] for shot in fresh):
        yield from _injections(fresh)
    if effects:
        for shot in fresh:
            yield from _effects(shot)
    if fresh:
        yield memory_table(report["memory"])
        predicted, measured = (format_bytes(report["peak"][name]) for name in ("predicted", "measured"))
        begun = report["first_step_after"]
        start = "" if begun is None else f"; first step after {format_seconds(begun)}"
        yield f"peak {measured}, predicted {predicted}{start}"
        yield from dict.fromkeys(
            "attention: {self} among video tokens, {cross} to the text".format_map(shot["model"]["attention"])
            for shot in fresh
        )
        cache = report["cache"]
        loaded = "encoder loaded" if cache["encoder_loaded"] else "encoder not loaded"
        yield f"prompts: {cache['hits']} from the cache, {cache['misses']} encoded ({loaded})"
    counts = dict.fromkeys(("rendered", "already done", "failed", "stopped", "elsewhere", "not started"), 0)
    for shot in report["shots"]:
        counts[shot["status"]] += 1
    yield ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if path:
        yield f"report: {path}"
        yield f"page: {path.with_suffix('.html')}"


def failures(report: Mapping[str, Any], ways: Iterable[str]) -> Iterator[RenderableType]:
    """Each shot that failed on one line, without the path of its output and cut to the terminal, for the
    report has all of it; and the ways out."""
    from rich.console import Console

    table = grid("failed shot", "code", "message")
    failed = [shot for shot in report["shots"] if "error" in shot]
    names = shorten_unique([shot["id"] for shot in failed], 24)
    codes = [shot["error"]["code"] for shot in failed]
    left = [max(11, *map(len, names)), max(map(len, codes))]
    room = max(20, Console(stderr=True).width - sum(left) - 2 * len(left) - 2)
    for name, code, shot in zip(names, codes, failed):
        message = shot["error"]["message"].removeprefix(f"{shot['output']}: ")
        table.add_row(name, code, _cut(message.replace("\n", " / "), room))
    yield table
    yield from ways


def _injections(shots: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    from rich.console import Console

    heads: Sequence[str] = ("shot", ">rule", "blocks", "steps", "branch", "blend", ">hits", "difference")
    rows = []
    for shot in shots:
        for index, rule in enumerate(shot["injection"]):
            verdict = rule["difference"]["verdict"]
            row = [
                shot["id"],
                str(index),
                format_ranges([int(block) for block in rule["blocks"]]),
                format_ranges([int(step) for step in rule["steps"]]),
                "+".join(rule["branches"]),
                rule["blend"],
                f"{rule['hits']:,}/{rule['planned']:,}",
                f"{verdict['percent']:.0f} %, {verdict['band']}",
            ]
            rows.append(row)
    line, heads, rows = fitted(heads, rows, Console(stderr=True).width)
    if line:
        yield line
    table = grid(*heads)
    for row in rows:
        table.add_row(*row)
    yield table


def _effects(shot: Mapping[str, Any]) -> Iterator[RenderableType]:
    """How much each measured forward's velocity moved, and every block's cross-attention output."""
    if not shot["effects"]:
        return
    depth = shot["model"]["sizes"]["num_layers"]
    blocks: dict[str, list[float]] = {}
    legacy: dict[str, list[float]] = {}
    for effect in shot["effects"]:
        for block, value in effect["blocks"].items():
            blocks.setdefault(block, []).append(100 * value)
            legacy.setdefault(block, []).append(effect["changed_percent"][block])
    top = max(value for values in blocks.values() for value in values) or 1.0
    yield f"\nshot {shot['id']}: what the injection changed, relative L2; a full bar is {top:.1f} %"
    yield f"{'step':>6} {'branch':<7} velocity  {ruler(depth)}"
    for effect in shot["effects"]:
        shares = [100 * effect["blocks"].get(str(block), 0.0) / top for block in range(depth)]
        yield f"{effect['step']:>6} {effect['branch']:<7} {100 * effect['velocity']:6.2f} %  {bar(shares)}"
    yield "cross-attention output, mean over steps, % (in brackets the legacy share of |change| > 0.01)"
    cells = [f"{b:>2}: {_mean(blocks[b]):5.1f} ({_mean(legacy[b]):3.0f})" for b in sorted(blocks, key=int)]
    for start in range(0, len(cells), 4):
        yield "  " + "  ".join(cells[start : start + 4])


def ruler(depth: int) -> str:
    """A ruler over the blocks: a digit for every ten."""
    return "".join(str(block // 10 % 10) if block % 10 == 0 else "." for block in range(depth))


def bar(shares: Iterable[float]) -> str:
    """One character per block, from · for 0 to a full block for 1."""
    return "".join("·" if share == 0 else LEVELS[max(1, round(share * 8))] for share in shares)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def difference_tables(differences: Sequence[PromptDistance]) -> Iterator[RenderableType]:
    """One table per pair: each figure, what it means, and hints on the prompts."""
    for difference in differences:
        yield f"A  {_cut(difference.a.text, 76)}"
        yield f"B  {_cut(difference.b.text, 76)}\n"
        table = grid("figure", ">value", "meaning")
        for label, value, meaning in difference.table_rows():
            table.add_row(label, value, meaning)
        yield table
        for hint in difference.hints:
            yield f"hint: {hint}"


def encoded_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """`KEY  TOKENS tokens  cached|encoded  TEXT`, one line per prompt."""
    for found in rows:
        state = "cached" if found["cached"] else "encoded"
        yield f"{found['key'][:16]}  {found['tokens']:>3} tokens  {state:<7}  {_cut(found['text'], 36)}"


def cache_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    table = grid("key", ">tokens", ">size", "used", "text")
    for entry in rows:
        used = entry["used"][:16].replace("T", " ")
        table.add_row(
            entry["key"][:12],
            str(entry["tokens"] or "-"),
            format_bytes(entry["bytes"]),
            used,
            _cut(entry["text"], 30),
        )
    yield table
    yield f"{pluralize(len(rows), 'entry', 'entries')}, {format_bytes(sum(entry['bytes'] for entry in rows))}"


def check_lines(found: Verdict) -> Iterator[str]:
    """`wancli check`: `PATH: PROBLEM`, what else is there, and how much verifies."""
    yield from (f"{path}: {problem}" for path, problem in found.problems)
    yield from (f"orphan, no manifest: {path}" for path in found.orphans)
    yield from (f"left by a dead process: {path}" for path in found.debris)
    kinds = {"video": found.videos, "latent": found.latents, "state": found.states}
    verified = ", ".join(pluralize(count, what) for what, count in kinds.items())
    yield f"verified: {verified}; problems: {len(found.problems):,}"
    if found.missing:
        yield f"not rendered yet: {len(found.missing):,}"
    if found.aside:
        yield f"moved aside by --force, not verified: {len(found.aside):,}"


def error_lines(kinds: Sequence[type[WancliError]]) -> Iterator[str]:
    """`wancli errors`: `CODE  EXIT CODE  retry|-  MEANING`, one line each."""
    yield f"{'code':<22} exit  retry  meaning"
    for kind in kinds:
        facts = describe_error_type(kind)
        again = "yes" if facts["retryable"] else "no"
        yield f"{facts['code']:<22} {facts['exit_code']:>4}  {again:<5}  {facts['meaning']}"


def _cut(text: str, limit: int) -> str:
    """One line of printable text."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def grid(*columns: str) -> Table:
    """A table without lines; `>` before a heading aligns its column to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table
