"""Nats of each token of a text, and validation losses by position, against logits one token at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, generator, write_prose

from hyperlm import data, evals, model
from hyperlm.config import Config, DataConfig, EvalConfig
from hyperlm.loss import IGNORE

CPU = torch.device("cpu")


def plain_nats(params: dict, tokens: torch.Tensor, config: Config) -> torch.Tensor:
    """-log p of every token (N,), each found by itself in float64."""
    return -F.log_softmax(model.apply(params, tokens[None], config.model)[0].double(), -1)


def test_nats_of_each_token_are_those_of_its_logits(cfg):
    config, params = Config(model=cfg), model.init(cfg, 0)
    tokens, targets = torch.randint(64, (2, 3, 11), generator=generator())
    targets[0, ::2] = IGNORE
    found = evals.token_nats(params, tokens, targets, config)
    assert found.shape == (3, 11) and found.dtype == torch.float32 and (found[0, ::2] == 0).all()
    for b, n in [(0, 1), (1, 0), (1, 10), (2, 5)]:
        alone = plain_nats(params, tokens[b, : n + 1], config)[n, targets[b, n]]  # and nothing after it is read
        assert found[b, n].item() == pytest.approx(alone.item(), rel=1e-5)


def test_losses_by_position_are_means_over_those_places(tmp_path):
    n = 20
    config = Config(
        model=replace(TINY, vocab_size=400), data=DataConfig(sources=(str(write_prose(tmp_path / "p.txt")),), seq_len=n, val_fraction=0.2)
    )
    config = replace(config, eval=EvalConfig(max_tokens=0))
    corpus, params = data.prepare(config, say=lambda line: None), model.init(config.model, 0)
    found = evals.evaluate(params, corpus, config, CPU)
    stream, by_place = torch.from_numpy(corpus.shards[0].val.astype("int64")), {}
    for start in range(0, len(stream) - 1, n):
        window = stream[start : start + n + 1]
        for place, nats in enumerate(plain_nats(params, window[:-1], config)[torch.arange(len(window) - 1), window[1:]].tolist()):
            by_place.setdefault(place, []).append(nats)
    parts = {key: value for key, value in found.items() if "positions" in key}
    assert list(parts) == [f"val_loss/positions_{low}_{high}" for low, high in [(0, 2), (2, 5), (5, 10), (10, 20)]]
    for key, value in parts.items():
        low, high = map(int, key.split("_")[2:])
        nats = [x for place in range(low, high) for x in by_place[place]]
        assert value == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.parametrize(("n", "names"), [(2, ["0_1", "1_2"]), (8, ["0_1", "1_2", "2_4", "4_8"])])
def test_short_sequences_have_fewer_parts_and_places_without_targets_none(n, names):
    sums = torch.ones(2, n, dtype=torch.float64)
    assert list(evals.position_losses(sums)) == [f"val_loss/positions_{name}" for name in names]
    sums[1, n // 2 :] = 0
    assert list(evals.position_losses(sums)) == [f"val_loss/positions_{name}" for name in names[:-1]]
