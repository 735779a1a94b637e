"""N-way K-shot episodes: few-shot classification tasks drawn from a pool of classes.

The set-up is that of Vinyals et al. (Matching Networks, 2016), used by MAML (Finn et al., 2017, section
5.2): a task is N classes drawn without replacement, K labelled examples of each to learn from, and further examples of
the same classes to be judged on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.types import Examples, Tasks
from helpers.validate import whole


@dataclass(frozen=True, eq=False)
class FewShot:
    """Few-shot classification tasks over a pool of classes.

    Every task draws its classes without replacement and, for each class, ``shots + queries`` different instances: the
    first ``shots`` are the support set, the others the query set, so the two never share an image. Labels 0 … ways − 1
    are given in the random order in which the classes were drawn, so a class has no fixed label. The same object serves
    training and evaluation.

    Images stay where they are: tasks are assembled on the device of ``images``, and only the images that are drawn are
    converted to floats.

    Args:
        images: uint8, ``[classes, instances, height, width]``; 255 is ink.
        ways: classes in a task, N.
        shots: support examples of each class, K.
        queries: query examples of each class.

    Raises:
        UserError: when ``images`` is not such a tensor, a number is not positive, there are fewer classes than
            ``ways``, or fewer instances of a class than ``shots + queries``.

    >>> import helpers, torch
    >>> images = torch.zeros(20, 6, 28, 28, dtype=torch.uint8)  # six images of each of twenty classes
    >>> support, query = helpers.FewShot(images, ways=5, shots=1, queries=3).sample(4, helpers.generator(0))
    >>> support.x.shape, support.y[0].tolist(), query.y.shape
    (torch.Size([4, 5, 1, 28, 28]), [0, 1, 2, 3, 4], torch.Size([4, 15]))
    """

    images: Tensor
    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        check_images(self.images)
        for name in ("ways", "shots", "queries"):
            whole(getattr(self, name), f"{name} of an episode")
        classes, instances = self.images.shape[:2]
        if self.ways > classes:
            raise UserError(
                f"{self.ways}-way tasks need at least {self.ways} classes, but there are {classes}: choose fewer ways"
            )
        if self.shots + self.queries > instances:
            raise UserError(
                f"{self.shots} shots and {self.queries} queries need {self.shots + self.queries} images of a class, "
                f"but each class has {instances}: choose fewer"
            )

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` tasks.

        Args:
            n_tasks: how many tasks, T.
            generator: the only source of randomness; it must live on the device of ``images``.

        Returns:
            ``Tasks`` with, for the support set (and alike for the query set with ``queries`` in place of ``shots``),
            ``x``: float32 ``[T, ways * shots, 1, height, width]`` in [0, 1], ink = 1;
            ``y``: int64 ``[T, ways * shots]`` in ``[0, ways)``.
            Examples are ordered class by class, so ``x.unflatten(1, (ways, shots))`` separates the classes.

        Raises:
            UserError: when ``n_tasks`` is not positive or the generator lives on another device.
        """
        check_draw(self.images, n_tasks, generator)
        # The positions of the k largest of independent uniforms are k positions without replacement, in random order.
        # (Equal uniforms, about one pair in 2^24, only make the order of that pair deterministic.)
        uniforms = torch.rand(n_tasks, len(self.images), generator=generator, device=self.images.device)
        return episodes_of(self.images, uniforms.topk(self.ways).indices, self.shots, self.queries, generator)


def check_images(images: Tensor) -> None:
    """Refuse what is no uint8 tensor ``[classes, instances, height, width]`` with pixels.

    Raises:
        UserError: then.
    """
    if not isinstance(images, Tensor):
        found = type(images).__name__
    elif images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape[2:]:
        found = f"{images.dtype} of shape {list(images.shape)}"
    else:
        return
    raise UserError(f"tasks need images as one uint8 tensor [classes, instances, height, width], not {found}")


def check_draw(images: Tensor, n_tasks: int, generator: torch.Generator) -> None:
    """Refuse a number of tasks that is not positive, and a generator that is not where the images are.

    Raises:
        UserError: in both cases.
    """
    whole(n_tasks, "number of tasks to draw")
    if generator.device.type != images.device.type:
        raise UserError(
            f"the images are on {images.device} but the random generator is on {generator.device}: "
            f"make it on {images.device}"
        )


def episodes_of(images: Tensor, classes: Tensor, shots: int, queries: int, generator: torch.Generator) -> Tasks:
    """Tasks of given classes: as many different images of each are drawn as a task needs.

    Args:
        images: uint8, ``[classes, instances, height, width]``.
        classes: the classes of every task, in the order of their labels, ``[T, ways]``.
        shots: support examples of each class.
        queries: query examples of each class.
        generator: the only source of randomness, on the device of ``images``.

    Returns:
        As :meth:`FewShot.sample`.
    """
    n_tasks, ways = classes.shape
    instances, height, width = images.shape[1:]
    uniforms = torch.rand(n_tasks, ways, instances, generator=generator, device=images.device)
    instance = uniforms.topk(shots + queries).indices
    drawn = classes.unsqueeze(-1) * instances + instance  # [T, ways, each], rows of the flattened pool
    pool = images.flatten(0, 1)

    def examples(rows: Tensor) -> Examples:
        x = pool.index_select(0, rows.flatten()).to(torch.float32).div_(255)
        y = torch.arange(ways, device=images.device).repeat_interleave(rows.shape[2]).repeat(n_tasks, 1)
        return Examples(x.view(n_tasks, -1, 1, height, width), y)

    return Tasks(support=examples(drawn[..., :shots]), query=examples(drawn[..., shots:]))
