"""`wancli encode` and `wancli diff`: which prompts they were given, and stage 1 run on these."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
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
from wancli.plan.planner import build_plan, resolve_model
from wancli.plan.shot import ModelSpec, Prompt
from wancli.text.embedding import read_tokens, save_embeddings
from wancli.text.encoder import Encoded
from wancli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from wancli.text.prompt_distance import PromptDistance

JOB_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for one checkpoint's encoder, in the order they were given."""

    model: ModelSpec
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class PromptPair:
    """Two prompts to be compared as a model reads them."""

    model: ModelSpec
    a: Prompt
    b: Prompt


def read_prompts(
    what: Sequence[str],
    folder: Path | None,
    max_tokens: int,
    truncate: bool,
    memo: Path,
    flags: CliOverrides = NO_OVERRIDES,
) -> list[PromptBatch]:
    """What `wancli encode` was asked for: job files, prompts, and `-` for either on stdin.

    `flags` change and choose from every job.
    """
    if max_tokens not in (256, 512):
        raise JobError(f"{max_tokens} is not 256 or 512", where="--max-tokens")
    said: list[JobFile | str] = []
    for argument in what:
        if argument == "-":
            data = sys.stdin.buffer.read()
            if re.search(rb"(?m)^(?:prompt|items|matrix|prompts_from|extends):|\A\s*\{", data):
                said.append(parse(data, "stdin", "stdin", Path.cwd(), flags))
            else:
                said += [line for line in data.decode(errors="surrogateescape").splitlines() if line.strip()]
        else:
            said.append(load(Path(argument), flags) if argument.endswith(JOB_SUFFIXES) else argument)
    if not said:
        raise JobError("no prompts to encode", where="stdin")
    if not any(isinstance(one, JobFile) for one in said):
        _reject_flags(flags)
    work: list[PromptBatch] = []
    for are_texts, several in groupby(said, key=lambda one: isinstance(one, str)):
        if are_texts:
            model = _resolve_model(folder, memo)
            work.append(
                PromptBatch(
                    model, tuple(tokenize_prompt(model, str(text), max_tokens, truncate) for text in several)
                )
            )
        else:
            work += [
                one for job in several if isinstance(job, JobFile) for one in _collect_job_prompts(job, memo)
            ]
    return work


def encode_prompts(
    work: Sequence[PromptBatch], out: Path | None, tools: RenderContext
) -> list[dict[str, Any]]:
    """Encodes; with `out` also writes all embeddings, in order, to one new file. One row per prompt."""
    encoded: list[Encoded] = []
    for one in work:
        found, _ = encode_stage.encode_prompts(one.model, one.prompts, tools)
        encoded += [found[prompt.id] for prompt in one.prompts]
    if out:
        try:
            save_embeddings(out, [e.embedding for e in encoded])
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
    memo: Path,
    flags: CliOverrides = NO_OVERRIDES,
) -> list[PromptPair]:
    """What `wancli diff` was asked for: two texts, or the pairs that a file holds.

    A job file gives its prompt against each injected one; a text file two prompts with an empty
    line between; an embedding file its first two embeddings.
    """
    if len(prompts) != (2 if file is None else 0):
        raise JobError(
            "give two prompts, or --file FILE", hint='wancli diff "prompt A" "prompt B" --model DIR'
        )
    if file is None or file.suffix not in JOB_SUFFIXES:
        _reject_flags(flags)
    if file is None:
        model = _resolve_model(folder, memo)
        a, b = (tokenize_prompt(model, text, 512, False) for text in prompts)
        return [PromptPair(model, a, b)]
    if file.suffix in JOB_SUFFIXES:
        shots = build_plan(load(file, flags), memo).shots
        found = {
            (s.model, s.prompt.id, p.id): PromptPair(s.model, s.prompt, p) for s in shots for p in s.injected
        }
        if not found:
            raise JobError("injects no prompt, so there is nothing to compare", where=str(file))
        return list(found.values())
    try:
        data = file.read_bytes()
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}", where=str(file)) from None
    model = _resolve_model(folder, memo)
    if file.suffix == ".safetensors":
        tokens = read_tokens(data, str(file))
        if len(tokens) < 2:
            raise JobError("holds one embedding; two are needed", where=str(file))
        a, b = (Prompt(f"{file}.{i}", tokens[i], file, i) for i in (0, 1))
        return [PromptPair(model, a, b)]
    texts = [part for part in re.split(r"\r?\n\r?\n", data.decode(errors="surrogateescape")) if part.strip()]
    if len(texts) != 2:
        raise JobError(f"holds {len(texts)} prompts; two are needed, an empty line between", where=str(file))
    a, b = (tokenize_prompt(model, text, 512, False) for text in texts)
    return [PromptPair(model, a, b)]


def compare_pair(pair: PromptPair, tools: RenderContext, *, dit: bool) -> PromptDistance:
    """All figures of two prompts; with `dit` also behind the text projection and in every block."""
    from wancli.text.prompt_distance import compare

    found, _ = encode_stage.encode_prompts(pair.model, [pair.a, pair.b], tools)
    model = Networks(pair.model).transformer(pair.model.first_expert) if dit else None
    difference = compare(found[pair.a.id].embedding, found[pair.b.id].embedding, model)
    if pair.model.checkpoint.root != wan_mini.FOLDER:
        return difference
    unknown = wan_mini.find_unknown_words([*pair.a.tokens.pieces[:-1], *pair.b.tokens.pieces])
    said = [f"{', '.join(unknown)}? {wan_mini.SUBJECTS_HINT}"] if unknown else []
    return replace(difference, hints=(*said, wan_mini.DIFFERENCES_HINT))


def _reject_flags(flags: CliOverrides) -> None:
    if flags != NO_OVERRIDES:
        raise JobError("--set, --sweep, --items and --shard are for a job, and none was given")


def tokenize_prompt(model: ModelSpec, text: str, max_tokens: int, truncate: bool) -> Prompt:
    tokens = Tokenizer(model.checkpoint.tokenizer).tokenize(text, max_tokens, truncate)
    return Prompt(model.encoder.key(tokens), tokens)


def _collect_job_prompts(job: JobFile, memo: Path) -> list[PromptBatch]:
    by_model: dict[ModelSpec, dict[str, Prompt]] = {}
    for shot in build_plan(job, memo).shots:
        by_model.setdefault(shot.model, {}).update({p.id: p for p in shot.prompts})
    return [PromptBatch(model, tuple(prompts.values())) for model, prompts in by_model.items()]


def _resolve_model(folder: Path | None, memo: Path) -> ModelSpec:
    said = str(folder) if folder else wan_mini.NAME
    model = resolve_model(
        model_registry.resolve_model(said, lambda *_: Path.cwd(), lambda *_: "--model"), "auto", "auto", memo
    )
    longest = memory_estimate.predict_encoding(model, [512])
    if memory_estimate.process_bytes(model) + longest.total > memory_policy.memory_limit(model):
        return memory_policy.with_encoder_residency(model, "streamed")
    return model
