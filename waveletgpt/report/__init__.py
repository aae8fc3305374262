"""Run folders -> report.html. `page.py` composes it, `figures.py` draws, `probing.py` looks into the trained models."""

from .page import render, write_report

__all__ = ["render", "write_report"]
