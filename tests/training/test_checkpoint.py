from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from training.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from training.errors import InputError
from training.files import replacing, replacing_files, write_text


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "model": {"a/b.weight": torch.randn(3, 4).T, "count": torch.tensor(7)},
        "loss": {"_extra_state": torch.tensor(-3)},
    }
    record = {"step": 5, "best": {"rsum": 1 / 3}, "split": "prüfung"}
    save_state(tmp_path / "state" / "last.safetensors", tensors, record)
    loaded, again = load_state(tmp_path / "state" / "last.safetensors")
    assert again == record
    assert loaded.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(loaded[group][name], tensor)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    save_state(tmp_path / "s", {}, {})
    expected = torch.rand(4)
    torch.manual_seed(99)
    load_state(tmp_path / "s")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_goes_on_where_it_was(kind: type[torch.optim.Adam]) -> None:
    torch.manual_seed(0)
    whole, resumed = nn.Linear(3, 2), nn.Linear(3, 2)
    rows = torch.randn(6, 5, 3)

    def steps(model: nn.Linear, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()

    first = kind(whole.parameters(), lr=0.1)
    steps(whole, first, rows[:3])
    resumed.load_state_dict(whole.state_dict())
    second = kind(resumed.parameters(), lr=0.1)
    restore_optimizer(second, {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()})
    steps(whole, first, rows[3:])
    steps(resumed, second, rows[3:])
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_missing_and_damaged_states_are_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(InputError, match=r"last\.safetensors: no state to resume from"):
        load_state(path)
    save_state(path, {"model": {"w": torch.zeros(100)}}, {"step": 1})
    whole = path.read_bytes()
    for damaged in (whole[:-50], b"", b"not a tensor file at all", whole[:8]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"last\.safetensors: damaged"):
            load_state(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_text(path, "old")

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space.*{path}"), replacing(path) as temporary:
        fail(temporary)
    with pytest.raises(OSError, match="No space"), replacing_files(tmp_path) as folder:
        fail(folder / path.name)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_several_files_are_replaced_together(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with replacing_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
