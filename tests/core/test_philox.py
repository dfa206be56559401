"""The generator against its published answers, and the Gumbel noise made from it."""

import math

import pytest
import torch
from glm_image.glm_core.ar import philox

CPU = torch.device("cpu")
# kat_vectors of Random123, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == answer


def test_noise_depends_on_candidate_column_row_and_grid():
    keys = philox.sample_keys((0x0123456789ABCDEF,), CPU)
    noise = philox.gumbel(keys, grid=1, row=5, columns=torch.tensor([9, 2]), n=11)
    assert noise.shape == (1, 2, 11)
    for cell, column in enumerate((9, 2)):
        for candidate in range(11):
            counter = tuple(map(torch.tensor, (candidate // 4, column, 5, 1)))
            words = philox.philox(counter, (torch.tensor(0x89ABCDEF), torch.tensor(0x01234567)))
            expected = philox.to_gumbel(words[candidate % 4])
            assert noise[0, cell, candidate] == expected


def test_samples_have_consecutive_seeds_that_wrap():
    keys = philox.sample_keys(philox.batch_seeds(2**64 - 2, 4), CPU)
    for i, seed in enumerate((2**64 - 2, 2**64 - 1, 0, 1)):
        assert torch.equal(keys[i : i + 1], philox.sample_keys((seed,), CPU))
    assert len({tuple(k.tolist()) for k in keys}) == 4


def test_noise_is_finite_and_distinct_at_both_ends():
    words = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 2**16, 2**32 - 2, 2**32 - 1])
    noise = philox.to_gumbel(words)
    assert noise.isfinite().all()
    assert (noise[:5].diff() < 0).all()  # the largest noise has all 32 bits
    exact = [-math.log(-math.log1p(-(w + 0.5) / 2**32)) for w in words[:6].tolist()]
    assert noise[:6].tolist() == pytest.approx(exact, rel=1e-3)
    assert -3 < noise[-1] < -2.8
    assert 22.8 < noise[0] < 23


def test_noise_follows_the_gumbel_distribution():
    keys = philox.sample_keys(range(7, 11), CPU)
    noise = philox.gumbel(keys, 0, 0, torch.arange(50), 1000).flatten().double()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    steps = torch.arange(1, len(uniform) + 1) / len(uniform)
    distance = (uniform - steps).abs().max().item()
    assert distance < 1.95 / len(uniform) ** 0.5  # Kolmogorov-Smirnov, p = 0.001
