"""Judging embeddings: exact retrieval ranks, the field's protocols, and tables. Knows no model."""
