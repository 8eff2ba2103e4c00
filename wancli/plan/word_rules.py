"""Decide what the keys of a rule say about words and attention guidance."""

from __future__ import annotations

from wancli.errors import JobError
from wancli.job.loader import Item
from wancli.job.schema_rules import InjectPrompt, InjectRule
from wancli.plan.pictures import InjectedPicture
from wancli.plan.shot import Prompt
from wancli.text.words import find_rows

# Those of the NAG node of ComfyUI-WanVideoWrapper.
NAG_DEFAULTS = {"scale": 11.0, "alpha": 0.25, "tau": 2.5}


def select_words(
    item: Item, index: int, inject: InjectRule, other: Prompt | InjectedPicture
) -> tuple[str | None, tuple[int, ...] | None]:
    """Return the words that a rule is narrowed to, and their rows; None if it has all. Raises JobError."""
    if not isinstance(inject, InjectPrompt) or inject.words is None or isinstance(other, InjectedPicture):
        return None, None
    where = item.location("inject", index, "words")
    if inject.blend == "nag":
        raise JobError("nag moves away from a whole prompt", where=where, hint="Leave out `words`.")
    return inject.words, find_rows(other.tokens, inject.words, where)


def read_nag(item: Item, index: int, inject: InjectRule, weakest: float) -> tuple[float, float, float] | None:
    """Return scale, alpha and tau of a rule; None if its blend is another. Raises JobError.

    `weakest` is its smallest strength.
    """
    given: dict[str, float | None] = {key: getattr(inject, key, None) for key in NAG_DEFAULTS}
    if inject.blend != "nag":
        for key, value in given.items():
            if value is not None:
                message = f"belongs to blend: nag, and the blend is {inject.blend}"
                raise JobError(message, where=item.location("inject", index, key))
        return None
    if not isinstance(inject, InjectPrompt):
        where = item.location("inject", index, "blend")
        raise JobError("nag moves away from a prompt, not from a picture", where=where)
    if inject.gain != 1:
        where = item.location("inject", index, "gain")
        raise JobError("nag has no gain", where=where, hint="`scale` sets how far it goes.")
    if weakest < 0:
        where = item.location("inject", index, "strength")
        raise JobError("nag needs strengths of 0 or above", where=where)
    chosen = NAG_DEFAULTS | {key: value for key, value in given.items() if value is not None}
    return chosen["scale"], chosen["alpha"], chosen["tau"]
