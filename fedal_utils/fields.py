"""Fields with limits, checked when a part is made, and parts whose fields are read and replaced by flat names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
from typing import Any

LIMITS = (("least", operator.ge, "{} or more"), ("most", operator.le, "{} at most"), ("above", operator.gt, "> {}"))


def number(default: Any, names: tuple = (), **limits: float) -> Any:
    """A field with limits: least <= value <= most, value > above; or one of `names`."""
    return dataclasses.field(default=default, metadata={"names": names, **limits})


def fraction(default: float) -> Any:
    """A field in [0, 1]."""
    return number(default, least=0, most=1)


def name(default: str, *names: str) -> Any:
    """A field that is one of these names (the default first, or among them)."""
    return number(default, names=names if default in names else (default, *names))


class Part:
    """What all parts share: limits, flat names, copies with changes."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), {"names": (), **field.metadata}
            values = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(v) for v in values if isinstance(v, float)):
                raise ValueError(f"{field.name} must be a finite number, got {value}")
            if limits["names"] and value not in limits["names"]:
                raise ValueError(f"{field.name} must be one of {limits['names']}, got {value!r}")
            if value is not None and "..." not in field.type and len(values) != field.type.count(",") + 1:
                raise ValueError(f"{field.name} must be {field.type}, got {value}")
            for limit, fits, words in LIMITS:
                if limit in limits and not all(fits(v, limits[limit]) for v in values):
                    raise ValueError(f"{field.name} must be {words.format(limits[limit])}, got {value}")

    @classmethod
    @functools.cache
    def paths(cls) -> dict[str, tuple[str, ...]]:
        """Every flat name, and where it stands: 'lr' -> ('training', 'lr')."""
        found: dict[str, tuple[str, ...]] = {}
        for field in dataclasses.fields(cls):
            inner = type(field.default).paths() if isinstance(field.default, Part) else {field.name: ()}
            found |= {name: (field.name, *path) for name, path in inner.items()}
        return found

    @classmethod
    def of(cls, **flat: Any) -> Any:
        """One with these values, by flat names; the rest at its defaults."""
        return cls().replace(**flat)

    def flat(self) -> dict[str, Any]:
        """Plain values by flat name, fit for JSON and back."""
        return {name: functools.reduce(getattr, path, self) for name, path in self.paths().items()}

    def differences(self, other: Any) -> dict[str, tuple[Any, Any]]:
        """{flat name: (value here, value there)} of all that differs."""
        there = other.flat()
        return {name: (value, there[name]) for name, value in self.flat().items() if value != there[name]}

    def replace(self, **changes: Any) -> Any:
        """A copy with these values, by flat names; unknown names and wrong types are refused, lists become tuples."""
        known, default = self.paths(), type(self)().flat()
        mine, inner = {}, {}
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown parameter {name!r}{hint} Known: {', '.join(sorted(known))}")
            first, *rest = known[name]
            place = inner.setdefault(first, {}) if rest else mine
            place[name] = value if rest else _typed(name, _as_tuple(value), default[name])
        parts = {first: getattr(self, first).replace(**values) for first, values in inner.items()}
        return dataclasses.replace(self, **mine, **parts)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value, whole numbers as floats where floats are wanted; a default of None stands for 'None or a pair'."""
    if default is None:
        if value is None or isinstance(value, tuple) and [type(v) for v in value] == [int, int] and min(value) > 0:
            return value
        raise ValueError(f"parameter {name!r} must be None or a pair of numbers from 1 up, got {value!r}")
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"parameter {name!r} must be {type(default).__name__}, got {value!r}")
    if isinstance(default, tuple) and len(kinds := {type(v) for v in default}) == 1:
        (item,) = kinds
        value = tuple(float(v) if item is float and type(v) is int else v for v in value)
        if any(type(v) is not item for v in value):
            raise ValueError(f"parameter {name!r} must hold values of type {item.__name__}, got {value!r}")
    return value
