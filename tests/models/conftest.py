"""What pytest leaves alone here: modules that import torch, which `make test` does without."""

collect_ignore = ["make_goldens.py", "reference.py"]
