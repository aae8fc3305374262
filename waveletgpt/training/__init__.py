"""From a recipe and data to run folders: one run (`trainer.py`) or a comparison (`compare.py`)."""
