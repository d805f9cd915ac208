"""The loop over blocks holds no more than a block needs."""

import weakref
from contextlib import nullcontext

from toolkit.lockstep.driver import march_through


class Step:
    """Stands for the states of a batch."""


class Marching:
    """One block of two steps."""

    def layers(self):
        yield 0

    def resident(self, layer):
        return nullcontext()

    def steps(self, layer):
        yield from (Step(), Step())

    def advance(self, layer, adapters):
        self.advanced = adapters


class Listener:
    """Keeps of every step whether it is alive."""

    def __init__(self):
        self.seen = []

    def update(self, step):
        self.seen.append(weakref.ref(step))

    def start(self):
        pass

    def reduce(self, processes):
        pass


def test_no_step_is_alive_while_a_block_is_analysed():
    march, listener, alive = Marching(), Listener(), []

    def conclude(layer, listeners):
        alive.extend(seen() is not None for seen in listeners["only"].seen)
        return layer, "adapters"

    assert list(march_through(march, lambda layer: {"only": listener}, conclude)) == [0]
    assert alive == [False, False]
    assert march.advanced == "adapters"
