"""Run folders, and what is asked of a trained model: see `folder.py`."""

from waveletgpt.runs.folder import RunFolder, find_runs

__all__ = ["RunFolder", "find_runs"]
