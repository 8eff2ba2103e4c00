"""The command line of the training program."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.mini.recipe import recipe
from scripts.mini.stages import STAGES, Workshop, run_check
from scripts.mini.training import Pace
from wancli.errors import WancliError


def main(arguments: Sequence[str]) -> None:
    """Runs one stage, or all that are left, in order, until the minutes are over."""
    said = _parser().parse_args(arguments)
    device = said.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    deadline = time.monotonic() + 60 * said.minutes
    try:
        numbers = recipe(said.out, said.set)
        pace = Pace(deadline, say_every=said.say_every, save_every=60 * said.save_minutes)
        into = said.into or said.out / "wan-mini"
        shop = Workshop(said.out, numbers, torch.device(device), pace, into)
        runs = STAGES | {"check": run_check}
        for stage in STAGES if said.stage == "all" else [said.stage]:
            if not runs[stage](shop):
                break
    except WancliError as error:
        sys.exit(f"train_mini: {error}\n  {error.hint}".rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_mini.py", description="Train wan-mini, stage by stage.")
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all", "check"])
    add("--out", type=Path, required=True, metavar="DIR", help="where the states are kept between runs")
    add("--into", type=Path, metavar="DIR", help="where `pack` writes the checkpoint; default OUT/wan-mini")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--minutes", type=float, default=math.inf, help="save and stop after this long; run again to go on")
    add("--set", action="append", default=[], metavar="NAME=NUMBER", help="change a number of the recipe")
    add("--say-every", type=int, default=50, metavar="STEPS")
    add("--save-minutes", type=float, default=2.0)
    return parser
