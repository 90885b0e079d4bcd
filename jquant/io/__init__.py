"""Files: jquant's own checkpoints, bit-exact and read with suspicion. See `jquant.io.native`."""

from jquant.io.native import Header, Stored, load, load_matching, read_header, save

__all__ = ["Header", "Stored", "load", "load_matching", "read_header", "save"]
