"""Update rules as expressions, how they step, networks trained by many of them, and the search for them."""

from helpers.optimizers.language import Expression, Grammar, build, latex, parse, text
from helpers.optimizers.rules import ADDSIGN, BASELINES, PAPER_RULES, POWERSIGN, RuleOptimizer, decay, slots, step

__all__ = [
    "ADDSIGN",
    "BASELINES",
    "Expression",
    "Grammar",
    "PAPER_RULES",
    "POWERSIGN",
    "RuleOptimizer",
    "build",
    "decay",
    "latex",
    "parse",
    "slots",
    "step",
    "text",
]
