"""Looking for derivatives that PyTorch gets wrong."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.overrides import TorchFunctionMode

from helpers.errors import UserError


class DerivativeCheck(TorchFunctionMode):
    """Within it, an operation of which PyTorch takes a wrong derivative is refused. The look costs about as much as the
    operations themselves, so that a function is run in it once.

    Where layer, batch or instance normalisation has an adapted scale, the batching rule of its derivative takes mean
    and variance for constants (pytorch/functorch#534), so that what the derivative of a derivative under ``vmap`` gets
    through them is missing; nothing fails. That of an embedding with ``padding_idx`` forgets the padding. First-order
    methods, normalisation without a scale, group and RMS normalisation are right.

    Raises:
        UserError: at such an operation.
    """

    depth = 0  # of those entered; one is enough

    def __enter__(self) -> DerivativeCheck:
        DerivativeCheck.depth += 1
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        DerivativeCheck.depth -= 1
        super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("layer_norm", "batch_norm", "instance_norm"):
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            own = kwargs.get("training", kwargs.get("use_input_stats", args[5] if len(args) > 5 else True))
            if (own or name == "layer_norm") and _differentiated_twice(given[0], given[1:]):
                raise UserError(
                    f"PyTorch gives a wrong second derivative of {name} under vmap: write the normalisation out from "
                    "mean and variance, as helpers.models.normalize and helpers.models.layer_norm do"
                )
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        if name == "embedding" and padding is not None and _differentiated_twice(args[1], [args[1]]):
            raise UserError(
                "PyTorch gives a wrong second derivative of an embedding with padding_idx under vmap: leave "
                "padding_idx out and multiply what comes of the padding by 0"
            )
        return func(*args, **kwargs)


def _differentiated_twice(x: Tensor, scales: list[Tensor]) -> bool:
    """Whether the derivative by one of ``scales`` is taken inside a ``vmap``, and one of that outside of it."""

    def levels(t: Tensor) -> list[int]:
        """The levels of transformation by which a derivative of ``t`` is taken."""
        found = []
        while _functorch.is_functorch_wrapped_tensor(t):
            if _functorch.is_gradtrackingtensor(t) and t.requires_grad:
                found.append(_functorch.maybe_get_level(t))
            t = _functorch.get_unwrapped(t)
        return found

    inner = max((level for t in scales for level in levels(t)), default=0)
    outer = min((level for t in (x, *scales) for level in levels(t)), default=inner)
    maps = (one for one in retrieve_all_functorch_interpreters() if one.key() == TransformType.Vmap)
    return any(outer < one.level() < inner for one in maps)
