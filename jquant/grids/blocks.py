"""The two block formats by name: the microscaling grids of OCP, and NVIDIA's NVFP4.

Both are rows of `Float`: numbers, how their scales are stored, and how many weights have one.
"""

from __future__ import annotations

from jquant.grids.floating import Float
from jquant.grids.ranges import MSE, MinMax
from jquant.grids.scales import Rule
from jquant.numerics.formats import FORMATS

MX_FORMATS = ("E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "INT8")


def MX(
    format: str = "E2M1",
    *,
    scale_rule: Rule = "floor",
    macro: int | None = None,
    range: MinMax | MSE = MinMax(),
) -> Float:
    """The microscaling grid of OCP: numbers of `format`, a power of two per 32 of them.

    Args:
        format: "E2M1" (MXFP4), "E2M3", "E3M2" (MXFP6), "E4M3", "E5M2" (MXFP8) or "INT8" (MXINT8,
            codes -127 ... 127).
        scale_rule: see `Float`. "floor" is OCP's. For E2M1 "oas" has the smaller error.
        macro: see `Float`. Not of OCP's format: files and engines of MXFP4 have no place for it.
        range: see `Float`. `MSE()` can only lower a power of two: give it "ceil" to start from.

    Raises:
        ValueError: there is no such format.

    Example:
        >>> import jax.numpy as jnp
        >>> grid = MX()
        >>> params = grid.fit(jnp.array([[7.0, 0.3]]))
        >>> float(params["scale"][0]), grid.nearest(jnp.array([[7.0, 0.3]]), params).tolist()
        (1.0, [[7, 1]])
        >>> grid = MX(scale_rule="oas", macro=4)
        >>> params = grid.fit(jnp.array([[7.0, 0.3]]))  # 7 / 6 in 256ths, rounded up
        >>> grid.decode(grid.nearest(jnp.array([[7.0, 0.3]]), params), params).tolist()
        [[7.0078125, 0.583984375]]
    """
    if format not in MX_FORMATS:
        raise ValueError(f"MX.format must be one of {MX_FORMATS}, got {format!r}")
    numbers = FORMATS[format][:2]
    return Float(*numbers, scale="e8m0", scale_rule=scale_rule, macro=macro, range=range, group=32)


def NV(
    *, four_six: bool = False, range: MinMax | MSE = MinMax(), tensor_scale: bool = True
) -> Float:
    """NVIDIA's NVFP4: E2M1, an E4M3 scale per 16 of them, and a float32 scale per tensor.

    Args:
        four_six: see `Float`. Every reader of NVFP4 takes what it makes.
        range: see `Float`.
        tensor_scale: see `Float`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = NV().fit(jnp.array([[[2688.0, 0.0], [6.0, 3.0]]]))
        >>> params["scale"].tolist(), params["tensor"].tolist()
        ([[448.0, 1.0]], [[1.0]])
        >>> w = jnp.array([[[1536.0, 0.0], [6.0, 4.5]]])
        >>> for grid in (NV(), NV(four_six=True)):
        ...     params = grid.fit(w)
        ...     print(grid.decode(grid.nearest(w, params), params)[0, 1].tolist())
        [6.0, 4.0]
        [6.0, 4.5]
    """
    return Float(
        2, 1, scale="e4m3", four_six=four_six, range=range, group=16, tensor_scale=tensor_scale
    )
