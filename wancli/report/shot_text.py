"""A shot as `wancli plan -v` prints it: its prompts, noise levels, LoRAs and injections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.injection.injected_share import injected_share_by_block
from wancli.plan.pictures import GivenFrame, InjectedPicture, LinkedFrame, PictureFile
from wancli.progress import make_printable
from wancli.report.area_text import describe_area, draw_area
from wancli.report.terminal import draw_bar, draw_ruler, truncate
from wancli.units import format_ranges, list_some, pluralize, quote

if TYPE_CHECKING:
    from wancli.injection.area import Area
    from wancli.injection.attention_spec import AttentionSpec
    from wancli.injection.table import Rule
    from wancli.injection.timeline import Timeline
    from wancli.injection.tuning import EmphasisRule, SteerRule
    from wancli.plan.render_plan import Plan
    from wancli.plan.schedule import Placement
    from wancli.plan.shot import Prompt, Shot
    from wancli.sampling.step_cache import StepCache
    from wancli.weights.lora.use import LoraUse


def describe_added_shots(plan: Plan) -> str:
    """Say which shots `compare` adds to those that the job lists; empty if none."""
    added = {*plan.comparison.added} if plan.comparison else set()
    ids = [shot.id for shot in plan.shots if shot.id in added]
    shots = f"{pluralize(len(ids), 'shot')} without injection: {list_some(ids, 3)}"
    return f"compare adds {shots} (compare: {{add_baseline: false}} adds none)" if ids else ""


def format_shot(shot: Shot, placement: Placement, same_sigmas: Shot) -> Iterator[str]:
    """Format everything about one shot: its prompts, its noise levels, and the table of injections.

    `same_sigmas` is the first shot of the plan with these noise levels, which shows them."""
    yield f"\nshot {shot.id}: {shot.output}"
    negative = {"negative": shot.negative} if shot.negative else {}
    injected = {f"inject.{i}": other for i, other in enumerate(shot.injected)}
    if shot.timeline:
        yield from format_timeline(shot, shot.timeline)
    main = {} if shot.timeline else {"prompt": shot.prompt}
    for name, other in {**main, **negative, **injected}.items():
        yield f"{name:>16}  {_describe_read(other)}"
    for name, frame in zip(("image", "last image"), shot.pictures.frames if shot.pictures else ()):
        yield f"{name:>16}  {make_printable(describe_frame(frame))}"
    if placement.batch_size > 1:
        yield f"{'batch':>16}  one of {placement.batch_size} shots on each pass over the weights"
    for index in range(len(shot.rules)):
        yield from format_rule(shot, index)
        yield from format_area(shot, shot.rules[index].area)
        for choice in (choice for choice in shot.auto_blocks if choice.rule == index):
            yield f"{choice.spec:>16}  is {choice.blocks}, by {choice.map_name}"
    if shot.attention:
        yield from format_attention(shot.attention)
    for rule in shot.emphasis:
        yield f"{'emphasis':>16}  {describe_emphasis(rule)}"
    for index, steering in enumerate(shot.steering):
        yield from format_steering(shot, index, steering)
    yield from format_sigmas(shot, same_sigmas)
    if shot.cache:
        yield from format_cache(shot, shot.cache)
    if shot.rules:
        yield from format_injection_table(shot)


def format_timeline(shot: Shot, timeline: Timeline) -> Iterator[str]:
    """Format the segments of a prompt, and the weight of each in every latent frame."""
    fade = f" over {pluralize(timeline.fade, 'frame')}" if timeline.fade else ""
    common = f", after {truncate(timeline.common, 30)}" if timeline.common else ""
    yield f"{'prompt':>16}  {len(timeline.segments)} segments, {timeline.blend}{fade}{common}"
    by_id = {prompt.id: prompt for prompt in shot.prompts}
    names = [f"frames {segment.frames[0]}-{segment.frames[1]}" for segment in timeline.segments]
    for name, segment in zip(names, timeline.segments):
        tokens = f"{len(by_id[segment.id].tokens.ids)} tokens"
        if segment.rows:
            tokens = f"rows {segment.rows[0]}-{segment.rows[1] - 1}"
        yield f"{name:>16}  {truncate(segment.text, 44)} ({tokens})"
    yield f"{'latent frame':>16}  {draw_ruler(shot.token_grid.latent_frames)}"
    for name, weights in zip(names, timeline.frame_weights()):
        yield f"{name:>16}  {draw_bar(weights)}"


def _describe_read(other: Prompt | InjectedPicture) -> str:
    """Describe what blocks read: `A cat (4 tokens)`, or `cat.png, 157x111, read by CLIP as official`."""
    if isinstance(other, InjectedPicture):
        width, height = other.source.size
        name = make_printable(other.source.name)
        return f"{name}, {width}x{height}, read by CLIP as {other.read.method}"
    return f"{truncate(other.tokens.text, 44)} ({len(other.tokens.ids)} tokens)"


def describe_frame(frame: GivenFrame) -> str:
    """Describe a given frame: `cat.png, 157x111, crop as official`."""
    source = frame.source
    return f"{source.name}, {source.size[0]}x{source.size[1]}, {frame.how.fit} as {frame.how.method}"


def name_given_pictures(shots: Sequence[Shot]) -> list[str]:
    """Name the given frames of each shot: `cat.png, end.png`; empty if it has none.

    If two files have the same name, the names of the folders around all files are added until none have.
    """
    given = [shot.pictures.frames if shot.pictures else () for shot in shots]
    files = {
        frame.source.path for of_shot in given for frame in of_shot if isinstance(frame.source, PictureFile)
    }
    parts = 1
    while len({path.parts[-parts:] for path in files}) < len(files):
        parts += 1

    def name(source: PictureFile | LinkedFrame) -> str:
        return str(Path(*source.path.parts[-parts:])) if isinstance(source, PictureFile) else source.name

    return [", ".join(name(frame.source) for frame in of_shot) for of_shot in given]


def format_rule(shot: Shot, index: int) -> Iterator[str]:
    """Format an injection: `27-39 at 0.6, steps 0-11, cond`, and a line for what is special about it."""
    rule = shot.rules[index]
    yield f"{f'inject.{index}':>16}  {_describe_reach(rule)}{', pictures' if rule.image else ''}"
    if rule.words and rule.rows:
        yield f"{'only':>16}  {describe_words(rule.words, rule.rows)}"
    if rule.nag:
        yield f"{'away from it':>16}  " + "scale {:g}, alpha {:g}, tau {:g}".format(*rule.nag)


def _describe_reach(rule: Rule | SteerRule) -> str:
    """Describe blocks, strengths, steps and branches: `27-39 at 0.6, steps 0-11, cond`."""
    blocks = format_ranges([block for block, _ in rule.blocks])
    values = sorted({round(s, 3) for _, s in rule.blocks})
    strength = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}..{values[-1]:g}"
    steps = format_ranges([step for step, _ in rule.steps])
    return f"{blocks} at {strength}, steps {steps}, {'+'.join(rule.branches)}"


def format_steering(shot: Shot, index: int, rule: SteerRule) -> Iterator[str]:
    """Format the prompts of a steering vector, and where it is added."""
    by_id = {prompt.id: prompt for prompt in shot.steering_prompts}
    yield f"{f'steer.{index}':>16}  {_describe_reach(rule)}"
    for title, ids in (("toward", rule.toward), ("away from", rule.away)):
        yield from (f"{title:>16}  {_describe_read(by_id[id])}" for id in ids)
    yield from format_area(shot, rule.area)


def format_area(shot: Shot, area: Area | None) -> Iterator[str]:
    """Format and draw the part of the video in which a rule acts; nothing if that is the whole."""
    if area:
        yield f"{'area':>16}  {describe_area(area, shot.token_grid)}"
        yield from (f"{title:>16}  {line}" for title, line in draw_area(area, shot.token_grid))


def format_attention(maps: AttentionSpec) -> Iterator[str]:
    """Format which attention maps are recorded: `red (row 2), circle (rows 3-4)`, and the groups."""
    words = [f"{word} ({describe_rows(rows)})" for word, rows in zip(maps.words, maps.rows)]
    yield f"{'attention':>16}  {truncate(', '.join(words), 62)}"
    for name, groups in (("blocks", maps.blocks), ("steps", maps.steps)):
        yield f"{'':>16}  {name} {truncate(' | '.join(group.label for group in groups), 56)}"


def describe_words(words: str, rows: Sequence[int]) -> str:
    """Describe words and their rows: `'red circle', rows 1-2`."""
    return f"{quote(words)}, {describe_rows(rows)}"


def describe_rows(rows: Sequence[int]) -> str:
    """Describe rows of a prompt: `row 2`, or `rows 3-4`."""
    return f"row{'s' if len(rows) > 1 else ''} {format_ranges(rows)}"


def describe_emphasis(rule: EmphasisRule) -> str:
    """Describe an emphasis: `'red circle', rows 1-2, counts 1.5 times, blocks 27-39, steps 0-11`."""
    blocks, steps = (format_ranges([index for index, _ in chosen]) for chosen in (rule.blocks, rule.steps))
    where = ", in a part of the video" if rule.area else ""
    words = describe_words(rule.words, rule.rows)
    return f"{words}, counts {rule.weight:g} times, blocks {blocks}, steps {steps}{where}"


def format_lora(use: LoraUse) -> str:
    """Describe a LoRA: `a.safetensors at 0.7, blocks 27-39, all steps: 130 targets, kohya naming`."""
    blocks = "all blocks" if use.blocks is None else f"blocks {format_ranges(use.blocks)}"
    steps = "all steps" if use.steps is None else f"steps {format_ranges(use.steps)}"
    coverage = use.coverage
    rank = f", rank {format_ranges(coverage.ranks)}" if coverage.ranks else ""
    scale = (
        f", scale {', '.join(f'{scale:g}' for scale in coverage.scales)}"
        if set(coverage.scales) - {1.0}
        else ""
    )
    skipped = f", {coverage.skipped} for images skipped" if coverage.skipped else ""
    return (
        f"lora: {make_printable(use.path.name)} at {use.strength:g}, {blocks}, {steps}: "
        f"{coverage.targets} targets{rank}{scale}, {coverage.style} naming{skipped}"
    )


def format_injection_table(shot: Shot) -> Iterator[str]:
    """Draw the injection table, one column per block: which share of its context is injected.

    What blocks read of pictures has lines of its own.
    """
    depth = shot.model.checkpoint.transformer_config.num_layers
    yield f"{'block':>16}  {draw_ruler(depth)}"
    for branch in shot.table.branches:
        for row, steps in shot.table.distinct_rows(branch).items():
            if any(not rule.image for rule in shot.rules):
                shares = injected_share_by_block(row, *shot.table.own_prompts(branch))
                yield f"{f'{branch} {format_ranges(steps)}':>16}  {draw_bar(shares)}"
            if shot.table.image and any(rule.image for rule in shot.rules):
                shares = injected_share_by_block(row, shot.table.image)
                yield f"{f'{branch} {format_ranges(steps)} image':>16}  {draw_bar(shares)}"


def format_cache(shot: Shot, cache: StepCache) -> Iterator[str]:
    """Draw which steps of each branch are computed, one column per step, and which reuse a residual."""
    yield f"{'cache':>16}  {truncate(describe_cache(shot, cache), 62)}"
    yield f"{'step':>16}  {draw_ruler(shot.steps)}"
    for branch in shot.table.branches:
        taken = shot.table.steps_by_branch[branch]
        strip = (
            " " if step not in taken else draw_bar([float((step, branch) not in cache.reused)])
            for step in range(shot.steps)
        )
        yield f"{branch:>16}  {''.join(strip)}"


def describe_cache(shot: Shot, cache: StepCache) -> str:
    """Describe a step cache: `18 of 50 forwards, 2.8x: magcache, threshold 0.24, ...`. The counts are those
    of each branch, or of all branches if these differ.
    """
    all_steps = [len(steps) for steps in shot.table.steps_by_branch.values()]
    computed = [n - len(reused) for n, (_, reused) in zip(all_steps, cache.steps, strict=True)]
    same = len({*zip(computed, all_steps)}) == 1
    some, of = (computed[0], all_steps[0]) if same else (sum(computed), sum(all_steps))
    settings = cache.settings
    return (
        f"{some} of {of} forwards, {of / some:.1f}x: {settings.method}, threshold {settings.threshold:g}, "
        f"skips {settings.skips}, retention {settings.retention:g}, table {settings.table}"
    )


def format_sigmas(shot: Shot, same: Shot) -> Iterator[str]:
    """Format the noise level of each step, seven to a line, or name the shot that has the `same` ones."""
    if same is not shot:
        yield f"{'sigma':>16}  as of shot {make_printable(same.id)}"
        return
    pairs = [f"{i}:{sigma:.3f}" for i, sigma in enumerate(shot.sigma_schedule.sigmas)]
    for start in range(0, len(pairs), 7):
        yield f"{'sigma' if start == 0 else '':>16}  " + " ".join(pairs[start : start + 7])
