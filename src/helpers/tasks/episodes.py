"""N-way K-shot episodes: few-shot classification tasks drawn from a pool of classes.

The set-up is that of Vinyals et al. (Matching Networks, 2016), used by MAML (Finn et al., 2017, section
5.2): a task is N classes drawn without replacement, K labelled examples of each to learn from, and further examples of
the same classes to be judged on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.tasks.images import ImageClasses
from helpers.types import Examples, Tasks
from helpers.validate import whole


class Pool(NamedTuple):
    """All images of all classes, one class after the other.

    Attributes:
        images: uint8 ``[images, channels, height, width]``.
        sizes: images of each class, int64 ``[classes]``.
        largest: the largest of these.
        even: all classes have so many.
    """

    images: Tensor
    sizes: Tensor
    largest: int
    even: bool


@dataclass(frozen=True, eq=False)
class FewShot:
    """Few-shot classification tasks over a pool of classes.

    Every task draws its classes without replacement and, for each class, ``shots + queries`` different instances: the
    first ``shots`` are the support set, the others the query set, so the two never share an image. Labels 0 … ways − 1
    are given in the random order in which the classes were drawn, so a class has no fixed label. The same object serves
    training and evaluation. Classes may differ in size: each is as likely as any other, and so is each image of it.

    Images stay where they are: tasks are assembled on the device of ``images``, and only the images that are drawn are
    converted to floats.

    Args:
        images: uint8, ``[classes, instances, height, width]``, or with colours ``[classes, instances, channels, height,
            width]``; a sequence of such tensors without the first axis, one a class, where classes differ in size; or
            :class:`~helpers.tasks.images.ImageClasses`, whose names then stand in messages. 255 is ink.
        ways: classes in a task, N.
        shots: support examples of each class, K.
        queries: query examples of each class.

    Raises:
        UserError: when ``images`` is nothing of the kind, a number is not positive, there are fewer classes than
            ``ways``, or fewer instances of a class than ``shots + queries``.

    >>> import helpers, torch
    >>> images = torch.zeros(20, 6, 28, 28, dtype=torch.uint8)  # six images of each of twenty classes
    >>> support, query = helpers.FewShot(images, ways=5, shots=1, queries=3).sample(4, helpers.generator(0))
    >>> support.x.shape, support.y[0].tolist(), query.y.shape
    (torch.Size([4, 5, 1, 28, 28]), [0, 1, 2, 3, 4], torch.Size([4, 15]))
    >>> uneven = [torch.zeros(n, 3, 28, 28, dtype=torch.uint8) for n in (4, 7, 30)]  # in colour
    >>> helpers.FewShot(uneven, ways=2, shots=1, queries=3).sample(4, helpers.generator(0)).query.x.shape
    torch.Size([4, 6, 3, 28, 28])
    """

    images: Tensor | Sequence[Tensor] | ImageClasses
    ways: int
    shots: int
    queries: int

    def __post_init__(self) -> None:
        named = isinstance(self.images, ImageClasses)
        images = self.images.images if named else self.images
        check_images(images)
        for name in ("ways", "shots", "queries"):
            whole(getattr(self, name), f"{name} of an episode")
        if self.ways > len(images):
            raise UserError(
                f"{self.ways}-way tasks need at least {self.ways} classes, but there are {len(images)}: "
                "choose fewer ways"
            )
        pool, needed = pooled(images), self.shots + self.queries
        small = (pool.sizes < needed).nonzero().flatten().tolist() if not pool.even else []
        if small or (pool.even and pool.largest < needed):
            named_as = self.images.names if named else [f"class {i}" for i in range(len(images))]
            listed = [f"{named_as[i]} has {len(images[i])}" for i in small[:5]]
            more = [f"{len(small) - 5} more have fewer as well"] if len(small) > 5 else []
            found = " and ".join([*listed, *more]) or f"each class has {pool.largest}"
            raise UserError(
                f"{self.shots} shots and {self.queries} queries need {needed} images of a class, but {found}: "
                f"choose fewer{', or leave the small classes out' if small else ''}"
            )
        object.__setattr__(self, "_pool", pool)

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` tasks.

        Args:
            n_tasks: how many tasks, T.
            generator: the only source of randomness; it must live on the device of ``images``.

        Returns:
            ``Tasks`` with, for the support set (and alike for the query set with ``queries`` in place of ``shots``),
            ``x``: float32 ``[T, ways * shots, channels, height, width]`` in [0, 1], ink = 1; one channel without
            colours; ``y``: int64 ``[T, ways * shots]`` in ``[0, ways)``.
            Examples are ordered class by class, so ``x.unflatten(1, (ways, shots))`` separates the classes.

        Raises:
            UserError: when ``n_tasks`` is not positive or the generator lives on another device.
        """
        check_draw(self._pool.images, n_tasks, generator)
        # The positions of the k largest of independent uniforms are k positions without replacement, in random order.
        # (Equal uniforms, about one pair in 2^24, only make the order of that pair deterministic.)
        uniforms = torch.rand(n_tasks, len(self._pool.sizes), generator=generator, device=self._pool.images.device)
        return episodes_of(self._pool, uniforms.topk(self.ways).indices, self.shots, self.queries, generator)


