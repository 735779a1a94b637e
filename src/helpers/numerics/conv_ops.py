"""Convolution and normalisation with hand-written derivatives: what the networks spend their time on.

Second-order meta-learning differentiates a network twice, for many tasks at once, each with its own weights. Left to
itself, automatic differentiation turns that into many passes over memory. The two operations here say their own
derivatives, in terms of each other, so they can be differentiated any number of times, backwards and forwards
(``torch.func.jvp``, ``torch.func.hessian``; forward mode over forward mode is refused); and they say how ``vmap`` maps
them, so a batch of tasks is one batched product. What they compute is in two lines of plain tensor code each:
:func:`patches` ``@ weight``, and mean and variance. The tests hold them against that.

**Convolution as a trilinear form.** For an input x, a weight w and an output cotangent g, the number ⟨g, w ∗ x⟩ is
linear in each of the three. Its derivative by g is the convolution, by x the transposed convolution, by w the
correlation. Each of the three is bilinear, and *its* derivatives are the other two. So three functions, closed under
differentiation, are enough for every order.

**Standardisation.** With y = (x − mean x) r and r = (var x + ε)^(−1/2), both derivatives are short when written in y
and r instead of x (:class:`_Pullback`), the same projection twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import Function
from torch.nn.functional import pad

from helpers.errors import UserError

STRIDE = 2  # of every convolution here


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """3×3 convolution with stride 2 and TensorFlow's "SAME" padding.

    Args:
        x: ``[n, height, width, in]``.
        weight: ``[3, 3, in, out]``.

    Returns:
        ``[n, ceil(height / 2), ceil(width / 2), out]``, which is ``patches(x) @ weight.flatten(0, 2)``.
    """
    return _Convolve.apply(x, weight)


def standardize(x: Tensor, epsilon: float) -> Tensor:
    """Give each channel of ``x`` ``[..., channels]`` mean 0 and variance 1 (but for ε) over all other axes."""
    return _Standardize.apply(x, epsilon, 0)[0]


def patches(x: Tensor, stride: int = STRIDE) -> Tensor:
    """The 3×3 patches that a strided convolution with TensorFlow's "SAME" padding sees.

    A convolution is then one matrix product, ``patches(x) @ weight``, which ``vmap`` turns into a batched product
    even when every task has its own weight (a convolution call would become a slow grouped convolution).

    Args:
        x: ``[n, height, width, channels]``.

    Returns:
        ``[n, ceil(height / stride), ceil(width / stride), 9 * channels]``.
    """
    (rows, above, below), (columns, left, right) = _padding(x.shape[1], stride), _padding(x.shape[2], stride)
    x = pad(x, (0, 0, left, right, above, below))
    windows = x.unfold(1, 3, stride).unfold(2, 3, stride)  # [n, rows, columns, channels, 3, 3]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(len(x), rows, columns, 9 * x.shape[3])


def _padding(size: int, stride: int = STRIDE) -> tuple[int, int, int]:
    """Number of windows along an axis, and the lines of padding before and after; the odd one goes to the far side."""
    windows = -(-size // stride)
    lines = max((windows - 1) * stride + 3 - size, 0)
    return windows, lines // 2, lines - lines // 2


# ---------------------------------------- convolution  Below, T... are task axes. A task axis of the data merges
# with the images' axis where the weight has none, that is where all tasks still share their weights: the first
# inner step is one large product.
class _Convolve(Function):
    """x ``[T..., n, h, w, in]``, weight ``[T..., 3, 3, in, out]`` -> ``[T..., n, rows, columns, out]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        tasks = weight.dim() - 4
        seen = patches(x.flatten(0, tasks))
        product = _rows(seen, weight.shape[:tasks]) @ weight.flatten(-4, -2)
        return product.view(*x.shape[: tasks + 1], *seen.shape[1:3], weight.shape[-1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def jvp(ctx, dx: Tensor | None, dw: Tensor | None):
        _one_forward_level()
        x, weight = ctx.saved_tensors
        return _sum(dx is not None and _Convolve.apply(dx, weight), dw is not None and _Convolve.apply(x, dw))

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        by_x, by_weight = ctx.needs_input_grad
        return (
            _Transpose.apply(g, weight, *x.shape[-3:-1]) if by_x else None,
            _Correlate.apply(x, g, weight.dim() - 4) if by_weight else None,
        )

    @staticmethod
    def vmap(info, dims, x: Tensor, weight: Tensor):
        if dims[1] is None and weight.dim() == 4:
            x = x.movedim(dims[0], 0)
            return _Convolve.apply(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]), 0
        if dims[0] is None and weight.dim() == 5:  # many networks see the same images: their weights side by side
            weight = weight.movedim(dims[1], -2)
            return _Convolve.apply(x, weight.flatten(-2)).unflatten(-1, weight.shape[-2:]), 3
        return _Convolve.apply(*_first(info, dims, x, weight)), 0


class _Transpose(Function):
    """The derivative of ⟨g, w ∗ x⟩ by x: g ``[T..., n, rows, columns, out]`` -> ``[T..., n, h, w, in]``.

    Instead of multiplying first and adding nine overlapping images up, it gathers first. With stride 2 the lines of x
    come in two parities, and a pixel meets 1, 2 or 4 of the nine weights, by the parities of its row and column: four
    products, no overlap.
    """

    @staticmethod
    def forward(g: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
        tasks = weight.dim() - 4
        n, rows, columns, _ = (merged := g.flatten(0, tasks)).shape
        padded = pad(merged, (0, 0, 1, 1, 1, 1))
        parts = []
        for down, lines in _meetings(height):
            for right, rights in _meetings(width):
                near = [padded[:, a : a + rows, b : b + columns] for a in lines for b in rights]
                matrix = weight[..., down::STRIDE, right::STRIDE, :, :].mT.flatten(-4, -2)  # [T..., taps * out, in]
                product = _rows(torch.cat(near, -1), weight.shape[:tasks]) @ matrix
                parts.append(product.view(n, rows, columns, -1))
        x = torch.stack(parts, 3).unflatten(3, (STRIDE, STRIDE)).transpose(2, 3)  # [n, rows, 2, columns, 2, in]
        return x.flatten(3, 4).flatten(1, 2)[:, :height, :width].unflatten(0, g.shape[: tasks + 1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, *inputs[:2])
        ctx.size = inputs[2:]

    @staticmethod
    def jvp(ctx, dg: Tensor | None, dw: Tensor | None, *_):
        _one_forward_level()
        g, weight = ctx.saved_tensors
        return _sum(
            dg is not None and _Transpose.apply(dg, weight, *ctx.size),
            dw is not None and _Transpose.apply(g, dw, *ctx.size),
        )

    @staticmethod
    def backward(ctx, u: Tensor):
        g, weight = ctx.saved_tensors
        by_g, by_weight = ctx.needs_input_grad[:2]
        return (
            _Convolve.apply(u, weight) if by_g else None,
            _Correlate.apply(u, g, weight.dim() - 4) if by_weight else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, dims, g: Tensor, weight: Tensor, height: int, width: int):
        if dims[1] is None and weight.dim() == 4:
            g = g.movedim(dims[0], 0)
            return _Transpose.apply(g.flatten(0, 1), weight, height, width).unflatten(0, g.shape[:2]), 0
        return _Transpose.apply(*_first(info, dims, g, weight), height, width), 0


class _Correlate(Function):
    """The derivative of ⟨g, w ∗ x⟩ by w, ``[T..., 3, 3, in, out]``; x and g have a task axis each time w has one."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, tasks: int) -> Tensor:
        seen, axes = patches(x.flatten(0, tasks)), x.shape[:tasks]
        return (_rows(seen, axes).mT @ _rows(g, axes)).unflatten(-2, (3, 3, -1))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, *inputs[:2])
        ctx.tasks = inputs[2]

    @staticmethod
    def jvp(ctx, dx: Tensor | None, dg: Tensor | None, _):
        _one_forward_level()
        x, g = ctx.saved_tensors
        return _sum(
            dx is not None and _Correlate.apply(dx, g, ctx.tasks),
            dg is not None and _Correlate.apply(x, dg, ctx.tasks),
        )

    @staticmethod
    def backward(ctx, u: Tensor):
        x, g = ctx.saved_tensors
        by_x, by_g = ctx.needs_input_grad[:2]
        return _Transpose.apply(g, u, *x.shape[-3:-1]) if by_x else None, _Convolve.apply(x, u) if by_g else None, None

    @staticmethod
    def vmap(info, dims, x: Tensor, g: Tensor, tasks: int):
        return _Correlate.apply(*_first(info, dims, x, g), tasks + 1), 0


def _save(ctx, *tensors: Tensor) -> None:
    """For derivatives in both directions."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _one_forward_level() -> None:
    """Refuse forward mode over forward mode: PyTorch drops the outer tangents of every function with a ``jvp`` of its
    own, without a word.

    Raises:
        UserError: within a second ``jvp`` or ``jacfwd``.
    """
    levels = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in levels) > 1:
        raise UserError(
            "PyTorch has no forward mode over forward mode of this operation: "
            "let the inner derivative be backward, as torch.func.hessian does"
        )


def _sum(first: Tensor | bool, second: Tensor | bool) -> Tensor:
    """The sum of the two parts of a product's derivative; a part without a tangent is False."""
    if first is False:
        return second
    return first if second is False else first + second


def _rows(x: Tensor, tasks: torch.Size) -> Tensor:
    """``[..., channels]`` as one matrix a task, ``[T..., -1, channels]``."""
    return x.reshape(*tasks, -1, x.shape[-1])


def _first(info, dims, *tensors: Tensor) -> list[Tensor]:
    """The tensors with the mapped axis first; one that is not mapped gets it, without a copy."""
    pairs = zip(tensors, dims)  # noqa: B905 (dims goes on with the arguments that are no tensors)
    return [t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs]


def _meetings(size: int) -> list[tuple[int, list[int]]]:
    """For even and for odd lines of the input: the first kernel line that meets them, and where it and the next but
    one stand in
    the output, counted from one line of padding before it."""
    _, before, _ = _padding(size)
    found = []
    for parity in range(STRIDE):
        kernel = [i for i in range(3) if (parity + before - i) % STRIDE == 0]
        found.append((kernel[0], [1 + (parity + before - i) // STRIDE for i in kernel]))
    return found


# ---------------------------------------- standardisation
class _Standardize(Function):
    """x ``[T..., ..., channels]`` -> y, and r ``[T..., 1, ..., channels]``; ``tasks`` counts the axes T."""

    @staticmethod
    def forward(x: Tensor, epsilon: float, tasks: int):
        axes = tuple(range(tasks, x.dim() - 1))
        centred = x - x.mean(axes, keepdim=True)
        r = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)
        return centred * r, r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, *output)
        ctx.tasks = inputs[2]

    @staticmethod
    def jvp(ctx, dx: Tensor, *_):
        _one_forward_level()
        y, r = ctx.saved_tensors
        axes = tuple(range(ctx.tasks, y.dim() - 1))
        along = (y * dx).mean(axes, keepdim=True)
        return r * (dx - dx.mean(axes, keepdim=True) - along * y), -r * r * along

    @staticmethod
    def backward(ctx, by_y: Tensor, by_r: Tensor):
        return _Pullback.apply(by_y, by_r, *ctx.saved_tensors, ctx.tasks)[0], None, None

    @staticmethod
    def vmap(info, dims, x: Tensor, epsilon: float, tasks: int):
        return _Standardize.apply(x.movedim(dims[0], 0), epsilon, tasks + 1), (0, 0)


class _Pullback(Function):
    """Cotangents g of y and s of r to that of x: r (g − mean g − k y) with k = mean(g y) + s r / n, over the n
    examples. Returns k too.

    Since dr = −r² mean(y dx) and dy = r (dx − mean dx − mean(y dx) y).
    """

    @staticmethod
    def forward(g: Tensor, s: Tensor, y: Tensor, r: Tensor, tasks: int):
        axes, n = tuple(range(tasks, y.dim() - 1)), y.shape[tasks:-1].numel()
        k = (g * y).mean(axes, keepdim=True) + s * r / n
        return torch.addcmul(torch.addcmul(-r * g.mean(axes, keepdim=True), y, r * k, value=-1), g, r), k

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.tasks = inputs
        _save(ctx, *tensors, *output)

    @staticmethod
    def jvp(ctx, dg: Tensor | None, ds: Tensor | None, dy: Tensor | None, dr: Tensor | None, _):
        _one_forward_level()
        g, s, y, r, x, k = ctx.saved_tensors
        axes, n = tuple(range(ctx.tasks, y.dim() - 1)), y.shape[ctx.tasks : -1].numel()
        given = zip((dg, ds, dy, dr), (g, s, y, r), strict=True)
        dg, ds, dy, dr = (torch.zeros_like(value) if change is None else change for change, value in given)
        dk = (dg * y + g * dy).mean(axes, keepdim=True) + (ds * r + s * dr) / n
        return dr / r * x + r * (dg - dg.mean(axes, keepdim=True) - dk * y - k * dy), dk

    @staticmethod
    def backward(ctx, u: Tensor, by_k: Tensor):
        g, s, y, r, x, k = ctx.saved_tensors
        axes, n = tuple(range(ctx.tasks, y.dim() - 1)), y.shape[ctx.tasks : -1].numel()
        rb = r * (u * y).mean(axes, keepdim=True) - by_k / n
        by_g = torch.addcmul(torch.addcmul(-r * u.mean(axes, keepdim=True), y, rb, value=-1), u, r)
        by_y = torch.addcmul(u * (-r * k), g, rb, value=-1)
        by_r = (u * x).sum(axes, keepdim=True) / r - rb * s
        return by_g, -r * rb, by_y, by_r, None

    @staticmethod
    def vmap(info, dims, g: Tensor, s: Tensor, y: Tensor, r: Tensor, tasks: int):
        return _Pullback.apply(*_first(info, dims, g, s, y, r), tasks + 1), (0, 0)
