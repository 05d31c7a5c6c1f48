"""A small recipe for the tests, as text."""

SMALL = """\
name: small
threads: 1
model:
  digits-cnn: {widths: [8, 12], blocks: [1, 1]}
data: digits
axes:
  width: {choices: [0.5, 1.0], divisor: 4}
train:
  supernet/bignas: {random: 1}
  steps: 6
  lr: 2e-3
  batch_size: 32
  checkpoint_every: 2
search:
  search/random-search: {}
  evaluations: 4
  costs: [params, macs]
  recalibration_batches: 2
deploy:
  budgets:
    - {name: half, params: "<= 4 k"}
  export: []
compare: {lrs: [1e-3]}
fast:
  train.steps: 3
"""


def changed(old: str, new: str) -> str:
    """The recipe with one place changed."""
    assert SMALL.count(old) == 1, f"{old!r} stands {SMALL.count(old)} times in the recipe"
    return SMALL.replace(old, new)
