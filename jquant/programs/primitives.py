"""What JAX's primitives are to whoever follows values through a program: one row for each.

A row names the traits of a primitive, and `having` gives the primitives of a trait. A primitive of
no row has none: nothing is followed through it, and it is thought cheap. The traits:

* `identity`: one array in, the same out; of several operands, each for itself.
* `view`: the numbers of one array, or a window of them, in another order or shape.
* `elementwise`: acts on every element by itself, on arrays of one shape.
* `complex`: likewise, but makes complex numbers, of which no second moment is gathered.
* `linear`: elementwise, and a product of parameters is one after it if all operands are made of
  parameters.
* `join`: adds two values, as a residual stream does.
* `cast`: one array in, all of its numbers out in another shape or type.
* `layerwise`: acts on each layer of a stack alone, whatever its size.
* `beside`: puts arrays beside one another.
* `running`: along one axis each entry is made of those before it, in their order.
* `reduction`: axes are added up, or chosen from.
* `product`: a weight may be contracted with an input.
* `lookup`: parts of an array, picked by an index.
* `source`: numbers out of nothing, or out of a key.
* `loop`: a loop or branch, with bodies of its own.
* `heavy`: too much work to be done again where its result is needed twice.
"""

from __future__ import annotations

_TABLE = """
abs                     elementwise
acos                    elementwise
acosh                   elementwise
add                     elementwise linear join
add_any                 elementwise linear join
and                     elementwise
argmax                  reduction
argmin                  reduction
asin                    elementwise
asinh                   elementwise
atan                    elementwise
atan2                   elementwise
atanh                   elementwise
broadcast_in_dim        view cast
cbrt                    elementwise
ceil                    elementwise
cholesky                heavy
clamp                   elementwise
clz                     elementwise
complex                 complex
concatenate             beside
cond                    loop heavy
conj                    complex
conv_general_dilated    product heavy
convert_element_type    elementwise linear cast layerwise
copy                    identity layerwise
copy_p                  identity layerwise
cos                     elementwise
cosh                    elementwise
cumlogsumexp            running
cummax                  running
cummin                  running
cumprod                 running
cumsum                  running
device_put              identity
digamma                 elementwise
div                     elementwise linear
dot_general             product heavy
dynamic_slice           lookup
dynamic_update_slice    beside
eq                      elementwise
eq_to                   elementwise
erf                     elementwise
erf_inv                 elementwise
erfc                    elementwise
exp                     elementwise
exp2                    elementwise
expm1                   elementwise
fft                     heavy
floor                   elementwise
gather                  lookup heavy
ge                      elementwise
gt                      elementwise
imag                    elementwise
integer_pow             elementwise
iota                    source
is_finite               elementwise
le                      elementwise
le_to                   elementwise
lgamma                  elementwise
log                     elementwise
log1p                   elementwise
logistic                elementwise
lt                      elementwise
lt_to                   elementwise
max                     elementwise
mesh_cast               identity
min                     elementwise
mul                     elementwise linear
name                    identity
ne                      elementwise
neg                     elementwise linear
nextafter               elementwise
not                     elementwise
optimization_barrier    identity
or                      elementwise
pad                     beside
pcast                   identity
population_count        elementwise
pow                     elementwise
pvary                   identity
ragged_dot              product heavy
ragged_dot_general      product heavy
random_bits             source
random_clone            source
random_fold_in          source
random_seed             source
random_split            source
random_unwrap           source
random_wrap             source
real                    elementwise
reduce_and              reduction
reduce_max              reduction
reduce_min              reduction
reduce_or               reduction
reduce_precision        identity layerwise
reduce_prod             reduction
reduce_sum              reduction
reduce_xor              reduction
rem                     elementwise
reshape                 view cast
reshard                 identity
rev                     view
round                   elementwise
rsqrt                   elementwise
scan                    loop heavy
scatter                 heavy
scatter-add             heavy
select_n                elementwise linear
sharding_constraint     identity
shift_left              elementwise
shift_right_arithmetic  elementwise
shift_right_logical     elementwise
sign                    elementwise
sin                     elementwise
sinh                    elementwise
slice                   view
sort                    heavy
split                   view
sqrt                    elementwise
square                  elementwise
squeeze                 view cast layerwise
stack                   beside
stop_gradient           identity layerwise
sub                     elementwise linear join
tan                     elementwise
tanh                    elementwise
tile                    view
transpose               view cast layerwise
triangular_solve        heavy
unstack                 view
while                   loop heavy
xor                     elementwise
"""

_ROWS = [line.split() for line in _TABLE.strip().splitlines()]
_TRAITS = {
    trait: frozenset(name for name, *own in _ROWS if trait in own)
    for trait in {trait for _, *own in _ROWS for trait in own}
}


def having(trait: str) -> frozenset[str]:
    """The names of the primitives that have a trait.

    Raises:
        KeyError: no primitive has it.

    Example:
        >>> sorted(having("loop")), "conv_general_dilated" in having("product")
        (['cond', 'scan', 'while'], True)
    """
    return _TRAITS[trait]
