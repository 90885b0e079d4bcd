"""Where a weight's axes lie: layouts, groups of inputs, parts that indexing leaves."""

from jquant.axes.groups import Blocks
from jquant.axes.layout import Layout

__all__ = ["Blocks", "Layout"]
