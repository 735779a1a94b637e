"""Estimators: from meta-parameters and a batch of tasks to a meta-gradient.

Every estimator has the shape ``estimator(learner, theta, tasks) -> (gradient, losses)``: ``gradient`` is a dictionary
like θ, the mean over the tasks, and ``losses`` ``[tasks]`` are the query losses after adaptation. A chapter is the
change of this one argument.

Any estimator meets any learner: the result is right, or refused in one sentence. What an estimator asks of a learner is
checked at its head; no check reads a value.

Any estimator becomes faster, and stays what it is, by :func:`chunked`, :func:`~helpers.numerics.tracing.traced` and
:func:`~helpers.numerics.tracing.compiled`, which combine, as in ``chunked(compiled(maml), 4)``; :func:`divided`
shares the tasks among processes.
"""

from helpers.estimators.explicit import (
    chunked,
    combination,
    divided,
    fomaml,
    inner_step,
    maml,
    query_gradient,
    reptile,
    stepwise,
)
from helpers.estimators.implicit import Implicit, ImplicitGradient, imaml
from helpers.estimators.nested import MetaLearner, evaluations
from helpers.numerics.tracing import captured, compiled, traced

__all__ = [
    "Implicit",
    "ImplicitGradient",
    "MetaLearner",
    "captured",
    "chunked",
    "combination",
    "compiled",
    "divided",
    "evaluations",
    "fomaml",
    "imaml",
    "inner_step",
    "maml",
    "query_gradient",
    "reptile",
    "stepwise",
    "traced",
]
