"""Whole jobs, from names and files to files: what the commands run.

A job loads models, calls the rooms before it, shows progress, goes on after an interruption and
writes a folder. It prints nothing but errors.
"""

__all__ = ["comparison", "diagnose", "evaluate", "figures", "train"]
