"""Corpora of images and captions: readers, image decoding, text tokenizers, batches."""
