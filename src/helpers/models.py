"""Networks as functions of a parameter dictionary: ``outputs = model(params, x)``.

A model holds no tensors. ``model.init(generator)`` makes the parameters, a flat dictionary of named tensors, and
calling the model with any such dictionary evaluates the network there; an adapted copy is just another dictionary.

Normalisation uses the statistics of the batch it is given, in training and in evaluation alike, as the official MAML
code does, and is not PyTorch's. That is deliberate: under ``torch.func.vmap`` some operations of PyTorch give
second-order meta-gradients that are silently wrong (the MAML chapter shows it; pytorch/functorch#534). They are

- ``batch_norm`` (in training), ``instance_norm`` and ``layer_norm`` with an adapted scale,
- ``embedding`` with ``padding_idx`` or ``scale_grad_by_freq``.

Without a scale all of them are right, as are ``group_norm`` and ``rms_norm``, convolutions, pooling, activations and
losses: the tests go through a list. What is computed here is ``mean`` and ``rsqrt``; :mod:`helpers.operations` has it
together with derivatives that make it fast. :func:`layer_norm` is layer normalisation with right derivatives, and
:func:`from_module` takes any ``torch.nn.Module``, with these operations made right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from helpers.modules import from_module
from helpers.operations import convolve, patches, standardize
from helpers.runtime import UserError
from helpers.validate import one_of, positive, whole

__all__ = [
    "EPSILON", "MLP", "ConvNet", "DeepSets", "Model", "Params", "WideResNet", "below", "from_module", "layer_norm",
    "normalize", "patches", "stacked",
]  # fmt: skip

Params = dict[str, Tensor]

EPSILON = 1e-3  # of the official MAML code's normalisation (TensorFlow's default)


def stacked(drawn: Sequence[Params]) -> Params:
    """Several parameter dictionaries of one network as one, its tensors with a leading axis."""
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


def below(params: Params, prefix: str) -> Params:
    """The entries whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


class Model(Protocol):
    """A network family: how its parameters begin, how they are applied, and which of them a learner adapts.

    Attributes:
        head: what the names of the last layer's parameters begin with, such as ``"head."``.
    """

    @property
    def head(self) -> str: ...

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params: ...

    def __call__(self, params: Params, x: Tensor) -> Tensor: ...

    def adapts(self, name: str) -> bool: ...


def normalize(x: Tensor, shift: Tensor | None = None, epsilon: float = EPSILON) -> Tensor:
    """Batch normalisation with the statistics of ``x`` itself, over every axis but the last.

    Args:
        x: ``[..., channels]``; all leading axes are the batch.
        shift: ``[channels]``, added afterwards. There is no scale: a ReLU and a linear map follow, which absorb it.

    Returns:
        A tensor of the shape of ``x``. Differentiable any number of times, also under ``vmap``.

    Source: Ioffe and Szegedy (2015), algorithm 1, without running averages.
    """
    normal = standardize(x, positive(epsilon, "epsilon of a normalisation"))
    return normal if shift is None else normal + shift


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Layer normalisation over the last axis, with derivatives that stay right under ``vmap``.

    ``torch.nn.functional.layer_norm`` gives wrong ones of second order there if ``weight`` is adapted.

    Args:
        x: ``[..., features]``.
        weight: ``[features]``, a scale.
        bias: ``[features]``, added afterwards.

    Source: Ba, Kiros and Hinton (2016), equation 4.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0])).round()
    tensor([[-2.,  3.]])
    """
    x = functional.layer_norm(x, x.shape[-1:], eps=positive(epsilon, "epsilon of a normalisation"))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _xavier(
    shape: tuple[int, ...], fan_in: int, fan_out: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return (2 * torch.rand(shape, generator=generator, dtype=dtype, device=generator.device) - 1) * bound


def _rows(x: Tensor, features: int) -> Tensor:
    """``[n, ...]`` as ``[n, features]``."""
    if x.dim() < 2 or x.shape[1:].numel() != features:
        raise UserError(f"this network takes inputs [n, {features}], not {list(x.shape)}: reshape them or change sizes")
    return x.flatten(1)


def _cut_normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draws from a normal distribution cut at two deviations: the inverse of its distribution function at uniform
    numbers. PyTorch's own ``trunc_normal_`` draws other numbers in other versions; ``rand`` does not."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (deviation * 2**0.5 * torch.erfinv((2 * uniform - 1) * math.erf(2**0.5))).to(dtype)


_ACTIVATIONS = {"relu": functional.relu, "tanh": functional.tanh, "elu": functional.elu, "identity": lambda x: x}


def _channels_last(x: Tensor, channels: int, halvings: int = 1) -> Tensor:
    """Images ``[n, channels, height, width]`` as ``[n, height, width, channels]``.

    Raises:
        UserError: for another shape, or if halving them so often begins with a single pixel.
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(f"this network takes images [n, {channels}, height, width], not {list(x.shape)}: reshape them")
    _large_enough(x.shape[2], x.shape[3], halvings)
    return x.movedim(1, -1)


