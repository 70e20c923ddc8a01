from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.models.pooling import PARAMETER_FREE, GeneralizedPooling
from training.models.text_tower import WordGRU

LENGTHS = [4, 1, 7, 7, 2]


def ragged(width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator, dtype=torch.float64) for length in LENGTHS]


def padded(rows: list[Tensor], junk: float = 99.0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Rows padded with a value that no pooling may see."""
    longest = max(map(len, rows)) + extra
    values = torch.full((len(rows), longest, rows[0].shape[1]), junk, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        values[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return values, mask


def naive(kind: str, tokens: Tensor) -> list[float]:
    columns = [[float(x) for x in column] for column in tokens.T]
    means = [sum(column) / len(column) for column in columns]
    highs = [max(column) for column in columns]
    lasts = [column[-1] for column in columns]
    return {"mean": means, "max": highs, "mean+max": means + highs, "last": lasts}[kind]


def generalized() -> GeneralizedPooling:
    torch.manual_seed(0)
    return GeneralizedPooling().double()


@pytest.mark.parametrize("kind", PARAMETER_FREE)
def test_pooling_is_what_a_loop_over_valid_tokens_gives(kind: str) -> None:
    rows = ragged()
    expected = torch.tensor([naive(kind, tokens) for tokens in rows], dtype=torch.float64)
    torch.testing.assert_close(PARAMETER_FREE[kind](*padded(rows)), expected)
    full = torch.stack([rows[2], rows[3]])
    torch.testing.assert_close(PARAMETER_FREE[kind](full, None), expected[2:4])


@pytest.mark.parametrize("kind", [*PARAMETER_FREE, "gpo"])
def test_padding_changes_neither_value_nor_gradient(kind: str) -> None:
    pool = generalized() if kind == "gpo" else PARAMETER_FREE[kind]
    results = []
    for extra in (0, 3):
        rows = [tokens.clone().requires_grad_() for tokens in ragged()]
        pooled = pool(*padded(rows, junk=99.0 - extra, extra=extra))
        pooled.square().sum().backward()
        results.append([pooled.detach(), *(tokens.grad for tokens in rows)])
    for tight, loose in zip(*results, strict=True):
        assert loose.isfinite().all()
        torch.testing.assert_close(tight, loose)


def test_generalized_pooling_is_a_weighted_mean_of_sorted_features() -> None:
    pool, rows = generalized(), ragged()
    values, mask = padded(rows)
    expected = []
    for tokens in rows:
        theta = pool.weights(torch.tensor([len(tokens)]), len(tokens))[0].tolist()
        expected.append(
            [sum(t * x for t, x in zip(theta, sorted(c.tolist(), reverse=True), strict=True)) for c in tokens.T]
        )
    torch.testing.assert_close(pool(values, mask), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(pool(values[2:4], mask[2:4]), pool(values[2:4], None))


def test_generalized_pooling_weights_sum_to_one_over_valid_positions() -> None:
    lengths = torch.tensor(LENGTHS)
    theta = generalized().weights(lengths, 9)
    torch.testing.assert_close(theta.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert (theta[torch.arange(9) >= lengths[:, None]] == 0).all()
    assert (theta[torch.arange(9) < lengths[:, None]] > 0).all()


def test_generalized_pooling_with_uniform_weights_is_the_mean() -> None:
    pool = generalized()
    torch.nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(*padded(ragged())), PARAMETER_FREE["mean"](*padded(ragged())))


def test_generalized_pooling_with_one_weight_is_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = generalized()
    first = torch.eye(7, dtype=torch.float64)[:1].expand(5, -1)
    monkeypatch.setattr(pool, "weights", lambda lengths, longest: first)
    torch.testing.assert_close(pool(*padded(ragged())), PARAMETER_FREE["max"](*padded(ragged())))


def test_generalized_pooling_ignores_the_order_of_tokens_and_learns() -> None:
    pool, rows = generalized(), ragged()
    torch.testing.assert_close(pool(*padded(rows)), pool(*padded([tokens.flip(0) for tokens in rows])))
    pool(*padded(rows)).square().sum().backward()
    for parameter in pool.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_a_padded_caption_is_read_like_a_caption_alone() -> None:
    torch.manual_seed(0)
    gru = WordGRU(words=20, word_dim=6, dim=8)
    captions = [torch.randint(1, 20, (length,)) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=19)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    together = PARAMETER_FREE["last"](*gru(ids, mask))
    alone = torch.cat([gru(caption[None]).values[:, -1] for caption in captions])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert math.isclose(gru.embedding.weight.abs().max().item(), 0.1, rel_tol=0.2)
