"""Regression on a family of functions of your own: one formula whose parameters differ from task to task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.types import Examples, Tasks
from helpers.validate import finite, positive, whole


@dataclass(frozen=True, eq=False)
class Functions:
    """Regression of y = f(x; a, b, …) plus noise; a task draws a, b, … uniformly, and every example its x.

    Args:
        function: ``function(x, a=..., b=...)``, called once for all tasks: ``x`` is ``[T, n, dimensions]``, every
            parameter ``[T, 1, 1]``, and what it returns ``[T, n, outputs]``.
        parameters: the range of each parameter, by its name.
        shots: support points of a task.
        queries: query points of a task.
        inputs: range of every entry of x.
        dimensions: entries of x.
        noise: deviation of what is added to y, in support and query set.

    Raises:
        UserError: when a number of points is not positive, a range is not two finite numbers, or the function does not
            take these parameters.

    >>> import helpers
    >>> lines = helpers.Functions(lambda x, a, b: a * x + b, {"a": (-2, 2), "b": (-1, 1)}, shots=5)
    >>> support, query = lines.sample(4, helpers.generator(0))
    >>> support.x.shape, query.y.shape
    (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """

    function: Callable[..., Tensor]
    parameters: Mapping[str, tuple[float, float]]
    shots: int = 10
    queries: int = 10
    inputs: tuple[float, float] = (-5.0, 5.0)
    dimensions: int = 1
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shots", "queries", "dimensions"):
            whole(getattr(self, name), f"{name} of a family of functions")
        for name, ends in {"inputs": self.inputs, **self.parameters}.items():
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise UserError(f"the range of {name} must be two numbers, such as (-1, 1), not {ends!r}")
            for end in ends:
                finite(end, f"ends of the range of {name}")
        positive(self.noise, "noise of a family of functions", zero=True)
        try:
            inspect.signature(self.function).bind(None, **dict.fromkeys(self.parameters))
        except TypeError as error:
            names = ", ".join(["x", *self.parameters])
            raise UserError(f"the function must take {names}, as in lambda {names}: … ({error})") from error

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` functions with their points.

        Returns:
            ``Tasks`` with ``x`` ``[T, n, dimensions]`` and ``y`` ``[T, n, outputs]``, on the generator's device.

        Raises:
            UserError: for a number of tasks below 1, or a function that returns another shape.
        """
        whole(n_tasks, "number of tasks")
        points = self.shots + self.queries

        def uniform(ends: tuple[float, float], *shape: int) -> Tensor:
            return ends[0] + (ends[1] - ends[0]) * torch.rand(shape, generator=generator, device=generator.device)

        drawn = {name: uniform(ends, n_tasks, 1, 1) for name, ends in self.parameters.items()}
        x = uniform(self.inputs, n_tasks, points, self.dimensions)
        y = self.function(x, **drawn)
        if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[:2] != x.shape[:2]:
            found = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UserError(
                f"the function must return a tensor [{n_tasks}, {points}, outputs] for x {list(x.shape)} and "
                f"parameters [{n_tasks}, 1, 1], not {found}: keep the last axis, as in x.sum(-1, keepdim=True)"
            )
        if self.noise:
            y = y + self.noise * torch.randn(y.shape, generator=generator, device=generator.device)
        return Tasks(*(Examples(x[:, part], y[:, part]) for part in (slice(self.shots), slice(self.shots, None))))
