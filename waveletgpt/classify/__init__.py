"""Classifiers: the Long Range Arena and recordings. Nothing outside knows of this but the command line."""
