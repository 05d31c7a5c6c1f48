"""A controller that writes a config as a sequence of decisions, and how it learns.

Searches by reinforcement learning share this: an LSTM decides site after site, each decision
fed back in. It is trained by weighted likelihood of sequences: REINFORCE weighs what was
sampled by its advantage, replay weighs what is remembered equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.training.losses import Labels
from supple.training.seeds import kept
from supple.training.step import SizesRun, WholeOnly

__all__ = ["Baseline", "Decisions", "SequenceController", "chosen", "entropy", "learning"]

_NEVER = -1e9
"""Logit of a choice that a site does not have: finite, so that 0 times it is 0."""
_SPREAD = 0.1


class Decisions(NamedTuple):
    """What a controller says of sequences.

    Args:
        log_probs: Of each choice at each site, shape (sequences, sites, most choices).
        states: The hidden state from which each site was decided, shape (sequences, sites,
            hidden); it has seen the decisions before.
    """

    log_probs: Tensor
    states: Tensor


class SequenceController(nn.Module):
    """An LSTM of one layer that decides site after site.

    Args:
        counts: How many choices each site has.
        hidden: Width of the LSTM and of the embeddings.
        temperature: What logits are divided by.
        limit: Logits are squashed into (-limit, limit) afterwards; None for any.
        seed: Of the weights, drawn uniformly from (-0.1, 0.1).

    Raises:
        SettingError: There is no site, or a number is not above 0.
    """

    missing: Tensor
    offsets: Tensor

    def __init__(
        self,
        counts: Sequence[int],
        *,
        hidden: int = 100,
        temperature: float = 5.0,
        limit: float | None = 2.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not len(counts) or min(counts) < 1 or hidden < 1 or not temperature > 0:
            raise SettingError(
                "a controller needs sites of at least one choice each, and a width and a "
                f"temperature above 0, got {list(counts)}, {hidden} and {temperature}"
            )
        self.counts = tuple(int(count) for count in counts)
        self.temperature = temperature
        self.limit = limit
        most, total = max(self.counts), sum(self.counts)
        missing = torch.arange(most)[None] >= torch.tensor(self.counts)[:, None]
        offsets = torch.tensor((0, *self.counts[:-1])).cumsum(0)
        self.register_buffer("missing", missing, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        with kept(seed):
            # The last row of the embedding begins a sequence.
            self.embedding = nn.Embedding(total + 1, hidden)
            self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
            self.heads = nn.ModuleList(nn.Linear(hidden, most, bias=False) for _ in self.counts)
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -_SPREAD, _SPREAD)

    def forward(self, rows: Tensor, state: Tensor | None = None) -> Decisions:
        """Says what the controller would have decided along given sequences.

        Args:
            rows: Choice indices, shape (sequences, sites).
            state: Hidden state that each sequence begins with, shape (sequences, hidden);
                zeros by default.
        """
        start = torch.full_like(rows[:, :1], self.embedding.num_embeddings - 1)
        tokens = torch.cat([start, (rows + self.offsets)[:, :-1]], dim=1)
        states, _ = self.lstm(self.embedding(tokens), _memory(state))
        logits = torch.stack([head(states[:, i]) for i, head in enumerate(self.heads)], dim=1)
        return Decisions(self._log_probs(logits, self.missing), states)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator,
        state: Tensor | None = None,
        *,
        heat: float = 1.0,
    ) -> Tensor:
        """Draws sequences.

        Args:
            n: How many.
            generator: Source of all randomness.
            state: Hidden state that each sequence begins with, shape (n, hidden).
            heat: What the logarithms of probabilities are divided by: above 1 for sequences
                that are unlikely so far.

        Returns:
            Choice indices, shape (n, sites).
        """
        token = torch.full((n, 1), self.embedding.num_embeddings - 1)
        memory = _memory(state)
        drawn = []
        for i, head in enumerate(self.heads):
            state, memory = self.lstm(self.embedding(token), memory)
            probs = (self._log_probs(head(state[:, 0]), self.missing[i]) / heat).softmax(-1)
            drawn.append(torch.multinomial(probs, 1, generator=generator))
            token = drawn[-1] + self.offsets[i]
        return torch.cat(drawn, dim=1)

    def _log_probs(self, logits: Tensor, missing: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.limit is not None:
            logits = self.limit * torch.tanh(logits)
        return logits.masked_fill(missing, _NEVER).log_softmax(-1)


class Baseline:
    """A running average of rewards; the first ones are their own average.

    Args:
        decay: Weight of what was before, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.value: float | None = None

    def advantages(self, rewards: Tensor) -> Tensor:
        """Gives how much better rewards are than the average so far, then counts them in."""
        before = float(rewards.mean()) if self.value is None else self.value
        self.value = self.decay * before + (1 - self.decay) * float(rewards.mean())
        return rewards - before


def _memory(state: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The hidden state in the LSTM's form, with an empty cell."""
    return None if state is None else (state[None].contiguous(), torch.zeros_like(state)[None])


def chosen(decisions: Decisions, rows: Tensor) -> Tensor:
    """Gives the logarithm of the probability of sequences, shape (sequences,)."""
    return decisions.log_probs.gather(2, rows[..., None])[..., 0].sum(1)


def entropy(decisions: Decisions) -> Tensor:
    """Gives the entropy of the decisions along each sequence, in nats, shape (sequences,)."""
    return -(decisions.log_probs.exp() * decisions.log_probs).sum((1, 2))


def learning(controller: SequenceController, *, lr: float, bonus: float) -> SizesRun:
    """Begins to train a controller with Adam.

    Args:
        controller: Whose weights change.
        lr: Learning rate.
        bonus: Weight of the mean entropy of the decisions, which is to be large.

    Returns:
        A run; `run.step((rows, weights))` raises the log-likelihood of sequences, shape (n,
        sites), each by its weight, shape (n,), and lowers it where the weight is negative.
    """

    def loss(output: Decisions, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, weights = batch
        return -(weights * chosen(output, rows)).sum() - bonus * entropy(output).mean()

    optimizer = torch.optim.Adam(controller.parameters(), lr=lr)
    return SizesRun(controller, optimizer, WholeOnly(), Labels(loss))
