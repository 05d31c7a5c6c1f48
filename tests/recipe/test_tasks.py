import math

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.recipe.tasks import task_of


class Fixed(nn.Module):
    """Gives the same logits whatever comes in; counts the mode it was run in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.modes = []

    def forward(self, x=None, labels=None):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.logits


def test_accuracy_is_the_share_of_right_answers_over_batches_of_any_size():
    logits = torch.eye(3)[[0, 1, 2, 0, 1]] * 5
    batches = [
        (torch.zeros(5, 2), torch.tensor([0, 1, 2, 1, 1])),
        (torch.zeros(2, 2), torch.tensor([1, 1])),
    ]

    class Net(nn.Module):
        def forward(self, x):
            return logits[: len(x)]

    figures = task_of(batches[0]).evaluate(Net(), batches)
    assert figures["accuracy"] == (4 + 1) / 7
    rows = torch.cat([logits, logits[:2]])
    labels = torch.cat([batch[1] for batch in batches])
    expected = nn.functional.cross_entropy(rows, labels).item()
    assert figures["loss"] == pytest.approx(expected, abs=1e-6)


def test_perplexity_counts_each_token_that_follows_and_leaves_out_padding():
    labels = torch.tensor([[3, 1, 4, -100], [1, 5, 2, 6]])
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    batch = {"labels": labels}
    figures = task_of(batch).evaluate(Fixed(logits), [batch])
    follows = [(0, 0, 1), (0, 1, 4), (1, 0, 5), (1, 1, 2), (1, 2, 6)]
    losses = [-logits[row, place].log_softmax(0)[token].item() for row, place, token in follows]
    assert figures["loss"] == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-6)


def test_the_training_loss_is_the_mean_that_is_evaluated():
    labels = torch.tensor([[3, 1, 4, 2]])
    logits = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(1))
    task = task_of({"labels": labels})
    expected = task.evaluate(Fixed(logits), [{"labels": labels}])["loss"]
    assert task.loss(logits, {"labels": labels}).item() == pytest.approx(expected, abs=1e-6)


def test_evaluation_runs_in_eval_mode_without_gradients_and_puts_the_modes_back():
    net = nn.Sequential(Fixed(torch.zeros(2, 3)), nn.Dropout())
    net[1].eval()
    batch = (torch.zeros(2, 1), torch.tensor([0, 0]))
    task_of(batch).evaluate(net, [batch])
    assert net[0].modes == [(False, False)]
    assert [part.training for part in net] == [True, False]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(2), torch.zeros(2)), "class numbers"),
        ((torch.zeros(2),), "needs batches"),
        ({"input_ids": torch.zeros(2, 3)}, "needs batches"),
    ],
)
def test_labels_that_tell_no_task_are_refused(batch, words):
    with pytest.raises(SettingError, match=words):
        task_of(batch)


def test_an_empty_set_is_refused():
    batch = (torch.zeros(2, 1), torch.tensor([0, 0]))
    with pytest.raises(SettingError, match="no examples"):
        task_of(batch).evaluate(Fixed(torch.zeros(2, 3)), [])
