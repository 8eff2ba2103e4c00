"""Resolve the prompt of a job: one text, or segments, each with the frames that read it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from wancli.errors import JobError
from wancli.injection.timeline import Segment, Timeline
from wancli.job import schema_values
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.job.yaml_reader import Key
from wancli.plan.areas import VideoShape, select_frames
from wancli.plan.prompts import PromptResolver
from wancli.plan.shot import Prompt
from wancli.text.tokenizer import clean

_FADE_SECONDS = Fraction(1, 2)


class MainPrompt(NamedTuple):
    """The prompt of a shot. If it changes over the frames, the first prompt, and the others by their id."""

    prompt: Prompt
    timeline: Timeline | None = None
    others: tuple[Prompt, ...] = ()


class _Entry(NamedTuple):
    """A segment as the job wrote it, and the path of its key."""

    written: str | schema_values.Segment
    path: tuple[Key, ...]

    @property
    def segment(self) -> schema_values.Segment:
        return schema_values.Segment(text=self.written) if isinstance(self.written, str) else self.written

    @property
    def text_path(self) -> tuple[Key, ...]:
        return self.path if isinstance(self.written, str) else (*self.path, "text")

    @property
    def has_frames(self) -> bool:
        return self.segment.frames is not None or self.segment.during is not None

    @property
    def frames_path(self) -> tuple[Key, ...]:
        return (*self.path, "during" if self.segment.frames is None else "frames")


class _Read(NamedTuple):
    """What a segment reads: a prompt, or some rows of it; `text` is that of the segment."""

    prompt: Prompt
    text: str
    rows: tuple[int, int] | None = None


def resolve_main_prompt(item: Item, prompts: PromptResolver, video: VideoShape) -> MainPrompt:
    """Resolve the key `prompt` of a shot. Segments cover all frames of the video, each frame once.

    Raises JobError.
    """
    spec = item.job.prompt
    if isinstance(spec, str | schema_values.EmbeddingFile):
        return MainPrompt(prompts.resolve(spec, "prompt"))
    path: tuple[Key, ...] = ("prompt", "segments")
    if not isinstance(spec, schema_values.PromptOverTime):
        path, spec = ("prompt",), schema_values.PromptOverTime(segments=spec)
    entries = [_Entry(written, (*path, i)) for i, written in enumerate(spec.segments)]
    frames: list[tuple[int, int]] = []
    problems = Problems()
    with problems.collect():
        frames = _place(item, entries, video)
        entries = [entry for _, entry in sorted(zip(frames, entries), key=lambda pair: pair[0])]
        frames.sort()
    with problems.collect():
        fade = _choose_fade(item, spec, video)
    with problems.collect():
        is_relay = spec.blend == "relay" and len(entries) > 1
        read = (_read_as_relay if is_relay else _read_each)(item, prompts, entries, spec.text)
    problems.raise_all()
    first = read[0].prompt
    if len(read) == 1:
        return MainPrompt(first)
    segments = tuple(Segment(own, one.prompt.id, one.text, one.rows) for own, one in zip(frames, read))
    common = clean(spec.text or "") if is_relay else ""
    others = {one.prompt.id: one.prompt for one in read if one.prompt.id != first.id}
    return MainPrompt(first, Timeline(segments, spec.blend, fade, common), tuple(others.values()))


def _read_each(
    item: Item, prompts: PromptResolver, entries: Sequence[_Entry], common: str | None
) -> list[_Read]:
    """Resolve a prompt of its own for each segment: `common`, if there is one, and its text."""
    problems = Problems()
    read = []
    for entry in entries:
        with problems.collect():
            text = entry.segment.text if common is None else f"{common} {_require_text(item, entry)}"
            prompt = prompts.resolve(text, *entry.text_path)
            read.append(_Read(prompt, prompt.tokens.text))
    problems.raise_all()
    return read


def _read_as_relay(
    item: Item, prompts: PromptResolver, entries: Sequence[_Entry], common: str | None
) -> list[_Read]:
    """Resolve one prompt for all segments, and find the rows that each has in it.

    No piece spans a space, so a text before a space is tokenized alike with and without what follows it.
    """
    problems = Problems()
    texts = []
    for entry in entries:
        with problems.collect():
            texts.append(_require_text(item, entry))
    problems.raise_all()
    joined = common or ""
    starts = [prompts.count_tokens(joined, "prompt", "text")]
    for text, entry in zip(texts, entries):
        joined = f"{joined} {text}"
        starts.append(prompts.count_tokens(joined, *entry.text_path))
    prompt = prompts.resolve(joined, *entries[0].path[:-1])
    kept = len(prompt.tokens.ids) - 1
    for entry, (start, stop) in zip(entries, pairwise(starts)):
        with problems.collect():
            if start == stop or start >= kept:
                why = "has no words" if start == stop else f"is cut off: {kept} tokens are kept"
                raise JobError(why, where=item.location(*entry.text_path))
    problems.raise_all()
    return [
        _Read(prompt, clean(text), (start, min(stop, kept)))
        for text, (start, stop) in zip(texts, pairwise(starts))
    ]


def _require_text(item: Item, entry: _Entry) -> str:
    """Return the text of a segment, which other texts are joined with. Raises JobError."""
    text, where = entry.segment.text, item.location(*entry.text_path)
    if isinstance(text, schema_values.EmbeddingFile):
        raise JobError(
            "is an embedding, which cannot be joined with a text",
            where=where,
            hint="Write a text; or leave out prompt.text, and blend: relay.",
        )
    if not text.strip():
        raise JobError("is empty", where=where)
    return text


def _choose_fade(item: Item, spec: schema_values.PromptOverTime, video: VideoShape) -> int:
    """Return over how many frames prompts are mixed; 0 for cuts."""
    where = item.location("prompt", "fade")
    if spec.blend != "crossfade":
        if spec.fade is not None:
            raise JobError("only a crossfade has one", where=where, hint="Write blend: crossfade.")
        return 0
    fade = max(1, round(Fraction(video.fps) * _FADE_SECONDS)) if spec.fade is None else spec.fade
    if fade > video.frames:
        raise JobError(f"is {fade} frames, and the video has {video.frames}", where=where)
    return fade


def _place(item: Item, entries: Sequence[_Entry], video: VideoShape) -> list[tuple[int, int]]:
    """Return the frames of each segment: as written or, if none has any, in equal parts."""
    if not any(entry.has_frames for entry in entries):
        return _split_evenly(item, entries, video)
    problems = Problems()
    frames = []
    for entry in entries:
        with problems.collect():
            if not entry.has_frames:
                raise JobError(
                    "has no frames, and other segments have some",
                    where=item.location(*entry.path),
                    hint="Write `frames` or `during` for all segments or for none.",
                )
            own = select_frames(item, entry.segment, entry.path, video)
            frames.append(own or (0, video.frames - 1))
    problems.raise_all()
    _refuse_gaps_and_overlaps(item, entries, frames, video)
    return frames


def _split_evenly(item: Item, entries: Sequence[_Entry], video: VideoShape) -> list[tuple[int, int]]:
    """Return equal parts of a video. Each begins with a latent frame."""
    count = len(entries)
    if count > video.grid.latent_frames:
        raise JobError(
            f"has {count} segments, and a video of {video.frames} frames has {video.grid.latent_frames} "
            "latent frames",
            where=item.location(*entries[0].path[:-1]),
            hint="Write fewer segments, or more frames.",
        )
    if count == 1:
        return [(0, video.frames - 1)]
    # Latent frame j > 0 begins with frame 4j-3; each segment has one at least.
    latents = [
        max(i, min(round((video.frames * i / count + 3) / 4), video.grid.latent_frames - count + i))
        for i in range(1, count)
    ]
    starts = [0, *(4 * j - 3 for j in latents), video.frames]
    return [(start, stop - 1) for start, stop in pairwise(starts)]


def _refuse_gaps_and_overlaps(
    item: Item, entries: Sequence[_Entry], frames: Sequence[tuple[int, int]], video: VideoShape
) -> None:
    problems = Problems()
    covered = 0  # the frames before this one have a prompt: the last of them that of `before`
    before = entries[0]
    for (first, last), entry in sorted(zip(frames, entries), key=lambda pair: pair[0]):
        with problems.collect():
            if first < covered:
                line, _, key = item.location(*before.path).partition(": ")
                both = _format(first, min(last, covered - 1))
                hint = "A frame has one prompt; `blend: crossfade` mixes two around a border."
                where = item.location(*entry.frames_path)
                raise JobError(f"two prompts in {both}: this one and {key} ({line})", where=where, hint=hint)
            if first > covered:
                hint = "End the segment before it later, or begin it earlier."
                gap = f"no prompt in {_format(covered, first - 1)} before it"
                raise JobError(gap, where=item.location(*entry.frames_path), hint=hint)
        if last >= covered:
            covered, before = last + 1, entry
    if covered < video.frames:
        with problems.collect():
            gap = f"no prompt in {_format(covered, video.frames - 1)} after it"
            hint = "Write `end` for the last frame, as in 40-end."
            raise JobError(gap, where=item.location(*before.frames_path), hint=hint)
    problems.raise_all()


def _format(first: int, last: int) -> str:
    return f"frame {first}" if first == last else f"frames {first}-{last}"