def _large_enough(height: int, width: int, halvings: int) -> None:
    if min(height, width) < 1 or max(height, width) <= 2 ** (halvings - 1) > 1:
        raise UserError(
            f"images of {height} x {width} pixels are too small for {halvings} blocks, each of which halves them: "
            "take fewer blocks or larger images"
        )


@dataclass(frozen=True)
class MLP:
    """A fully connected network; with ``norm`` each hidden layer is batch-normalised.

    Parameters are ``linear1.weight`` ``[in, out]``, ``linear1.bias`` ``[out]`` and so on, and ``norm1.shift`` with
    ``norm``. The sinusoid network is ``MLP((1, 40, 40, 1))``; the fully connected Omniglot network ``MLP((784, 256,
    128, 64, 64, 5), norm=True)``.

    Attributes:
        scale: deviation of the first weights; None draws weights and biases from U[−1/√n, 1/√n], n inputs, as PyTorch's
            linear layers do; ``"xavier"`` is Glorot and Bengio's uniform distribution, with biases 0.
        activation: ``"relu"``, ``"tanh"`` or ``"elu"``; or ``"identity"``, for a product of linear maps.
        bias: whether the linear maps have one.

    Raises:
        UserError: if there is no such network.

    Source: Finn, Abbeel and Levine (2017), section 5.1 and 5.2; initialisation of the official code (weights from a
    normal distribution of deviation 0.01, cut at two deviations; biases 0).
    """

    sizes: tuple[int, ...]
    norm: bool = False
    scale: float | str | None = 0.01
    activation: str = "relu"
    bias: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.sizes, str) or not isinstance(self.sizes, Sequence) or len(self.sizes) < 2:
            raise UserError(
                "the sizes of an MLP are the numbers of inputs, hidden units and outputs, such as (1, 40, 40, 1), "
                f"not {self.sizes!r}"
            )
        for size in self.sizes:
            whole(size, "sizes of an MLP")
        one_of(self.activation, "activation", _ACTIVATIONS)
        if isinstance(self.scale, str):
            one_of(self.scale, "distribution of first weights", ["xavier"])
        elif self.scale is not None:
            positive(self.scale, "scale of an MLP", zero=True)

    @property
    def head(self) -> str:
        """The last linear map."""
        return f"linear{len(self.sizes) - 1}."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False), start=1):
            bias = torch.zeros(fan_out, dtype=dtype, device=generator.device)
            if self.scale is None:
                weight = torch.empty(fan_in, fan_out, dtype=dtype, device=generator.device)
                weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            elif self.scale == "xavier":
                weight = _xavier((fan_in, fan_out), fan_in, fan_out, generator, dtype)
            else:
                weight = _cut_normal((fan_in, fan_out), self.scale, generator, dtype)
            params |= {f"linear{layer}.weight": weight} | ({f"linear{layer}.bias": bias} if self.bias else {})
            if self.norm and layer < len(self.sizes) - 1:
                params[f"norm{layer}.shift"] = torch.zeros(fan_out, dtype=dtype, device=generator.device)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map ``x`` ``[n, ...]`` (flattened to ``[n, sizes[0]]``) to ``[n, sizes[-1]]``.

        Raises:
            UserError: if the inputs have another number of features.
        """
        x = _rows(x, self.sizes[0])
        last = len(self.sizes) - 1
        activate = _ACTIVATIONS[self.activation]
        for layer in range(1, last):
            x = self._linear(params, layer, x)
            x = activate(normalize(x, params[f"norm{layer}.shift"]) if self.norm else x)
        return self._linear(params, last, x)

    def _linear(self, params: Params, layer: int, x: Tensor) -> Tensor:
        x = x @ params[f"linear{layer}.weight"]
        return x + params[f"linear{layer}.bias"] if self.bias else x

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all but the normalisation shifts."""
        return not name.endswith(".shift")


