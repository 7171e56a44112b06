"""Sampling: distributions by hand and by plain loops, decoding against whole forward passes, and where a text ends."""

import decimal
import math
import random
from collections.abc import Iterator

import pytest
import torch
from conftest import TINY, generator, normal

from hyperlm import model, sample
from hyperlm.config import ConfigError, ModelConfig
from hyperlm.sample import Sampling

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sampling(1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.0, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 0, 0.3), [0, 1, 0, 0]),
        (Sampling(0.5, 0, 1.0), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(1e-40, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(5e-324, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(1e308, 0, 1.0), [0.25, 0.25, 0.25, 0.25]),
        (Sampling(1.0, 10**30, 5e-324), [0, 1, 0, 0]),
    ],
)
def test_the_next_token_is_drawn_from_the_right_distribution(how, expected):
    torch.testing.assert_close(sample.probabilities(LOGITS, how), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-40, 1e-3, 0.3, 1.0, 40.0, 1e30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 3e38])
def test_every_temperature_gives_its_distribution(temperature, scale):
    """Against sums of 60 digits, of logits in fp32 of every size."""
    logits = (scale * normal(9, seed=1) / 4).float()
    with decimal.localcontext(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        weights = [
            ((decimal.Decimal(x) - decimal.Decimal(max(logits.tolist()))) / decimal.Decimal(temperature)).exp() for x in logits.tolist()
        ]
        expected = [float(weight / sum(weights)) for weight in weights]
    torch.testing.assert_close(
        sample.probabilities(logits, Sampling(temperature, 0, 1.0)), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(value, temperature):
    with pytest.raises(sample.NotFinite):
        sample.probabilities(torch.tensor([0.0, value, 1.0]), Sampling(temperature))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc é 漢 \U0001f468\u200d\U0001f469", "a\nb\tc é 漢 \U0001f468\u200d\U0001f469"),
        ("\x1b[31m\x07\r\x00", "\\x1b[31m\\x07\\r\\x00"),
        ("\x7f\x9b2J", "\\x7f\\x9b2J"),
        ("\u202eevil\u2069\u200f", "\\u202eevil\\u2069\\u200f"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert sample.printable(text) == shown


def test_greedy_text_is_what_whole_forward_passes_would_choose(cfg):
    params = model.init(cfg, 5)
    ids = [3, 1, 4, 1, 5]
    logits, cache = sample.prefill(params, ids, sample.empty_cache(params, cfg), cfg)
    tokens = sample.generate(
        logits, cache, Sampling(0.0), generator(), stop=set(), usable=cfg.vocab_size, decode=sample.decoder(params, cfg)
    )
    drawn = [token for (token, _, _), _ in zip(tokens, range(30), strict=False)]
    for token in drawn:
        assert token == model.apply(params, torch.tensor([ids]), cfg)[0, -1].argmax()
        ids.append(token)


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_decoder_goes_on_from_any_cache():
    cfg, device = ModelConfig(kind="phase8", d_model=64, n_layers=2, head_dim=32, vocab_size=64), torch.device("cuda", 0)
    params = model.init(cfg, 5, device=device)
    decode = sample.decoder(params, cfg)
    for prompt in ([3, 1, 4], [2, 7]):
        logits, cache = sample.prefill(params, prompt, sample.empty_cache(params, cfg), cfg)
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(logits.argmax()))
            logits, cache = decode(torch.tensor(ids[-1:], device=device), cache)
            logits = logits[0]
            torch.testing.assert_close(logits, model.apply(params, torch.tensor([ids], device=device), cfg)[0, -1], rtol=1e-3, atol=1e-3)


def test_tokens_that_the_tokenizer_lacks_are_never_drawn():
    params = model.init(TINY, 0)
    logits, cache = sample.prefill(params, [1], sample.empty_cache(params, TINY), TINY)
    tokens = sample.generate(logits, cache, Sampling(5.0, 0, 1.0), generator(), stop=set(), usable=7, decode=sample.decoder(params, TINY))
    assert all(token < 7 for (token, _, _), _ in zip(tokens, range(50), strict=False))


def naive(logits: list[float], how: Sampling, recent: list[int]) -> list[float]:
    """The distribution by plain loops in double precision, each restriction applied on its own."""
    x = [(v / how.repetition_penalty if v > 0 else v * how.repetition_penalty) if i in recent else v for i, v in enumerate(logits)]
    if how.temperature == 0:
        return [float(i == x.index(max(x))) for i in range(len(x))]
    p = [math.exp((v - max(x)) / how.temperature) for v in x]
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    kept = set(ranked[: how.top_k] if how.top_k else ranked)
    share, nucleus = 0.0, set()
    for i in (i for i in ranked if i in kept):
        if share < how.top_p * sum(p[j] for j in kept):
            nucleus.add(i)
        share += p[i]
    kept &= nucleus
    kept &= {i for i in kept if p[i] / sum(p) >= how.min_p * max(p) / sum(p)}
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("recent", [[], [0, 3, 3, 7], list(range(20))])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.0, 0, 1.0, min_p=0.2),
        Sampling(0.6, 0, 1.0, min_p=0.2),
        Sampling(2.0, 0, 1.0, min_p=1.0),
        Sampling(0.7, 9, 0.8, min_p=0.05),
        Sampling(1.0, 0, 1.0, repetition_penalty=1.3),
        Sampling(0.0, 0, 1.0, repetition_penalty=40.0),
        Sampling(0.9, 5, 0.9, min_p=0.1, repetition_penalty=1.2),
    ],
)
def test_every_restriction_is_what_plain_loops_find(how, recent):
    for seed in range(10):
        logits = 3 * normal(20, seed=seed)
        expected = torch.tensor(naive(logits.tolist(), how, recent), dtype=torch.float64)
        torch.testing.assert_close(sample.probabilities(logits, how, recent), expected)


