"""Searching a language of rules: a recurrent controller trained by PPO, random search, and evolution.

All three propose sequences of tokens of a :class:`helpers.optimizers.language.Grammar` and are told their rewards.
Random search is the controller before its first update: its last layer begins at zero, so every choice that the grammar
allows is equally probable.

Source: Bello, Zoph, Vasudevan and Le (2017), section 4.2 (controller), Schulman et al. (2017) for PPO, Real et al.
(2019) for regularised evolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from helpers.errors import UserError
from helpers.optimizers.language import Grammar
from helpers.types import Params
from helpers.validate import positive, whole

__all__ = ["Batch", "Controller", "encoded", "policy_gradient", "ppo_loss"]

NEVER = -1e9  # logit of a token that may not stand here: its probability is exactly 0


class Batch(NamedTuple):
    """Proposed rules as tensors.

    Attributes:
        tokens: int64 ``[rules, length]``, padded with 0.
        mask: bool ``[rules, length, tokens]``, what may stand where.
        real: bool ``[rules, length]``, False on the padding.
    """

    tokens: Tensor
    mask: Tensor
    real: Tensor


def encoded(grammar: Grammar, sequences: Sequence[Sequence[int]]) -> Batch:
    """Complete sequences of tokens as tensors, padded to the longest.

    Raises:
        UserError: if there is none, or one is not a whole rule.
    """
    if not sequences:
        raise UserError("there is no rule to encode: propose at least one")
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.ones(len(sequences), longest, len(grammar), dtype=torch.bool)
    real = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        kinds = grammar.expected(sequence)
        if len(kinds) != len(sequence):
            raise UserError("the tokens are no whole rule: complete them")
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = torch.stack([grammar.mask(kind) for kind in kinds])
        real[i, : len(sequence)] = True
    return Batch(tokens, mask, real)


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One number ``[n]`` a row of ``probabilities`` ``[n, numbers]``, the first whose cumulative probability exceeds a
    uniform number. ``torch.multinomial`` draws others in other versions of PyTorch; ``rand`` does not."""
    cumulative = probabilities.double().cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64, device=generator.device)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1)


@dataclass(frozen=True)
class Controller:
    """An LSTM that writes a rule token by token; tokens that the grammar forbids have probability 0.

    Parameters are ``embedding`` ``[tokens + 1, size]`` (the last row begins a rule), ``input`` ``[size, 4 size]``,
    ``hidden`` ``[size, 4 size]``, ``bias`` ``[4 size]``, ``head.weight`` ``[size, tokens]`` and ``head.bias``.

    Attributes:
        tokens: size of the vocabulary.
        size: of the state and of the embeddings.
        scale: first weights are uniform in [−scale, scale], but the head's are 0.

    Raises:
        UserError: for sizes that are no whole numbers of at least 1, or a negative scale.
    """

    tokens: int
    size: int = 64
    scale: float = 0.1

    def __post_init__(self) -> None:
        whole(self.tokens, "number of tokens of a controller")
        whole(self.size, "size of a controller")
        positive(self.scale, "scale of a controller", zero=True)

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters: a uniform policy."""

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator, dtype=dtype, device=generator.device) - 1) * self.scale

        n, size = self.tokens, self.size
        zeros = {"dtype": dtype, "device": generator.device}
        return {
            "embedding": uniform(n + 1, size),
            "input": uniform(size, 4 * size),
            "hidden": uniform(size, 4 * size),
            "bias": torch.zeros(4 * size, **zeros),
            "head.weight": torch.zeros(size, n, **zeros),
            "head.bias": torch.zeros(n, **zeros),
        }

    def step(self, params: Params, token: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Read one token ``[rules]`` and return the logits of the next ``[rules, tokens]`` and the new state."""
        h, c = state
        gates = params["embedding"][token] @ params["input"] + h @ params["hidden"] + params["bias"]
        input, forget, cell, output = gates.chunk(4, -1)
        c = torch.sigmoid(forget + 1) * c + torch.sigmoid(input) * torch.tanh(cell)
        h = torch.sigmoid(output) * torch.tanh(c)
        return h @ params["head.weight"] + params["head.bias"], (h, c)

    def begin(self, params: Params, rules: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The token before the first ``[rules]``, and the first state."""
        zero = params["bias"].new_zeros(rules, self.size)
        return torch.full((rules,), self.tokens, device=zero.device), (zero, zero)

    @torch.no_grad()
    def sample(self, params: Params, grammar: Grammar, rules: int, generator: torch.Generator) -> list[list[int]]:
        """Draw so many rules, as sequences of tokens.

        Raises:
            UserError: for a number below 1, or a grammar of another vocabulary.
        """
        whole(rules, "number of rules")
        if len(grammar) != self.tokens:
            raise UserError(f"a controller of {self.tokens} tokens writes no grammar of {len(grammar)}: make it anew")
        token, state = self.begin(params, rules)
        sequences: list[list[int]] = [[] for _ in range(rules)]
        while True:
            kinds = [grammar.expected(sequence)[len(sequence) :] for sequence in sequences]
            if not any(kinds):
                return sequences
            logits, state = self.step(params, token, state)
            allowed = torch.stack([grammar.mask(kind[0] if kind else "binary") for kind in kinds]).to(logits.device)
            probabilities = logits.masked_fill(~allowed, NEVER).softmax(-1)
            token = drawn(probabilities, generator)
            for sequence, kind, number in zip(sequences, kinds, token.tolist(), strict=True):
                if kind:
                    sequence.append(number)

    def log_probabilities(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability of each rule ``[rules]``, and the mean entropy of the choices in each ``[rules]``."""
        token, state = self.begin(params, len(batch.tokens))
        chosen, entropy = 0.0, 0.0
        for t in range(batch.tokens.shape[1]):
            logits, state = self.step(params, token, state)
            log = logits.masked_fill(~batch.mask[:, t], NEVER).log_softmax(-1)
            token, real = batch.tokens[:, t], batch.real[:, t]
            chosen = chosen + real * log.gather(1, token[:, None])[:, 0]
            entropy = entropy - real * (log.exp() * log.masked_fill(~batch.mask[:, t], 0)).sum(-1)
        return chosen, entropy / batch.real.sum(1)


def ppo_loss(
    log_new: Tensor, log_old: Tensor, advantage: Tensor, entropy: Tensor, clip: float = 0.2, bonus: float = 0.01
) -> Tensor:
    """The clipped surrogate of proximal policy optimisation, with an entropy bonus; to be minimised.

    Args:
        log_new, log_old: log-probabilities of the proposed rules now and when they were drawn ``[rules]``.
        advantage: reward minus baseline ``[rules]``.
        entropy: of the choices ``[rules]``.

    Source: Schulman et al. (2017), equations 7 and 9 (no value function: the baseline is a moving average).
    """
    ratio = (log_new - log_old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(surrogate + bonus * entropy).mean()


def policy_gradient(
    controller: Controller,
    params: Params,
    batch: Batch,
    log_old: Tensor,
    advantage: Tensor,
    clip: float = 0.2,
    bonus: float = 0.01,
) -> tuple[Params, Tensor]:
    """Gradient of :func:`ppo_loss` by the controller's parameters, and its value."""

    def loss(params: Params) -> Tensor:
        log_new, entropy = controller.log_probabilities(params, batch)
        return ppo_loss(log_new, log_old, advantage, entropy, clip, bonus)

    return grad_and_value(loss)(params)