@dataclass(frozen=True)
class ConvNet:
    """The Omniglot network: four blocks of 3×3 convolution with stride 2, batch normalisation and ReLU; mean over
    positions; linear.

    Parameters are ``conv1.weight`` ``[3, 3, in, out]``, ``norm1.shift`` ``[out]``, …, ``head.weight`` ``[filters,
    ways]`` and ``head.bias`` ``[ways]``. There is no convolution bias, since normalisation removes it, and no
    normalisation scale. The shifts belong to the meta-parameters but the inner loop leaves them alone, as in the
    official code.

    The official code draws the head from a unit normal distribution (``head_scale=1``). The default is smaller: the
    first predictions are then near uniform instead of confidently wrong, which saves about a thousand iterations.

    The networks of Reptile's and iMAML's codes differ in their ends: ``flatten`` feeds all positions of the last block
    to the linear layer instead of their mean (so the image size matters), and ``affine`` gives each normalisation a
    scale, ``norm1.scale`` ``[out]``, which the inner loop adapts together with the shift.

    With ``norm_last`` a block is convolution, ReLU, normalisation. Flattened, the features of every example then have
    a norm near √(number of features), and the inner problem of iMAML's set-up is well conditioned: the iMAML chapter
    measures it.

    Attributes:
        ways: number of classes.
        head_scale: deviation of the head's first weights; None draws them as the convolutions'; 0 is a head of zeros.
        flatten: the head sees every position.
        affine: normalisation with scale and shift, both adapted.
        size: height and width of the images; matters with ``flatten`` only.
        gain: factor of the first weights of the convolutions (and of the head, where ``head_scale`` is None).
        norm: without it there is no normalisation, each image is judged by itself, and the shifts are adapted biases.
        norm_last: normalisation after ReLU instead of before; with ``norm`` and ``affine`` alone.

    Raises:
        UserError: if there is no such network, or ``norm_last`` has no normalisation with scale and shift to put last.

    Source: Finn, Abbeel and Levine (2017), section 5.2; otherwise initialised as in the official code (Xavier for
    convolutions). With ``flatten`` and ``affine``, ``models.py`` of Reptile's official code.
    """

    ways: int
    filters: int = 64
    blocks: int = 4
    channels: int = 1
    head_scale: float | None = 0.1
    flatten: bool = False
    affine: bool = False
    size: int = 28
    gain: float = 1.0
    norm: bool = True
    norm_last: bool = False

    def __post_init__(self) -> None:
        if self.norm_last and not (self.norm and self.affine):
            raise UserError("norm_last needs a normalisation with scale and shift: pass norm=True and affine=True")
        for name in ("ways", "filters", "blocks", "channels", "size"):
            whole(getattr(self, name), f"{name} of a ConvNet")
        if self.head_scale is not None:
            positive(self.head_scale, "head_scale of a ConvNet", zero=True)
        positive(self.gain, "gain of a ConvNet")
        if self.flatten:
            _large_enough(self.size, self.size, self.blocks)

    @property
    def head(self) -> str:
        """The linear map."""
        return "head."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        device, params, fan_in = generator.device, {}, self.channels
        for block in range(1, self.blocks + 1):
            shape = (3, 3, fan_in, self.filters)
            weight = _xavier(shape, 9 * fan_in, 9 * self.filters, generator, dtype)
            params[f"conv{block}.weight"] = self.gain * weight
            if self.affine:
                params[f"norm{block}.scale"] = torch.ones(self.filters, dtype=dtype, device=device)
            params[f"norm{block}.shift"] = torch.zeros(self.filters, dtype=dtype, device=device)
            fan_in = self.filters
        side = -(-self.size // 2**self.blocks) if self.flatten else 1
        shape = (self.filters * side**2, self.ways)
        if self.head_scale is None:
            params["head.weight"] = self.gain * _xavier(shape, *shape, generator, dtype)
        else:
            params["head.weight"] = self.head_scale * torch.randn(
                shape, generator=generator, dtype=dtype, device=device
            )
        params["head.bias"] = torch.zeros(self.ways, dtype=dtype, device=device)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map images ``x`` ``[n, channels, height, width]`` to logits ``[n, ways]``.

        Raises:
            UserError: if the images have another number of channels than the model, or too few pixels.
        """
        shape = list(x.shape)
        x = _channels_last(x, self.channels, self.blocks)
        for block in range(1, self.blocks + 1):
            x = convolve(x, params[f"conv{block}.weight"])
            if self.norm_last:
                x = torch.relu(x)
            if self.norm:
                x = normalize(x)
            if self.affine:
                x = x * params[f"norm{block}.scale"]
            x = x + params[f"norm{block}.shift"]
            if not self.norm_last:
                x = torch.relu(x)
        x = x.flatten(1) if self.flatten else x.mean((1, 2))
        if x.shape[1] != params["head.weight"].shape[0]:
            raise UserError(f"a flattened network takes images of one size: give ConvNet the size of {shape}")
        return x @ params["head.weight"] + params["head.bias"]

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all but the shifts of a normalisation without a scale."""
        return self.affine or not self.norm or not name.endswith(".shift")


@dataclass(frozen=True)
class DeepSets:
    """A network of a set of particles: a network of each, their mean weighted by pT, a network of that.

    Parameters are those of two :class:`MLP`, under ``each.`` and ``all.``. The order of the particles does not matter,
    nor do slots that are empty, nor whether a particle is split in two at the same place: no weight, no part in the
    mean.

    Attributes:
        ways: number of logits.
        hidden: units of the layers.

    Raises:
        UserError: if one of them is not a whole number of at least 1.

    Source: Zaheer et al. (2017), theorem 2; weighted by pT, an energy flow network (Komiske, Metodiev and Thaler 2019,
    arXiv:1810.05165, equation 1.2).
    """

    ways: int = 2
    hidden: int = 32

    def __post_init__(self) -> None:
        whole(self.ways, "ways of a network of sets")
        whole(self.hidden, "hidden units of a network of sets")

    @property
    def head(self) -> str:
        """The last linear map of the set's network."""
        return "all." + self._parts["all."].head

    @property
    def _parts(self) -> dict[str, MLP]:
        each, whole = (2, self.hidden, self.hidden), (self.hidden, self.hidden, self.ways)
        return {"each.": MLP(each, scale=None), "all.": MLP(whole, scale=None)}

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        drawn = {prefix: part.init(generator, dtype) for prefix, part in self._parts.items()}
        return {prefix + name: value for prefix, params in drawn.items() for name, value in params.items()}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map ``x`` ``[n, particles, 3]``, share of pT, η and φ, to logits ``[n, ways]``.

        Raises:
            UserError: if ``x`` has another shape.
        """
        if x.dim() != 3 or x.shape[2] != 3:
            raise UserError(f"this network takes particles [n, particles, 3], not {list(x.shape)}")
        each, whole = (partial(part, below(params, prefix)) for prefix, part in self._parts.items())
        hidden = torch.relu(each(x[..., 1:].flatten(0, 1))).unflatten(0, x.shape[:2])
        return whole((x[..., :1] * hidden).sum(1))

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: it changes all."""
        return True


@dataclass(frozen=True)
class WideResNet:
    """The wide residual network WRN-d-k: a convolution with 16 filters, three groups of (d − 4) / 6 blocks with 16k,
    32k and 64k filters, batch normalisation and ReLU, mean over positions, linear.

    A block adds two 3×3 convolutions to its input, each preceded by normalisation and ReLU. The first block of the
    second and of the third group has stride 2. Where a block changes the number of channels, its input is projected (a
    1×1 convolution, after the normalisation and ReLU that both paths then share).

    Parameters are ``conv.weight`` ``[3, 3, channels, 16]``; in each block, say the first, ``group1.block1.norm1.scale``
    and ``.norm1.shift`` ``[in]``, ``.conv1.weight`` ``[3, 3, in, out]``, ``.norm2.scale`` and ``.norm2.shift``
    ``[out]``, ``.conv2.weight`` ``[3, 3, out, out]`` and, if it projects, ``.project.weight`` ``[in, out]``;
    ``norm.scale`` and ``norm.shift``; ``head.weight`` ``[64k, classes]`` and ``head.bias`` ``[classes]``. Normalisation
    has the statistics of the batch itself. There is no dropout.

    One network is fast: the convolutions are PyTorch's own, four times as fast on a CPU as products of patches. Many,
    under ``vmap``, are right too but gain nothing over one after the other.

    Attributes:
        depth: 6 n + 4, for n blocks in each group.
        width: k, how many times as many filters as in a thin network.
        channels: of the images.
        classes: number of logits.

    Raises:
        UserError: if no network has that depth or width.

    Source: Zagoruyko and Komodakis (2016), table 1 and section 2; weights drawn as by He et al. (2015), from a normal
    distribution of variance 2 / inputs.
    """

    depth: int = 16
    width: int = 1
    channels: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("depth", "width", "channels", "classes"):
            whole(getattr(self, name), f"{name} of a wide residual network")
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"a wide residual network has depth 6 n + 4, not {self.depth}: take 10, 16, 22, 28 or 40")

    @property
    def head(self) -> str:
        """The linear map."""
        return "head."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        device, params = generator.device, {}

        def draw(*shape: int) -> Tensor:
            deviation = (2 / math.prod(shape[:-1])) ** 0.5
            return deviation * torch.randn(shape, generator=generator, dtype=dtype, device=device)

        def norm(name: str, size: int) -> Params:
            scale, shift = torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)
            return {f"{name}.scale": scale, f"{name}.shift": shift}

        params["conv.weight"] = draw(3, 3, self.channels, 16)
        fan_in = 16
        for block, filters, _ in self._blocks():
            params |= norm(f"{block}.norm1", fan_in) | {f"{block}.conv1.weight": draw(3, 3, fan_in, filters)}
            params |= norm(f"{block}.norm2", filters) | {f"{block}.conv2.weight": draw(3, 3, filters, filters)}
            if filters != fan_in:
                params[f"{block}.project.weight"] = draw(fan_in, filters)
            fan_in = filters
        params |= norm("norm", fan_in) | {"head.weight": draw(fan_in, self.classes)}
        return params | {"head.bias": torch.zeros(self.classes, dtype=dtype, device=device)}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map images ``x`` ``[n, channels, height, width]`` to logits ``[n, classes]``.

        Raises:
            UserError: if the images have another number of channels than the model.
        """
        x = _channels_last(x, self.channels).contiguous()
        x = _convolution(x, params["conv.weight"])
        for block, _, stride in self._blocks():
            hidden = _activated(params, f"{block}.norm1", x)
            if (project := params.get(f"{block}.project.weight")) is not None:
                x = hidden[:, ::stride, ::stride] @ project
            hidden = _convolution(hidden, params[f"{block}.conv1.weight"], stride)
            hidden = _activated(params, f"{block}.norm2", hidden)
            x = x + _convolution(hidden, params[f"{block}.conv2.weight"])
        return _activated(params, "norm", x).mean((1, 2)) @ params["head.weight"] + params["head.bias"]

    def _blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, filters and stride of every block."""
        for group in (1, 2, 3):
            for block in range(1, (self.depth - 4) // 6 + 1):
                stride = 2 if group > 1 and block == 1 else 1
                yield f"group{group}.block{block}", 8 * 2**group * self.width, stride

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all of them."""
        return True


def _convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3×3 convolution of ``x`` ``[n, h, w, in]`` with one line of zeros on each side, as PyTorch's layers have it; both
    views are free, for conv2d works on channels in the last place."""
    return functional.conv2d(x.movedim(-1, 1), weight.permute(3, 2, 0, 1), stride=stride, padding=1).movedim(1, -1)


def _activated(params: Params, norm: str, x: Tensor) -> Tensor:
    return torch.relu(torch.addcmul(params[f"{norm}.shift"], normalize(x), params[f"{norm}.scale"]))
