"""LoRC: a low-rank term beside the codes, that makes up for a part of what rounding has lost.

With `E = W - Q` what is left after any rounding, `U_r` the r leading left singular vectors of `E S`
and `S` a root of the metric, `S Sᵀ = H`, the term

    L = U_r U_rᵀ E = left @ right        minimises  ‖(E - L) S‖² = tr((E - L) H (E - L)ᵀ)

over all terms of rank r (Eckart and Young), and leaves `Σ_{i>r} σ_i²` of it. By Frobenius,
`S = I`, this is LoRC (ZeroQuant-V2, Yao et al. 2023): `left = U_r Σ^½`, `right = Σ^½ V_rᵀ`. With
`H = Σ x xᵀ` over the inputs it is QERA's closed form `SVD_r(E H^½) H^-½` (Zhang et al. 2024; EoRA,
Liu et al. 2024): it minimises the error of the outputs. No inverse of `S` is needed, since
`Σ_r V_rᵀ S⁻¹ = U_rᵀ E`, so moments may be singular.

    S = D^½ Q Λ^½,    D = diag(H),    Q Λ Qᵀ = D^-½ H D^-½    (scales of inputs taken out first)

Entries of Λ below `CUTOFF` times its largest are raised to that, and entries of D below `CUTOFF`
times its mean: inputs never seen count that little, but they count. Both are what float32 can tell
from zero.

*What it is worth.* Nearest codes leave an error that is nearly white: of independent Gaussian 768 ×
768 weights, rank 8 takes away 4 % of the squared error in that metric, at 2 to 4 bits, per row
and in groups of 64, for bits that would pay for smaller groups. Real inputs are not white, so in
their metric it takes away more, and neither are the errors that GPTQ leaves. Compare at equal bytes
(`benchmarks/lorc.py`): with one scale per row smaller groups are the better buy beside GPTQ, in
groups of 64 the term is.

Static: the choice. Arrays: `LowRank`, the two factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout
from jquant.calibration.evidence import Evidence
from jquant.errors import EvidenceError, PlanError
from jquant.grids.base import Grid, code_dtype
from jquant.grids.grouped import Grouped
from jquant.numerics.narrow import as_dtype
from jquant.weights.qtensor import LowRank, QTensor

CUTOFF = 1e-6  # eight units of float32's relative precision: eigenvalues below are rounding errors
OVERSAMPLING = 8  # Halko, Martinsson & Tropp 2011, §4.2: 5 or 10
ITERATIONS = 4  # heuristic: they take 1 or 2, but the spectra of rounding errors are flat
LARGE = 1024  # heuristic: sides above which the decomposition is randomized

_DTYPES = ("float16", "bfloat16", "float32")
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LoRC:
    """A low-rank term that makes up for rounding, `Scheme(..., compensation=LoRC(rank))`.

    It runs after any rounding; where codes aim at another weight than the given one (GPTQ's
    corrections), it does too. `rank` more numbers are stored for every row and column.

    Without data it gains little: errors of nearest rounding are nearly white, and of those of
    Gaussian 768 × 768 weights rank 8 takes away 4 %. The large gains in ZeroQuant-V2 are at 2 and 3
    bits with one scale per row. Take `metric="hessian"` where there is data, and compare with
    smaller groups of the same size in bytes. SmolLM2 at 3 bits, KL on held-out text, without a
    term, by Frobenius, by the Hessian, with smaller groups: in groups of 64 nearest 1.22, 1.11,
    0.47, 1.10 and GPTQ 0.51, 0.34, 0.32, 0.46; with one scale per row GPTQ 1.38, 0.99, 0.96, 0.54.

    Args:
        rank: of the term, at least 1 and at most the shorter side of the weight. ZeroQuant-V2
            takes 8 and sees gains flatten from 4 on.
        factor_grid: what to round the factors to, with parameters per column of `left` and per row
            of `right` (in groups of the size that the grid's format fixes, if it does):
            `Uniform(8, symmetric=True)` loses nothing in ZeroQuant-V2. None: floats of `dtype`.
        metric: `"frobenius"` (default; LoRC's: the squared error of the weight; needs nothing), or
            `"hessian"` (QERA's: the squared error of its outputs; needs the second moment of its
            inputs).
        rounds: how often to round what the term leaves of the weight, and to compute the term anew
            (LoftQ, Li et al. 2023). Codes and term of the round with the least
            reported error are kept, by itself for each layer of a stack, so more rounds are never
            worse. 1 (default): round once.
        method: `"exact"` (singular value decomposition), `"randomized"` (range finder with 8 more
            columns and 4 power iterations, always with the same random numbers), or `"auto"`
            (default): randomized where both sides exceed 1024 and are four times what is looked
            for.
        dtype: of float factors, `"float16"` (default; 11 bits are plenty), `"bfloat16"` or
            `"float32"`. float16 loses digits below 6e-5 and overflows at 65504, so weights of
            unusual scale need another.

    Raises:
        ValueError: an argument is out of its set.

    Example:
        >>> from jquant.grids import Uniform
        >>> error = jnp.outer(jnp.arange(4.0), jnp.ones(3)) + 0.1 * jnp.eye(4, 3)
        >>> low = LoRC(1)(error)
        >>> low.left.shape, low.right.shape, low.left.dtype.name
        ((4, 1), (1, 3), 'float16')
        >>> float(jnp.abs(error - low.product()).max()) < 0.11
        True
        >>> LoRC(1, Uniform(8, symmetric=True))(error).left.codes.dtype.name
        'int8'

    References:
        Yao et al., ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive
        Study to Low Rank Compensation, 2023, https://arxiv.org/abs/2303.08302
        Zhang et al., QERA: an Analytical Framework for Quantization Error Reconstruction, 2024,
        https://arxiv.org/abs/2410.06040
        Liu et al., EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
        Approximation, 2024, https://arxiv.org/abs/2410.21271
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
        https://arxiv.org/abs/2310.08659
        Halko, Martinsson & Tropp, Finding Structure with Randomness: Probabilistic Algorithms for
        Constructing Approximate Matrix Decompositions, 2011, https://arxiv.org/abs/0909.4061
    """

    rank: int
    factor_grid: Grid | None = None
    metric: Literal["frobenius", "hessian"] = "frobenius"
    rounds: int = 1
    method: Literal["exact", "randomized", "auto"] = "auto"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", deprecated.current("LoRC.metric", self.metric))
        for name in ("rank", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"LoRC.{name} must be an int of at least 1, got {value!r}")
        if self.factor_grid is not None and not isinstance(self.factor_grid, Grid):
            raise ValueError(f"LoRC.factor_grid must be a grid or None, got {self.factor_grid!r}")
        for name, allowed in (
            ("metric", ("frobenius", "hessian")),
            ("method", ("exact", "randomized", "auto")),
            ("dtype", _DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"LoRC.{name} must be one of {allowed}, got {getattr(self, name)!r}"
                )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.metric == "frobenius" else frozenset({"moment"})

    @property
    def label(self) -> str:
        return f"LoRC {self.rank}"

    def check(self, grid: Grid, groups: Groups) -> None:
        """A low-rank term is of any grid and groups."""

    @property
    def papers(self) -> tuple[str, ...]:
        weighed = ("zhang2024qera", "liu2024eora") if self.metric == "hessian" else ()
        return ("yao2023zeroquantv2", *weighed, *(("li2023loftq",) if self.rounds > 1 else ()))

    def __call__(
        self,
        error: Float[Array, "*batch out in"],
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
    ) -> LowRank:
        """The term that is nearest to an error in the metric, with factors of balanced size.

        Args:
            error: what is to be made up for, `[*batch, out, in]`; arithmetic is float32.
            evidence: the second moment of the inputs, sum or mean; only for `metric="hessian"`.

        Returns:
            The factors `[*batch, out, rank]` and `[*batch, rank, in]`, as they are stored.

        Raises:
            PlanError: the rank is larger than the shorter side.
            EvidenceError: no second moment where the metric needs one, or one of another shape.
        """
        return _term(error, self._moment(error, evidence), self)

    def spectrum(
        self,
        error: Float[Array, "*batch out in"],
        evidence: Evidence | Float[Array, "*batch in in"] | None = None,
    ) -> Float[Array, "*batch rank"]:
        """What each further rank takes away of the squared error, falling: `σ_i²`.

        That error is `tr(E H Eᵀ)`, or by Frobenius `|E|²`.
        Arguments and errors are those of a call. Factors are taken as exact.

        Example:
            >>> LoRC(2).spectrum(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).tolist()
            [9.0, 4.0]
        """
        return _spectrum(error, self._moment(error, evidence), self)

    def _moment(
        self,
        error: Float[Array, "*batch out in"],
        evidence: Evidence | Float[Array, "*batch in in"] | None,
    ) -> Float[Array, "*batch in in"] | None:
        """The second moment that the metric is to be made of, checked."""
        *batch, out, width = error.shape
        if self.rank > min(out, width):
            raise PlanError(
                f"LoRC of rank {self.rank} on a weight of {out} × {width}: pass a rank of at most "
                f"{min(out, width)}"
            )
        if self.metric == "frobenius":
            return None
        moment = evidence.second_moment if isinstance(evidence, Evidence) else evidence
        if moment is None:
            raise EvidenceError(
                "LoRC(metric='hessian') needs the second moment of the inputs: pass evidence=, or "
                "metric='frobenius'"
            )
        if moment.shape != (*batch, width, width):
            raise EvidenceError(
                f"LoRC on a weight {error.shape} needs a second moment of shape "
                f"{(*batch, width, width)}, got {moment.shape}"
            )
        return moment


@partial(jax.jit, static_argnames="choice")
def _term(
    error: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    choice: LoRC,
) -> LowRank:
    error = error.astype(jnp.float32)
    left = _directions(error, moment, choice)[0]
    right = _matmul(jnp.swapaxes(left, -1, -2), error)
    size = jnp.sqrt(jnp.linalg.norm(right, axis=-1))
    left = left * size[..., None, :]
    right = right / jnp.where(size > 0, size, 1.0)[..., None]
    return LowRank(_stored(left, choice, "out"), _stored(right, choice, "in"))


@partial(jax.jit, static_argnames="choice")
def _spectrum(
    error: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    choice: LoRC,
) -> Float[Array, "*batch rank"]:
    return _directions(error.astype(jnp.float32), moment, choice)[1] ** 2


def _directions(
    error: Float[Array, "*batch out in"],
    moment: Float[Array, "*batch in in"] | None,
    choice: LoRC,
) -> tuple[Float[Array, "*batch out rank"], Float[Array, "*batch rank"]]:
    """The leading left singular vectors of `E S`, and the singular values."""
    weighed = error if moment is None else _matmul(error, root(moment.astype(jnp.float32)))
    sides, columns = min(error.shape[-2:]), choice.rank + OVERSAMPLING
    small = choice.method == "auto" and (sides <= LARGE or 4 * columns > sides)
    if choice.method == "exact" or small or columns >= sides:
        vectors, values = _left_vectors(weighed)
    else:
        span = _range(weighed, columns)
        inner, values = _left_vectors(_matmul(jnp.swapaxes(span, -1, -2), weighed))
        vectors = _matmul(span, inner)
    return vectors[..., : choice.rank], values[..., : choice.rank]


def _left_vectors(
    a: Float[Array, "*batch m n"],
) -> tuple[Float[Array, "*batch m k"], Float[Array, "*batch k"]]:
    """Left singular vectors and singular values; of a wide matrix those of its triangle.

    With `a = L Qᵀ` they are those of L: eight times faster for 576 × 1536 on a CPU.
    """
    if a.shape[-2] < a.shape[-1]:
        a = jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(a, -1, -2), mode="r"), -1, -2)
    vectors, values, _ = jnp.linalg.svd(a, full_matrices=False)
    return vectors, values


def root(moment: Float[Array, "*batch in in"]) -> Float[Array, "*batch in in"]:
    """`S` with `S Sᵀ` the second moment, small eigenvalues raised; see the module.

    Example:
        >>> root(jnp.diag(jnp.array([4.0, 9.0]))).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    power = jnp.maximum(jnp.diagonal(moment, axis1=-2, axis2=-1), 0.0)
    mean = jnp.mean(power, axis=-1, keepdims=True)
    least = jnp.where(mean > 0, CUTOFF * mean, 1.0)  # of inputs that are all dead: any will do
    scale = jnp.sqrt(jnp.maximum(power, least))
    even = moment / (scale[..., :, None] * scale[..., None, :])
    unit = jnp.eye(moment.shape[-1], dtype=bool)
    even = jnp.where(unit, 1.0, (even + jnp.swapaxes(even, -1, -2)) / 2)
    values, vectors = jnp.linalg.eigh(even)
    values = jnp.maximum(values, CUTOFF * values[..., -1:])
    return scale[..., :, None] * vectors * jnp.sqrt(values)[..., None, :]


def _range(a: Float[Array, "*batch m n"], columns: int) -> Float[Array, "*batch m k"]:
    """An orthonormal basis that holds most of the range of a matrix (Halko et al., algorithm 4.4).

    The sketch is the same Gaussian matrix for every weight of a width: results are pure.
    """
    key = jax.random.key(0, impl="threefry2x32")
    sketch = jax.random.normal(key, (a.shape[-1], columns), jnp.float32)
    span = jnp.linalg.qr(_matmul(a, sketch))[0]
    for _ in range(ITERATIONS):
        back = jnp.linalg.qr(_matmul(jnp.swapaxes(a, -1, -2), span))[0]
        span = jnp.linalg.qr(_matmul(a, back))[0]
    return span


def _stored(
    factor: Float[Array, "*batch a b"], choice: LoRC, axis: Literal["in", "out"]
) -> Float[Array, "*batch a b"] | QTensor:
    """A factor as it is stored; groups run along `axis`."""
    grid = choice.factor_grid
    if grid is None:
        return as_dtype(factor, choice.dtype)
    groups, rank = Groups(axis, getattr(grid, "group", None)), factor.ndim
    grouped = Grouped(grid, groups)
    params = grouped.fit(factor)
    codes = grouped.nearest(factor, params).astype(code_dtype(grid))
    layout = Layout.of(factor.shape, in_axes=(rank - 1,), batch_axes=tuple(range(rank - 2)))
    return QTensor(codes, dict(params), grid, groups, layout, jnp.dtype(jnp.float32))
