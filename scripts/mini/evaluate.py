"""The model card's figures: prompts obeyed, what injection moves, what the VAE loses.

Everything is rendered by `wancli render`, as a user would, and judged from the frames of the MP4s by
comparing them with the world's own renderer (recognise.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.mini.captions import STYLES, caption
from scripts.mini.recognise import Seen, recognise
from scripts.mini.vae import psnr
from scripts.mini.world import ATTRIBUTES, HELD_OUT, Scene, draw_all, random_scene
from wancli import wan_mini
from wancli.models.vae import VAE
from wancli.video import clip, contact_sheet, mp4
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_vae

GRID = (9, 64, 64)
CLIPS = 64  # for the VAE
PER_JOB = 100
WHERE = ("none", "all", "early", "middle", "late")
SOURCES = ("main", "injected", "neither")
WANTED = {"colour": 0.95, "background": 0.95, "direction": 0.85, "shape": 0.75}
WORST = 8


@dataclass(frozen=True)
class Case:
    """One video: its name, what its prompt says and, if one is injected, what that says and where."""

    name: str
    seed: int
    scene: Scene
    prompt: str
    injected: Scene | None = None
    other: str = ""
    blocks: str = "none"

    def item(self) -> dict[str, Any]:
        rules = [{"prompt": self.other, "blocks": self.blocks}] if self.blocks != "none" else []
        return {"id": self.name, "seed": self.seed, "prompt": self.prompt, "inject": rules}


def main(arguments: Sequence[str]) -> None:
    """Renders what is not there yet, and prints the tables."""
    said = _parser().parse_args(arguments)
    prompts, pairs = held_out_prompts(said.prompts), injection_pairs(said.pairs)
    seen = render([*prompts, *pairs], said.out, said.model, said.jobs)
    obeyed = obedience(prompts, seen)
    moved = attribution(pairs, seen)
    losses = vae_losses(said.model)
    result = {"prompts": len(prompts), "pairs": said.pairs, "obeyed": obeyed, "moved": moved, "psnr": losses}
    (said.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(*tables(result), sep="\n")
    show_worst(prompts, seen, said.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate_mini.py", description="Judge wan-mini by what it renders."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for the videos and evaluation.json")
    add("--model", type=Path, default=wan_mini.FOLDER, metavar="DIR", help="default: the one inside wancli")
    add("--prompts", type=int, default=200, help="held-out prompts; default 200")
    add("--pairs", type=int, default=100, help="pairs of prompts for injection; default 100")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="renders at once")
    return parser


def held_out_prompts(count: int) -> list[Case]:
    """Prompts of combinations that training never saw, in all three styles."""
    rng = random.Random("evaluate prompts")
    cases = []
    for index in range(count):
        scene = random_scene(rng, HELD_OUT)
        cases.append(Case(f"prompt-{index:03d}", index, scene, caption(scene, rng, STYLES[index % 3])))
    return cases


def injection_pairs(count: int) -> list[Case]:
    """Pairs that agree in no attribute, the second prompt in none, all, or a third of the blocks."""
    rng = random.Random("evaluate pairs")
    cases = []
    for index in range(count):
        scene, other = random_scene(rng), random_scene(rng)
        while any(getattr(scene, name) == getattr(other, name) for name in ATTRIBUTES):
            other = random_scene(rng)
        texts = [caption(one, rng, STYLES[index % 3]) for one in (scene, other)]
        cases += [
            Case(f"pair-{index:03d}-{blocks}", 1000 + index, scene, texts[0], other, texts[1], blocks)
            for blocks in WHERE
        ]
    return cases


def render(cases: Sequence[Case], out: Path, model: Path, jobs: int) -> dict[str, Seen]:
    """What is seen in each case's video."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(cases), PER_JOB):
        items = [case.item() for case in cases[start : start + PER_JOB]]
        job = {"model": str(model.resolve()), "output": "{id}.mp4", "prompt": "-", "items": items}
        paths.append(out / f"job-{start:04d}.yaml")
        paths[-1].write_text(json.dumps(job))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(render_job, paths))
    return {case.name: recognise(frames(out / f"{case.name}.mp4")) for case in cases}


