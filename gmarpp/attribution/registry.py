"""Methods by name: the published ones, this project's variants of them, and those of one's own."""

import re
from collections.abc import Iterable

from gmarpp.attribution.method import AttributionMethod
from gmarpp.attribution.methods import (
    GMAR,
    BalancedRollout,
    Chefer,
    GMARPlusPlus,
    LastAttention,
    LeGrad,
    RandomMap,
    Rollout,
    TokenRelevance,
)
from gmarpp.entry_points import announced, import_announced
from gmarpp.labels import METHOD_LABELS, name_method

_GROUP = "gmarpp.methods"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,59}")
_COLOR = re.compile(r"#[0-9a-f]{6}")
# What files of maps call other things.
_RESERVED = ("index", "fractions")


def _by_name(*methods: AttributionMethod) -> dict[str, AttributionMethod]:
    return {method.name: method for method in methods}


_PUBLISHED = _by_name(
    GMARPlusPlus(),
    GMARPlusPlus(name="gmarpp_l2", label="GMAR++ (L2)", norm=2),
    GMAR(),
    GMAR(name="gmar_l2", label="GMAR (L2)", norm=2),
    Rollout(),
    LeGrad(),
    Chefer(),
    LastAttention(),
    RandomMap(),
)
# Found to be more faithful than the published rule: docs/study.md.
_VARIANTS = _by_name(
    GMARPlusPlus(name="gmarpp_sum", label="GMAR++ (sum)", norm=None), BalancedRollout(), TokenRelevance()
)
_OWN: dict[str, AttributionMethod] = {}
_ALIASES = {"gmar++": "gmarpp_l1", "gmar": "gmar_l1"}

METHODS: tuple[str, ...] = tuple(_PUBLISHED)
"""Names of the published methods and the controls."""
VARIANTS: tuple[str, ...] = tuple(_VARIANTS)
"""Names of this project's own variants of them."""


def register_method(method: AttributionMethod, *, replace: bool = False) -> None:
    """Make a method known by its name everywhere: in `gmarpp.explain`, on command lines, in figures and reports.

    A package announces its methods by entry points of the group `gmarpp.methods`: each has the method's name, and names
    a module that registers it when imported.

    Args:
        method: an object of a subclass of `Method` or `MapMethod`, or a `FunctionMethod`. One that is registered
            already, with the same options, is left as it is.
        replace: take the place of another method of one's own with the same name, as when a notebook's cell runs again.

    Raises:
        ValueError: for a name, label or color that cannot be used, or that another method has.
    """
    _check_presentation(method)
    known = _known(method.name)
    if known is not None and type(known) is type(method) and vars(known) == vars(method):
        return
    if known is not None and not (replace and method.name in _OWN):
        remedy = ", or replace=True to replace it" if method.name in _OWN else ""
        raise ValueError(
            f"{method.name!r} is the name of another method, or of the same with other options: give the method a name "
            f"and a label of its own{remedy}"
        )
    same = [name for name, label in METHOD_LABELS.items() if label == method.label and name != method.name]
    if same:
        raise ValueError(
            f"{method.name}: {method.label!r} is the label of {same[0]}: give the method a label of its own"
        )
    _OWN[method.name] = method
    name_method(method.name, method.label, method.color)


def _check_presentation(method: AttributionMethod) -> None:
    if not isinstance(method, AttributionMethod):
        given = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ValueError(f"expected an object of a Method, a MapMethod or a FunctionMethod, got {given}")
    name, label, color = (getattr(method, each, None) for each in ("name", "label", "color"))
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*_RESERVED, *_ALIASES):
        raise ValueError(
            f"name of a method: expected a small letter, then up to 59 small letters, digits, _ or -, and none of "
            f"{', '.join((*_RESERVED, *_ALIASES))}, got {name!r:.80}"
        )
    if not isinstance(label, str) or not label.strip() or not label.isprintable() or len(label) > 60:
        raise ValueError(f"{name}: label: expected up to 60 printable characters, got {label!r:.80}")
    if not isinstance(color, str) or (color and not _COLOR.fullmatch(color)):
        raise ValueError(f"{name}: color: expected #rrggbb in small hexadecimal digits, got {color!r:.80}")


def is_own(method: AttributionMethod) -> bool:
    """Return whether a method is none of this package's by name."""
    return method.name not in _PUBLISHED and method.name not in _VARIANTS


def resolve_method(name: str) -> str:
    """Return the canonical name of a method.

    Args:
        name: a name in `METHODS` or `VARIANTS`, an alias (`gmar++`, `gmar`), or the name of a registered method or of
            one that an installed package announces.

    Raises:
        ValueError: if there is no such method; the message lists the names.

    Examples:
        >>> resolve_method("gmar++")
        'gmarpp_l1'
    """
    canonical = str(_ALIASES.get(name, name))
    if _known(canonical) is None:
        entry = import_announced(_GROUP, canonical)
        if entry is None:
            choices = dict.fromkeys((*_names(), *announced(_GROUP), *_ALIASES))
            raise ValueError(f"unknown method {name!r}: choose from {', '.join(choices)}")
        if canonical not in _OWN:
            raise ValueError(
                f"a package announces the method {canonical!r}, but {entry.value} does not register it: expected a "
                "call of gmarpp.register_method where the module is imported"
            )
    return canonical


def select_methods(
    methods: str | AttributionMethod | Iterable[str | AttributionMethod],
) -> tuple[AttributionMethod, ...]:
    """Return the methods that names and objects stand for, each once, in the given order.

    Raises:
        ValueError: for an unknown name, two different methods under one name, or no method.
    """
    wanted = [methods] if isinstance(methods, str | AttributionMethod) else list(methods)
    selected: dict[str, AttributionMethod] = {}
    for item in wanted:
        method = item if isinstance(item, AttributionMethod) else _known(resolve_method(item))
        assert method is not None
        if selected.setdefault(method.name, method) != method:
            raise ValueError(f"two different methods are named {method.name!r}: give each its own name")
    if not selected:
        raise ValueError(f"expected at least one method, got none: choose from {', '.join(_names())}")
    return tuple(selected.values())


def _known(name: str) -> AttributionMethod | None:
    return _PUBLISHED.get(name) or _VARIANTS.get(name) or _OWN.get(name)


def _names() -> tuple[str, ...]:
    return (*METHODS, *VARIANTS, *_OWN)
