"""Classifiers: the Long Range Arena and recordings. `training` knows their task and settings, `cli` their commands."""
