"""How the multiprocessors of a GPU are split, read off the grids of its kernels.

Communication kernels and persistent products are launched with one block for each multiprocessor
(SM) that they are to have, so their grids tell the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .classify import Class
from .kernel_table import COMMUNICATION, GEMM
from .pieces import is_waiting
from .report import SmSplit
from .trace import Activity

# Of the time of products whose grid fits the GPU, a grid needs this share to count: small products
# have any number of blocks, but those that fill the GPU take most of the time.
_SHARE = 0.1


def sm_split(
    num_sms: int | None, activities: Iterable[Activity], classes: Mapping[str, Class]
) -> SmSplit:
    """How many SMs communication and computation have.

    For communication, the blocks under which its kernels that transfer ran longest; for
    computation, the largest grid up to `num_sms` under which products ran for a tenth of their
    time or more.
    """
    comm: dict[int, int] = {}
    transfer: dict[int, int] = {}
    products: dict[int, int] = {}
    for activity in activities:
        if activity.grid is None:
            continue
        x, y, z = activity.grid
        blocks, time = x * y * z, activity.end - activity.start
        known = classes[activity.name]
        if known.group == COMMUNICATION:
            comm[blocks] = comm.get(blocks, 0) + time
            if not is_waiting(known):
                transfer[blocks] = transfer.get(blocks, 0) + time
        elif known.role == GEMM and (num_sms is None or blocks <= num_sms):
            products[blocks] = products.get(blocks, 0) + time
    longest = transfer or comm
    blocks = max(longest, key=lambda count: (longest[count], count)) if longest else None
    enough = _SHARE * sum(products.values())
    wide = [count for count, time in products.items() if time >= enough]
    return SmSplit(
        num_sms=num_sms,
        comm=blocks,
        # Without the number of SMs nothing tells a persistent grid from any other.
        compute=max(wide, default=None) if num_sms is not None else None,
        comm_ns=comm[blocks] if blocks is not None else 0,
    )
