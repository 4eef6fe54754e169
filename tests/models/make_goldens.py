"""Write tests/models/goldens: what torch gives for each case, for tests without torch.

Needs torch and transformers: ``python -m tests.models.make_goldens`` in the repository's root.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.models import cases, reference

FOLDER = pathlib.Path(__file__).parent / "goldens"


def main() -> None:
    """Write one file per case, and one of pre-trained models where `shared/weights` is there."""
    FOLDER.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, case in cases.CASES.items():
        recorded = reference.run(case)
        arrays = {
            f"{group}:{key}": np.ascontiguousarray(value)
            for group, values in recorded.items()
            for key, value in values.items()
        }
        metadata = versions | {"config": json.dumps(case.config, sort_keys=True)}
        save_file(arrays, FOLDER / f"{name}.safetensors", metadata=metadata)
    weights = FOLDER.parents[3] / "shared" / "weights"
    if weights.is_dir():
        arrays = {n: np.ascontiguousarray(a) for n, a in reference.pretrained(weights).items()}
        save_file(arrays, FOLDER / "pretrained.safetensors", metadata=versions)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{len(cases.CASES)} cases, {size / 1024:.0f} KiB in {FOLDER}")


if __name__ == "__main__":
    main()
