"""Find the syntax of other programs in a prompt, which Wan models read as plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ABOUT = (
    (r"<(?:lora|lyco|hypernet):[^<>]*>", "{} in a prompt loads no LoRA: name the file under `loras`"),
    (
        r"\([^()]*:\s*[-+]?\d*\.?\d+\s*\)|\(\([^()]*\)\)",
        "{} in a prompt is plain text: words have no weights; `inject` gives a prompt a strength",
    ),
    (
        r"\[[^][:]*:[^][:]*:\s*\d*\.?\d+\s*\]|\{[^{}]*\|[^{}]*\}|(?<!\w)__[\w/-]+__(?!\w)",
        "{} in a prompt is plain text: `matrix` renders alternatives, `inject` swaps prompts between steps",
    ),
    (
        r"(?<!\S)--[a-z]+(?:[ =]-?[\w.:]+)?(?!\S)",
        "{} in a prompt is plain text: size, frames, seed, negative and sampler.steps are keys of the job",
    ),
)
_PATTERNS = [(re.compile(pattern), kind) for pattern, kind in _ABOUT]


def find_foreign_syntax(text: str) -> Iterator[tuple[str, str]]:
    """Yield what each piece of foreign syntax does not do, with `{}` for the piece, and the piece."""
    for pattern, kind in _PATTERNS:
        for match in pattern.finditer(text):
            yield kind, match[0]
