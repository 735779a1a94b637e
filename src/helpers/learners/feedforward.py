"""Learners that do not descend: what they do with a support set is computed forwards, by a network that was learned.

They have the shape of every learner, ``φ = adapt(θ, support)`` and ``task_loss(θ, task)``, so that the estimator and
the outer loop are those of the other chapters: ``maml(Prototypes(...), theta, tasks)``. No gradient is
taken at test time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.losses import cross_entropy, mean_squared_error
from helpers.models.layers import subtree
from helpers.models.mlp import MLP
from helpers.models.seq2seq import recurrence
from helpers.types import Examples, Model, Params, Tasks
from helpers.validate import positive, whole

FEATURES, MEMORY, READER, HEAD = "features.", "memory", "reader.", "head."


def one_hot(y: Tensor, ways: int) -> Tensor:
    """Labels ``[n]`` as rows ``[n, ways]``; unlike PyTorch's, also under ``vmap``."""
    return (y[..., None] == torch.arange(ways, device=y.device)).to(torch.get_default_dtype())


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖² of all pairs: ``[n, d]`` and ``[m, d]`` give ``[n, m]``."""
    return (a[:, None] - b[None]).square().sum(-1)


@dataclass(frozen=True)
class Amortized(ABC):
    """What these learners share; a subclass says what ``adapt`` makes of a support set and what ``predict`` of that.

    Attributes:
        features: the network that looks at an input.
        ways: number of classes; 0 for regression, whose targets are numbers ``[n, 1]``.
    """

    features: Model
    ways: int = 0

    def __post_init__(self) -> None:
        whole(self.ways, "ways", least=0)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """``loss(outputs, y)``: cross-entropy for classes, the mean squared error for numbers."""
        return cross_entropy if self.ways else mean_squared_error

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh θ: the parameters of ``features``, under ``features.``."""
        return {FEATURES + name: value for name, value in self.features.init(generator, dtype).items()}

    def look(self, params: Params, x: Tensor) -> Tensor:
        """Features ``[n, width]`` of the inputs ``[n, ...]``."""
        return self.features(subtree(params, FEATURES), x)

    def targets(self, y: Tensor, like: Tensor) -> Tensor:
        """Targets as rows of numbers, ``[n, ways]`` or ``[n, 1]``."""
        return one_hot(y, self.ways).to(like.dtype) if self.ways else y

    @abstractmethod
    def adapt(self, theta: Params, support: Examples) -> Params:
        """φ: θ and what was made of the support set."""

    @abstractmethod
    def predict(self, phi: Params, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` or numbers ``[n, 1]`` for inputs ``x`` ``[n, ...]``."""

    def query_loss(self, phi: Params, query: Examples) -> Tensor:
        """The loss on the query set, a scalar."""
        return self.loss(self.predict(phi, query.x), query.y)

    def task_loss(self, theta: Params, task: Tasks) -> Tensor:
        """The summand of the meta-objective."""
        return self.query_loss(self.adapt(theta, task.support), task.query)

    def replace(self, **changes) -> Amortized:
        """A copy with some attributes changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Recurrent(Amortized):
    """A GRU that reads the support set, one (x, y) after the other; its last state is all that is known of the task.

    Learning is then what a trained network does to its state: nobody wrote the rule down. A prediction is made by a
    small network from the state and the features of the new input. The order in which examples are read matters to it.

    Attributes:
        width: numbers that ``features`` gives.
        hidden: units of the state.

    Source: Hochreiter, Younger and Conwell (2001); Santoro et al. (2016), who have an outer memory beside the state.

    >>> import helpers
    >>> g, reader = helpers.generator(0), Recurrent(helpers.MLP((1, 8)), width=8, hidden=16)
    >>> theta, tasks = reader.init(g), helpers.Sinusoids().sample(4, g)
    >>> gradient, losses = helpers.maml(reader, theta, tasks)
    >>> gradient.keys() == theta.keys(), losses.shape
    (True, torch.Size([4]))
    """

    width: int = 40
    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.width, "width of what features give")
        whole(self.hidden, "hidden units of a recurrent learner")

    @property
    def _head(self) -> MLP:
        return MLP((self.width + self.hidden, 64, self.ways or 1), scale=None)

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh θ: the network that looks, the one that reads, and the one that answers."""
        theta, inputs = super().init(generator, dtype), self.width + (self.ways or 1)
        shapes = {
            "input.weight": (inputs, 3 * self.hidden), "hidden.weight": (self.hidden, 3 * self.hidden),
            "input.bias": (3 * self.hidden,), "hidden.bias": (3 * self.hidden,),
        }  # fmt: skip
        for name, shape in shapes.items():
            uniform = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
            theta[READER + name] = (2 * uniform - 1) * self.hidden**-0.5
        return theta | {HEAD + name: value for name, value in self._head.init(generator, dtype).items()}

    def adapt(self, theta: Params, support: Examples) -> Params:
        """θ, and the state after the last example as ``memory`` ``[hidden]``."""
        seen = self.look(theta, support.x)
        if seen.shape[-1] != self.width:
            raise UserError(f"features give {seen.shape[-1]} numbers, so give width={seen.shape[-1]}, not {self.width}")
        read, gru = torch.cat([seen, self.targets(support.y, seen)], -1), subtree(theta, READER)
        inputs = (read @ gru["input.weight"] + gru["input.bias"])[:, None]
        states = recurrence(inputs, gru["hidden.weight"], gru["hidden.bias"], inputs.new_zeros(1, self.hidden))
        return theta | {MEMORY: states[-1, 0]}

    def predict(self, phi: Params, x: Tensor) -> Tensor:
        """From the features and the state."""
        seen = self.look(phi, x)
        known = phi[MEMORY].expand(len(seen), -1)
        return self._head(subtree(phi, HEAD), torch.cat([seen, known], -1))


@dataclass(frozen=True)
class Prototypes(Amortized):
    """The mean of each class's features stands for the class; a query belongs to the nearest.

    Raises:
        UserError: for regression, which has no classes.

    Source: Snell, Swersky and Zemel (2017), equations 1 and 2.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ways < 2:
            raise UserError("prototypes stand for classes: give ways, at least 2")

    def adapt(self, theta: Params, support: Examples) -> Params:
        """θ, and the prototypes as ``memory`` ``[ways, width]``."""
        seen = self.look(theta, support.x)
        members = self.targets(support.y, seen).mT
        return theta | {MEMORY: members @ seen / members.sum(-1, keepdim=True)}

    def predict(self, phi: Params, x: Tensor) -> Tensor:
        """Logits: minus the squared distances."""
        return -squared_distances(self.look(phi, x), phi[MEMORY])


@dataclass(frozen=True)
class Neighbours(Amortized):
    """A prediction is a mean of the support set's targets, each weighted by how near its input is in feature space.

    For regression this is kernel regression with a learned distance; for classes the matching of Vinyals et al. With a
    ``sharpness`` of infinity it is the nearest neighbour.

    Attributes:
        sharpness: of the softmax of minus the squared distances.

    Source: Vinyals et al. (2016), equation 1, with distances in place of cosines.

    >>> import torch
    >>> nearest = Neighbours(AsItIs(), ways=2, sharpness=float("inf"))
    >>> phi = nearest.adapt({}, Examples(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])))
    >>> nearest.predict(phi, torch.tensor([[0.2], [0.9]])).argmax(-1).tolist()
    [0, 1]
    """

    sharpness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpness != float("inf"):
            positive(self.sharpness, "sharpness")

    def adapt(self, theta: Params, support: Examples) -> Params:
        """θ, the support set's features as ``memory`` ``[n, width]``, and its targets."""
        seen = self.look(theta, support.x)
        return theta | {MEMORY: seen, "targets": self.targets(support.y, seen)}

    def predict(self, phi: Params, x: Tensor) -> Tensor:
        """Weighted means; for classes their logarithm, so that they are logits."""
        near = -squared_distances(self.look(phi, x), phi[MEMORY])
        if self.sharpness == float("inf"):
            weights = (near == near.amax(-1, keepdim=True)).to(near.dtype)
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = (self.sharpness * near).softmax(-1)
        mean = weights @ phi["targets"]
        return mean.clamp(min=1e-6).log() if self.ways else mean


@dataclass(frozen=True)
class AsItIs:
    """The network without parameters: features are the input itself, as one row of numbers."""

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """An empty dictionary, since there are no parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """``[n, ...]`` as ``[n, numbers]``."""
        return x.flatten(1)

    def is_adapted(self, name: str) -> bool:
        """There is nothing to adapt."""
        return False

    @property
    def head(self) -> str:
        """An empty prefix, since there is no layer."""
        return ""
