"""Storing and searching vectors: exact indexes, and galleries that keep them on disk with their items."""
