"""The arena: no two rooms overlap, what is let go of comes back, and only that."""

from __future__ import annotations

import gc
import itertools
import random
import resource
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from millrace.core.errors import UsageError
from millrace.feed.arena import Arena, Room, room_bytes

GRAIN = room_bytes(1)


class Tenancy(RuleBasedStateMachine):
    """Rooms are taken, viewed and let go of in any order; each holder's bytes stay as it wrote them."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(40 * GRAIN)
        self.rooms: dict[int, tuple[Any, int, int]] = {}  # holder's array, what it wrote, what it takes of the arena
        self.number = 0

    @rule(target=held, size=st.integers(1, 9 * GRAIN))
    def take(self, size: int) -> Any:
        try:
            room = self.arena.take(size)
        except UsageError:
            taken = sum(t for _, _, t in self.rooms.values())
            assert taken + room_bytes(size) > 40 * GRAIN or len(self.rooms) > 1  # full, or in pieces
            return multiple()
        assert len(room.bytes) == size
        assert room.offset % GRAIN == 0
        assert room.bytes.ctypes.data == self.arena.address + room.offset
        return self.keep(room.bytes, room.taken)

    def keep(self, data: Any, taken: int) -> int:
        self.number += 1
        data[:1], data[-1:] = self.number % 251, self.number % 251
        self.rooms[self.number] = (data, self.number % 251, taken)
        return self.number

    @rule(key=held, data=st.data())
    def view(self, key: int, data: st.DataObject) -> None:
        """Whoever holds a view holds the room."""
        if key in self.rooms:
            array, value, taken = self.rooms[key]
            narrow = array[: data.draw(st.integers(1, len(array)))]
            narrow[-1] = value
            self.rooms[key] = (np.asarray(memoryview(narrow)), value, taken)

    @rule(key=consumes(held))
    def drop(self, key: int) -> None:
        self.rooms.pop(key, None)

    @rule(key=consumes(held))
    def drop_in_a_cycle(self, key: int) -> None:
        """Then it is the collector that gives it back, whenever it comes by."""
        cycle: list[Any] = [self.rooms.pop(key, None)]
        cycle.append(cycle)
        del cycle
        gc.collect(1)

    @rule()
    def trim(self) -> None:
        self.arena.trim()

    @invariant()
    def nothing_was_written_over_or_lost(self) -> None:
        for data, value, _ in self.rooms.values():
            assert data[0] == data[-1] == value
        places = sorted((d.__array_interface__["data"][0], t) for d, _, t in self.rooms.values())
        for (a, taken), (b, _) in itertools.pairwise(places):
            assert a + taken <= b
        assert self.arena.used_bytes == sum(t for _, _, t in self.rooms.values())

    def teardown(self) -> None:
        self.rooms.clear()
        assert self.arena.used_bytes == 0
        assert len(self.arena.take(40 * GRAIN).bytes) == 40 * GRAIN  # in one piece


Tenancy.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_tenancy = Tenancy.TestCase


def test_threads_share_it() -> None:
    arena = Arena(256 * GRAIN)
    wrong: list[str] = []

    def tenant(number: int) -> None:
        dice = random.Random(number)
        rooms: list[Room] = []
        for _ in range(300):
            rooms.append(arena.take(dice.randint(1, 3 * GRAIN)))
            rooms[-1].bytes[:] = number
            if len(rooms) > 4:
                room = rooms.pop(dice.randrange(4))
                if not (room.bytes == number).all():
                    wrong.append(f"thread {number} found another's bytes")

    threads = [threading.Thread(target=tenant, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena.used_bytes == 0


def test_the_collector_gives_rooms_back_in_the_middle_of_taking_one() -> None:
    """It runs where memory is allocated: inside of take() too, in the same thread."""
    arena = Arena(64 * GRAIN)
    dice = random.Random(1)
    kept: list[Room] = []
    before = gc.get_threshold()
    gc.set_threshold(1)  # at nearly every allocation
    try:
        for n in range(2000):
            room = arena.take(dice.randint(1, 3) * GRAIN)
            room.bytes[:] = n % 251
            if dice.random() < 0.7:
                cycle: list[Any] = [room]
                cycle.append(cycle)
                del cycle
            else:
                kept.append(room)
                assert (kept[0].bytes == kept[0].bytes[0]).all()
                del kept[:-5]
            del room
    finally:
        gc.set_threshold(*before)
    places = sorted((k.offset, k.taken) for k in kept)
    for (a, taken), (b, _) in itertools.pairwise(places):
        assert a + taken <= b
    kept.clear()
    gc.collect()
    assert arena.used_bytes == 0


def test_it_is_used_from_the_low_end() -> None:
    arena = Arena(1000 * GRAIN)
    rooms = [arena.take(5) for _ in range(10)]
    rooms[3:5] = []
    assert arena.take(2 * GRAIN).offset == 3 * GRAIN


def test_when_it_is_full_it_says_what_to_do() -> None:
    arena = Arena(2 * GRAIN)
    kept = arena.take(GRAIN)
    with pytest.raises(UsageError, match=r"no room for a block of 131 KB beside the 65.5 KB in use; .*memory="):
        arena.take(2 * GRAIN)
    del kept
    arena.take(2 * GRAIN)


def test_items_begin_at_every_byte() -> None:
    arena = Arena(GRAIN)
    room = arena.take(100)
    room.bytes[:] = np.arange(100)
    words = arena.strided(np.dtype(np.uint16))
    assert len(words) == GRAIN - 1
    assert words[[0, 1, 7]].tolist() == [0x0100, 0x0201, 0x0807]


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    arena = Arena(4 * 2**20)
    kept = arena.take(2**20)
    kept.bytes[:] = 7
    arena.take(2**20).bytes[:] = 8
    arena.trim()
    assert (kept.bytes == 7).all()
    assert (arena.bytes[2**20 : 2 * 2**20] == 0).all()


def test_views_outlive_the_arena() -> None:
    arena = Arena(2**20)
    view = arena.take(1000).bytes[10:20]
    view[:] = 5
    del arena
    gc.collect()
    assert view.tolist() == [5] * 10


LIMITED = """
import resource
from millrace.core.errors import UsageError
from millrace.feed.arena import Arena
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
print(len(Arena(2**40, 2**20).bytes))
try:
    Arena(2**40, 2**39)
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_a_limit_of_address_space_is_lived_with() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    code = LIMITED.format(limit=4 * 2**30 + used)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    size, error = done.stdout.splitlines()
    assert 2**20 <= int(size) < 2**33
    assert error.startswith("the system grants no 550 GB of address space for blocks (")
    assert "ulimit -v" in error
