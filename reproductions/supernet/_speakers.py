"""Synthetic speakers: recordings whose features tell who speaks, and not by one number.

A recording is a second at 8 kHz: six sounds drawn from eight that all speakers share, each a
resonator (an all-pole filter) driven by harmonics of a pitch and some breath. A speaker moves
the resonances of all sounds by a factor, has two resonances of his own, a slope of the
spectrum and a mean pitch. Each recording has a pitch of its own around that, another channel
(slope and ripple of the spectrum) and noise, so that neither pitch nor mean spectrum suffice.
Features are logarithms of 24 bands, mel-spaced, of 50 frames.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.data.base import Dataset, Splits, TensorSource

__all__ = ["BANDS", "TRAINED", "equal_error", "speakers"]

BANDS, FRAMES, RATE, SOUNDS = 24, 50, 8000, 6
TRAINED = 40  # speakers
_TAKES = 30
_HELD_OUT = {"validation": (20, 10), "test": (40, 12)}  # speakers and recordings of each
_BINS = 129  # of a spectrum, from 0 Hz to half the rate
_HERTZ = np.linspace(0, RATE / 2, _BINS)


@cache
def speakers(batch_size: int) -> Splits:
    """Makes the recordings: 40 speakers to train on, 20 to choose by and 40 to report on.

    No speaker is in two of the parts. Features have shape (N, 24, 50), speakers are numbers.
    """
    random = np.random.RandomState(0)  # its stream stays the same in all versions
    sounds = random.uniform([250, 800, 2000], [850, 2200, 3200], (8, 3))
    parts = {"train": (TRAINED, _TAKES), **_HELD_OUT}
    made = {
        name: _recordings(random, sounds, *counts, batch_size) for name, counts in parts.items()
    }
    return Splits(**made, classes=TRAINED)


@torch.no_grad()
def equal_error(module: nn.Module, data: Dataset) -> float:
    """Gives the rate at which errors of both kinds are equally frequent, over all pairs.

    Args:
        module: Gives embeddings as the second of its outputs.
        data: Recordings with their speakers.

    Returns:
        The share of pairs of one speaker that are taken for two, where as large a share of
        pairs of two speakers are taken for one.
    """
    module.eval()
    batches = list(data.batches())
    embedded = F.normalize(torch.cat([module(x)[1] for x, _ in batches]))
    who = torch.cat([y for _, y in batches])
    first, second = torch.triu_indices(len(who), len(who), 1)
    scores, same = (embedded @ embedded.T)[first, second], who[first] == who[second]
    right = same[scores.argsort()].double()
    # With the threshold behind each pair: missed pairs of one speaker, and false alarms.
    missed = right.cumsum(0) / right.sum()
    alarms = 1 - (1 - right).cumsum(0) / (1 - right).sum()
    place = (missed - alarms).abs().argmin()
    return float((missed[place] + alarms[place]) / 2)


def _recordings(
    random: np.random.RandomState,
    sounds: np.ndarray,
    count: int,
    takes: int,
    batch_size: int,
) -> Dataset:
    features, who = [], []
    for speaker in range(count):
        voice = {
            "factor": random.uniform(0.85, 1.18),
            "own": random.uniform([500, 2200], [2000, 3800]),
            "slope": random.uniform(-1.0, 1.0),
            "pitch": 90 * 2.6 ** random.uniform(),
        }
        for _ in range(takes):
            features.append(_recording(random, sounds, **voice))
            who.append(speaker)
    return Dataset(
        source=TensorSource((torch.stack(features), torch.tensor(who))), batch_size=batch_size
    )


def _recording(
    random: np.random.RandomState,
    sounds: np.ndarray,
    factor: float,
    own: np.ndarray,
    slope: float,
    pitch: float,
) -> Tensor:
    """Features of one second, shape (24, 50)."""
    spoken = sounds[random.randint(len(sounds), size=SOUNDS)]
    spoken = spoken * factor * random.uniform(0.95, 1.05, spoken.shape)
    peaks = np.concatenate([spoken, np.broadcast_to(own, (SOUNDS, 2))], 1)
    logs = _resonances(peaks)[np.arange(FRAMES) * SOUNDS // FRAMES]
    octaves = np.log2(np.maximum(_HERTZ, 125) / 1000)
    ripple = random.normal() * np.cos(np.pi * _HERTZ / 4000 * random.uniform(0.5, 3))
    logs = logs + (slope + 0.7 * random.normal()) * octaves + ripple
    # Harmonics of a pitch that glides, with breath between them.
    glide = np.linspace(1, random.uniform(0.8, 1.25), FRAMES)
    tone = pitch * random.uniform(0.85, 1.18) * glide
    comb = np.cos(2 * np.pi * _HERTZ / tone[:, None])
    logs = logs + 1.5 * comb
    # A spectrum that is estimated from few samples, and noise around it.
    power = np.exp(logs) * random.gamma(2.0, 0.5, logs.shape)
    power = power + power.mean() * 0.1 * random.gamma(2.0, 0.5, logs.shape)
    bands = np.log(power @ _filters() + 1e-6)
    return torch.tensor((bands - bands.mean()).T / 2, dtype=torch.float32)


def _resonances(peaks: np.ndarray) -> np.ndarray:
    """Log power of all-pole filters with these resonances in hertz, (sounds, bins)."""
    radius = np.exp(-np.pi * (60 + 0.06 * peaks) / RATE)
    angle = 2 * np.pi * peaks / RATE
    z = np.exp(-2j * np.pi * _HERTZ / RATE)
    poles = radius * np.exp(1j * angle)
    factors = (1 - poles[..., None] * z) * (1 - poles.conj()[..., None] * z)
    return -2 * np.log(np.abs(factors)).sum(1)


@cache
def _filters() -> np.ndarray:
    """Triangles over the bins, evenly spaced in mel, (bins, bands)."""
    mel = np.linspace(*(2595 * np.log10(1 + np.array([60, RATE / 2]) / 700)), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    up = (_HERTZ[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - _HERTZ[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(up, down)) + 1e-3
