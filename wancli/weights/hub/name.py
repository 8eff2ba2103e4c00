"""Names of weights on the Hugging Face hub: `ORG/NAME`, `ORG/NAME@REVISION`, `ORG/NAME:PATH`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from wancli.weights.formats.tensor_index import SUFFIXES

DEFAULT_REVISION = "main"
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<path>[^:]+))?")


@dataclass(frozen=True)
class HubName:
    """A repository at a revision (a branch, a tag or a commit), and a folder or file in it.

    `path` is empty for the whole repository. The name of a file may stand without its folders.
    """

    repo: str
    revision: str = DEFAULT_REVISION
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.repo}{revision}{f':{self.path}' if self.path else ''}"

    def at(self, path: str) -> HubName:
        """Return the name of another file of the same repository and revision."""
        return replace(self, path=path)


def parse_name(text: str) -> HubName | None:
    """Parse a name of the hub; None if the text can only be a path of this machine.

    `models/wan.safetensors` is a path: no repository is called like a file of weights.
    """
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"] or match["repo"].endswith((*SUFFIXES, ".git")):
        return None
    path = (match["path"] or "").strip("/")
    return HubName(match["repo"], match["revision"] or DEFAULT_REVISION, path)
