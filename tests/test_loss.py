"""Chunked cross entropy against torch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, normal
from torch.utils._python_dispatch import TorchDispatchMode

from hyperlm import loss

max_logits = pytest.mark.parametrize("max_logits", [1, 100, 0], ids=["one number a chunk", "few", "all"])


def inputs():
    x, w = normal(17, 6, seed=1).requires_grad_(), normal(11, 6, seed=2).requires_grad_()
    y = torch.randint(11, (17,), generator=generator(3))
    y[::5] = loss.IGNORE
    return x, w, y


@max_logits
def test_nats_and_gradients_equal_torch(max_logits, monkeypatch):
    monkeypatch.setattr(loss, "TOKENS", 5)
    x, w, y = inputs()
    truth = F.cross_entropy(x @ w.mT, y, ignore_index=loss.IGNORE, reduction="sum")
    nats, count = loss.head_nats(x, w, y, max_logits=max_logits)
    torch.testing.assert_close(nats, truth)
    assert count == (y != loss.IGNORE).sum()
    for found, expected in zip(torch.autograd.grad(nats / 7, [x, w]), torch.autograd.grad(truth / 7, [x, w]), strict=True):
        torch.testing.assert_close(found, expected)


@max_logits
def test_without_gradients_the_same_value_comes_out(max_logits):
    x, w, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            loss.head_nats(x, w, y, max_logits=max_logits)[0], F.cross_entropy(x @ w.mT, y, ignore_index=loss.IGNORE, reduction="sum")
        )


@max_logits
def test_nats_of_each_token_equal_torch_and_add_up_to_the_last_bit(max_logits):
    x, w, y = inputs()
    nats = loss.token_nats(x, w, y, max_logits=max_logits)
    torch.testing.assert_close(nats, F.cross_entropy(x @ w.mT, y, ignore_index=loss.IGNORE, reduction="none"))
    assert nats.dtype == torch.float64 and not nats.requires_grad and (nats[::5] == 0).all()
    with torch.no_grad():
        assert nats.sum() == loss.head_nats(x, w, y, max_logits=max_logits)[0]


def test_the_backward_pass_needs_no_more_memory():
    class Made(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            out = fn(*args, **(kwargs or {}))
            if out.data_ptr() not in {x.data_ptr() for x in args if torch.is_tensor(x)}:
                self.largest = max(self.largest, out.numel())
            return out

    x, w, y = inputs()
    nats, _ = loss.head_nats(x, w, y)
    with Made() as made:
        torch.autograd.grad(nats, [x, w])
    assert made.largest == 1  # the gradient of nats


def test_large_logits_do_not_overflow():
    x, w, y = inputs()
    assert loss.head_nats(x.float() * 1e4, w.float(), y)[0].isfinite()
