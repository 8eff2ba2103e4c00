"""Options that several commands have together, each group as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from wancli.commands._common import collect_flags
from wancli.commands._options import Items, Picks, Sets, Shard, Sweeps

if TYPE_CHECKING:
    from wancli.job.cli_overrides import CliOverrides


@dataclass(frozen=True, kw_only=True)
class JobChanges:
    """The options that change a job, and choose from its shots."""

    sets: Sets = None
    sweeps: Sweeps = None
    items: Items = None
    picks: Picks = None
    shard: Shard = None

    @property
    def flags(self) -> CliOverrides:
        return collect_flags(self.sets, self.sweeps, self.items, self.shard, self.picks)


def takes_groups(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command of Typer: a parameter whose type is a dataclass becomes the options of its fields."""
    hints = get_type_hints(run, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        parameter = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _field_parameters(groups[name])
        else:
            parameters.append(parameter)

    def command(**values: Any) -> Any:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return run(**values, **made)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints, kind = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
