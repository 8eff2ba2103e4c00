"""Try to build a transformer of diffusers in bf16 under a memory limit, and print the result.

python -m scripts.bench.diffusers_memory CONFIG.json BYTES
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel


def main(argv: Sequence[str]) -> None:
    """Print {"needs": bytes of the weights in bf16, "error": text or null}."""
    config, limit = json.loads(Path(argv[0]).read_text(encoding="utf-8")), int(argv[1])
    with torch.device("meta"):
        needs = sum(2 * parameter.numel() for parameter in _build(config).parameters())
    before = 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (before + limit, before + limit))
    torch.set_default_dtype(torch.bfloat16)
    error = None
    try:
        _build(config)
    except (MemoryError, RuntimeError) as caught:
        error = str(caught).partition("err == 0. ")[2] or str(caught)  # before it: a line of torch
    print(json.dumps({"needs": needs, "error": error}))


def _build(config: dict[str, Any]) -> Any:
    return WanTransformer3DModel(  # type: ignore[no-untyped-call]
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        text_dim=config["text_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
