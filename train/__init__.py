"""Recipes that fine-tune, watch, resume, evaluate and export: ``python -m train --help``."""
