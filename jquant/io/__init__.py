"""Files: jquant's own checkpoints, bit-exact and read with suspicion. See `jquant.io.native`."""

from jquant.io import exported as _exported  # noqa: F401  (tells JAX how to write the weights)
from jquant.io.native import Header, Stored, load, load_matching, read_header, save
from jquant.io.orbax import lazy_orbax

__all__ = ["Header", "Stored", "lazy_orbax", "load", "load_matching", "read_header", "save"]
