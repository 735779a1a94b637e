"""Update rules as expressions: their language (:mod:`helpers.optimizers.language`) and how they step
(:mod:`helpers.optimizers.rules`)."""

from helpers.optimizers.language import Expression, Grammar, build, latex, parse, text
from helpers.optimizers.rules import ADDSIGN, BASELINES, PAPER_RULES, POWERSIGN, RuleOptimizer, decay, slots, step

__all__ = [
    "ADDSIGN", "BASELINES", "PAPER_RULES", "POWERSIGN", "Expression", "Grammar", "RuleOptimizer", "build", "decay",
    "latex", "parse", "slots", "step", "text",
]  # fmt: skip
