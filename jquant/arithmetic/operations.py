"""What the primitives of JAX are to rounding: `ACTIONS`, and a primitive without one is refused.

* `ARITHMETIC` computes: its results are rounded, each once, as IEEE 754 rounds an operation. What
  is one operation to XLA is one here, `exp`, `fft` and `cholesky` included.
* `CONVERSIONS` bring a number in from elsewhere: another dtype, an index.
* `MOVES` give back numbers they were given, or something as short: `select`, `max`, `floor`,
  `gather`. Bit casts are among them: whoever works on bits knows what for.

`SHIFTS` are moves that read a number at other places than where it is needed, see `once.py`;
`VIEWS` give an operand's numbers at their own place, and need it as they do themselves. `SUMS` are
those of arithmetic whose many partial results have an order here, see `sums.py`; those in
`UNORDERED` are sums too, in an order that is the compiler's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jax.extend import core

ARITHMETIC = frozenset(
    """
    add sub mul div rem pow integer_pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p log2
    sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh logistic erf erfc erf_inv
    lgamma digamma polygamma zeta igamma igammac igamma_grad_a random_gamma random_gamma_grad
    regularized_incomplete_beta bessel_i0e bessel_i1e nextafter add_any one_minus_square polynomial
    dot_general ragged_dot ragged_dot_general conv_general_dilated reduce_sum reduce_prod reduce
    cumsum cumprod cumlogsumexp reduce_window reduce_window_sum select_and_scatter_add
    scatter-add scatter-mul scatter-sub scatter_add scatter_mul scatter_sub psum psum_invariant
    fft cholesky lu qr eig eigh svd schur hessenberg householder_product triangular_solve
    tridiagonal tridiagonal_solve
    """.split()
)
CONVERSIONS = frozenset({"convert_element_type", "reduce_precision", "iota", "rng_uniform"})
MOVES = frozenset(
    """
    neg abs sign floor ceil round max min clamp select_n real imag complex conj
    reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice dynamic_update_slice
    gather scatter scatter-min scatter-max scatter_min scatter_max concatenate pad rev split stack
    unstack tile sort top_k approx_top_k reduce_max reduce_min reduce_window_max reduce_window_min
    cummax cummin bitcast_convert_type copy copy_p empty empty2 device_put name stop_gradient
    optimization_barrier sharding_constraint layout_constraint reshard mesh_cast pvary pcast
    all_gather all_to_all ppermute pmax pmin ragged_all_to_all
    """.split()
)
SHIFTS = frozenset({"slice", "dynamic_slice", "gather", "concatenate", "pad", "rev"})
VIEWS = frozenset({"neg", "abs", "reshape", "transpose", "broadcast_in_dim", "squeeze"})
SUMS = frozenset({"dot_general", "reduce_sum", "reduce_prod", "cumsum", "cumprod"})
UNORDERED = frozenset(
    """
    ragged_dot ragged_dot_general conv_general_dilated reduce cumlogsumexp reduce_window
    reduce_window_sum select_and_scatter_add scatter-add scatter-mul scatter-sub scatter_add
    scatter_mul scatter_sub psum psum_invariant
    """.split()
)
COMPLEX = frozenset({"abs", "sign"})  # moves of real numbers, arithmetic of complex ones

ACTIONS = {
    **dict.fromkeys(ARITHMETIC, "round"),
    **dict.fromkeys(CONVERSIONS, "convert"),
    **dict.fromkeys(MOVES, "leave"),
}


class Operation(NamedTuple):
    """What a rule for formats is asked about.

    Attributes:
        primitive: its name in a jaxpr; of what the program is given, "input" or "constant".
        dtype: of the result, "float32".
        scope: the `jax.named_scope`s it stands in, joined by "/".
    """

    primitive: str
    dtype: str
    scope: str = ""

    def matches(self, expression: re.Pattern[str]) -> bool:
        """Whether it is the whole of the primitive, of the dtype, or of `scope/primitive`."""
        path = f"{self.scope}/{self.primitive}" if self.scope else self.primitive
        return any(expression.fullmatch(name) for name in (self.primitive, self.dtype, path))


def scope(within: tuple[core.JaxprEqn, ...]) -> str:
    """The named scopes of the last of these equations, the others being those that enclose it."""
    names = (str(eqn.source_info.name_stack) for eqn in within)
    return "/".join(name for name in names if name)
