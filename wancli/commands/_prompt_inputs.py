"""Read the prompts of `wancli encode` and `wancli diff`, encode them and compare them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli import wan_mini
from wancli.engine import encode_stage
from wancli.engine.context import RenderContext
from wancli.engine.networks import Networks
from wancli.errors import JobError, OutputExists
from wancli.job.cli_overrides import NO_OVERRIDES, CliOverrides
from wancli.job.loader import JobFile, load, parse
from wancli.plan import memory_estimate, memory_policy, model_registry
from wancli.plan.model_spec import ModelSpec
from wancli.plan.planner import build_plan, resolve_model
from wancli.plan.prompts import tokenize
from wancli.plan.shot import Prompt, Shot
from wancli.storage import disk, records
from wancli.text.embedding import Role, read_tokens, save_embeddings
from wancli.text.encoder import Encoded

if TYPE_CHECKING:
    from wancli.text.prompt_distance import PromptDistance

JOB_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for the encoder of one checkpoint, in the order of the command line."""

    model: ModelSpec
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class PromptPair:
    """Two prompts to compare as a model reads them."""

    model: ModelSpec
    a: Prompt
    b: Prompt


def read_prompts(
    what: Sequence[str],
    folder: Path | None,
    max_tokens: int,
    truncate: bool,
    hashes: Path,
    flags: CliOverrides = NO_OVERRIDES,
) -> list[PromptBatch]:
    """Read the arguments of `wancli encode`: job files, prompts, and `-` for either on stdin.

    `flags` change every job, and choose from its shots.
    """
    if max_tokens not in (256, 512):
        raise JobError(f"{max_tokens} is not 256 or 512", where="--max-tokens")
    inputs: list[JobFile | str] = []
    for argument in what:
        if argument == "-":
            data = sys.stdin.buffer.read()
            if re.search(rb"(?m)^(?:prompt|items|matrix|prompts_from|images_from|extends):|\A\s*\{", data):
                inputs.append(parse(data, "stdin", "stdin", Path.cwd(), flags))
            else:
                inputs += [
                    line for line in data.decode(errors="surrogateescape").splitlines() if line.strip()
                ]
        else:
            inputs.append(load(Path(argument), flags) if argument.endswith(JOB_SUFFIXES) else argument)
    if not inputs:
        raise JobError("no prompts to encode", where="stdin")
    if not any(isinstance(item, JobFile) for item in inputs):
        _reject_flags(flags)
    batches: list[PromptBatch] = []
    for are_texts, group in groupby(inputs, key=lambda item: isinstance(item, str)):
        if are_texts:
            batches += tokenize_texts([*map(str, group)], folder, max_tokens, truncate, hashes)
        else:
            for job in group:
                assert isinstance(job, JobFile)
                batches += _collect_job_prompts(job, hashes)
    return batches


def list_roles(
    what: Sequence[str], toward: Sequence[str], away: Sequence[str], out: Path | None
) -> tuple[list[str], list[Role]]:
    """Return the prompts to encode and, if they are for steering, the role of each. Raises JobError."""
    if not toward and not away:
        if not what:
            raise JobError("no prompts to encode", hint='wancli encode "a prompt", or a job file, or -')
        return [*what], []
    if what or out is None:
        hint = "Give --out FILE, and no prompts but those."
        raise JobError("--toward and --away write a file for `steer`", hint=hint)
    roles: list[Role] = ["toward"] * len(toward)
    roles += ["away"] * len(away)
    return [*toward, *away], roles


def tokenize_texts(
    texts: Sequence[str], folder: Path | None, max_tokens: int, truncate: bool, hashes: Path
) -> list[PromptBatch]:
    """Tokenize prompts of the command line for one model."""
    if max_tokens not in (256, 512):
        raise JobError(f"{max_tokens} is not 256 or 512", where="--max-tokens")
    model = _resolve_model(folder, hashes)
    return [PromptBatch(model, tuple(tokenize(model, text, max_tokens, truncate) for text in texts))]


def encode_prompts(
    batches: Sequence[PromptBatch], out: Path | None, context: RenderContext, roles: Sequence[Role] = ()
) -> list[dict[str, Any]]:
    """Encode all prompts and return one row for each. With `out`, write the embeddings to one new file."""
    encoded: list[Encoded] = []
    for batch in batches:
        by_id, _ = encode_stage.encode_prompts(batch.model, batch.prompts, context)
        encoded += [by_id[prompt.id] for prompt in batch.prompts]
    if out:
        try:
            save_embeddings(out, [e.embedding for e in encoded], roles)
        except OutputExists as error:
            raise OutputExists(error.message, where=error.where, hint="Give --out another name.") from None
    return [
        {
            "index": index,
            "key": e.key,
            "text": e.embedding.text,
            "tokens": len(e.embedding.ids),
            "truncated": e.embedding.truncated,
            "cached": e.hit,
        }
        for index, e in enumerate(encoded)
    ]


