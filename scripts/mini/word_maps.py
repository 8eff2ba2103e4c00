"""Whether the attention maps of wan-mini lie where their words act: on the shape, and behind it.

Prompts are rendered by `wancli render` with maps of the word of the shape and the words of the background.
The shape is found in the decoded pixels: those nearer to the ink of its colour than to any other ink and to
the background. Letters: T frames (or latent frames), Y X rows and columns of pixels (or tokens), K inks and
the background.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.mini.captions import PLACE, SHAPE
from scripts.mini.evaluate import Case, frames, held_out_prompts, render_job
from scripts.mini.recognise import LEAST_AREA
from scripts.mini.world import COLOURS, INK, background
from wancli import wan_mini
from wancli.storage import attention_file

TOKEN = 16  # pixels of a side


@dataclass(frozen=True)
class Ratio:
    """Of one prompt: the share of a map's mass on the shape, in times of the shape's share of the video."""

    shape: float
    background: float


def main(arguments: Sequence[str]) -> None:
    """Render what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(prog="evaluate_word_maps.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", type=Path, default=wan_mini.FOLDER, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=30)
    said = parser.parse_args(arguments)
    cases = held_out_prompts(said.prompts)
    render(cases, said.out, said.model)
    ratios = [ratio for case in cases if (ratio := measure(case, said.out))]
    print(*table(ratios, len(cases)), sep="\n")


def render(cases: Sequence[Case], out: Path, model: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    items = [case.item() | {"attention": {"words": list(words_of(case))}} for case in cases]
    job = {"model": str(model.resolve()), "output": "{id}.mp4", "prompt": "-", "items": items}
    path = out / "word-maps.yaml"
    path.write_text(json.dumps(job))
    render_job(path)


def words_of(case: Case) -> tuple[str, str]:
    """Return the words of a prompt for its shape and for its background."""
    return _find(case.prompt, SHAPE[case.scene.shape]), _find(case.prompt, PLACE[case.scene.background])


def _find(prompt: str, choices: Sequence[str]) -> str:
    found = [words for words in choices if re.search(rf"\b{re.escape(words)}\b", prompt, re.IGNORECASE)]
    return max(found, key=len)


def measure(case: Case, out: Path) -> Ratio | None:
    """Return the ratios of a rendered prompt; None if its video shows no shape of the colour."""
    share_TYX = token_shares(shape_mask(frames(out / f"{case.name}.mp4"), case))
    if share_TYX.mean() < LEAST_AREA:
        return None
    maps = torch.from_numpy(attention_file.read(out / f"{case.name}.attention.npz").maps_WGSTYX)
    shape, behind = (
        float((map_TYX * share_TYX).sum() / map_TYX.sum() / share_TYX.mean()) for map_TYX in maps[:, 0, 0]
    )
    return Ratio(shape, behind)


def shape_mask(video_CTYX: Tensor, case: Case) -> Tensor:
    """Return [T, Y, X], 1 where the video has the ink that the prompt says."""
    _, T, Y, X = video_CTYX.shape
    paper_CTYX = background(case.scene.background, X).expand(3, T, Y, X)
    inks_KCTYX = torch.tensor([INK[name] for name in COLOURS])[..., None, None, None].expand(-1, -1, T, Y, X)
    candidates_KCTYX = torch.cat([inks_KCTYX, paper_CTYX[None]])
    nearest_TYX = (candidates_KCTYX - video_CTYX).square().sum(1).argmin(0)
    return (nearest_TYX == COLOURS.index(case.scene.colour)).float()


def token_shares(mask_TYX: Tensor) -> Tensor:
    """Return the share of each token's pixels that lies on the shape: of one frame, then of four each."""
    by_frame_TYX = F.avg_pool2d(mask_TYX[:, None], TOKEN)[:, 0]
    later_TYX = by_frame_TYX[1:].view(-1, 4, *by_frame_TYX.shape[1:]).mean(1)
    return torch.cat((by_frame_TYX[:1], later_TYX))


def table(ratios: Sequence[Ratio], prompts: int) -> Iterator[str]:
    """Markdown."""
    yield f"{len(ratios)} of {prompts} videos show a shape of the colour. Mass on it, in times of chance:\n"
    yield "| word of | mean | standard deviation | least | median | most | prompts of 3 or more | below 1 |"
    yield "| --- |" + " ---: |" * 7
    for name in ("shape", "background"):
        values = [getattr(ratio, name) for ratio in ratios]
        figures = (
            statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else 0.0,
            min(values),
            statistics.median(values),
            max(values),
        )
        counts = sum(v >= 3 for v in values), sum(v < 1 for v in values)
        yield f"| {name} | " + " | ".join([*(f"{x:.2f}" for x in figures), *map(str, counts)]) + " |"
