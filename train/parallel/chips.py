"""Accelerators, by what their vendors publish of them, and the time that a step takes there.

All figures are of one chip, or of the part of one that JAX takes for a device. FLOP/s are of dense
bfloat16 products. What joins chips is published as the sum of both directions; a chip receives by
half of it.
"""

from __future__ import annotations

import dataclasses

from .program import Work


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      name: as it is known.
      flops: peak FLOP/s of dense products of bfloat16, summed in float32.
      memory: bytes.
      bandwidth: bytes a second between memory and chip.
      links: bytes a second between chips, both directions together.
      joined: how many chips these links join; beyond, a slower network does.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    joined: int


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Lower bounds of a step's time on a chip.

    Attributes:
      compute: all products at the peak rate.
      memory: operands and results of the products, between memory and chip.
      links: what the collectives bring from other chips; None beyond those that are joined.
    """

    compute: float
    memory: float
    links: float | None

    @property
    def limit(self) -> str:
        """What takes longest: compute, memory or links."""
        return max(self._each, key=self._each.__getitem__)

    @property
    def overlapped(self) -> float:
        """A step's time where all three run at once: the longest of them."""
        return max(self._each.values())

    @property
    def serial(self) -> float:
        """A step's time where they follow one another: their sum."""
        return sum(self._each.values())

    @property
    def _each(self) -> dict[str, float]:
        each = {"compute": self.compute, "memory": self.memory, "links": self.links or 0.0}
        return each


GIB, GB, TB, TERA = 2**30, 1e9, 1e12, 1e12

CHIPS = (
    # https://cloud.google.com/tpu/docs/v5e
    Chip("TPU v5e", 197 * TERA, 16 * GIB, 819 * GB, 400 * GB, 256),
    # https://cloud.google.com/tpu/docs/v5p and https://cloud.google.com/tpu/docs/tpu7x: of 96 GiB
    # a program has 95.
    Chip("TPU v5p", 459 * TERA, 95 * GIB, 2765 * GB, 1200 * GB, 8960),
    # https://cloud.google.com/tpu/docs/v6e
    Chip("TPU v6e", 918 * TERA, 32 * GIB, 1638 * GB, 800 * GB, 256),
    # https://cloud.google.com/tpu/docs/tpu7x: a chip is two devices (2,307 TFLOP/s, 192 GiB,
    # 7,380 GB/s, 1,200 GB/s; pods of 9,216).
    Chip("TPU7x, a half", 1153.5 * TERA, 96 * GIB, 3690 * GB, 600 * GB, 18432),
    # SXM: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
    # nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; eight on an HGX board.
    Chip("A100 40 GB", 312 * TERA, 40 * GB, 1555 * GB, 600 * GB, 8),
    Chip("A100 80 GB", 312 * TERA, 80 * GB, 2039 * GB, 600 * GB, 8),
    # SXM: https://www.nvidia.com/en-us/data-center/h100/ (1,979 with sparsity)
    Chip("H100", 989.5 * TERA, 80 * GB, 3.35 * TB, 900 * GB, 8),
    # SXM: https://www.nvidia.com/en-us/data-center/h200/ (1,979 with sparsity)
    Chip("H200", 989.5 * TERA, 141 * GB, 4.8 * TB, 900 * GB, 8),
    # An eighth of https://www.nvidia.com/en-us/data-center/dgx-b200/ (72 PFLOP/s of FP8 with
    # sparsity, 1,440 GB, 64 TB/s, 14.4 TB/s), with bfloat16 at half of FP8's rate.
    Chip("B200", 2250 * TERA, 180 * GB, 8 * TB, 1800 * GB, 8),
)


def seconds(work: Work, chip: Chip, devices: int = 1) -> Seconds:
    """Returns how long a device's work takes on a chip at least.

    Args:
      work: of one device, in one step.
      chip: which.
      devices: of the mesh.

    >>> work = Work(flops=989.5e12, traffic=2.4e12, collectives={})
    >>> found = seconds(work, next(chip for chip in CHIPS if chip.name == "H200"))
    >>> found.compute, found.memory, found.limit, found.overlapped, found.serial
    (1.0, 0.5, 'compute', 1.0, 1.5)
    """
    links = work.received / (chip.links / 2) if devices <= chip.joined else None
    return Seconds(work.flops / chip.flops, work.traffic / chip.bandwidth, links)
