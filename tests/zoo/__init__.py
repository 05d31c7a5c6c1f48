"""Small model families on which the elastic core is tested.

`ZOO` maps a name to a function without arguments that returns `(module, args, kwargs)`: a
freshly built float32 network in eval mode with example inputs. Building is seeded (the same
weights and inputs at each call) and leaves the global random state as it was. `EXPECTED` says
which sites somebody who knows the architecture would look for.

Widths are distinct numbers on purpose: a dimension that is confused with another one then
shows as a wrong size rather than as a wrong value.
"""

from tests.zoo import (
    adapters,
    convolution,
    decoders,
    detection,
    diffusion,
    encoders,
    experts,
    mixers,
    pairs,
    recurrent,
    sequences,
    speech,
    state_space,
    vision,
)
from tests.zoo.base import EXPECTED, ZOO, Entry, Expected

__all__ = [
    "EXPECTED",
    "ZOO",
    "Entry",
    "Expected",
    "adapters",
    "convolution",
    "decoders",
    "detection",
    "diffusion",
    "encoders",
    "experts",
    "mixers",
    "pairs",
    "recurrent",
    "sequences",
    "speech",
    "state_space",
    "vision",
]
