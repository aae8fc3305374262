"""Mixing in models that are not this package's: a module for one's own, and `add_mixing` for those of transformers."""
