from __future__ import annotations

import itertools

import numpy as np
import pytest

from training.sampling.redundancy import duplicate_groups


def test_finds_planted_copies() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 8))
    vectors[[5, 17, 40]] = vectors[3]
    vectors[50] = vectors[12] * (1 + 1e-5)
    groups = duplicate_groups(vectors, 1e-3)
    assert [sorted(group.tolist()) for group in groups] == [[3, 5, 17, 40], [12, 50]]


def test_nothing_is_no_copy_of_nothing() -> None:
    assert [sorted(g.tolist()) for g in duplicate_groups(np.ones((4, 2)), 0.0)] == [[0, 1, 2, 3]]
    assert duplicate_groups(np.zeros((4, 2)), 0.1) == []


@pytest.mark.parametrize("seed", range(3))
def test_each_member_is_close_to_its_leader_and_leaders_are_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((10, 3))[rng.integers(10, size=80)] + 0.02 * rng.standard_normal((80, 3))
    groups = duplicate_groups(vectors, 0.05)
    members = np.concatenate(groups)
    assert len(set(members.tolist())) == len(members)

    def near(leader: int, other: int) -> bool:
        return bool(np.linalg.norm(vectors[leader] - vectors[other]) <= 0.05 * np.linalg.norm(vectors[leader]))

    assert all(near(group[0], other) for group in groups for other in group)
    alone = sorted(set(range(80)) - set(members.tolist()))
    leaders = [int(group[0]) for group in groups] + alone
    assert not any(near(a, b) and near(b, a) for a, b in itertools.combinations(leaders, 2))
