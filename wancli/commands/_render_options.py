"""The options of `wancli render`: one value, with one parser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.commands._common import collect_flags
from wancli.commands._option_groups import takes_groups
from wancli.commands._options import (
    Address,
    CacheDir,
    CpusPerWorker,
    Engine,
    EngineOption,
    FailFast,
    ForceOption,
    Items,
    Json,
    JsonEvents,
    LogLevel,
    LogLevelOption,
    MaxFailures,
    NoWait,
    Picks,
    Quiet,
    RenderProgress,
    RenderProgressOption,
    Retries,
    SaveEvery,
    Sets,
    Shard,
    Socket,
    Sweeps,
)
from wancli.errors import JobError, UsageError

if TYPE_CHECKING:
    from wancli.engine.outcome import FailurePolicy
    from wancli.job.cli_overrides import CliOverrides


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """The arguments and options of one `wancli render`. Each field is a parameter of the command."""

    job: Annotated[str | None, typer.Argument(metavar="JOB", help="A job file; - reads it from stdin.")] = (
        None
    )
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instead of a job: render one video of this prompt, with wan-mini or --model.",
        ),
    ] = None
    image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --prompt: the picture that the video begins with."),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|DIR",
            help="The video of --prompt, default {slug}.mp4; or the folder of a job's videos, named by id.",
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A folder, a file, or a name, as `model` in a job."),
    ] = None
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="The negative prompt.")] = None
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height: 832x480.")] = None
    frames: Annotated[int | None, typer.Option(metavar="N", help="4n+1 frames: 33.")] = None
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the sampler.")] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="The seed of the noise.")] = None
    save_job: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --prompt: also write the job that this command line means."),
    ] = None
    sets: Sets = None
    sweeps: Sweeps = None
    items: Items = None
    picks: Picks = None
    shard: Shard = None
    save_every: SaveEvery = None
    fail_fast: FailFast = False
    max_failures: MaxFailures = None
    retries: Retries = 0
    no_wait: NoWait = False
    engine: EngineOption = Engine.local
    address: Address = None
    cpus_per_worker: CpusPerWorker = None
    force: ForceOption = False
    as_json: Json = False
    json_stream: JsonEvents = False
    cache_dir: CacheDir = None
    socket: Socket = None  # read by wancli.__main__, before this module is imported
    log_level: LogLevelOption = LogLevel.basic
    progress: RenderProgressOption = RenderProgress.auto
    quiet: Quiet = False

    @classmethod
    def parse(cls, words: Sequence[str]) -> RenderOptions:
        """Parse the words after `wancli render`. Raises what that command line would raise."""
        app = typer.Typer(add_completion=False, rich_markup_mode=None)

        @app.command()
        @takes_groups
        def _(options: RenderOptions) -> RenderOptions:
            return options

        options = typer.main.get_command(app)([*words], prog_name="wancli render", standalone_mode=False)
        if not isinstance(options, cls):  # --help, which has printed its text
            raise typer.Exit
        return options

    @property
    def flags(self) -> CliOverrides:
        """The options that change the job, and choose from its shots."""
        sets = [*self._key_settings(), *(self.sets or [])]
        if self.save_every is not None:
            sets.append(f"save_every={self.save_every}")
        if self.job is not None and self.output is not None:
            sets.append(f"output={_name_job_outputs(self.output)}")
        return collect_flags(sets, self.sweeps, self.items, self.shard, self.picks)

    def _key_settings(self) -> Iterator[str]:
        """Yield what the options that are keys of a job set. Raises UsageError if --set has one, too."""
        texts = {"model": self.model, "negative": self.negative, "size": self.size}
        numbers = {"frames": self.frames, "sampler.steps": self.steps, "seed": self.seed}
        said = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items() if text is not None}
        said |= {key: str(number) for key, number in numbers.items() if number is not None}
        keys = [text.partition("=")[0].strip() for text in self.sets or []]
        for key, value in said.items():
            if key in keys:
                option = f"--{key.removeprefix('sampler.')}"
                raise UsageError(f"{option} and --set {key} set the same key", hint="Give one of them.")
            yield f"{key}={value}"

    @property
    def failure_policy(self) -> FailurePolicy:
        """When failed shots stop the batch, and how often one is retried. Raises JobError."""
        from wancli.engine.outcome import FailurePolicy

        if self.fail_fast and self.max_failures is not None:
            raise JobError("--fail-fast is --max-failures 1; give one of them")
        return FailurePolicy(1 if self.fail_fast else self.max_failures, self.retries)

    @property
    def measures_effects(self) -> bool:
        """Whether to measure and report what injections change."""
        return self.log_level in (LogLevel.verbose, LogLevel.trace)

    @property
    def prints_paths(self) -> bool:
        """Whether stdout gets the path of each finished shot."""
        return not (self.as_json or self.json_stream)


def _name_job_outputs(output: str) -> str:
    """Return the output template of a job's shots: a folder has them by id, a name with a suffix is one."""
    return (
        output if PurePath(output).suffix and not output.endswith("/") else f"{output.rstrip('/')}/{{id}}.mp4"
    )