def check_images(images: Tensor | Sequence[Tensor]) -> None:
    """Refuse what is neither a uint8 tensor ``[classes, instances, (channels,) height, width]`` with pixels nor a
    sequence of its parts, one a class.

    Raises:
        UserError: then.
    """
    whole_set = isinstance(images, Tensor)
    if whole_set:
        parts, axes, found = [images], (4, 5), f"{images.dtype} of shape {list(images.shape)}"
    elif isinstance(images, (list, tuple)) and images and all(isinstance(one, Tensor) for one in images):
        parts, axes = images, (3, 4)
        kinds = {f"{one.dtype} of shape [n, {', '.join(map(str, one.shape[1:]))}]" for one in images}
        found = f"a {type(images).__name__} of {' and '.join(sorted(kinds)[:3])}"
    else:
        parts, axes, found = [], (), f"a {type(images).__name__}"
    first = axes[0] - 2 if axes else 0  # of the axes that all classes share
    alike = {(one.dtype, one.device, one.shape[first:]) for one in parts}
    if len(alike) == 1 and all(
        one.dtype == torch.uint8 and one.dim() in axes and 0 not in one.shape[first:] for one in parts
    ):
        return
    raise UserError(
        "tasks need images as one uint8 tensor [classes, instances, height, width], for colours with channels before "
        f"the height, or as a list of such tensors, one a class, not {found}"
    )


def pooled(images: Tensor | Sequence[Tensor]) -> Pool:
    """Images by class as one pool.

    Args:
        images: what :func:`check_images` lets pass.
    """
    if isinstance(images, Tensor):
        flat, counts, grey = images.flatten(0, 1), [images.shape[1]] * len(images), images.dim() == 4
    else:
        flat, counts, grey = torch.cat(list(images)), [len(one) for one in images], images[0].dim() == 3
    sizes = torch.tensor(counts, device=flat.device)
    return Pool(flat.unsqueeze(1) if grey else flat, sizes, max(counts, default=0), len(set(counts)) <= 1)


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


def episodes_of(pool: Pool, classes: Tensor, shots: int, queries: int, generator: torch.Generator) -> Tasks:
    """Tasks of given classes: as many different images of each are drawn as a task needs.

    Args:
        pool: the images, with enough of each class.
        classes: the classes of every task, in the order of their labels, ``[T, ways]``.
        shots: support examples of each class.
        queries: query examples of each class.
        generator: the only source of randomness, on the device of the images.

    Returns:
        As :meth:`FewShot.sample`.
    """
    (n_tasks, ways), device = classes.shape, pool.images.device
    uniforms = torch.rand(n_tasks, ways, pool.largest, generator=generator, device=device)
    if pool.even:
        first = classes * pool.largest
    else:  # what a class does not have comes last
        absent = torch.arange(pool.largest, device=device) >= pool.sizes[classes].unsqueeze(-1)
        uniforms.masked_fill_(absent, -1.0)
        first = (pool.sizes.cumsum(0) - pool.sizes)[classes]
    drawn = first.unsqueeze(-1) + uniforms.topk(shots + queries).indices  # [T, ways, each], rows of the pool

    def examples(rows: Tensor) -> Examples:
        x = pool.images.index_select(0, rows.flatten()).to(torch.float32).div_(255)
        y = torch.arange(ways, device=device).repeat_interleave(rows.shape[2]).repeat(n_tasks, 1)
        return Examples(x.view(n_tasks, -1, *pool.images.shape[1:]), y)

    return Tasks(support=examples(drawn[..., :shots]), query=examples(drawn[..., shots:]))
