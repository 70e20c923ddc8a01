"""Learning and judging image–caption embeddings: data, models, losses, evaluation, trainer."""
