"""Load a transformer, run its blocks once and print the times; the process measured by first_block.

    python -m scripts.bench.first_block_process make FOLDER MODEL DTYPE          # one checkpoint for both
    python -m scripts.bench.first_block_process ours FOLDER DTYPE LAUNCHED
    python -m scripts.bench.first_block_process theirs FOLDER DTYPE LAUNCHED

LAUNCHED is the time of day when the process was started; imports count.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LATENT = (1, 16, 1, 32, 32)
PROMPT = 60  # tokens
SMALL, LARGE = "small", "transformer"  # all other components; the transformer under diffusers' names


class Moments:
    """Times from launch to begin and end of the first block, and to the end of the last."""

    def __init__(self, launched: float) -> None:
        self._launched = launched
        self._seconds: list[float] = []

    def watch(self, model: Any) -> None:
        """Record the times of one forward."""
        first, *_, last = model.blocks.children()  # a loop over them may load them
        first.register_forward_pre_hook(self._now)
        first.register_forward_hook(self._now)
        last.register_forward_hook(self._end)

    def _now(self, *_: Any) -> None:
        self._seconds.append(time.time() - self._launched)

    def _end(self, *_: Any) -> None:
        self._now()
        print(json.dumps(self._seconds), flush=True)
        os._exit(0)


def ours(folder: Path, dtype: str, launched: float) -> None:
    """Run `wancli render`, whose prompts are in the cache."""
    from wancli.__main__ import main
    from wancli.engine.networks import Networks

    moments, load = Moments(launched), Networks.load

    def load_and_watch(self: Networks, expert: Any) -> Any:
        if self._loaded is None:
            moments.watch(load(self, expert)[0])
        return load(self, expert)

    Networks.load = load_and_watch  # type: ignore[method-assign]
    sys.argv = ["wancli", "render", str(folder / f"{dtype}.yaml"), "-q", "--force"]
    main()


def theirs(folder: Path, dtype: str, launched: float) -> None:
    """Run diffusers as a script would, with an encoded prompt."""
    import torch
    from diffusers import WanTransformer3DModel

    network: Any = WanTransformer3DModel
    model = network.from_pretrained(folder / LARGE, torch_dtype=getattr(torch, dtype))
    Moments(launched).watch(model)
    with torch.inference_mode():
        text_BNE = torch.zeros(1, 512, model.config.text_dim, dtype=model.dtype)
        text_BNE[:, :PROMPT] = torch.randn(PROMPT, model.config.text_dim)
        model(torch.randn(LATENT, dtype=model.dtype), torch.tensor([500.0]), text_BNE)


def make(folder: Path, model: str, dtype: str) -> None:
    """Write the transformer as a diffusers folder, and a small checkpoint for the other components."""
    from dataclasses import replace

    import torch
    from diffusers import WanTransformer3DModel

    from scripts.make_random_checkpoint import (
        parse_model,
        transformer_entries,
        write_checkpoint,
        write_sharded,
    )
    from wancli.weights.formats.key_mapping import transformer_from_diffusers

    config = parse_model(model)
    one = replace(config, num_layers=1)
    write_checkpoint(folder / SMALL, one, dtype="bf16", text_encoder="tiny", vae="tiny")
    with torch.device("meta"):
        theirs: Any = WanTransformer3DModel(  # type: ignore[no-untyped-call]
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            text_dim=config.text_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    theirs.save_config(folder / LARGE)
    names = {transformer_from_diffusers(name): name for name in theirs.state_dict()}
    entries = [replace(entry, name=names[entry.name]) for entry in transformer_entries(config, dtype)]
    write_sharded(folder / LARGE, entries, sys.maxsize)


def main(argv: Sequence[str]) -> None:
    what, folder, *rest = argv
    if what == "make":
        make(Path(folder), *rest)
    else:
        {"ours": ours, "theirs": theirs}[what](Path(folder), rest[0], float(rest[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
