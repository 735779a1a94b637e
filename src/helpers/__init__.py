"""What the chapters of *Learning to Learn* share: the machine in which each paper changes one box.

The names of ``__all__`` are the face of the package, imported where they are first used. Importing ``helpers`` itself,
or any module of it, has no side effects.

>>> import helpers
>>> g = helpers.generator(0)
>>> learner = helpers.GradientDescent(helpers.MLP((1, 40, 40, 1)), helpers.mean_squared_error, rate=0.01)
>>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
>>> gradient, losses = helpers.maml(learner, theta, tasks)
>>> sorted(gradient) == sorted(theta), list(losses.shape)
(True, [4])
"""

from importlib import import_module as _import_module
from importlib import metadata as _metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.errors import UserError
    from helpers.estimators import chunked, fomaml, imaml, maml, reptile, stepwise, traced
    from helpers.lab.evaluation import adaptation_curve
    from helpers.lab.training import fit, train
    from helpers.learners import GradientDescent, LearnedDescent, MinibatchDescent, Proximal
    from helpers.losses import accuracy, cross_entropy, mean_squared_error
    from helpers.models import MLP, ConvNet, from_module
    from helpers.runtime import generator
    from helpers.tasks import FewShot, Functions, Sinusoids
    from helpers.types import Examples, Tasks

_HOME = {
    "chunked": "estimators", "fomaml": "estimators", "imaml": "estimators", "maml": "estimators",
    "reptile": "estimators", "stepwise": "estimators", "traced": "estimators",
    "adaptation_curve": "lab.evaluation", "fit": "lab.training", "train": "lab.training",
    "GradientDescent": "learners", "LearnedDescent": "learners", "MinibatchDescent": "learners", "Proximal": "learners",
    "accuracy": "losses", "cross_entropy": "losses", "mean_squared_error": "losses",
    "MLP": "models", "ConvNet": "models", "from_module": "models",
    "UserError": "errors", "generator": "runtime",
    "FewShot": "tasks", "Functions": "tasks", "Sinusoids": "tasks",
    "Examples": "types", "Tasks": "types",
}  # fmt: skip

__all__ = [
    "ConvNet", "Examples", "FewShot", "Functions", "GradientDescent", "LearnedDescent", "MLP", "MinibatchDescent",
    "Proximal", "Sinusoids", "Tasks", "UserError", "__version__", "accuracy", "adaptation_curve", "chunked",
    "cross_entropy", "fit", "fomaml", "from_module", "generator", "imaml", "maml", "mean_squared_error", "reptile",
    "stepwise", "traced", "train",
]  # fmt: skip

try:
    __version__ = _metadata.version("metabook")
except _metadata.PackageNotFoundError:  # run from a checkout that nobody installed
    __version__ = "0+checkout"


def __getattr__(name: str):
    if name in _HOME:
        return getattr(_import_module(f"helpers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")