def test_min_p_looks_at_probabilities_after_the_temperature():
    """0.4 and 0.2: half as probable at temperature 1, a quarter at 0.5."""
    kept = [int((sample.probabilities(LOGITS, Sampling(t, 0, 1.0, min_p=0.3)) > 0).sum()) for t in (1.0, 0.5)]
    assert kept == [3, 2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Sampling(min_p=1.1), "--min-p 1.1: must be a number of at least 0 and at most 1"),
        (Sampling(min_p=math.nan), "--min-p nan"),
        (Sampling(repetition_penalty=0.9), "--repetition-penalty 0.9"),
        (Sampling(repetition_penalty=math.inf), "--repetition-penalty inf"),
        (Sampling(top_k=-1), "--top-k -1"),
        (Sampling(temperature=math.inf), "--temperature inf"),
    ],
)
def test_values_that_no_distribution_has_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        sample.checked(how)


def test_the_latest_tokens_are_penalised_of_the_prompt_too_and_those_that_end_a_text_never():
    """Greedy text against whole forward passes, with the penalty by plain loops."""
    params, how, stop = model.init(TINY, 5), Sampling(0.0, repetition_penalty=1.5), {1}
    ids = [1, *torch.randint(0, 64, (sample.PENALISED,), generator=generator(3)).tolist()]
    logits, cache = sample.prefill(params, ids, sample.empty_cache(params, TINY), TINY)
    tokens = sample.generate(logits, cache, how, generator(), stop=stop, usable=64, decode=sample.decoder(params, TINY), before=ids)
    drawn = [token for (token, _, _), _ in zip(tokens, range(30), strict=False)]
    for token in drawn:
        recent = [i for i in ids if i not in stop][-sample.PENALISED :]
        expected = naive(model.apply(params, torch.tensor([ids]), TINY)[0, -1].tolist(), how, recent)
        assert token == expected.index(1.0)
        ids.append(token)
    assert len(drawn) > 10


def cut(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """By reading character after character: the text before the first stop string that is complete, what is certain of it, and whether there is one."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            before = text[: end - max(map(len, found))]
            return before, before, True
    begun = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text, text[: len(text) - begun], False


@pytest.mark.parametrize("stops", [[], ["b"], ["ab", "abc"], ["aab", "bb"], ["abab", "ba"], ["abc", "b\n"], ["aaaa"], ["\n\n", "ab"]])
def test_a_text_ends_before_a_stop_string_and_nothing_that_may_begin_one_is_shown(stops):
    """However the text comes in pieces."""
    rng = random.Random(1)
    for _ in range(200):
        require_cut(["".join(rng.choices("aabc\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 8))], stops)


def require_cut(pieces: list[str], stops: list[str]) -> None:
    fed, shown = "", ""

    def feed() -> Iterator[str]:
        nonlocal fed
        for piece in pieces:
            assert shown == cut(fed, stops)[1]
            fed += piece
            yield piece

    for piece in sample.until(feed(), stops):
        assert piece
        shown += piece
    assert shown == cut("".join(pieces), stops)[0]
    assert fed == "".join(pieces) or cut(fed, stops)[2]  # and no more is asked for than was needed


SENTENCE = "It was the best of times, it was the worst of times. "  # 53 characters
COUNTING = "".join(map(str, range(200)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("once upon a time " + "ha" * 80, True),
        ("ha" * 79, False),  # too short
        ("#" + "-" * 79, False),  # a line across a page
        (SENTENCE * 3, False),  # not often enough
        ("It began so: " + SENTENCE * 4, True),
        (SENTENCE * 3 + SENTENCE[:52], False),
        (SENTENCE[7:] + SENTENCE * 3 + SENTENCE[:7], True),  # wherever it begins
        (SENTENCE * 4 + "Then", False),  # it goes on
        ("".join(f"{i}: 0x{i:02x}\n" for i in range(40)), False),  # a table, whose numbers differ
        (COUNTING[: sample.LONGEST] * 4, True),
        (COUNTING[: sample.LONGEST + 1] * 4, False),  # longer than is looked for
    ],
)
def test_a_text_that_ends_in_a_loop_is_noticed(text, expected):
    assert sample.repeats(text) == expected
