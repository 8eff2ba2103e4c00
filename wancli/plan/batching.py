"""Batching: which shots are sampled together.

If every pass over the blocks fetches the weights, shots that take the same steps share the pass: they form a
batch. Batches form a round in two cases. If the model has two experts, all shots of the round take their
high-noise steps before the expert is changed. If shots agree on their first steps, one shot takes these steps
for all (`wancli.plan.prefix_sharing`). Sharing changes no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from wancli.plan import memory_estimate, memory_policy
from wancli.plan.chains import split_waves
from wancli.plan.model_spec import ModelSpec
from wancli.plan.picture_entries import given_values
from wancli.plan.prefix_sharing import Fork, PrefixTree
from wancli.plan.schedule import Batch, Placement, Round, Schedule
from wancli.plan.shot import Shot
from wancli.resources.memory_model import FP32, Phase

MAX_BATCH = 8  # shots in a batch if the job does not set `batch`: one more gains little
MAX_CLAIMED = 8  # shots that a worker claims at once: the rest of a sweep is work for other workers
MAX_WAITING_BYTES = 2 * 2**30  # for states that wait for the other expert, or until their dependents fork
STATE_TENSORS = 4  # the latent, and with UniPC two x0 and the last latent


def build_schedule(shots: Sequence[Shot]) -> Schedule:
    """Arrange shots in batches, and batches in rounds, in the order of the first shot of each.

    A batch exceeds the memory limit of its model only if a single shot does or the job sets `batch`.
    """
    rounds: list[_RoundBuilder] = []
    open_rounds: dict[Hashable, _RoundBuilder] = {}
    prefixes = PrefixTree()
    for batch in sorted(_make_batches(shots, prefixes), key=lambda batch: batch[0].index):
        keys = dict.fromkeys(_round_key(shot, prefixes) for shot in batch)
        builder = next((open_rounds[key] for key in keys if key in open_rounds), None)
        if builder is None or not builder.try_add(batch):
            builder = _RoundBuilder(prefixes)
            builder.try_add(batch)
            rounds.append(builder)
        open_rounds.update(dict.fromkeys(keys, builder))
    placements = {index: place for builder in rounds for index, place in builder.placements()}
    schedule = Schedule(tuple(builder.round for builder in rounds), placements)
    return replace(schedule, placements=placements | dict(_place_pictures(schedule)))


def reschedule(schedule: Schedule, shots: Sequence[Shot]) -> Schedule:
    """Return the schedule if it has exactly these shots, else a new one; the memory limit is the same."""
    return schedule if schedule.covers(shots) else build_schedule(shots)


def predict_batch(batch: Sequence[Shot]) -> Phase:
    """Predict the memory of sampling a batch: the weights once, every distinct context once, and the residual
    stream of every forward of a pass beside the working set of the largest."""
    seen: set[str] = set()
    largest = streams = buffer = 0
    for shot in batch:
        rows = {id: count for id, count in shot.context_rows.items() if id not in seen}
        seen |= rows.keys()
        one, two = (memory_estimate.predict_sampling(shot, sum(rows.values()), n) for n in (1, 2))
        stream = two.activation - one.activation
        if shot.model.residency == "resident":  # forwards follow one another
            largest = max(largest, one.activation)
        else:
            largest = max(largest, one.activation - stream)
            streams += shot.forwards_per_step * stream
        buffer += one.buffer
    return Phase(one.name, one.model, largest + streams, buffer)


def _place_pictures(schedule: Schedule) -> Iterator[tuple[int, Placement]]:
    """Yield the index and the placement of every shot with pictures, which a round encodes when it begins.

    The transformer stays in memory from round to round if the encoders fit beside it. CLIP stays for later
    rounds of its model if it fits beside the transformer and the decoder.
    """
    numbers: dict[ModelSpec, list[int]] = {}
    for number, round_ in enumerate(schedule.rounds):
        numbers.setdefault(round_[0][0].model, []).append(number)
    for number, round_ in enumerate(schedule.rounds):
        of_model = numbers[round_[0][0].model]
        shots = [shot for batch in round_ for shot in batch if shot.pictures]
        beside = number > of_model[0] and all(map(memory_policy.pictures_fit_alongside, shots))
        keeps = number < of_model[-1] and all(
            _clip_may_stay(shot, schedule.placement(shot)) for shot in shots
        )
        for shot in shots:
            place = schedule.placement(shot)
            sample = place.sample or memory_estimate.predict_alone(shot)
            if beside:
                pictures = memory_estimate.predict_pictures(shot, sample.model)
                place = replace(place, pictures=pictures)
            if keeps:
                sample = replace(sample, model=sample.model + memory_estimate.clip_bytes(shot))
                place = replace(place, sample=sample, keeps_clip=True)
            yield shot.index, place


def _clip_may_stay(shot: Shot, place: Placement) -> bool:
    clip, room = memory_estimate.clip_bytes(shot), memory_policy.headroom(shot.model)
    _, sample, decode, *_ = memory_estimate.predict_phases(shot, place.sample)
    return bool(clip) and max(sample.total, decode.total) + clip <= room


def _make_batches(shots: Sequence[Shot], prefixes: PrefixTree) -> Iterator[Batch]:
    """Batch compatible shots, those next to each other that share steps."""
    compatible: dict[Hashable, dict[Hashable, list[Shot]]] = {}
    wave_by_index = {shot.index: number for number, wave in enumerate(split_waves(shots)) for shot in wave}
    for shot in shots:
        key = wave_by_index[shot.index], _compatibility_key(shot)
        families = compatible.setdefault(key, {})
        families.setdefault(prefixes.first_step_key(shot), []).append(shot)
    for families in compatible.values():
        batch: Batch = ()
        for shot in (shot for family in families.values() for shot in family):
            if batch and (len(batch) == _max_batch(shot) or not _fits(batch, shot)):
                yield batch
                batch = ()
            batch = (*batch, shot)
        yield batch


def _compatibility_key(shot: Shot) -> Hashable:
    """Return what must be the same in all shots of a batch."""
    stages = tuple((stage.expert, stage.steps) for stage in shot.stages)
    weights = tuple(tuple(use.pixel_settings.items()) for use in shot.loras)
    return shot.model, shot.batch, stages, weights


def _max_batch(shot: Shot) -> int:
    if shot.batch is not None:
        return shot.batch
    # Resident weights are not fetched; on a GPU shots share a pass only if the job says so.
    return 1 if shot.model.residency == "resident" or shot.model.device == "cuda" else MAX_BATCH


def _fits(batch: Batch, shot: Shot) -> bool:
    if shot.batch is not None:
        return True
    return predict_batch([*batch, shot]).total <= memory_policy.headroom(shot.model)


def _round_key(shot: Shot, prefixes: PrefixTree) -> Hashable:
    """Return what is the same for shots that gain by being in one round."""
    return shot.model if _changes_experts(shot) else (shot.model, prefixes.first_step_key(shot))


def _changes_experts(shot: Shot) -> bool:
    return shot.guidance_low is not None


class _RoundBuilder:
    """A round that batches are added to. Their states are in memory at the same time."""

    def __init__(self, prefixes: PrefixTree) -> None:
        self._batches: list[Batch] = []
        self._prefixes = PrefixTree(share_memo_with=prefixes)
        self._forks: dict[int, Fork] = {}  # by index of the shot that forks
        self._waiting = 0  # bytes of states in memory beside the batch that is being sampled, or with it
        self._given = 0  # bytes of the given frames of all shots, encoded when the round begins
        self._largest = 0
        self._closed = False

    @property
    def round(self) -> Round:
        return tuple(self._batches)

    def try_add(self, batch: Batch) -> bool:
        """Add a batch and return whether it was added; the first batch always is.

        A batch that would make the round claim more than MAX_CLAIMED shots, or whose waiting states would
        not fit into memory beside the largest batch, is refused and closes the round. If there are two
        experts, all states wait for the other one, else only states that others fork from.
        """
        if self._closed or sum(map(len, self._batches)) + len(batch) > max(MAX_CLAIMED, len(batch)):
            self._closed = True
            return False
        new_forks = {shot.index: self._prefixes.add(shot) for shot in batch}
        waiting, forks = self._waiting, dict(self._forks)
        points = set(forks.values())
        for shot in batch:
            fork = new_forks[shot.index]
            if _changes_experts(shot) or (fork and fork not in points):
                waiting += _state_bytes(shot)
            if fork:
                forks[shot.index] = fork
                points.add(fork)
        given = self._given + sum(map(_given_bytes, batch))
        largest = max(self._largest, predict_batch(batch).total)
        if self._batches and not _may_wait(batch[0].model, waiting + given, largest):
            self._closed = True
            return False
        self._batches.append(batch)
        self._waiting, self._given, self._forks, self._largest = waiting, given, forks, largest
        return True

    def placements(self) -> Iterator[tuple[int, Placement]]:
        """Yield the index and the placement of every shot."""
        for batch in self._batches:
            sample: Phase | None = predict_batch(batch)
            others = self._waiting + self._given - sum(map(_given_bytes, batch))
            if _changes_experts(batch[0]):
                others -= sum(map(_state_bytes, batch))
            if len(batch) == 1 and not others:
                sample = None
            elif sample and batch[0].model.device == "cpu":  # states wait in the memory of the host
                sample = replace(sample, buffer=sample.buffer + others)
            for shot in batch:
                yield shot.index, Placement(len(batch), sample, fork=self._forks.get(shot.index))


def _may_wait(model: ModelSpec, waiting: int, largest: int) -> bool:
    fits = model.device == "cuda" or largest + waiting <= memory_policy.headroom(model)
    return fits and waiting <= MAX_WAITING_BYTES


def _state_bytes(shot: Shot) -> int:
    return FP32 * STATE_TENSORS * math.prod(shot.latent_shape) + memory_estimate.residual_bytes(shot)


def _given_bytes(shot: Shot) -> int:
    return FP32 * given_values(shot)
