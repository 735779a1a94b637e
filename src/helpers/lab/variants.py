"""Variants of the recorded experiments: other values of their fields, and what the fields mean."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, get_type_hints

from helpers import settings
from helpers.errors import UserError, nearest
from helpers.lab.checkpoints import configuration
from helpers.lab.experiment import Experiment

LONGEST = 120  # letters of a variant's name, since files are called by it
# What fields of these names mean, unless the docstring of their class says more.
COMMON = {
    "ways": "classes of a task",
    "shots": "examples of each class, or points, to adapt to",
    "queries": "examples of each class, or points, to be judged on",
    "test_queries": "points of a test task to be judged on",
    "network": "kind of network",
    "hidden": "widths of the hidden layers",
    "filters": "channels of each convolution",
    "head_scale": "factor on the first weights of the last layer",
    "estimator": "how the meta-gradient is estimated",
    "inner_rate": "step size of the inner loop",
    "inner_steps": "steps of the inner loop in training",
    "minibatch": "examples in a minibatch of the inner loop",
    "tuning_rates": "inner rates that are tried on validation tasks",
    "meta_batch": "tasks of an outer iteration",
    "seeds": "networks with starts and tasks of their own, trained side by side",
    "test_tasks": "tasks of an evaluation",
    "spot_tasks": "of the test tasks, those that are evaluated on the way and by the check of records",
    "test_steps": "inner steps after which the test tasks are judged",
    "chunk": "tasks that are differentiated at once; it changes rounding and speed, nothing else",
}


class Field(NamedTuple):
    """One field of an experiment; ``kind`` and ``meaning`` are in words."""

    name: str
    value: Any
    kind: str
    meaning: str


def variant(experiment: Experiment, changes: Mapping[str, str]) -> Experiment:
    """The experiment with other values in some of its fields, named after what differs.

    Args:
        changes: texts by the names of fields (:func:`helpers.settings.read`); a field of a field has a dot, as in
            ``children.epochs``.

    Raises:
        UserError: for a field that the experiment does not have, or a text that is not of its kind.

    >>> from helpers.experiments import find
    >>> own = variant(find("maml-sinusoid-5"), {"seed": "3", "inner_steps": "2"})
    >>> own.name, own.inner_steps
    ('maml-sinusoid-5_inner_steps-2_seed-3', 2)
    """
    if "name" in changes:
        raise UserError("a variant is named after what was changed: leave `name` out")
    changed: Any = experiment
    for path, text in changes.items():
        changed = _changed(changed, path, text, experiment.name)
    differs = differences(experiment, changed)
    name = "_".join([experiment.name, *(f"{path}-{_plain(value)}" for path, value in differs.items())])
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{zlib.crc32(name.encode()):08x}"
    return replace(changed, name=name)


def _changed(part: Any, path: str, text: str, owner: str) -> Any:
    name, _, rest = path.partition(".")
    known = [field.name for field in fields(part) if field.init]
    if name not in known:
        raise UserError(
            f"{owner} has no field {name!r}{nearest(name, known)}; `metabook show NAME` lists those of an experiment"
        )
    if rest and is_dataclass(getattr(part, name)):
        return replace(part, **{name: _changed(getattr(part, name), rest, text, f"{name} of {owner}")})
    if rest:
        raise UserError(
            f"{name} of {owner} is {getattr(part, name)!r} and has no field {rest!r}; `metabook show NAME` says what "
            "it is"
        )
    if is_dataclass(getattr(part, name)):
        inner = fields(getattr(part, name))[0].name
        raise UserError(f"{path} of {owner} has fields of its own: set one of them, as in {name}.{inner}=VALUE")
    value = settings.read(text, get_type_hints(type(part))[name], f"{path} of {owner}")
    return replace(part, **{name: value})


def differences(before: Any, after: Any) -> dict[str, Any]:
    """The fields in which one experiment differs from another of its class, with the values that the other has."""
    found: dict[str, Any] = {}
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if is_dataclass(old):
            found |= {f"{field.name}.{path}": value for path, value in differences(old, new).items()}
        elif old != new:
            found[field.name] = new
    return found


def _plain(value: Any) -> str:
    """The value as part of a file's name."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()
    return re.sub(r"[^\w.+]+", "-", text).strip("-") or f"{zlib.crc32(text.encode()):08x}"


def restored(config: Mapping[str, Any], known: Mapping[str, Experiment]) -> Experiment:
    """The experiment or variant that a checkpoint is of, from the configuration in its header.

    Args:
        known: experiments by name; that of a variant begins its name.

    Raises:
        UserError: if it is of none of them, or of another version of its class.
    """
    name = str(config.get("name"))
    base = next((known[one] for one in sorted(known, key=len, reverse=True) if f"{name}_".startswith(f"{one}_")), None)
    if base is None:
        raise UserError(f"the checkpoint is of {name!r}, which is no experiment here nor a variant of one")
    kinds = get_type_hints(type(base))
    try:
        given = {f.name: settings.conform(config[f.name], kinds[f.name]) for f in fields(base) if f.name in config}
        experiment = replace(base, **given)
    except (TypeError, ValueError):
        experiment = base
    if configuration(experiment) != config:
        raise UserError(f"the checkpoint of {name} is of another version of the experiment: train it again")
    return experiment


def described(experiment: Any) -> list[Field]:
    """The fields of an experiment, with what they mean by the docstrings of its classes.

    What is itself made of fields comes field by field, named as :func:`variant` takes them.
    """
    kinds, meanings = get_type_hints(type(experiment)), dict(COMMON)
    for owner in reversed(type(experiment).__mro__):
        meanings |= _attributes(owner)
    found = []
    for field in fields(experiment):
        name, value = field.name, getattr(experiment, field.name)
        if is_dataclass(value):
            found += [inner._replace(name=f"{name}.{inner.name}") for inner in described(value)]
        else:
            found.append(Field(name, value, settings.described(kinds[name]), meanings.get(name, "")))
    return found


def _attributes(owner: type) -> dict[str, str]:
    """What the section ``Attributes`` of a docstring says, as plain text."""
    section = re.search(
        r"^Attributes:\n((?:[ ]{4}.*\n?|\n)+)", inspect.cleandoc(vars(owner).get("__doc__") or ""), re.M
    )
    found = {}
    for entry in re.split(r"\n(?=[ ]{4}\S)", section[1].rstrip()) if section else ():
        name, _, meaning = entry.partition(":")
        found[name.strip()] = plain(meaning).rstrip(".")
    return found


def plain(text: str) -> str:
    """A docstring's text without its markup, on one line.

    >>> plain("one of :data:`~helpers.x.KINDS`, as in ``a`` or :func:`b.c`")
    'one of KINDS, as in a or b.c'
    """
    text = re.sub(r":[a-z:]+:`~[\w.]*?(\w+)`", r"\1", text)
    return " ".join(re.sub(r":[a-z:]+:`([^`]+)`|``(.+?)``", lambda found: found[1] or found[2], text).split())
