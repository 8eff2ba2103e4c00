"""The only file that knows the order of the phases: encode, load, sample, decode, write, record.

Each shot is on disk before the next begins, and its latent before its decoding begins; only where
two experts share the steps are the latents of several shots made together. `render` yields an
Outcome per shot; a ShotError ends one shot, any other WancliError ends the batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wancli import files, latents, manifest, memory, presets, record, underway, video
from wancli.encode import Encoded, encode, load_embedding
from wancli.errors import (
    CheckpointError,
    DoesNotFit,
    EntryError,
    JobError,
    MachineError,
    NotFinite,
    OutputExists,
    ShotError,
    WancliError,
)
from wancli.events import Progress
from wancli.experts import Expert
from wancli.record import Record
from wancli.shot import Model, Plan, Prompt, Shot
from wancli.store import Store
from wancli.underway import Underway
from wancli.weights.lora_use import LoraUse

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.dit import WanModel
    from wancli.models.vae import VAE
    from wancli.weights.lora import Lora, Loras, Patches


@dataclass(frozen=True)
class Outcome:
    """What became of one shot. `record` is the body of its manifest, if it has one."""

    shot: Shot
    status: Literal["rendered", "already done", "failed"]
    record: Record | None = None
    error: WancliError | None = None


@dataclass(frozen=True)
class Tools:
    """What every phase may use: the embedding cache, the display, and how to treat what is there."""

    store: Store | None
    progress: Progress
    force: bool = False


def preflight(plan: Plan, tools: Tools) -> list[Shot]:
    """The shots that are not done yet. Raises before anything slow starts.

    OutputExists lists every file in the way; MachineError when ffmpeg or a folder will not do;
    DoesNotFit when the machine has less memory than a shot needs.
    """
    wrong = {shot.index: manifest.problems(shot.output, shot.key) for shot in plan.shots}
    todo = [shot for shot in plan.shots if tools.force or wrong[shot.index] or _unmeasured(shot)]
    in_the_way = [
        shot
        for shot in todo
        if shot.output.exists() and wrong[shot.index] and not tools.force and not _unrecorded(shot)
    ]
    if in_the_way:
        reasons = {shot.output: wrong[shot.index][0].rpartition(": ")[2] for shot in in_the_way}
        raise OutputExists(
            "\n".join(
                f"{p} exists, and is not what this job makes now ({why})" for p, why in reasons.items()
            ),
            hint="--force moves it aside; or change `output`.",
        )
    for device in {device for shot in todo for device in (shot.model.device, shot.noise)}:
        check_device(device)
    for folder in dict.fromkeys(shot.output.parent for shot in todo):
        files.writable(folder)
    for codec in dict.fromkeys(shot.codec for shot in todo):
        video.check_ffmpeg(codec)
    for shot in todo:
        if shot.model.device == "cpu":
            encoded = all(text.file or _cached(text, tools) for text in shot.texts)
            phases = [phase for phase in shot.phases if phase.name != "encode" or not encoded]
            memory.require(phases, memory.available(), f"shot {shot.id}")
    return todo


def _unmeasured(shot: Shot) -> bool:
    """Whether a finished shot's injections should be measured and were not. Its pixels stay the same."""
    body = manifest.read(shot.manifest) if shot.measure else None
    return body is not None and _lacks_effects(shot, body)


def _lacks_effects(shot: Shot, facts: Record) -> bool:
    return shot.measure and any(rule.on for rule in shot.rules) and not facts["effects"]


def _unrecorded(shot: Shot) -> bool:
    """Whether a run may have died between the video of this shot and its manifest: then its latent is
    still there. The video is made once more, and publishing the same bytes is no overwriting."""
    if shot.manifest.exists():
        return False
    try:
        return bool(latents.load(shot.latents)[1]["key"] == shot.key)
    except EntryError:
        return False


def _cached(text: Prompt, tools: Tools) -> bool:
    return tools.store is not None and tools.store.path(text.id).exists()


def check_device(device: str) -> None:
    """Raises MachineError where a plan says `cuda` and torch has none."""
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "torch can use no CUDA device here",
            hint="Set memory.device: cpu and noise: cpu, or look at nvidia-smi.",
        )


def render(plan: Plan, tools: Tools) -> Iterator[Outcome]:
    """Renders what `preflight` leaves to do, one checkpoint after the other."""
    todo = preflight(plan, tools)
    pending = {shot.index for shot in todo}
    for shot in plan.shots:
        if shot.index not in pending:
            yield Outcome(shot, "already done", manifest.read(shot.manifest))
    for model in dict.fromkeys(shot.model for shot in todo):
        yield from _render_all(model, [shot for shot in todo if shot.model == model], tools)