def read_pairs(
    prompts: Sequence[str],
    file: Path | None,
    folder: Path | None,
    hashes: Path,
    flags: CliOverrides = NO_OVERRIDES,
) -> list[PromptPair]:
    """Read the arguments of `wancli diff`: two texts, or a file with pairs.

    A job file pairs its prompt with each injected one; of a prompt over time each segment, and the segments
    that follow each other. A text file has two prompts with an empty line
    between. Of an embedding file the first two embeddings are a pair.
    """
    if len(prompts) != (2 if file is None else 0):
        raise JobError(
            "give two prompts, or --file FILE", hint='wancli diff "prompt A" "prompt B" --model DIR'
        )
    if file is None or file.suffix not in JOB_SUFFIXES:
        _reject_flags(flags)
    if file is None:
        model = _resolve_model(folder, hashes)
        a, b = (tokenize(model, text, 512, False) for text in prompts)
        return [PromptPair(model, a, b)]
    if file.suffix in JOB_SUFFIXES:
        shots = build_plan(load(file, flags), hashes).shots
        pairs = {(pair.model, pair.a.id, pair.b.id): pair for shot in shots for pair in _pair_prompts(shot)}
        if not pairs:
            raise JobError("injects no prompt, so there is nothing to compare", where=str(file))
        return list(pairs.values())
    is_embedding = file.suffix == ".safetensors"
    with disk.reading_for_job(str(file)):
        data = records.read(file, records.EMBEDDING) if is_embedding else _read_any(file)
    model = _resolve_model(folder, hashes)
    if is_embedding:
        tokens = read_tokens(data, str(file))
        if len(tokens) < 2:
            raise JobError("holds one embedding; two are needed", where=str(file))
        a, b = (Prompt(f"{file}.{i}", tokens[i], file, i) for i in (0, 1))
        return [PromptPair(model, a, b)]
    texts = [part for part in re.split(r"\r?\n\r?\n", data.decode(errors="surrogateescape")) if part.strip()]
    if len(texts) != 2:
        raise JobError(f"holds {len(texts)} prompts; two are needed, an empty line between", where=str(file))
    a, b = (tokenize(model, text, 512, False) for text in texts)
    return [PromptPair(model, a, b)]


def _pair_prompts(shot: Shot) -> Iterator[PromptPair]:
    segments = (shot.prompt, *shot.later_prompts)
    for segment in segments:
        yield from (PromptPair(shot.model, segment, other) for other in shot.injected_prompts)
    for before, after in pairwise(segments):
        yield PromptPair(shot.model, before, after)


def _read_any(file: Path) -> bytes:
    """Read a text of the user, which may come through a pipe."""
    with disk.opened(file, pipes=True) as opened:
        return opened.read()


def compare_pair(pair: PromptPair, context: RenderContext, *, dit: bool) -> PromptDistance:
    """Measure how different two prompts are; with `dit` also after the text projection and in every block."""
    from wancli.text.prompt_distance import compare

    by_id, _ = encode_stage.encode_prompts(pair.model, [pair.a, pair.b], context)
    model = Networks(pair.model).transformer(pair.model.first_expert) if dit else None
    difference = compare(by_id[pair.a.id].embedding, by_id[pair.b.id].embedding, model)
    if pair.model.checkpoint.root != wan_mini.FOLDER:
        return difference
    unknown = wan_mini.find_unknown_words([*pair.a.tokens.pieces[:-1], *pair.b.tokens.pieces])
    hints = [f"{', '.join(unknown)}? {wan_mini.SUBJECTS_HINT}"] if unknown else []
    return replace(difference, hints=(*hints, wan_mini.DIFFERENCES_HINT))


def _reject_flags(flags: CliOverrides) -> None:
    if flags != NO_OVERRIDES:
        raise JobError("--set, --sweep, --items, --pick and --shard are for a job, and none was given")


def _collect_job_prompts(job: JobFile, hashes: Path) -> list[PromptBatch]:
    """Collect the distinct prompts of a job, one batch for each of its models."""
    by_model: dict[ModelSpec, dict[str, Prompt]] = {}
    for shot in build_plan(job, hashes).shots:
        by_model.setdefault(shot.model, {}).update({p.id: p for p in shot.prompts})
    return [PromptBatch(model, tuple(prompts.values())) for model, prompts in by_model.items()]


def _resolve_model(folder: Path | None, hashes: Path) -> ModelSpec:
    """Resolve --model; stream the text encoder if it does not fit in memory."""
    name = str(folder) if folder else wan_mini.NAME
    model = resolve_model(
        model_registry.resolve_model(name, lambda *_: Path.cwd(), lambda *_: "--model"),
        "auto",
        "auto",
        hashes,
    )
    longest = memory_estimate.predict_encoding(model, [512])
    if memory_estimate.process_bytes(model) + longest.total > memory_policy.read_free_memory(model.device):
        return memory_policy.with_encoder_residency(model, "streamed")
    return model
