"""The loop that every training stage runs in: steps that depend on nothing but their number, saved often.

A stage that is stopped anywhere goes on from its last save and ends with the same numbers, for the
data of step i are drawn from (seed, stage, i) alone.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from wancli.errors import JobError
from wancli.storage import atomic

Tensors: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, Any]


class Trainer(Protocol):
    """One stage: `step(i)` trains on batch i and returns its loss; `state` is all it needs to go on."""

    samples: int  # per step

    def step(self, i: int) -> Tensor: ...
    def state(self) -> State: ...
    def load(self, state: State) -> None: ...


@dataclass(frozen=True)
class Pace:
    """When to speak, to save and to stop. Times in seconds; `deadline` is one of time.monotonic()."""

    deadline: float = math.inf
    say_every: int = 50  # steps
    save_every: float = 120.0


def train(name: str, trainer: Trainer, steps: int, path: Path, pace: Pace) -> bool:
    """Runs a stage from where `path` says it stopped, and saves there. False if the deadline came first."""
    done = 0
    if path.exists():
        state = load(path)
        done = state.pop("step")
        trainer.load(state)
    if done >= steps:
        print(f"{name}: done, {done} steps")
        return True
    losses: list[Tensor] = []
    start = saved = said = time.monotonic()
    first = done
    for i in range(done, steps):
        losses.append(trainer.step(i).detach())
        done, now = i + 1, time.monotonic()
        if done % pace.say_every == 0 or done == steps:
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                raise JobError(f"the loss is {loss} at step {done}", where=name)
            rate = len(losses) / (now - said)
            eta = (steps - done) * (now - start) / (done - first)
            line = f"loss {loss:.5f}  {rate * trainer.samples:.1f} samples/s  ETA {eta / 60:.1f} min"
            print(f"{name}: step {done}/{steps}  {line}", flush=True)
            losses, said = [], now
        stopping = now > pace.deadline and done < steps
        if now - saved > pace.save_every or stopping:
            save(path, {"step": done} | trainer.state())
            saved = now
        if stopping:
            print(f"{name}: stopped at step {done} of {steps}; run it again to go on", flush=True)
            return False
    save(path, {"step": done} | trainer.state())
    return True


def save(path: Path, state: State) -> None:
    """Replaces the file atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic.replace(path, buffer.getvalue())


def load(path: Path) -> State:
    """What `save` wrote, on the CPU. Raises JobError when its stage has not run."""
    if not path.exists():
        raise JobError("not there yet", where=str(path), hint=f"Run the stage `{path.stem}` first.")
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def rng_of(seed: int, stage: str, i: int) -> random.Random:
    """The random numbers of step i."""
    return random.Random(f"{seed} {stage} {i}")


def torch_rng(rng: random.Random) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same on every machine."""
    return torch.Generator().manual_seed(rng.getrandbits(63))


def rate(i: int, steps: int, warmup: int = 100, floor: float = 0.03) -> float:
    """The factor on every learning rate at step i: up, flat for half of the way, a cosine down to `floor`."""
    rise = min(1.0, (i + 1) / warmup)
    fall = max(0.0, (i / steps - 0.5) * 2)
    return rise * (floor + (1 - floor) * (1 + math.cos(math.pi * fall)) / 2)


class Average:
    """A moving average of a network's parameters: long at the end, short in the beginning."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._live = dict(network.named_parameters())
        self._decay = decay
        self.tensors: Tensors = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self, i: int) -> None:
        decay = min(self._decay, (1 + i) / (10 + i))
        live = [p.detach() for p in self._live.values()]
        torch._foreach_lerp_(list(self.tensors.values()), live, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


def adamw(parameters: Sequence[nn.Parameter], betas: tuple[float, float] = (0.9, 0.98)) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=0.01)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def chunks(total: int, size: int) -> Iterator[range]:
    """0..total-1 in ranges of at most `size`."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
