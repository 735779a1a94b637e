"""Losses, as functions ``loss(outputs, y) -> scalar`` of one task's predictions; and losses that are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import subtree
from helpers.models.mlp import MLP
from helpers.types import Params
from helpers.validate import same_shape, whole

LOSS = "loss:"  # prefix, in θ, of the parameters of a learned loss


def mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean of the squared errors; ``outputs`` and ``y`` ``[n, d]``.

    Raises:
        UserError: if their shapes differ, which would compare every output with every target.
    """
    same_shape(outputs, y, "outputs and targets")
    return (outputs - y).square().mean()


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``outputs`` ``[n, ways]`` against labels ``y`` ``[n]``.

    The official MAML code differentiates the *sum* over the N classes instead: its inner rate acts N times as strongly.

    Raises:
        UserError: if there is not one label for each row of logits.

    >>> import helpers, torch
    >>> logits, labels = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])
    >>> bool(helpers.cross_entropy(logits, labels) < helpers.cross_entropy(logits, 1 - labels))
    True
    """
    _one_each(outputs, y)
    return functional.cross_entropy(outputs, y)


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Share of the examples whose largest logit is the label's; a fraction in ``[0, 1]``.

    Raises:
        UserError: if there is not one label for each row of logits.
    """
    _one_each(outputs, y)
    return (outputs.argmax(-1) == y).to(outputs.dtype).mean()


def label_proportions(outputs: Tensor, y: Tensor, bags: int = 2) -> Tensor:
    """For unlabelled bags of known composition: how far the mean predicted share of class 1 is from the true one.

    The divergence KL(s ‖ p) between two coins, for each bag's share s and mean probability p, averaged over the bags;
    0 where every share is met.

    Args:
        outputs: logits ``[bags · size, 2]``, bag after bag.
        y: of every example the share of class 1 in its bag, ``[bags · size]``.
        bags: how many there are. With one, or with equal shares, a constant output is as good as any.

    Raises:
        UserError: if there is not one share for each row of logits, or the bags cannot be equally large.

    Source: learning from label proportions, Quadrianto et al. (2009); with jets Dery et al. (2017), arXiv:1702.00414.
    """
    _one_each(outputs, y)
    if len(y) % whole(bags, "number of bags"):
        raise UserError(f"{len(y)} examples are no {bags} bags of equal size: give a number of bags that divides them")
    share = y.unflatten(0, (bags, -1)).mean(1)
    found = outputs.softmax(-1)[:, 1].unflatten(0, (bags, -1)).mean(1)
    found, true = (torch.stack([1 - part, part]).clamp(min=1e-6) for part in (found, share))
    return (true * (true.log() - found.log())).sum(0).mean()


def mixture(outputs: Tensor, y: Tensor) -> Tensor:
    """Classification without labels: cross-entropy of telling the bag with more of class 1 from that with less.

    The best classifier of two mixtures is the best of their components, whatever the shares, so these need not be
    known, only which is larger. What comes out ranks examples; it is no probability of class 1.

    Args:
        outputs: logits ``[n, 2]``.
        y: of every example the share of class 1 in its bag, ``[n]``.

    Raises:
        UserError: if there is not one share for each row of logits.

    Source: Metodiev, Nachman and Thaler (2017), arXiv:1708.02949, theorem 1 ("CWoLa").
    """
    _one_each(outputs, y)
    return functional.cross_entropy(outputs, (y > y.mean()).long())


def prediction_and_target(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """(ŷ, y), the features of the paper's regression: ``[n, 2 d]``."""
    same_shape(outputs, y, "outputs and targets")
    return torch.cat([outputs, y], -1)


def input_prediction_and_target(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """(x, ŷ, y), so that errors at different inputs may weigh differently: ``[n, d_x + 2 d]``."""
    same_shape(outputs, y, "outputs and targets")
    return torch.cat([x, outputs, y], -1)


def probabilities_and_label(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """For classification: the predicted probabilities and the label, one-hot, ``[n, 2 ways]``."""
    _one_each(outputs, y)
    label = y[:, None] == torch.arange(outputs.shape[-1], device=y.device)  # one_hot looks at values: vmap cannot
    return torch.cat([outputs.softmax(-1), label.to(outputs.dtype)], -1)


def _one_each(outputs: Tensor, y: Tensor) -> None:
    """Refuse other than one label, or share, for each row of logits."""
    same_shape(outputs.shape[:-1], y, "rows of logits and labels")


@dataclass(frozen=True)
class LearnedLoss:
    """A loss that is itself a network: a number for each example, computed from features and averaged.

    Its parameters ψ are part of θ, under ``loss:``. Nothing says that its minimum is where a prediction is right, or
    that it is bounded below; what it is good for is what descending it does to the task's own loss.

    Attributes:
        body: maps the features of an example to one number.
        features: ``features(x, outputs, y) -> [n, body.sizes[0]]``.
        positive: a softplus on the output, so that the loss is at least 0.

    Raises:
        UserError: if the body has more than one output.

    Source: Bechtle et al. (2020), section III.

    >>> import helpers, torch
    >>> loss = LearnedLoss(helpers.MLP((2, 8, 1)))  # it sees a prediction and a target
    >>> psi = loss.init(helpers.generator(0))
    >>> list(psi)[:2], bool(loss(psi, torch.ones(5, 1), torch.ones(5, 1), torch.zeros(5, 1)) >= 0)
    (['loss:linear1.weight', 'loss:linear1.bias'], True)
    """

    body: MLP
    features: Callable[[Tensor, Tensor, Tensor], Tensor] = prediction_and_target
    positive: bool = True

    def __post_init__(self) -> None:
        if self.body.sizes[-1] != 1:
            raise UserError(f"a learned loss is one number an example: its network cannot end in {self.body.sizes[-1]}")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh ψ, ready to be part of θ."""
        return {LOSS + name: value for name, value in self.body.init(generator, dtype).items()}

    def each(self, theta: Params, x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of every example, ``[n]``."""
        values = self.body(subtree(theta, LOSS), self.features(x, outputs, y))[:, 0]
        return functional.softplus(values) if self.positive else values

    def __call__(self, theta: Params, x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean over examples, a scalar."""
        return self.each(theta, x, outputs, y).mean()
