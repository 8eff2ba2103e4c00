"""Stage 1: the embeddings of prompts, each encoded once ever."""

from __future__ import annotations

from collections.abc import Sequence

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.engine.networks import check_device
from wancli.errors import ErrorCapture, JobError
from wancli.plan.shot import Model, Prompt
from wancli.resources.measure import Peak
from wancli.text.embedding import load_embedding
from wancli.text.encoder import Encoded, encode


def embed(model: Model, prompts: Sequence[Prompt], tools: RenderContext) -> tuple[dict[str, Encoded], Record]:
    """Stage 1: every distinct prompt's embedding by id, and what it took. UMT5 is gone when it returns.

    Raises Stopped between two prompts, and in the end what went wrong with the first that failed."""
    found, failed, stage1 = embed_each(model, prompts, tools)
    for attempt in failed.values():
        assert attempt.error
        raise attempt.error
    return found, stage1


def embed_each(
    model: Model, prompts: Sequence[Prompt], tools: RenderContext
) -> tuple[dict[str, Encoded], dict[str, ErrorCapture], Record]:
    """As `embed`, with those that failed by id."""
    import torch  # noqa: F401 - before the measurement, which is of what comes on top

    check_device(model.device)
    texts = {prompt.id: prompt for prompt in prompts}
    found: dict[str, Encoded] = {}
    failed: dict[str, ErrorCapture] = {}
    with Peak() as peak, tools.progress.phase("encode", (), len(texts)) as bar:
        for prompt in texts.values():
            if prompt.file:
                with ErrorCapture() as attempt:
                    found[prompt.id] = Encoded(prompt.id, load_embedding(prompt.file, prompt.index), hit=True)
                failed |= {prompt.id: attempt} if attempt.error else {}
                bar.advance()
        for result in encode(model.encoder, [p.tokens for p in texts.values() if not p.file], tools.store):
            if isinstance(result, Encoded):
                found[result.key] = result
            else:
                failed[result.key] = ErrorCapture()
                failed[result.key].record(result.error)
            bar.advance()
            if tools.stop.requested and len(found) + len(failed) < len(texts):
                raise tools.stop.error(f"{len(found)} of {len(texts)} prompts encoded")
    width = model.checkpoint.transformer.text_dim
    for id, done in found.items():
        rows_NE = done.embedding.rows_NE
        if rows_NE.shape[1] != width:
            message = f"its rows are {rows_NE.shape[1]} wide, the model reads {width}"
            failed[id] = ErrorCapture()
            failed[id].record(JobError(message, where=str(texts[id].file or model.encoder.files[0])))
    return found, failed, manifest_body.phase("encode", peak)
