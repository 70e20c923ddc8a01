from __future__ import annotations

import numpy as np
import torch

from training.models.similarity import order_scores


def test_order_scores_equal_a_triple_loop() -> None:
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(5, 600, generator=generator, dtype=torch.float64)
    captions = torch.randn(900, 600, generator=generator, dtype=torch.float64)  # several blocks
    captions[0] = images[0] - 1  # dominated everywhere
    naive = [
        [
            -(sum(max(0.0, c - i) ** 2 for c, i in zip(caption, image, strict=True)) ** 0.5)
            for caption in captions.tolist()
        ]
        for image in images.tolist()
    ]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            scores = order_scores(images, captions)
        np.testing.assert_allclose(scores, naive, rtol=1e-12)
        assert scores[0, 0] == 0
