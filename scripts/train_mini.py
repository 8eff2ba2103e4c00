"""Train wan-mini: a Wan 2.1 model that knows a small world of moving shapes.

    python scripts/train_mini.py all --out out/mini
    python scripts/train_mini.py dit --out out/mini --minutes 9 --set dit_batch=256

Stages, in order: text, latents, vae, dit, grow, finetune, pack (and `check`, at any time after the
latents and the dit). Each goes on where it stopped; see scripts/mini.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scripts.mini.cli import main

    main(sys.argv[1:])
