"""A PyTorch module as a model: its layers are called with the parameters of a dictionary.

A few of PyTorch's operations have a wrong derivative of second order under ``torch.func.vmap``, without a word
(pytorch/functorch#534): layer, batch and instance normalisation with an adapted scale, and an embedding with a padding
index or gradients scaled by frequency. Others have none there. :func:`translated` is the one place that knows them: it
puts an equal expression with right derivatives in their place, and where there is none it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from helpers.errors import UserError

__all__ = ["ModuleModel", "from_module", "translated"]


class translated(TorchFunctionMode):  # noqa: N801 (used as a function: ``with translated():``)
    """Within it, PyTorch's operations have right derivatives of every order under ``vmap``, or are refused.

    :func:`from_module` needs nothing else. A model of your own that calls, say, ``torch.nn.functional.layer_norm`` with
    an adapted scale needs it around its operations.

    >>> weight, x = torch.ones(3), torch.rand(4, 3)
    >>> with translated():
    ...     y = torch.nn.functional.layer_norm(x, (3,), weight)
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if instead := _REFUSED.get(function):
            raise UserError(f"{function.__name__} cannot be meta-learned here: {instead}")
        return _EXACT.get(function, function)(*args, **(kwargs or {}))


class ModuleModel:
    """What :func:`from_module` returns: a model, see :class:`helpers.types.Model`.

    Attributes:
        head: prefix of the last layer's parameters.
    """

    def __init__(self, module: nn.Module, head: str) -> None:
        self.head = head
        self._module = module
        parameters = dict(module.named_parameters())
        self._start = {name: value.detach() for name, value in parameters.items() if value.requires_grad}
        frozen = {name: value.detach() for name, value in parameters.items() if not value.requires_grad}
        self._constants = frozen | dict(module.named_buffers())
        self._placed: dict[tuple, dict[str, Tensor]] = {}  # the constants by device and type of number

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Copies of the module's own weights, on the generator's device; nothing is drawn."""
        device = generator.device
        self._placed[device, dtype] = self._constants_like(device, dtype)
        return {name: value.to(device, dtype, copy=True) for name, value in self._start.items()}

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Any:
        """What the module says of ``x``, with these parameters.

        Raises:
            UserError: if a parameter is missing, or the module does what cannot be mapped over tasks.
        """
        if missing := [name for name in self._start if name not in params]:
            raise UserError(f"the parameters of this module lack {missing[0]!r}: take all that init returns")
        like = params[next(iter(self._start))]
        constants = self._placed.get((like.device, like.dtype)) or self._constants_like(like.device, like.dtype)
        try:
            with translated():
                return functional_call(self._module, {name: params[name] for name in self._start} | constants, (x,))
        except RuntimeError as error:
            said = (str(error).splitlines() or [""])[0]
            if not any(word in said for word in ("vmap", "atching rule", "in-place")):
                raise
            raise UserError(f"this module cannot be mapped over tasks, rewrite what PyTorch names: {said}") from error

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all of them; what is frozen in the module is no parameter."""
        return True

    def _constants_like(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        def placed(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return {name: placed(value) for name, value in self._constants.items()}


def from_module(module: nn.Module, head: str | None = None) -> ModuleModel:
    """A PyTorch module as a model, for every learner and estimator.

    Meta-training begins at the module's own weights: build it after ``torch.manual_seed``, or load what was trained.
    Buffers and parameters with ``requires_grad=False`` are constants; tied weights stay tied. The module is copied, as
    it is, in training or in evaluation mode; dropout and running averages need ``module.eval()``.

    Args:
        module: of one input ``x`` ``[n, ...]``.
        head: prefix of the last layer's parameters; by default that of the layer registered last.

    Returns:
        The model; see :class:`helpers.types.Model`.

    Raises:
        UserError: if it holds a layer that cannot be meta-learned; the sentence says what to use instead.

    >>> import helpers
    >>> net = nn.Sequential(nn.Linear(1, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 1))
    >>> learner = helpers.GradientDescent(from_module(net), helpers.mean_squared_error, rate=0.01, steps=2)
    >>> draws = helpers.generator(0)
    >>> gradient, losses = helpers.maml(learner, learner.init(draws), helpers.Sinusoids().sample(4, draws))
    >>> gradient["3.weight"].shape, losses.shape, learner.model.head
    (torch.Size([1, 40]), torch.Size([4]), '3.')
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"from_module takes a torch.nn.Module, not {module!r}")
    for name, layer in module.named_modules():
        if reason := _unfit(layer):
            raise UserError(f"{name or 'the module'} ({type(layer).__name__}) cannot be meta-learned: {reason}")
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    if not names:
        raise UserError("this module has no parameter that requires a gradient: there is nothing to learn")
    if head is None:
        head = names[-1].rpartition(".")[0]
        head += "." if head else ""
    elif not any(name.startswith(head) for name in names):
        raise UserError(f"no parameter begins with {head!r}: the last is {names[-1]!r}")
    return ModuleModel(copy.deepcopy(module), head)


def _unfit(layer: nn.Module) -> str | None:
    """Why a layer cannot be meta-learned, as far as that can be seen before it is called, and what to do."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "PyTorch hides the operations of a script, so pass the module that it was made from"
    if any(isinstance(value, nn.UninitializedParameter) for value in layer.parameters(recurse=False)):
        return "it has no weights yet, so call the module once on an example"
    if isinstance(layer, nn.RNNBase):
        return f"PyTorch cannot map it over tasks, so loop over time with nn.{layer.mode.split('_')[0]}Cell"
    dropout = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else getattr(layer, "dropout", 0.0)
    if layer.training and isinstance(dropout, float) and dropout > 0:
        return "dropout draws anew in each of the calls that are differentiated, so set p=0 or call module.eval()"
    if layer.training and getattr(layer, "track_running_stats", False):
        return "running averages would mix the tasks, so set track_running_stats=False or call module.eval()"
    if isinstance(layer, nn.EmbeddingBag):
        return _REFUSED[functional.embedding_bag]
    if isinstance(layer, nn.Embedding) and (layer.max_norm or layer.scale_grad_by_freq or layer.sparse):
        return PLAIN_EMBEDDING
    return None


# ---------------------------------------- operations with right derivatives, in the signatures of PyTorch's
PLAIN_EMBEDDING = "use an embedding without max_norm, scale_grad_by_freq and sparse"


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x`` ``[n, channels, ...]`` times a scale, plus a shift, for each channel."""
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True) -> Tensor:  # noqa: A002
    x = functional.layer_norm(input, normalized_shape, eps=eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5  # noqa: A002
) -> Tensor:  # fmt: skip
    if not training:
        scale = (running_var + eps).rsqrt()
        return _affine(_affine(input, scale, -scale * running_mean), weight, bias)
    if running_mean is not None:
        raise UserError("running averages would mix the tasks: pass None for running_mean and running_var")
    return _affine(functional.batch_norm(input, None, None, training=True, eps=eps), weight, bias)


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5  # noqa: A002
) -> Tensor:  # fmt: skip
    if use_input_stats and running_mean is not None:
        raise UserError("running averages would mix the tasks: pass None for running_mean and running_var")
    x = functional.instance_norm(input, running_mean, running_var, use_input_stats=use_input_stats, eps=eps)
    return _affine(x, weight, bias)


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False  # noqa: A002
) -> Tensor:  # fmt: skip
    if max_norm or scale_grad_by_freq or sparse:
        raise UserError(f"this embedding cannot be meta-learned here: {PLAIN_EMBEDDING}")
    rows = functional.embedding(input, weight)
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % len(weight))[..., None]
    return torch.where(padding, rows.detach(), rows)


def _gates(input, state, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Tensor]:  # noqa: A002
    return functional.linear(input, w_ih, b_ih), functional.linear(state, w_hh, b_hh)


def _gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> Tensor:  # noqa: A002
    seen, known = (gates.chunk(3, -1) for gates in _gates(input, hx, w_ih, w_hh, b_ih, b_hh))
    reset, update = (torch.sigmoid(a + b) for a, b in zip(seen[:2], known[:2], strict=True))
    candidate = torch.tanh(seen[2] + reset * known[2])
    return candidate + update * (hx - candidate)


def _lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> tuple[Tensor, Tensor]:  # noqa: A002
    enter, keep, candidate, show = sum(_gates(input, hx[0], w_ih, w_hh, b_ih, b_hh)).chunk(4, -1)
    cell = keep.sigmoid() * hx[1] + enter.sigmoid() * candidate.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> Tensor:  # noqa: A002
    return sum(_gates(input, hx, w_ih, w_hh, b_ih, b_hh)).tanh()


def _rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> Tensor:  # noqa: A002
    return sum(_gates(input, hx, w_ih, w_hh, b_ih, b_hh)).relu()


def _hardsigmoid(input, inplace=False) -> Tensor:  # noqa: A002
    return functional.relu6(input + 3) / 6


def _in_plain_products(attention: Callable) -> Callable:
    """Attention by matrix products and a softmax: the fused kernels have no second derivative."""

    def run(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **kwargs)

    return run


_EXACT: dict[Callable, Callable] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    functional.embedding: _embedding,
    functional.hardsigmoid: _hardsigmoid,
    torch.gru_cell: _gru_cell,
    torch.lstm_cell: _lstm_cell,
    torch.rnn_tanh_cell: _rnn_tanh_cell,
    torch.rnn_relu_cell: _rnn_relu_cell,
    **{f: _in_plain_products(f) for f in (
        functional.scaled_dot_product_attention, functional.multi_head_attention_forward
    )},
}  # fmt: skip
_REFUSED: dict[Callable, str] = {
    torch.batch_norm: "call torch.nn.functional.batch_norm",
    torch.native_batch_norm: "call torch.nn.functional.batch_norm",
    torch.native_layer_norm: "call torch.nn.functional.layer_norm",
    torch.instance_norm: "call torch.nn.functional.instance_norm",
    torch.embedding: "call torch.nn.functional.embedding",
    functional.embedding_bag: "PyTorch has no second derivative of it, so take the mean of an nn.Embedding",
    torch.cdist: "PyTorch has no second derivative of it, so write (a[:, None] - b).square().sum(-1)",
    **dict.fromkeys((torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu), "loop over time with a cell"),
}
