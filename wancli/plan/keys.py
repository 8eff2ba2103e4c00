"""Hashes of settings: the keys of shots are made of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from wancli.injection.table import Rule
from wancli.injection.tuning import EmphasisRule, SteerRule
from wancli.models.config import WanConfig


def rule_settings(rule: Rule | EmphasisRule | SteerRule) -> dict[str, Any]:
    """Return what of a rule counts for a key."""
    area = {} if rule.area is None else {"area": rule.area.pixel_settings}
    settings = used_fields(replace(rule, area=None)) | area
    return {name: value for name, value in settings.items() if name != "words"}  # their rows count


@lru_cache(1024)
def used_fields(value: Rule | EmphasisRule | SteerRule | WanConfig) -> dict[str, Any]:
    """Return the fields that count for a key: those added since keys exist only if they are used."""
    return {name: x for name, x in asdict(value).items() if x is not None and x is not False}


def hash_settings(value: object) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
