"""OMP_NUM_THREADS=1 python -m benchmarks.loss

Cost of a loss, forward and backward, in units of the three products of (B, D) and (D, B) matrices that any
loss on the full score matrix needs. Max of hinges searches its negatives with one of the three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import compare, format_comparison
from training.losses import InfoNCE, MaxOfHinges

DIMENSIONS = 1024


def max_of_full_matrix(images: Tensor, captions: Tensor) -> Tensor:
    """Max of hinges as first published: every step on the full score matrix, in the graph."""
    scores = images @ captions.T
    positive = scores.diagonal()[:, None]
    diagonal = torch.eye(len(scores), dtype=torch.bool)
    over_captions = (0.2 + scores - positive).clamp(min=0).masked_fill(diagonal, 0)
    over_images = (0.2 + scores - positive.T).clamp(min=0).masked_fill(diagonal, 0)
    return over_captions.max(1)[0].sum() + over_images.max(0)[0].sum()


def alternatives(batch: int) -> dict[str, Callable[[], object]]:
    images, captions = torch.nn.functional.normalize(torch.randn(2, batch, DIMENSIONS), dim=2)
    images.requires_grad_()
    captions.requires_grad_()
    image_ids, gradient = torch.arange(batch), torch.randn(batch, batch)
    max_of_hinges, infonce = MaxOfHinges(), InfoNCE()

    @torch.no_grad()
    def three_products() -> None:
        images @ captions.T
        gradient @ captions
        gradient.T @ images

    def step(loss: Callable[[], Tensor]) -> None:
        images.grad = captions.grad = None
        torch.autograd.backward(loss())

    return {
        "three products": three_products,
        "max of hinges, full matrix": lambda: step(lambda: max_of_full_matrix(images, captions)),
        "max of hinges": lambda: step(lambda: max_of_hinges(images, captions, image_ids).value),
        "InfoNCE": lambda: step(lambda: infonce(images, captions, image_ids).value),
    }


def main() -> None:
    torch.manual_seed(0)
    for batch in (128, 512, 1024, 2048):
        print(f"B = {batch}, D = {DIMENSIONS}")
        print(format_comparison(compare(alternatives(batch), repeats=max(9, 20_000 // batch))))


if __name__ == "__main__":
    main()
