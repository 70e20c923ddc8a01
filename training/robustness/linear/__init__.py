"""Linear models, whose robustness is known exactly: references, optimisers, study."""
