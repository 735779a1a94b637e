"""What the papers claim, and what the book asks itself: read from ``data/claims/PAPER.yaml``, never computed."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any, get_type_hints

from helpers import settings
from helpers.errors import UserError, nearest
from helpers.parsing import from_yaml
from helpers.runtime import root
from helpers.validate import one_of, positive

ORIGINS = ("paper", "other", "own")
SIDES = {"left": str, "right": str | float, "within": float, "label": str}  # of a comparison


@dataclass(frozen=True)
class Claim:
    """One quantity that a paper states.

    Attributes:
        id: short unique name.
        quantity: what is measured, in words.
        value, ci95: as printed in the paper; fractions for accuracies. None for a claim without a number.
        where: table, figure or section of the paper.
        experiment, metric: the record and its metric that answer the claim.
        better: ``"higher"`` or ``"lower"`` is better.
        direction: comparisons ``{"left": EXPERIMENT/METRIC, "right": EXPERIMENT/METRIC or a number, "label": words}``;
            left is better than right. With ``"within": d`` it is that the two differ by at most d. A claim without a
            number consists of its comparisons, which must all hold.
        origin: ``"paper"``, one of the papers that the chapters are about; ``"other"``, another paper, on other data;
            ``"own"``, a question of the book.
        from_memory: the number was not checked against the paper itself.
        baseline: the number is not the method's: to be better than it is no success, it has to be met.
        exact: what is compared is counted or computed and has no spread, so that the values decide.
        toy: why the comparison is at another scale than the claim; it is then shown, and decides nothing.
        no_data: why the claim cannot be tested: its data cannot be had.
        note: what differs between the paper's set-up and ours.
    """

    paper: str
    id: str
    quantity: str
    where: str
    experiment: str
    metric: str
    value: float | None = None
    ci95: float | None = None
    better: str = "higher"
    direction: tuple[dict[str, Any], ...] = ()
    origin: str = "paper"
    from_memory: bool = False
    baseline: bool = False
    exact: bool = False
    toy: str = ""
    no_data: str = ""
    note: str = ""

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments whose records answer the claim, the claim's own first."""
        sides = [comparison[side] for comparison in self.direction for side in ("left", "right")]
        others = [side.partition("/")[0] for side in sides if isinstance(side, str)]
        return tuple(dict.fromkeys([self.experiment, *others]))


def papers() -> list[str]:
    """The papers that have a file of claims."""
    return sorted(path.stem for path in (root() / "data" / "claims").glob("*.yaml"))


def load_claims(paper: str | None = None) -> list[Claim]:
    """The claims of one paper, or of all.

    Raises:
        UserError: if a file is missing or does not describe claims.
    """
    where = root() / "data" / "claims"
    paths = [where / f"{name}.yaml" for name in ([paper] if paper is not None else papers())]
    claims = []
    for path in paths:
        try:
            content = from_yaml(path.read_text(encoding="utf-8"))
            origin = content.get("origin", "paper")
            if content["paper"] != path.stem:
                raise ValueError(f"its paper is {reprlib.repr(content['paper'])}")
            if not content["claims"]:
                raise ValueError("there are no claims")
            claims += [_claim(path.stem, {"origin": origin} | entry) for entry in content["claims"]]
        except FileNotFoundError:
            raise UserError(
                f"there is no claims file {path}{nearest(path.stem, papers())}; known papers: {', '.join(papers())}"
            ) from None
        except (OSError, UserError, AttributeError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"the claims file {path} cannot be read ({' '.join(str(error).split())[:200]}): "
                "mend it after data/schemas/claims.schema.json"
            ) from None
    ids = [claim.id for claim in claims]
    if twice := next((claim for claim in claims if ids.count(claim.id) > 1), None):
        raise UserError(
            f"two claims are called {twice.id!r}, one of them in {where / f'{twice.paper}.yaml'}: call one otherwise "
            "(an `id` is unique; mend it after data/schemas/claims.schema.json)"
        )
    return claims


def _claim(paper: str, entry: dict[str, Any]) -> Claim:
    """One entry of a claims file, of which each part is what its field declares.

    Raises:
        AttributeError, KeyError, TypeError, UserError, ValueError: if one is not.
    """
    of, kinds = reprlib.repr(entry.get("id")), get_type_hints(Claim)
    for name, value in entry.items():
        if name != "direction" and name in kinds:
            _is(value, kinds[name], f"{name} of {of}")
    comparisons = entry.get("direction", ())
    for comparison in comparisons:
        for side, kind in SIDES.items():
            if side in ("left", "right") or side in comparison:
                _is(comparison[side], kind, f"{side} of {of}")
        if unknown := comparison.keys() - SIDES.keys():
            raise ValueError(f"a comparison of {of} has {', '.join(map(str, unknown))}")
        if any(isinstance(comparison[side], str) and "/" not in comparison[side] for side in ("left", "right")):
            raise ValueError(f"a side of {of} is EXPERIMENT/METRIC")
        positive(comparison.get("within", 1), f"distance within which {of} holds")
    claim = Claim(paper=paper, **entry | {"direction": tuple(comparisons)})
    one_of(claim.better, "direction", ("higher", "lower"))
    one_of(claim.origin, f"origin of {of}", ORIGINS)
    positive(claim.ci95 or 0, f"interval of {of}", zero=True)
    if claim.value is None and not claim.direction:
        raise ValueError(f"{of} has neither a value nor a direction")
    return claim


def _is(value: Any, kind: Any, what: str) -> None:
    try:
        settings.conform(value, kind)
    except (OverflowError, ValueError):
        raise ValueError(f"{what} must be {settings.described(kind)}, not {reprlib.repr(value)}") from None
    if isinstance(value, str) and not _is_plain(value):
        raise ValueError(f"{what} must be plain words, not {reprlib.repr(value)}")


def _is_plain(text: str) -> bool:
    """Whether a text says something, to a terminal and on a page alike: no control characters, no HTML."""
    line = " ".join(text.split())
    return bool(line) and line.isprintable() and not re.search(r"<[a-zA-Z/!]", line)
