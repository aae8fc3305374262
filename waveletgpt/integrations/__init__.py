"""Mixing in models of other libraries: a module for your own models, and `add_mixing` for those of transformers."""
