"""The encode stage: the embeddings of prompts, each encoded once ever."""

from __future__ import annotations

from collections.abc import Sequence

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.engine.networks import prepare_device
from wancli.errors import ErrorCapture, JobError
from wancli.plan.model_spec import ModelSpec
from wancli.plan.shot import Prompt
from wancli.resources.measure import PeakMemory
from wancli.text.embedding import load_embedding
from wancli.text.encoder import Encoded, encode


def encode_prompts(
    model: ModelSpec, prompts: Sequence[Prompt], context: RenderContext
) -> tuple[dict[str, Encoded], Record]:
    """Encode every distinct prompt; return the embeddings by id, and the record of the phase.

    UMT5 is not in memory any more when it returns. Raises Stopped between two prompts, and at the end the
    error of the first prompt that failed.
    """
    encoded, errors, stage1 = encode_each(model, prompts, context)
    for attempt in errors.values():
        assert attempt.error
        raise attempt.error
    return encoded, stage1


def encode_each(
    model: ModelSpec, prompts: Sequence[Prompt], context: RenderContext
) -> tuple[dict[str, Encoded], dict[str, ErrorCapture], Record]:
    """Encode as `encode_prompts` does, and return the errors of prompts that failed by id."""
    import torch  # noqa: F401 - before the measurement, which does not include it

    prepare_device(model.device)
    texts = {prompt.id: prompt for prompt in prompts}
    missing = [
        id for id, text in texts.items() if not (text.file or (context.store and context.store.has(id)))
    ]
    encoded: dict[str, Encoded] = {}
    errors: dict[str, ErrorCapture] = {}
    with PeakMemory() as peak, context.progress.phase("encode", (), len(missing)) as bar:
        for prompt in texts.values():
            if prompt.file:
                with ErrorCapture() as attempt:
                    encoded[prompt.id] = Encoded(
                        prompt.id, load_embedding(prompt.file, prompt.index), hit=True
                    )
                errors |= {prompt.id: attempt} if attempt.error else {}
        for result in encode(model.encoder, [p.tokens for p in texts.values() if not p.file], context.store):
            if isinstance(result, Encoded):
                encoded[result.key] = result
            else:
                errors[result.key] = ErrorCapture()
                errors[result.key].record(result.error)
            if not (isinstance(result, Encoded) and result.hit):
                bar.advance()
            if context.stop.requested and len(encoded) + len(errors) < len(texts):
                raise context.stop.error(f"{len(encoded)} of {len(texts)} prompts encoded")
    width = model.checkpoint.transformer_config.text_dim
    for id, done in encoded.items():
        rows_NE = done.embedding.rows_NE
        if rows_NE.shape[1] != width:
            message = f"its rows are {rows_NE.shape[1]} wide, the model reads {width}"
            errors[id] = ErrorCapture()
            errors[id].record(JobError(message, where=str(texts[id].file or model.encoder.files[0])))
    return encoded, errors, manifest_body.phase_record("encode", peak)
