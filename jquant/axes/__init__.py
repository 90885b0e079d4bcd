"""Where a weight's axes lie: layouts, groups of inputs, parts that indexing leaves."""

from functools import partial

from jquant import deprecated
from jquant.axes.groups import Groups
from jquant.axes.layout import Layout

__all__ = ["Groups", "Layout"]

__getattr__ = partial(deprecated.attribute, __name__)
