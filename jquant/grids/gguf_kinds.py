"""GGUF's block types as numbers: bits, sizes of groups, levels of scales. See `grids/gguf.py`."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A block type.

    Attributes:
        bits: of a code.
        group: weights that share a scale.
        together: groups that share a float16 scale, a super-block.
        scale_codes: the least and the largest integer that the float16 scale is multiplied by;
            None: the scale is a float16 number itself.
        scale_dtype: of these integers.
        has_offset: whether something is subtracted; codes are then from 0, else on both sides of 0.
    """

    bits: int
    group: int
    together: int = 1
    scale_codes: tuple[int, int] | None = None
    scale_dtype: str = ""
    has_offset: bool = True

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code, both included."""
        half = 2 ** (self.bits - 1)
        return (0, 2 * half - 1) if self.has_offset else (-half, half - 1)


KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 32, has_offset=False),
    "Q5_0": Kind(5, 32, has_offset=False),
    "Q8_0": Kind(8, 32, has_offset=False),
    "Q4_1": Kind(4, 32),
    "Q5_1": Kind(5, 32),
    "Q2_K": Kind(2, 16, 16, (0, 15), "uint4"),
    "Q3_K": Kind(3, 16, 16, (-32, 31), "int8", has_offset=False),
    "Q4_K": Kind(4, 32, 8, (0, 63), "uint8"),
    "Q5_K": Kind(5, 32, 8, (0, 63), "uint8"),
    "Q6_K": Kind(6, 16, 16, (-128, 127), "int8", has_offset=False),
}
