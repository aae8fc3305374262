"""Kinds of data, one file each: how documents become tokens, and tokens a sample."""