def _render_all(model: Model, shots: Sequence[Shot], tools: Tools) -> Iterator[Outcome]:
    recalled = {shot.index for shot in shots if not tools.force and _recalled(shot)}
    texts = [text for shot in shots if shot.index not in recalled for text in shot.texts]
    try:
        with _fitting("encoding prompts"):
            encoded, stage1 = encode_prompts(model, texts, tools)
    except ShotError as error:
        yield from (Outcome(shot, "failed", error=error) for shot in shots if shot.index not in recalled)
        shots = [shot for shot in shots if shot.index in recalled]
        encoded, stage1 = {}, {}
    networks = Networks(model)
    for group in underway.together(shots):
        yield from _render_together(group, recalled, encoded, stage1, networks, tools)


def _render_together(
    shots: Sequence[Shot],
    recalled: set[int],
    encoded: dict[str, Encoded],
    stage1: Record,
    networks: Networks,
    tools: Tools,
) -> Iterator[Outcome]:
    """Noise to latents, an expert loaded once for all shots; then latents to videos, shot by shot."""
    ready = {shot.index: known for shot in shots if shot.index in recalled and (known := _recalled(shot))}
    begun = {shot.index: Underway(shot) for shot in shots if shot.index not in ready}
    for shot, stage in underway.by_expert(shots):
        if shot.index not in begun:  # recalled or failed
            continue
        try:
            with _fitting(f"shot {shot.id}"):
                # Without a name for the network, which would keep this expert in memory beside the next.
                underway.advance(
                    begun[shot.index],
                    stage,
                    networks.transformer(stage.expert),
                    networks.loading,
                    networks.patches,
                    networks.loras(shot.loras),
                    encoded,
                    tools.progress,
                )
                if stage == shot.stages[-1]:
                    loras = networks.loras(shot.loras)
                    ready[shot.index] = underway.keep(begun.pop(shot.index), encoded, loras, stage1)
        except ShotError as error:
            begun.pop(shot.index, None)
            yield Outcome(shot, "failed", error=error)
    for shot in shots:
        if shot.index not in ready:
            continue
        try:
            with _fitting(f"shot {shot.id}"):
                body = finish(*ready.pop(shot.index), shot.output, networks.vae, tools)
        except ShotError as error:
            yield Outcome(shot, "failed", error=error)
        else:
            if not shot.keep_latents:
                with files.writing(shot.latents):
                    shot.latents.unlink(missing_ok=True)
            yield Outcome(shot, "rendered", body)


@contextmanager
def _fitting(where: str) -> Iterator[None]:
    """Running out of memory ends with DoesNotFit, whatever the allocator calls it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch says "CUDA out of memory" and "DefaultCPUAllocator: can't allocate memory".
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise DoesNotFit(
            "out of memory",
            where=where,
            hint="Fewer frames, a smaller size, or memory.decode_chunk: 1. A finished latent is kept.",
        ) from error


@dataclass
class Networks:
    """The networks of a checkpoint, loaded when first used and kept for the next shot, of two experts one."""

    model: Model
    loading: Record = field(default_factory=dict)  # what loading the transformer took
    _loaded: tuple[Expert, WanModel] | None = None
    _patches: Patches | None = None  # of the network that is loaded
    _loras: dict[str, Lora] = field(default_factory=dict)  # by SHA-256

    def transformer(self, expert: Expert) -> WanModel:
        """The network of an expert; the other one makes room first."""
        if self._loaded and self._loaded[0] == expert:
            return self._loaded[1]
        import torch

        from wancli.weights.networks import load_transformer

        self._loaded = self._patches = None
        with memory.Peak() as peak:
            network = load_transformer(
                self.model.checkpoint,
                getattr(torch, _TORCH[self.model.computes]),
                self.model.device,
                expert,
                self.model.residency,
                self._fetched,
                self.model.dtype == "fp8",
            )
        self.loading = record.phase("load", peak)
        self._loaded = expert, network
        return network

    def _fetched(self, name: str, weight: Tensor) -> None:
        """Puts the LoRAs of the step into a weight that was just fetched."""
        if self._patches:
            self._patches.into(name, weight)

    @property
    def patches(self) -> Patches:
        """What puts LoRAs into the transformer that is loaded, and takes them out again."""
        from wancli.weights.lora import Patches
        from wancli.weights.networks import transformer_tensors

        assert self._loaded
        if self._patches is None:
            expert, network = self._loaded
            base = partial(transformer_tensors, self.model.checkpoint, expert=expert)
            self._patches = Patches(dict(network.named_parameters()), base)
        return self._patches

    def loras(self, uses: Sequence[LoraUse]) -> Loras:
        """The LoRAs of a shot, each file read once."""
        from wancli.weights.lora import Loras, load
        from wancli.weights.sizes import parameter_shapes

        shapes = parameter_shapes(self.model.checkpoint.transformer)
        for use in uses:
            if use.sha256 not in self._loras:
                self._loras[use.sha256] = load(use.path, shapes)
        return Loras(uses, [self._loras[use.sha256] for use in uses])

    @cached_property
    def vae(self) -> VAE:
        from wancli.weights.networks import load_vae

        return load_vae(self.model.checkpoint, self.model.device)


_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def encode_prompts(
    model: Model, prompts: Sequence[Prompt], tools: Tools
) -> tuple[dict[str, Encoded], Record]:
    """Stage 1: every distinct prompt's embedding by id, and what it took. UMT5 is gone when it returns."""
    import torch  # noqa: F401 - before the measurement, which is of what comes on top

    check_device(model.device)
    texts = {prompt.id: prompt for prompt in prompts}
    found: dict[str, Encoded] = {}
    with memory.Peak() as peak, tools.progress.phase("prompts", "encode", len(texts)) as bar:
        for prompt in texts.values():
            if prompt.file:
                found[prompt.id] = Encoded(prompt.id, load_embedding(prompt.file, prompt.index), hit=True)
                bar.advance()
        for result in encode(model.encoder, [p.tokens for p in texts.values() if not p.file], tools.store):
            found[result.key] = result
            bar.advance()
    width = model.checkpoint.transformer.text_dim
    for prompt in texts.values():
        rows_NE = found[prompt.id].embedding.rows_NE
        if rows_NE.shape[1] != width:
            message = f"its rows are {rows_NE.shape[1]} wide, the model reads {width}"
            raise JobError(message, where=str(prompt.file or model.encoder.files[0]))
    return found, record.phase("encode", peak)


