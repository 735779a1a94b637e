"""Networks as functions of a parameter dictionary: ``outputs = model(params, x)``.

A model holds no tensors. ``model.init(generator)`` makes the parameters, a flat dictionary of named tensors, and
calling the model with any such dictionary evaluates the network there; an adapted copy is just another dictionary.

Normalisation uses the statistics of the batch it is given, in training and in evaluation alike, as the official MAML
code does, and is not PyTorch's. That is deliberate: under ``torch.func.vmap`` some operations of PyTorch give
second-order meta-gradients that are silently wrong (the MAML chapter shows it; pytorch/functorch#534). They are

- ``batch_norm`` (in training), ``instance_norm`` and ``layer_norm`` with an adapted scale,
- ``embedding`` with ``padding_idx`` or ``scale_grad_by_freq``.

Without a scale all of them are right, as are ``group_norm`` and ``rms_norm``, convolutions, pooling, activations and
losses: the tests go through a list. What is computed here is ``mean`` and ``rsqrt``; :mod:`helpers.numerics.conv_ops`
has it together with derivatives that make it fast. :func:`layer_norm` is layer normalisation with right derivatives,
and
:func:`from_module` takes any ``torch.nn.Module``, with these operations made right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import as_rows, normalize, xavier
from helpers.types import Params
from helpers.validate import one_of, positive, whole

__all__ = ["MLP"]


def _cut_normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draws from a normal distribution cut at two deviations: the inverse of its distribution function at uniform
    numbers. PyTorch's own ``trunc_normal_`` draws other numbers in other versions; ``rand`` does not."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (deviation * 2**0.5 * torch.erfinv((2 * uniform - 1) * math.erf(2**0.5))).to(dtype)


_ACTIVATIONS = {"relu": functional.relu, "tanh": functional.tanh, "elu": functional.elu, "identity": lambda x: x}


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

    >>> import helpers, torch
    >>> network = helpers.MLP((1, 40, 40, 1))
    >>> params = network.init(helpers.generator(0))
    >>> list(params)[:2], network(params, torch.zeros(5, 1)).shape
    (['linear1.weight', 'linear1.bias'], torch.Size([5, 1]))
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
        """Prefix of the last linear map's parameters."""
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
                weight = xavier((fan_in, fan_out), fan_in, fan_out, generator, dtype)
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
        x = as_rows(x, self.sizes[0])
        last = len(self.sizes) - 1
        activate = _ACTIVATIONS[self.activation]
        for layer in range(1, last):
            x = self._linear(params, layer, x)
            x = activate(normalize(x, params[f"norm{layer}.shift"]) if self.norm else x)
        return self._linear(params, last, x)

    def _linear(self, params: Params, layer: int, x: Tensor) -> Tensor:
        x = x @ params[f"linear{layer}.weight"]
        return x + params[f"linear{layer}.bias"] if self.bias else x

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all but the normalisation shifts."""
        return not name.endswith(".shift")
