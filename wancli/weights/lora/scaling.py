"""How strong a LoRA file says that it is: the alphas of its metadata, or of PEFT's configuration. No torch.

    X.alpha                    a tensor beside the matrices: wins over all others
    lora_adapter_metadata      PEFT's configuration in the header, as diffusers writes it
    adapter_config.json        PEFT's configuration, beside a file in PEFT's naming
    lora_config                PEFT's configuration in the header, as finetrainers writes it
    lora_alpha, alpha, network_alpha    one number in the header, as LightX2V writes it
    ss_network_alpha           kohya's: converters bake it into the matrices, so it is not applied, and said

The keys of `alpha_pattern` and `rank_pattern` are regular expressions, matched as `get_pattern_key` of PEFT
does: the first key wins for which `re.match(rf"(.*\\.)?({key})$", name)`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.storage import disk

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the file
METADATA_KEY = "lora_adapter_metadata"  # diffusers', in the file
CONFIG_KEY = "lora_config"  # finetrainers', in the file
ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha")
BAKED_KEY = "ss_network_alpha"
METHODS = ("LORA", "LOHA", "LOKR")  # peft_type
# Values of init_lora_weights with which PEFT takes the untrained product off the model's weights.
SUBTRACTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What makes matching take exponentially long: a repeated group, or many repetitions.
_COSTLY = re.compile(r"\)[*+{]|(?:[*+}].*){5}", re.DOTALL)
_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Scaling:
    """The scale of each module of a file that has no alpha tensor.

    `notes` are what a user should know. `config` is the file beside it that sets the scale.
    """

    alpha: float | None = None  # None: nothing says it, so the scale is 1
    rank: float = 0  # 0: that of the matrices
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha_pattern
    ranks: Mapping[str, float] = field(default_factory=dict)  # rank_pattern
    stabilised: bool = False
    config: Path | None = None
    in_metadata: bool = False  # set by a key of the header that the first versions of wancli did not read
    notes: tuple[str, ...] = ()

    def scale_of(self, names: Collection[str], rank: int) -> float:
        """Return the scale of a module, given all its names in the file and the rank of its matrices."""
        if self.alpha is None:
            return 1.0
        alpha = _look_up(self.alphas, names, self.alpha)
        divisor = rank or _look_up(self.ranks, names, self.rank)
        return alpha / (math.sqrt(divisor) if self.stabilised else divisor)

    def find_unmatched(self, modules: Collection[Collection[str]]) -> tuple[str, ...]:
        """Return the patterns that match none of the modules, each of which may have several names."""
        return tuple(
            pattern
            for pattern in dict.fromkeys((*self.alphas, *self.ranks))
            if not any(_matches(pattern, names) for names in modules)
        )

    @property
    def has_expressions(self) -> bool:
        """Whether a pattern is more than the end of a name."""
        return not all(_PLAIN.fullmatch(pattern) for pattern in self.alphas)


@disk.reading_weights()
def read_scaling(path: Path, metadata: Mapping[str, str], *, peft: bool) -> Scaling:
    """Read how strong a file says it is. PEFT's file beside it is read only if the keys are named as PEFT
    names them.

    Raises CheckpointError for a configuration without a usable alpha and rank, or one that cannot be read.
    """
    config = path.with_name(ADAPTER_CONFIG)
    if text := metadata.get(METADATA_KEY):
        return _parse_config(text, f"{path}: {METADATA_KEY}")
    if peft and (document := disk.find_bytes(config)) is not None:
        return _parse_config(document, str(config), config=config)
    if text := metadata.get(CONFIG_KEY):
        return _parse_config(text, f"{path}: {CONFIG_KEY}", in_metadata=True)
    return _read_numbers(metadata)


def _read_numbers(metadata: Mapping[str, str]) -> Scaling:
    said = {key: metadata[key] for key in ALPHA_KEYS if metadata.get(key, "").strip()}
    numbers = {key: number for key, text in said.items() if (number := _parse_number(text)) is not None}
    quoted = ", ".join(f"{key} = {text[:40]!r}" for key, text in said.items())
    if len(set(numbers.values())) > 1:
        used = next(iter(numbers))
        return Scaling(
            numbers[used], in_metadata=True, notes=(f"its metadata says {quoted}; {used} is taken",)
        )
    if numbers:
        return Scaling(
            next(iter(numbers.values())),
            stabilised=metadata.get("use_rslora", "").strip().lower() == "true",
            in_metadata=True,
        )
    if said:
        return Scaling(
            notes=(f"its metadata says {quoted}, which is not a number from 0 up; its scale is taken as 1",)
        )
    if BAKED_KEY in metadata:
        baked = f"{BAKED_KEY} = {metadata[BAKED_KEY][:40]!r}"
        return Scaling(
            notes=(
                f"its metadata says {baked} and it has no alpha; converters bake that into the matrices, "
                "so its scale is taken as 1",
            )
        )
    return Scaling()


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _parse_config(
    text: str | bytes, where: str, *, config: Path | None = None, in_metadata: bool = False
) -> Scaling:
    """Parse a configuration of PEFT, whose keys begin with `transformer.` in diffusers."""
    try:
        settings = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        if settings.get("use_dora") is True:
            raise CheckpointError("says use_dora; wancli does not apply DoRA", where=where)
        _refuse_other_methods(settings, where)
        # LoHa and LoKr say alpha.
        alpha = settings["lora_alpha"] if "lora_alpha" in settings else settings["alpha"]
        return Scaling(
            alpha=_require_positive(alpha),
            rank=_require_positive(settings["r"]),
            alphas=_parse_pattern(settings, "alpha_pattern"),
            ranks=_parse_pattern(settings, "rank_pattern"),
            stabilised=settings.get("use_rslora") is True,
            config=config,
            in_metadata=in_metadata,
        )
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"says no usable lora_alpha and r: {error!r}", where=where) from None


def _refuse_other_methods(settings: Mapping[str, object], where: str) -> None:
    """Raise CheckpointError for a method whose matrices are not what is added to the model's weights."""
    if (method := settings.get("peft_type", "LORA")) not in METHODS:
        raise CheckpointError(
            f"says peft_type = {method!r}; wancli applies {', '.join(METHODS)}", where=where
        )
    if settings.get("layer_replication"):
        raise CheckpointError("says layer_replication; wancli does not repeat blocks", where=where)
    start = str(settings.get("init_lora_weights", "")).lower()
    if start.startswith(SUBTRACTED):
        raise CheckpointError(
            f"says init_lora_weights = {start!r}: its matrices belong to weights that PEFT changed first",
            where=where,
            hint="Save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )


def _parse_pattern(settings: Mapping[str, object], key: str) -> dict[str, float]:
    pattern = settings.get(key) or {}
    if not isinstance(pattern, dict):
        raise TypeError(key)
    for expression in pattern:
        if _COSTLY.search(expression):
            raise ValueError(f"{key}: {expression!r} repeats more than the name of a module needs")
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{key}: {expression!r} is not a regular expression: {error}") from None
    return {expression: _require_positive(value) for expression, value in pattern.items()}


def _require_positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)


def _look_up(values: Mapping[str, float], names: Collection[str], default: float) -> float:
    return next((value for pattern, value in values.items() if _matches(pattern, names)), default)


def _matches(pattern: str, names: Collection[str]) -> bool:
    """Return whether PEFT applies a pattern to a module of one of these names."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) or name == pattern for name in names)
