#!/usr/bin/env python
"""Where the attention maps of wan-mini lie: renders prompts, finds the shape in the pixels, compares.

    python scripts/evaluate_word_maps.py --out out/word-maps

Prints the table of docs/directing.md. DIR keeps the videos; a second run goes on where the first was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.mini.word_maps import main

if __name__ == "__main__":
    main(sys.argv[1:])