def render_job(job: Path) -> None:
    """Render a job in a process of its own, as a user would."""
    command = [
        sys.executable,
        "-c",
        "from wancli.__main__ import main; main()",
        "render",
        str(job),
        "--quiet",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def frames(path: Path) -> Tensor:
    """An MP4 as [3, T, Y, X] in [-1, 1]."""
    pictures = [
        torch.frombuffer(bytearray(frame.rgb), dtype=torch.uint8).view(frame.height, frame.width, 3)
        for frame in mp4.read_frames(path)
    ]
    return torch.stack(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


def obedience(cases: Sequence[Case], seen: dict[str, Seen]) -> dict[str, float]:
    """The share of prompts whose video shows what they say, per attribute and for all four together."""
    right: Counter[str] = Counter()
    for case in cases:
        agrees = seen[case.name].agrees(case.scene)
        right.update([name for name, is_right in agrees.items() if is_right])
        right["all four"] += all(agrees.values())
    return {name: right[name] / len(cases) for name in (*ATTRIBUTES, "all four")}


def attribution(cases: Sequence[Case], seen: dict[str, Seen]) -> dict[str, dict[str, list[int]]]:
    """Per place of injection and attribute: how often it is that of each of SOURCES."""
    counts = {blocks: {name: [0, 0, 0] for name in ATTRIBUTES} for blocks in WHERE}
    for case in cases:
        assert case.injected is not None
        main_has, other_has = (seen[case.name].agrees(scene) for scene in (case.scene, case.injected))
        for name in ATTRIBUTES:
            source = 0 if main_has[name] else 1 if other_has[name] else 2
            counts[case.blocks][name][source] += 1
    return counts


def beyond_chance(counts: Sequence[Sequence[int]]) -> float:
    """The p-value that rows of three outcomes each are alike: Pearson's chi-squared, three rows.

    Its tail for 4 degrees of freedom is exp(-x/2)·(1 + x/2), for 2 it is exp(-x/2).
    """
    columns = [column for column in zip(*counts, strict=True) if sum(column)]
    rows = [sum(row) for row in zip(*columns, strict=True)]
    total = sum(rows)
    x = 0.0
    for column in columns:
        for found, row in zip(column, rows, strict=True):
            expected = row * sum(column) / total
            x += (found - expected) ** 2 / expected
    return {1: 1.0, 2: math.exp(-x / 2), 3: math.exp(-x / 2) * (1 + x / 2)}[len(columns)]


def vae_losses(model: Path) -> dict[str, float]:
    """PSNR in dB of held-out clips through encoder and decoder."""
    vae = load_vae(identify(model), "cpu")
    rng = random.Random("evaluate clips")
    clips_BCTYX = draw_all([random_scene(rng, HELD_OUT) for _ in range(CLIPS)], GRID)
    with torch.inference_mode():
        made = [_through(vae, clip_CTYX) for clip_CTYX in clips_BCTYX]
    each = [psnr(a, b) for a, b in zip(made, clips_BCTYX, strict=True)]
    return {"all clips": psnr(torch.stack(made), clips_BCTYX), "worst clip": min(each)}


def _through(vae: VAE, clip_CTYX: Tensor) -> Tensor:
    return torch.cat(list(vae.decode(vae.encode(clip_CTYX))), dim=1)


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield f"\n{result['prompts']} held-out prompts, right in their videos:\n"
    yield "| attribute | right | wanted |\n| --- | ---: | ---: |"
    for name, share in result["obeyed"].items():
        yield f"| {name} | {share:.1%} | {f'{WANTED[name]:.0%}' if name in WANTED else ''} |"
    losses = ", ".join(f"{name} {value:.1f} dB" for name, value in result["psnr"].items())
    yield f"\nVAE on {CLIPS} held-out clips: {losses}"
    yield f"\n{result['pairs']} pairs of prompts that differ in everything: whose attribute is seen,"
    yield f"in percent ({' / '.join(SOURCES)}):\n"
    yield "| injected into | " + " | ".join(ATTRIBUTES) + " |\n| --- |" + " ---: |" * len(ATTRIBUTES)
    for blocks, row in result["moved"].items():
        cells = [" / ".join(f"{100 * n / sum(counts):.0f}" for n in counts) for counts in row.values()]
        yield f"| {blocks} | " + " | ".join(cells) + " |"
    thirds = [result["moved"][blocks] for blocks in ("early", "middle", "late")]
    chances = [beyond_chance([third[name] for third in thirds]) for name in ATTRIBUTES]
    yield "| p that the thirds are alike | " + " | ".join(f"{p:.0e}" for p in chances) + " |"


def show_worst(cases: Sequence[Case], seen: dict[str, Seen], out: Path) -> None:
    """The prompts that were obeyed least, in words and as a contact sheet."""

    def wrong(case: Case) -> list[str]:
        return [name for name, is_right in seen[case.name].agrees(case.scene).items() if not is_right]

    worst = sorted((c for c in cases if wrong(c)), key=lambda c: (-len(wrong(c)), seen[c.name].overlap))[
        :WORST
    ]
    for case in worst:
        said = [f"{name} {getattr(seen[case.name], name) or 'none'}" for name in wrong(case)]
        print(f"- {case.name}: {', '.join(said)} for: {case.prompt}")
    if worst:
        clips = clip.read_clips([out / f"{case.name}.mp4" for case in worst])
        contact_sheet.write(out / "worst.png", contact_sheet.draw_contact_sheet(clips, [""] * len(clips)))
        print(f"\nworst cases: {out / 'worst.png'}")
