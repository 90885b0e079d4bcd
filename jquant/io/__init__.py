"""Files: jquant's own checkpoints, and ways from and into those of others.

`save` and `load` keep quantized trees bit-exact and are read with suspicion (`jquant.io.native`).
`plain` and `restore` go through the savers of others: Orbax, Flax, `numpy.savez`
(`jquant.io.plain`). `lazy_orbax` opens what Orbax wrote without reading it. Importing this also
lets `jax.export` write programs on quantized weights (`jquant.io.exported`).
"""

from jquant.io import exported as _exported  # noqa: F401  (tells JAX how to write the weights)
from jquant.io.native import Header, Stored, load, load_matching, read_header, save
from jquant.io.orbax import lazy_orbax
from jquant.io.placing import place
from jquant.io.plain import plain, restore

__all__ = [
    "Header",
    "Stored",
    "lazy_orbax",
    "load",
    "load_matching",
    "place",
    "plain",
    "read_header",
    "restore",
    "save",
]
