#!/usr/bin/env python
"""How well wan-mini obeys its prompts, and what its blocks do: renders, looks, counts.

    python scripts/evaluate_mini.py --out out/evaluation

Prints the tables of the model card; DIR keeps the videos, evaluation.json and worst.png. A second
run goes on where the first was stopped. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.mini.evaluate import main

if __name__ == "__main__":
    main(sys.argv[1:])
