"""Which shots are sampled together.

Where weights are fetched for every pass over the blocks, shots that take the same steps share it: they
form a group, and go in lock-step. Groups form a wave where two experts share the steps: all of them
take their high-noise steps before the expert is changed; and where shots agree on their first steps: these
are taken once, see `wancli.plan.prefix_sharing`. Which shots share what changes no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from wancli.plan import memory_estimate, memory_policy
from wancli.plan.prefix_sharing import Fork, PrefixTree
from wancli.plan.shot import ModelSpec, Shared, Shot
from wancli.resources.memory_model import FP32, Phase

MAX_BATCH = 8  # shots in a group that the user said nothing of: what is gained by one more is little then
MAX_CLAIMED = (
    8  # shots that a worker claims at once: one sweep is work for many, and more would share little more
)
MAX_WAITING_BYTES = 2 * 2**30  # for states that wait: for the other expert, or for those that fork from them
STATE_TENSORS = 4  # the latent, and with UniPC two x0 and the last latent

Group = list[Shot]


def waves(shots: Sequence[Shot]) -> list[list[Group]]:
    """Shots in groups, and groups in waves, in the order of the first shot of each.

    Every shot is told with how many others it is sampled, the memory that takes, which is no more than
    there is unless a shot alone or the `batch` of a job takes more, and where it forks from which other.
    """
    found: list[_Wave] = []
    open_to: dict[Hashable, _Wave] = {}
    ways = PrefixTree()
    for group in sorted(_groups(shots, ways), key=lambda group: group[0].index):
        meets = dict.fromkeys(_meets(shot, ways) for shot in group)
        wave = next((open_to[one] for one in meets if one in open_to), None)
        if wave is None or not wave.takes(group):
            wave = _Wave(ways)
            wave.takes(group)
            found.append(wave)
        open_to.update(dict.fromkeys(meets, wave))
    return [wave.told() for wave in found]


def assign_batches(shots: Sequence[Shot]) -> list[Shot]:
    """The shots of all waves in their order, each told with how many others it is sampled."""
    told = [shot for wave in waves(shots) for group in wave for shot in group]
    return sorted(told, key=lambda shot: shot.index)


def predict_batch(group: Sequence[Shot]) -> Phase:
    """Predicted memory of sampling a group: the weights once, every distinct text once, and the residual
    stream of every forward that rides along beside the working set of the largest."""
    seen: set[str] = set()
    widest = riding = buffer = 0
    for shot in group:
        rows = {text.id: text.rows for text in shot.prompts if text.id not in seen}
        seen |= rows.keys()
        alone, with_one_more = (
            memory_estimate.predict_sampling(shot, sum(rows.values()), riders) for riders in (1, 2)
        )
        rider = with_one_more.activation - alone.activation
        if shot.model.residency == "resident":  # forwards follow one another
            widest = max(widest, alone.activation)
        else:
            widest = max(widest, alone.activation - rider)
            riding += shot.forwards_per_step * rider
        buffer += alone.buffer
    return Phase(alone.name, alone.model, widest + riding, buffer)


def _groups(shots: Sequence[Shot], ways: PrefixTree) -> Iterator[Group]:
    """Shots of one kind, those that share steps side by side."""
    alike: dict[Hashable, dict[Hashable, list[Shot]]] = {}
    for shot in shots:
        alike.setdefault(_kind(shot), {}).setdefault(ways.first_step_key(shot), []).append(shot)
    for families in alike.values():
        group: Group = []
        for shot in (shot for family in families.values() for shot in family):
            if group and (len(group) == _most(shot) or not _fits(group, shot)):
                yield group
                group = []
            group.append(shot)
        yield group


def _kind(shot: Shot) -> Hashable:
    """What must be the same in all shots of a group."""
    stages = tuple((stage.expert, stage.steps) for stage in shot.stages)
    weights = tuple(tuple(use.decided.items()) for use in shot.loras)
    return shot.model, shot.batch, stages, weights


def _most(shot: Shot) -> int:
    if shot.batch is not None:
        return shot.batch
    # Resident weights are at hand; on a GPU shots share what the job tells them to.
    return 1 if shot.model.residency == "resident" or shot.model.device == "cuda" else MAX_BATCH


def _fits(group: Group, shot: Shot) -> bool:
    return shot.batch is not None or predict_batch([*group, shot]).total <= memory_policy.headroom(shot.model)


def _meets(shot: Shot, ways: PrefixTree) -> Hashable:
    """The same for shots that gain by being in one wave."""
    return shot.model if _changes_experts(shot) else (shot.model, ways.first_step_key(shot))


def _changes_experts(shot: Shot) -> bool:
    return shot.guidance_low is not None


class _Wave:
    """Groups whose states are in memory at the same time."""

    def __init__(self, ways: PrefixTree) -> None:
        self._groups: list[Group] = []
        self._tree = PrefixTree(ways)
        self._forks: set[Fork] = set()
        self._waiting = 0  # bytes of states in memory beside the group that is being sampled, or with it
        self._largest = 0
        self._complete = False

    def takes(self, group: Group) -> bool:
        """Whether the wave may be claimed at once with this group, too, and the states that wait be in memory
        beside the largest group; the first always may. Once the answer was no the wave is complete.

        All states wait for the other of two experts, else those that others fork from.
        """
        if self._complete or sum(map(len, self._groups)) + len(group) > max(MAX_CLAIMED, len(group)):
            self._complete = True
            return False
        group = [replace(shot, fork=self._tree.add(shot)) for shot in group]
        waiting, forks = self._waiting, set(self._forks)
        for shot in group:
            if _changes_experts(shot) or (shot.fork and shot.fork not in forks):
                waiting += _state_bytes(shot)
            forks |= {shot.fork} if shot.fork else set()
        largest = max(self._largest, predict_batch(group).total)
        if self._groups and not _may_wait(group[0].model, waiting, largest):
            self._complete = True
            return False
        self._groups.append(group)
        self._waiting, self._forks, self._largest = waiting, forks, largest
        return True

    def told(self) -> list[Group]:
        """The groups, each shot with the memory that sampling takes."""
        found = []
        for group in self._groups:
            phase = predict_batch(group)
            others = self._waiting
            if _changes_experts(group[0]):
                others -= sum(map(_state_bytes, group))
            if group[0].model.device == "cpu":  # states wait in the memory of the host
                phase = replace(phase, buffer=phase.buffer + others)
            shared = Shared(len(group), phase) if len(group) > 1 or others else None
            found.append([replace(shot, shared=shared) for shot in group])
        return found


def _may_wait(model: ModelSpec, waiting: int, largest: int) -> bool:
    fits = model.device == "cuda" or largest + waiting <= memory_policy.headroom(model)
    return fits and waiting <= MAX_WAITING_BYTES


def _state_bytes(shot: Shot) -> int:
    return FP32 * STATE_TENSORS * math.prod(shot.latent_shape)
