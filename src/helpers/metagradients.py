"""Estimators: from meta-parameters and a batch of tasks to a meta-gradient.

Every estimator has the shape ``estimator(learner, theta, tasks) -> (gradient, losses)``: ``gradient`` is a dictionary
like θ, the mean over the tasks, and ``losses`` ``[tasks]`` are the query losses after adaptation. A chapter is the
change of this one argument.

The second half of the module makes any estimator faster without changing it: :func:`chunked`, :func:`traced` and
:func:`compiled`, which combine, as in ``chunked(compiled(maml), 4)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from helpers import runtime
from helpers.learners import GradientDescent
from helpers.models import Params
from helpers.tasks import Tasks

Estimator = Callable[[GradientDescent, Params, Tasks], tuple[Params, Tensor]]


def maml(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """The exact meta-gradient: differentiate the mean query loss through every inner step.

    Args:
        learner: what adapts; its ``first_order`` must be off for the exact gradient.
        theta: meta-parameters, a dictionary of tensors without a task axis.
        tasks: a batch, every tensor with a leading task axis.

    Returns:
        The gradient of the mean query loss with respect to θ, a dictionary like θ, and the query losses ``[tasks]``.

    Source: Finn, Abbeel and Levine (2017), equation 1 and algorithm 1, line 8. Written out in the MAML chapter,
    section "The core".
    """

    def objective(theta: Params) -> tuple[Tensor, Tensor]:
        losses = vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks)
        return losses.mean(), losses

    gradient, (_, losses) = grad_and_value(objective, has_aux=True)(theta)
    return gradient, losses


def fomaml(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """First-order MAML: the same, with the inner gradients held constant, so that ∂φ/∂θ is taken for the identity.

    Arguments and returns are those of :func:`maml`. No second derivative is computed.

    Source: Finn, Abbeel and Levine (2017), section 5.2, "first-order approximation".
    """
    return maml(learner.with_(first_order=True), theta, tasks)


def chunked(estimator: Estimator, size: int | None) -> Estimator:
    """The same estimator, ``size`` tasks at a time: memory then does not grow with the meta-batch.

    On a CPU small chunks are also faster, since the activations of a few tasks stay in the cache. ``None`` leaves it
    as it is.
    """
    if size is None:
        return estimator

    def run(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count = len(tasks.support.x)
        total: Params | None = None
        losses = []
        for begin in range(0, count, size):
            part = tree_map(lambda t, begin=begin: t[begin : begin + size], tasks)
            gradient, loss = estimator(learner, theta, part)
            weighted = {name: g * (len(loss) / count) for name, g in gradient.items()}
            total = weighted if total is None else {name: total[name] + g for name, g in weighted.items()}
            losses.append(loss)
        return total, torch.cat(losses)

    return run


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its tensor operations written down once and replayed from then on.

    ``grad`` inside ``vmap`` inside ``grad`` costs far more Python than the small tensors of meta-learning cost
    arithmetic. The list of operations that remains when all transformations are carried out is the same every time,
    so it is recorded at the first call (some seconds), freed of repetitions, and replayed.

    Args:
        function: an estimator, or any function of nested dictionaries and tuples of tensors. What is not a tensor,
        such as the learner,
            is a constant; control flow must not depend on the values of tensors. No gradient flows through the result.

    Returns:
        A function of the same signature. It keeps one list of operations for each set of shapes and constants.
    """
    return _specialized(function, lambda program: program)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like :func:`traced`, with the operations fused by ``torch.compile``; where there is no compiler, :func:`traced`
    itself.

    Compilation happens at the first call for each set of shapes and takes half a minute for the Omniglot network with
    one inner step.
    """
    if not runtime.can_compile():
        return traced(function)
    return _specialized(function, lambda program: torch.compile(program, dynamic=False))


def _specialized(function: Callable[..., Any], build: Callable[[GraphModule], Callable]) -> Callable[..., Any]:
    """``function`` by programs that ``build`` makes of its operations, one for each set of shapes and constants."""
    programs: list[tuple[Any, Callable, TreeSpec]] = []

    def run(*arguments):
        leaves, layout = tree_flatten(arguments)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        kind = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves], layout
        found = next((entry for entry in programs if entry[0] == kind), None)
        if found is None:
            operations, form = _record(function, leaves, layout)
            programs.append(found := (kind, build(_tidy(operations)), form))
        _, program, form = found
        with torch.no_grad():
            return tree_unflatten(program(*tensors), form)

    return run


def _record(function: Callable, leaves: list, layout: TreeSpec) -> tuple[GraphModule, TreeSpec]:
    """The operations of ``function`` at these arguments, from tensors to tensors, and how the result is nested."""
    forms = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        values = iter(tensors)
        filled = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        out, form = tree_flatten(function(*tree_unflatten(filled, layout)))
        forms.append(form)
        return out

    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    # Fake tensors have shapes and no values: nothing is computed here.
    return make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors), forms[0]


def _tidy(program: GraphModule) -> GraphModule:
    """Leave out views that change nothing, results that nobody uses, and what was computed before."""
    aten, graph = torch.ops.aten, program.graph
    reshapes = {aten.view.default, aten._unsafe_view.default}
    views = {aten.expand.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.detach.default}
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.target is not operator.getitem and node.target._schema.is_mutable for node in calls):
        return program  # order matters then
    seen = {}
    for node in calls:
        while node.target in reshapes and node.args[0].target in reshapes:
            node.update_arg(0, node.args[0].args[0])
        same = node
        if node.target in reshapes | views:
            new, old = node.meta["val"], node.args[0].meta["val"]
            if (new.shape, new.stride(), new.storage_offset()) == (old.shape, old.stride(), old.storage_offset()):
                same = node.args[0]
        if same is node and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            same = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.recompile()
    return program