def _recalled(shot: Shot) -> tuple[Tensor, Record] | None:
    """The latent that an earlier run left for this shot, whose video may have changed since."""
    try:
        z_CTYX, facts = latents.load(shot.latents)
    except EntryError:
        return None
    if facts["latents_key"] != shot.latents_key or _lacks_effects(shot, facts):
        return None
    return z_CTYX, facts | record.plain(record.of_shot(shot))


def decode_file(path: Path, output: Path | None, folder: Path | None, memo: Path, tools: Tools) -> Path:
    """`wancli decode`: finishes a shot from its latent, into the output it was made for or another.

    The checkpoint is that of the record unless `folder` names it; the latent stays. Raises
    EntryError for a damaged latent, CheckpointError for another VAE than the shot was planned with.
    """
    from wancli.weights.identify import fingerprint, identify
    from wancli.weights.networks import load_vae

    if not path.exists():
        raise JobError("no such file", where=str(path))
    z_CTYX, facts = latents.load(path)
    output = output or path.with_name(facts["shot"]["output"])
    if output.exists() and not tools.force:
        raise OutputExists(
            "exists", where=str(output), hint="--force moves it aside; or give -o another name."
        )
    video.check_ffmpeg(facts["shot"]["codec"])
    if folder:
        source = presets.resolve(str(folder), Path.cwd(), lambda *_: "--model")
    else:
        source = record.source_of(facts["model"])
    checkpoint = identify(source)
    if fingerprint(checkpoint.vae_files, memo) != facts["model"]["sha256"]["vae"]:
        raise CheckpointError(
            "not the VAE that this latent was planned with",
            where=str(checkpoint.vae_files[0]),
            hint="--model DIR names the checkpoint to decode with.",
        )
    with _fitting(str(path)):
        finish(z_CTYX, facts, output, load_vae(checkpoint, facts["model"]["device"]), tools)
    return output


def finish(z_CTYX: Tensor, facts: Record, output: Path, vae: VAE, tools: Tools) -> Record:
    """Stage 3: decodes a latent into `output` and writes its manifest; returns the manifest's body."""
    import torch

    shot = facts["shot"]
    with (
        torch.inference_mode(),
        memory.Peak() as peak,
        tools.progress.phase(shot["id"], "decode", shot["frames"]) as bar,
    ):

        def rgb() -> Iterator[memoryview]:
            for frames_CTYX in vae.decode(z_CTYX.to(next(vae.parameters()).device), shot["decode_chunk"]):
                if not frames_CTYX.isfinite().all():
                    raise NotFinite("NaN or Inf in the decoded frames", where=f"shot {shot['id']}")
                yield video.to_rgb24(frames_CTYX)
                bar.advance(frames_CTYX.shape[1])
            if tools.force:  # not before there is something to put in their place
                files.set_aside(output)
                files.set_aside(manifest.manifest_path(output))

        video.write_mp4(
            rgb(),
            output,
            width=shot["width"],
            height=shot["height"],
            fps=shot["fps"],
            frame_count=shot["frames"],
            crf=shot["crf"],
            codec=shot["codec"],
            comment=f"wancli {shot['id']} {facts['key'][:16]}",
        )
    body = facts | {
        "phases": [*facts["phases"], record.phase("decode", peak)],
        "files": [manifest.file_record(output, output.parent)],
    }
    manifest.write(manifest.manifest_path(output), body)
    return body
