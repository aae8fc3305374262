"""Kinds of data, one file each: from documents to tokens, and from tokens to samples."""
