"""Exchange: pytrees of updates in few bits, from many to one.

`compress` puts a tree on a grid by stochastic rounding, in groups, and `decompress` gives it back,
with itself as its mean; `with_feedback` keeps what was lost for the next round; `to_bytes` and
`from_bytes` are the form that is sent, of a size by formula and with a checksum; `average` is what
a server does with the packets of its clients. For federated learning, data-parallel gradients, and
whatever else is sent often and summed.
"""

from jquant.exchange.averaging import average
from jquant.exchange.feedback import with_feedback
from jquant.exchange.packet import Packet, compress, decompress
from jquant.exchange.wire import OVERHEAD, from_bytes, to_bytes, wire_bytes

__all__ = [
    "OVERHEAD",
    "Packet",
    "average",
    "compress",
    "decompress",
    "from_bytes",
    "to_bytes",
    "wire_bytes",
    "with_feedback",
]
