"""Several runs of one task side by side: which are made, and what they show."""
