"""Random bits are a function of a counter, even, and unlike those of other counters."""

import pytest
import torch
from conftest import normal

from hyperlm import random


def test_bits_are_a_function_of_the_counter():
    """A stream that starts later is the rest of one that starts before: parts of a tensor draw what the whole draws."""
    base = torch.tensor(-(1 << 62))
    whole = random.random_bits(base, (8, 256))
    assert torch.equal(random.random_bits(base + 3 * 64, (5, 256)), whole[3:])
    assert int(whole.min()) >= 0 and int(whole.max()) < 1 << 16


def test_bits_are_even_and_streams_unlike_each_other():
    n = 1 << 16
    first, second = (random.uniform(random.random_bits(torch.tensor(step) * random.STRIDE, (n,))) for step in (1, 2))
    for x in (first, second):
        assert x.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / n) ** 0.5) and x.min() >= 0 and x.max() < 1
        assert x.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / n**0.5
    shifted = torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]
    assert abs(float(shifted)) < 4 / n**0.5


def test_dropout_keeps_expectations_and_repeats_itself():
    x, key = normal(400, 300, seed=1).abs() + 1, torch.tensor(7)
    dropped = random.dropout(x, 0.25, key)
    assert torch.equal(dropped, random.dropout(x, 0.25, key)) and not torch.equal(dropped, random.dropout(x, 0.25, key + 1))
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.005)
    torch.testing.assert_close(dropped[kept], x[kept] / 0.75)
    assert random.dropout(x, 0.25, None) is x and random.dropout(x, 0.0, key) is x
