"""Find the syntax of other programs in a prompt, which Wan models read as plain words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_ABOUT = (
    (r"<(?:lora|lyco|hypernet):[^<>]*>", "{} in a prompt loads no LoRA: name the file under `loras`"),
    (
        r"\((?P<words>[^()]*):\s*(?P<weight>[-+]?\d*\.?\d+)\s*\)|\(\((?P<bracketed>[^()]*)\)\)",
        "{} in a prompt is plain text: words have no weights there; write them plainly, and <line>",
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
            yield kind.replace("<line>", _write_emphasis(match)) if "<line>" in kind else kind, match[0]


def _write_emphasis(match: re.Match[str]) -> str:
    """Write the line of a job that does what the brackets do elsewhere: `emphasis: {red: 1.4}`."""
    words = (match["words"] or match["bracketed"]).strip()
    weight = float(match["weight"]) if match["weight"] else 1.1**2
    key = words if re.fullmatch(r"\w+( \w+)*", words) else json.dumps(words, ensure_ascii=False)
    return f"`emphasis: {{{key}: {weight if weight > 0 else 0.1:g}}}`"
