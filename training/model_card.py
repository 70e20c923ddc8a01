"""The model card: written from the run's own figures."""

from __future__ import annotations

from typing import Any

from training.config import Config, to_toml


def model_card(config: Config, metrics: dict[str, Any], step: int, seconds: float, pairs: int) -> str:
    """Markdown for the ``README.md`` beside the weights.

    Args:
        config: The resolved configuration.
        metrics: Validation metrics in the form of the evaluation contract.
        step: Step at which these weights were reached.
        seconds: Training time up to then.
        pairs: Number of training pairs.
    """
    model = config.model

    def tower(encoder: str, frozen: bool, pooling: str, head: str) -> str:
        return f"`{encoder}`{' (frozen)' if frozen else ''}, {pooling} pooling, {head} head"

    contrastive = config.loss.name in ("infonce", "sigmoid")
    hinge = f"margin {config.loss.margin}, {config.loss.reduction} over the batch"
    setting = f"initial temperature {config.loss.temperature}" if contrastive else hinge
    rows = "\n".join(
        f"| {name} | {m['r1']:.1f} | {m['r5']:.1f} | {m['r10']:.1f} | {m['medr']:.1f} | {m['meanr']:.1f} |"
        for name, m in (("image → text", metrics["i2t"]), ("text → image", metrics["t2i"]))
    )
    return f"""---
library_name: vse
pipeline_tag: feature-extraction
tags: [image-text-retrieval, visual-semantic-embedding]
---
# Visual-semantic embedding trained on `{config.data}`

An image tower and a text tower that map pictures and sentences into one {model.dim}-dimensional space,
compared by {model.similarity} similarity.

* Image tower: {tower(model.image.encoder, model.image.frozen, model.image.pooling, model.image.head)}
* Text tower: {tower(model.text.encoder, model.text.frozen, model.text.pooling, model.text.head)}
* Loss: {config.loss.name}, {setting}, batches of {config.optim.batch_size}
* Training data: split `{config.train_split}`, {pairs:,} image–caption pairs; seed {config.seed}
* Weights of step {step:,}, after {seconds / 60:.1f} minutes, selected by validation rSum

## Retrieval on split `{metrics["split"]}` ({metrics["images"]:,} images, {metrics["captions"]:,} captions)

| query → answer | R@1 | R@5 | R@10 | medR | meanR |
|---|---|---|---|---|---|
{rows}

rSum {metrics["rsum"]:.1f}; {metrics["ties"]} tied queries, counted against the model. These weights were
chosen on this very split: expect a little less elsewhere.

## Use

```python
from training.models.dual_encoder import DualEncoder

model = DualEncoder.from_pretrained("this directory")
texts = model.encode_texts(["two dogs play in the snow"])
```

```sh
vse index my-gallery add ~/Pictures --model {config.out}
vse search my-gallery "two dogs play in the snow"
```

## Limits

It knows what its captions talk about and little else, it inherits their biases and those of the pretrained
backbones, and nothing here says how it behaves on pictures that were made to fool it.

## Configuration

```toml
{to_toml(config)}```
"""
