from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from training.config import (
    Config,
    LossConfig,
    OptimConfig,
    check_ranges,
    difference,
    from_dict,
    read_toml,
    to_toml,
)
from training.errors import InputError
from training.models.config import ImageTowerConfig, ModelConfig
from vse_app.train_arguments import read_arguments

ODD = Config(
    data='folder:/tmp/"quoted" \\ Bücher\n',
    out="läufe/1",
    model=ModelConfig(image=ImageTowerConfig(encoder="precomputed", normalise=False, layers=(-1, 0)), dim=7),
    loss=LossConfig(name="infonce", temperature=1e-5),
    optim=OptimConfig(lr=1e-05, weight_decay=1 / 3, clip=float("inf"), epochs=2),
    tensorboard=True,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("config", [Config(), ODD], ids=["defaults", "odd"])
def test_toml_round_trip(config: Config, tmp_path: Path) -> None:
    assert read_toml(write(tmp_path / "config.toml", to_toml(config))) == config


def test_toml_states_every_setting_so_that_later_defaults_change_nothing() -> None:
    text = to_toml(Config())
    for name in ("val_split", "min_count", "normalise_features", "on_collapse", "backbone_lr"):
        assert f"\n{name} = " in text


def test_missing_settings_take_defaults_and_integers_become_floats(tmp_path: Path) -> None:
    config = read_toml(write(tmp_path / "r.toml", "[optim]\nlr = 1\n[model.text]\nmin_count = 2\n"))
    expected = replace(Config(), optim=OptimConfig(lr=1.0))
    assert replace(config, model=ModelConfig()) == expected
    assert isinstance(config.optim.lr, float)
    assert config.model.text.min_count == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[optim]\nlearning_rate = 1.0", "'optim.learning_rate'"),
        ("[optim]\nepochs = 2.5", "optim.epochs = 2.5"),
        ("[model.text]\nlayers = [1, 2.0]", "model.text.layers = [1, 2.0]"),
        ("[model.text]\nlayers = 1", "model.text.layers = 1"),
        ("[optim]\nepochs = true", "optim.epochs = True"),
        ("tensorboard = 1", "tensorboard = 1"),
        ("seed = '1'", "seed = '1'"),
        ("[model]\nimage = 'small-cnn'", "model.image must be a table"),
        ("[model.image]\npooling = 'median'", "model.image.pooling = 'median'"),
        ("[model.image]\npooling = ['mean']", "model.image.pooling = ['mean']"),
        ("[loss]\nname = 'hinge'", "choose from 'curriculum'"),
        ("seed = ", "not TOML"),
    ],
)
def test_bad_settings_name_file_and_key(text: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.toml", text)
    with pytest.raises(InputError) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml: no such recipe"):
        read_toml(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"optim": {"batch_size": 1}}, "optim.batch_size = 1 must be at least 2"),
        ({"optim": {"lr": float("nan")}}, "optim.lr = nan"),
        ({"optim": {"epochs": 0}}, "optim.epochs = 0 must be at least 1"),
        ({"clusters": {"mix": 1.5}}, "clusters.mix = 1.5 must be at most 1"),
        ({"sampler": "importance", "clusters": {"mix": 0.0}}, "clusters.mix = 0: pairs without a gradient"),
        ({"optim": {"decay_epochs": 0}}, "optim.decay_epochs = 0"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0"),
        ({"model": {"text": {"dropout": 1.0}}}, "model.text.dropout = 1.0 must be below 1"),
    ],
)
def test_impossible_numbers_are_refused(record: dict[str, object], told: str) -> None:
    check_ranges(Config())
    with pytest.raises(InputError) as caught:
        check_ranges(from_dict(record, "test"))
    assert told in str(caught.value)


def test_difference_names_the_first_setting() -> None:
    assert difference(ODD, ODD) is None
    assert difference(ODD, replace(ODD, optim=replace(ODD.optim, lr=0.5))) == "optim.lr: 1e-05 ≠ 0.5"
    other = replace(ODD, model=replace(ODD.model, image=ImageTowerConfig(encoder="small-cnn", normalise=False)))
    assert difference(ODD, other) == "model.image.encoder: 'precomputed' ≠ 'small-cnn'"


def test_flags_override_nested_fields_of_a_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.toml", "data = 'scenes:9'\n[optim]\nlr = 0.5\nepochs = 3\n[model]\ndim = 8\n")
    flags = "--out runs/x --optim.lr 1e-3 --model.image.encoder small-cnn --tensorboard True --model.text.min-count 2"
    config, resume = read_arguments([str(recipe), *flags.split()])
    assert not resume
    assert (config.data, config.out, config.tensorboard) == ("scenes:9", "runs/x", True)
    assert (config.optim.lr, config.optim.epochs, config.model.dim) == (1e-3, 3, 8)
    assert (config.model.image.encoder, config.model.text.min_count) == ("small-cnn", 2)


def test_a_packaged_recipe_goes_by_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "scenes:60", "--out", "r"]
    packaged, _ = read_arguments(["scenes", *flags])
    assert packaged.optim.schedule == "cosine"
    assert read_arguments(["scenes.toml", *flags])[0] == packaged
    (tmp_path / "scenes").mkdir()  # as `vse data scenes scenes` makes it
    assert read_arguments(["scenes", *flags])[0] == packaged
    write(tmp_path / "scenes.toml", "seed = 5")
    assert read_arguments(["scenes.toml", *flags])[0].seed == 5


def test_a_mistyped_path_is_not_taken_for_a_packaged_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        read_arguments([str(tmp_path / "scenes.toml"), "--data", "scenes:60", "--out", "r"])


def test_data_and_run_directory_are_needed() -> None:
    with pytest.raises(InputError, match="--out"):
        read_arguments(["--data", "scenes:60"])
    with pytest.raises(InputError, match="--data"):
        read_arguments(["--out", "r"])


def test_resume_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    started = Config(data="scenes:60", out="where it began", optim=OptimConfig(lr=0.125))
    write(tmp_path / "config.toml", to_toml(started))
    expected = replace(started, out=str(tmp_path))
    out = ["--out", str(tmp_path)]
    assert read_arguments(["--resume", *out]) == (expected, True)
    assert read_arguments([*out, "--optim.lr", "0.125", "--resume"]) == (expected, True)
    recipe = write(tmp_path / "recipe.toml", "[optim]\nlr = 0.125")
    assert read_arguments([str(recipe), *out, "--resume"]) == (expected, True)


def test_resume_refuses_other_settings_and_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        read_arguments(["--resume", "--out", str(tmp_path)])
    write(tmp_path / "config.toml", to_toml(Config(data="scenes:60")))
    with pytest.raises(InputError, match=r"optim\.lr: 0\.0002 ≠ 0\.5"):
        read_arguments(["--resume", "--out", str(tmp_path), "--optim.lr", "0.5"])
