"""The arguments of ``vse train``: a recipe, overridden field by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from training.config import Config, changed_course, read_toml
from training.errors import InputError


def read_arguments(arguments: list[str]) -> tuple[Config, bool]:
    """``[RECIPE.toml] [--resume] [--field.sub VALUE ...]`` → configuration, resume.

    With ``--resume`` the run's own ``config.toml`` stands in for the recipe, so ``--out`` suffices; what is
    given beside it must not change what the run computes, see :func:`~training.config.changed_course`.

    Raises:
        InputError: For an unknown recipe, missing ``--data`` or ``--out``, or a resumed run that was started
            with other settings.
    """
    resume = "--resume" in arguments
    arguments = [argument for argument in arguments if argument != "--resume"]
    recipe = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    config = _parse(arguments, read_toml(_find(recipe)) if recipe else Config())
    if not config.out:
        raise InputError("train: no run directory; add --out RUN")
    if resume:
        path = Path(config.out) / "config.toml"
        if not path.exists():
            raise InputError(f"{path}: nothing to resume; run without --resume")
        saved = replace(read_toml(path), out=config.out)
        wanted = config if recipe else _parse(arguments, saved)
        wanted = replace(wanted, data=wanted.data or saved.data)
        changed = changed_course(saved, wanted)
        if changed:
            raise InputError(f"{path}: the run was started with other settings ({changed}); choose another --out")
        return wanted, True
    if not config.data:
        raise InputError("train: no data; add --data KIND:PATH, or try --data scenes:6000")
    return config, False


def _parse(arguments: list[str], default: Config) -> Config:
    return tyro.cli(
        Config,
        default=default,
        args=arguments,
        prog="vse train [RECIPE.toml] [--resume]",
        description="Train a dual encoder. A recipe's settings are the defaults; every field can be overridden.",
        config=(tyro.conf.FlagConversionOff,),
    )


def _find(recipe: Path) -> Path:
    """A file, or the name of a recipe that comes with the package."""
    import training

    packaged = Path(training.__file__).parent / "recipes" / f"{recipe.name.removesuffix('.toml')}.toml"
    bare = recipe.parent == Path()
    return packaged if bare and packaged.exists() and not recipe.is_file() else recipe
