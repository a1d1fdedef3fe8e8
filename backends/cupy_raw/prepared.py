"""A kernel launch that is ready but for its addresses.

Arguments are packed once with marks where addresses go; a call fills the addresses in. So the
layout of an argument is told in one place, where it is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from struct import Struct

Launch = Callable[[int, Sequence[int]], None]  # on a stream, with these addresses

_FIRST_MARK = 0xA5C3_96E1_0000_0001  # no address, and as a stride or a size beyond any memory
_ADDRESS = Struct("<Q")


def marks(count: int) -> tuple[int, ...]:
    """Return `count` numbers that stand for addresses in arguments packed for a `Template`."""
    return tuple(range(_FIRST_MARK, _FIRST_MARK + count))


class Template:
    """Arguments of a kernel with holes for addresses.

    >>> first, second = marks(2)
    >>> packing = Struct("<QiiQ")
    >>> template = Template(packing.pack(second, 1, 2, first), 2)
    >>> packing.unpack(template.fill((7, 8)))
    (8, 1, 2, 7)

    Parameters
    ----------
    packed : bytes
        Arguments packed with the first `slots` `marks`, each any number of times.
    slots : int
        How many addresses `fill` will be given.
    """

    __slots__ = ("_pack", "_pick", "_rest")

    def __init__(self, packed: bytes, slots: int) -> None:
        holes: list[tuple[int, int]] = []  # (offset, slot)
        for slot, mark in enumerate(marks(slots)):
            value = _ADDRESS.pack(mark)
            offset = packed.find(value)
            while offset >= 0:
                holes.append((offset, slot))
                offset = packed.find(value, offset + len(value))
        holes.sort()
        if len(holes) < 2:  # `itemgetter` of one gives no tuple
            raise ValueError(f"a kernel's arguments need two addresses or more, got {len(holes)}")
        form, at = ["<"], 0
        rest: list[bytes | int] = []
        for offset, _ in holes:
            form.append(f"{offset - at}sQ")
            rest += [packed[at:offset], 0]
            at = offset + _ADDRESS.size
        form.append(f"{len(packed) - at}s")
        rest.append(packed[at:])
        self._pack = Struct("".join(form)).pack
        self._pick = itemgetter(*(slot for _, slot in holes))
        self._rest = rest

    def fill(self, addresses: Sequence[int]) -> bytes:
        """Return the arguments with `addresses` in the holes."""
        fields = self._rest.copy()
        fields[1::2] = self._pick(addresses)
        return self._pack(*fields)

    def bind(self, enqueue: Callable[[int, bytes], None]) -> Launch:
        """Return `enqueue`, a kernel's bound launch, that takes addresses in place of arguments."""
        pack, pick, rest = self._pack, self._pick, self._rest

        def launch(stream: int, addresses: Sequence[int]) -> None:
            fields = rest.copy()  # `fill`, without a call of it
            fields[1::2] = pick(addresses)
            enqueue(stream, pack(*fields))

        return launch
