"""A recurrent network that translates: one GRU reads the source, another writes the target, letter by letter.

Like the networks of :mod:`helpers.models.mlp` it is a function of a dictionary of parameters, in plain tensor code, so
a population of networks is one call: ``torch.func.vmap(model, (0, None))(population, x)``.

What makes a GRU slow here is the number of operations, a few dozen for each of some eighty letters. So all that does
not depend on the state is done for all letters at once, and padding is held off there too, not in each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import subtree
from helpers.models.tokens import BEGIN, END, PAD
from helpers.types import Params
from helpers.validate import whole

__all__ = ["Seq2Seq", "exact_match", "greedy", "recurrence", "token_accuracy", "translation_loss"]

HOLD = 1e4  # added to the update gate's input, keeps the state exactly: its sigmoid is 1


@dataclass(frozen=True)
class Seq2Seq:
    """A GRU encoder and a GRU decoder, which starts from the encoder's last state and attends to all of them.

    With d the state of the decoder and e₁, e₂, … those of the encoder, the logits are a linear map of d and of the mean
    of the e, weighted by softmax(d · e). Padding in the source changes nothing: the state stays and the weight is 0.

    Parameters are ``embedding.weight`` ``[vocabulary, embedding]``, for source and target; ``encoder.input.weight``
    ``[embedding, 3 hidden]``, ``encoder.hidden.weight`` ``[hidden, 3 hidden]``, ``encoder.input.bias`` and
    ``encoder.hidden.bias`` ``[3 hidden]``, each for reset gate, update gate and candidate in this order, as in PyTorch;
    the same of ``decoder``; ``head.weight`` ``[2 hidden, vocabulary]`` (``[hidden, vocabulary]`` without attention) and
    ``head.bias``.

    Attributes:
        vocabulary: number of different tokens; 0 is padding.
        source_length: tokens of a source, S, with its padding.
        hidden: size of both states.
        embedding: numbers that stand for a token.
        attention: whether the decoder sees all states of the encoder, or only the last.

    Raises:
        UserError: if a size is not positive.

    Source: Cho et al. (2014), the GRU, with the reset gate where PyTorch has it; Sutskever et al. (2014), encoder and
    decoder; Luong et al. (2015), section 3.1, attention by dot products. Weights as PyTorch draws them.
    """

    vocabulary: int
    source_length: int
    hidden: int = 64
    embedding: int = 32
    attention: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "source_length", "hidden", "embedding"):
            whole(getattr(self, name), f"{name} of a translating network")

    @property
    def head(self) -> str:
        """The linear map to the logits."""
        return "head."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        settings = {"generator": generator, "dtype": dtype, "device": generator.device}

        def draw(*shape: int, inputs: int) -> Tensor:
            return (2 * torch.rand(shape, **settings) - 1) * inputs**-0.5

        params = {"embedding.weight": torch.randn(self.vocabulary, self.embedding, **settings)}
        for part in ("encoder", "decoder"):
            for name, size in (("input", self.embedding), ("hidden", self.hidden)):
                params[f"{part}.{name}.weight"] = draw(size, 3 * self.hidden, inputs=self.hidden)
                params[f"{part}.{name}.bias"] = draw(3 * self.hidden, inputs=self.hidden)
        seen = (2 if self.attention else 1) * self.hidden
        params["head.weight"] = draw(seen, self.vocabulary, inputs=seen)
        params["head.bias"] = draw(self.vocabulary, inputs=seen)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Predict each token of the target from the source and the tokens before it (teacher forcing).

        Args:
            params: see above.
            x: int64 ``[n, S + T − 1]``, the tokens of the source, then those of the target without its last; all below
                ``vocabulary``.

        Returns:
            Logits ``[n, T − 1, vocabulary]``, for the tokens of the target without its first.

        Raises:
            UserError: if ``x`` has another shape, or numbers that are not whole.
        """
        if x.dim() != 2 or x.shape[1] <= self.source_length or x.dtype != torch.int64:
            wanted = f"int64 [n, {self.source_length} + length of the target - 1]"
            raise UserError(f"this network takes tokens {wanted}, not {x.dtype} {list(x.shape)}")
        source, target = x.split((self.source_length, x.shape[1] - self.source_length), 1)
        read = self.read(params, source)
        return self.write(params, source, read, read[:, -1], target)[0]

    def read(self, params: Params, source: Tensor) -> Tensor:
        """The encoder's states ``[n, S, hidden]`` after each token of ``source`` ``[n, S]``."""
        start = params["head.bias"].new_zeros(len(source), self.hidden)
        return self._run(params, "encoder.", source, start, hold=True)

    def write(
        self, params: Params, source: Tensor, read: Tensor, state: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One or more steps of the decoder.

        Args:
            params: see above.
            source: ``[n, S]``, for its padding.
            read: the encoder's states ``[n, S, hidden]``.
            state: the decoder's, ``[n, hidden]``.
            target: the tokens that it is given, ``[n, t]``.

        Returns:
            Logits ``[n, t, vocabulary]`` and the decoder's last state.
        """
        states = self._run(params, "decoder.", target, state)
        seen = states
        if self.attention:
            scores = (states @ read.mT).masked_fill((source == PAD)[:, None], torch.finfo(states.dtype).min)
            seen = torch.cat([states, scores.softmax(-1) @ read], -1)
        return seen @ params["head.weight"] + params["head.bias"], states[:, -1]

    def _run(self, params: Params, part: str, tokens: Tensor, state: Tensor, hold: bool = False) -> Tensor:
        """All states ``[n, t, hidden]``. What a token contributes to the gates is a row of one small table."""
        gru = subtree(params, part)
        table = params["embedding.weight"] @ gru["input.weight"] + gru["input.bias"]
        if hold:
            update = torch.arange(3 * self.hidden, device=tokens.device) // self.hidden == 1
            padding = torch.arange(self.vocabulary, device=tokens.device)[:, None] == PAD
            table = table + HOLD * (padding & update).to(table.dtype)
        inputs = functional.embedding(tokens.mT, table)  # [t, n, 3 hidden]
        return recurrence(inputs, gru["hidden.weight"], gru["hidden.bias"], state).transpose(0, 1)

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all of them."""
        return True


def recurrence(inputs: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """All states of a GRU, ``[t, n, hidden]``, from what the inputs contribute to its gates, ``[t, n, 3 hidden]``."""
    hidden, states = state.shape[-1], []
    gates, candidates = inputs.split((2 * hidden, hidden), -1)
    for gate, candidate in zip(gates.unbind(0), candidates.unbind(0), strict=True):
        for_gate, for_candidate = (state @ weight + bias).split((2 * hidden, hidden), -1)
        reset, update = torch.sigmoid(gate + for_gate).chunk(2, -1)
        state = torch.lerp(torch.tanh(torch.addcmul(candidate, reset, for_candidate)), state, update)
        states.append(state)
    return torch.stack(states)


def translation_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens that are not padding.

    Args:
        logits: ``[n, t, vocabulary]``.
        y: int64 ``[n, t]``, the target without its first token.
    """
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PAD)


def token_accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the tokens, other than padding, whose largest logit is theirs; shapes as in :func:`translation_loss`."""
    counts = y != PAD
    return ((logits.argmax(-1) == y) & counts).sum().to(logits.dtype) / counts.sum()


def exact_match(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the targets of which every token is predicted, each from the right tokens before it; shapes as in
    :func:`translation_loss`.

    Where each token is the most probable one after the right ones before it, :func:`greedy` writes them all: so this is
    also the share of targets that greedy decoding gets right.
    """
    return ((logits.argmax(-1) == y) | (y == PAD)).all(-1).to(logits.dtype).mean()


@torch.no_grad()
def greedy(model: Seq2Seq, params: Params, source: Tensor, length: int) -> Tensor:
    """Translate with one network, taking the most probable token each time.

    Args:
        model: the network.
        params: its parameters.
        source: int64 ``[n, S]``.
        length: tokens to write at most.

    Returns:
        int64 ``[n, length]``; it begins with the first token after ``BEGIN``, and padding follows ``END``.

    Raises:
        UserError: if the source has another length than the model's, or ``length`` is not positive.
    """
    whole(length, "number of tokens to write")
    if source.dim() != 2 or source.shape[1] != model.source_length or source.dtype != torch.int64:
        wanted = f"source of int64 [n, {model.source_length}] tokens"
        raise UserError(f"translating takes a {wanted}, not {source.dtype} {list(source.shape)}")
    read = model.read(params, source)
    state, token = read[:, -1], torch.full_like(source[:, :1], BEGIN)
    written, ended = [], torch.zeros_like(token, dtype=torch.bool)
    for _ in range(length):
        logits, state = model.write(params, source, read, state, token)
        token = logits.argmax(-1).masked_fill(ended, PAD)
        ended = ended | (token == END)
        written.append(token)
    return torch.cat(written, 1)
