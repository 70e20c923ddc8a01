"""Noticing that training has collapsed: every image as similar to every caption as to any other."""

from __future__ import annotations

TOLERANCE = 0.01
MAX_SPREAD = 1e-3


class CollapseDetector:
    """Watches for the plateau at which the hardest hinge is exactly the margin.

    When all scores are equal, the max of hinges is ``2Ba`` and hardly has a gradient; fine-tuned backbones
    and small batches are drawn there. A step counts as collapsed if the mean hinge ``a + hardest -
    positive`` is within 1 % of the margin ``a``, which is to say the MH loss within 1 % of ``2Ba`` whatever
    the reduction, and the negatives' scores have a standard deviation below 0.001. After ``patience`` such
    steps in a row the detector reports once and begins to count anew.

    Relations to its neighbours:
        It reads the :class:`~training.losses.base.Statistics` of any loss. The mend is
        :meth:`~training.losses.curriculum.Curriculum.fall_back`, or a smaller learning rate.

    Args:
        margin: The loss's margin, in units of the score.
        patience: Consecutive collapsed steps before a report.

    Example:
        >>> detector = CollapseDetector(margin=0.2, patience=2)
        >>> detector.observe(positive=0.99, hardest=0.99, spread=1e-5)
        >>> print(detector.observe(positive=0.99, hardest=0.99, spread=1e-5))
        collapsed for 2 steps: all scores are near 0.990 (standard deviation 1.0e-05), so nothing is ranked
    """

    def __init__(self, margin: float, patience: int = 200) -> None:
        self.margin = margin
        self.patience = patience
        self._collapsed_steps = 0

    def observe(self, positive: float, hardest: float, spread: float) -> str | None:
        """Take in one step's statistics.

        Args:
            positive: Mean score of the matching pairs.
            hardest: Mean score of the hardest negatives.
            spread: Standard deviation of the negatives' scores.

        Returns:
            A sentence for the log if this step completes a collapse, otherwise None.
        """
        collapsed = abs(hardest - positive) <= TOLERANCE * self.margin and spread < MAX_SPREAD
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        if self._collapsed_steps < self.patience:
            return None
        self._collapsed_steps = 0
        return (
            f"collapsed for {self.patience} steps: all scores are near {positive:.3f} "
            f"(standard deviation {spread:.1e}), so nothing is ranked"
        )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"collapsed_steps": self._collapsed_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._collapsed_steps = state["collapsed_steps"]
