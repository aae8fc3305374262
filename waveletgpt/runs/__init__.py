"""Run folders, and what is asked of a trained model: see `folder.py`."""
