"""Matplotlib's figures without its global state. It is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.errors import InputError
from training.files import replacing

NORM_NAMES = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}
BLACK, BLUE, ORANGE, GREY = "#000000", "#0072b2", "#e69f00", "#8c8c8c"


def require_matplotlib() -> None:
    """To be called before hours of work that ends in a figure.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("matplotlib is not installed; pip install 'vse-app[plots]' or add --no-plot") from None


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches that no window shows.

    Raises:
        InputError: If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """A grid behind the lines, and no frame."""
    axes.set_axisbelow(True)
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, whole or not at all, and the same bytes for the same figure."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
