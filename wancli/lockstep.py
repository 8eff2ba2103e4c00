"""Which shots are sampled together.

Where weights are fetched for every pass over the blocks, shots that take the same steps share it: they
form a group, and go in lock-step. Where two experts share the steps, groups form a wave: all of them
take their high-noise steps before the expert is changed. Which shots share what changes no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from wancli import choose, footprint
from wancli.memory import FP32, Phase
from wancli.shot import Shared, Shot

MOST = 8  # shots in a group that the user said nothing of: what is gained by one more is little then
WAITING_BYTES = 2 * 2**30  # for the states of shots that wait for the other expert
_STATE_TENSORS = 4  # the latent, and with UniPC two x0 and the last latent

Group = list[Shot]


def waves(shots: Sequence[Shot]) -> list[list[Group]]:
    """Shots in groups, and groups in waves, in the order of the first shot of each.

    Every shot is told with how many others it is sampled, and the memory that takes, which is no more than
    there is unless a shot alone or the `batch` of a job takes more.
    """
    found: list[list[Group]] = []
    states = largest = 0
    for group in sorted(_groups(shots), key=lambda group: group[0].index):
        states += _state_bytes(group)
        largest = max(largest, sampling(group).total)
        if found and _changes_experts(found[-1], group) and _may_wait(group, states, largest):
            found[-1].append(group)
        else:
            found.append([group])
            states, largest = _state_bytes(group), sampling(group).total
    return [_told(wave) for wave in found]


def arranged(shots: Sequence[Shot]) -> list[Shot]:
    """The shots of all waves in their order, each told with how many others it is sampled."""
    told = [shot for wave in waves(shots) for group in wave for shot in group]
    return sorted(told, key=lambda shot: shot.index)


def sampling(group: Sequence[Shot]) -> Phase:
    """Predicted memory of sampling a group: the weights once, every distinct text once, and the residual
    stream of every forward that rides along beside the working set of the largest."""
    seen: set[str] = set()
    widest = riding = buffer = 0
    for shot in group:
        rows = {text.id: text.rows for text in shot.texts if text.id not in seen}
        seen |= rows.keys()
        alone, with_one_more = (footprint.sampling(shot, sum(rows.values()), riders) for riders in (1, 2))
        rider = with_one_more.activation - alone.activation
        if shot.model.residency == "resident":  # forwards follow one another
            widest = max(widest, alone.activation)
        else:
            widest = max(widest, alone.activation - rider)
            riding += shot.riders * rider
        buffer += alone.buffer
    return Phase(alone.name, alone.model, widest + riding, buffer)


def _groups(shots: Sequence[Shot]) -> Iterator[Group]:
    alike: dict[Hashable, list[Shot]] = {}
    for shot in shots:
        alike.setdefault(_kind(shot), []).append(shot)
    for several in alike.values():
        group: Group = []
        for shot in several:
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
    return 1 if shot.model.residency == "resident" or shot.model.device == "cuda" else MOST


def _fits(group: Group, shot: Shot) -> bool:
    return shot.batch is not None or sampling([*group, shot]).total <= choose.room(shot.model)


def _changes_experts(wave: Sequence[Group], group: Group) -> bool:
    """Whether the group may go with the wave from one expert to the other."""
    shot = group[0]
    return shot.guidance_low is not None and shot.model == wave[0][0].model


def _may_wait(group: Group, states: int, largest: int) -> bool:
    """Whether these bytes of states may be in memory beside the largest group."""
    model = group[0].model
    fits = model.device == "cuda" or largest + states <= choose.room(model)
    return fits and states <= WAITING_BYTES


def _state_bytes(group: Group) -> int:
    return sum(FP32 * _STATE_TENSORS * math.prod(shot.latent_shape) for shot in group)


def _told(wave: Sequence[Group]) -> list[Group]:
    waiting = sum(map(_state_bytes, wave))
    found = []
    for group in wave:
        phase = sampling(group)
        if group[0].model.device == "cpu":  # states wait in the memory of the host
            phase = replace(phase, buffer=phase.buffer + waiting - _state_bytes(group))
        shared = Shared(len(group), phase) if len(group) > 1 or waiting > _state_bytes(group) else None
        found.append([replace(shot, shared=shared) for shot in group])
    return found
