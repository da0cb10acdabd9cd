#!/usr/bin/env python3
"""The card made of software refuses work of two streams on the same memory that is not in order: tests/card/test_order.py FOLDER"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

OUT_OF_ORDER = 700  # CUDA_ERROR_ILLEGAL_ADDRESS, which is all that a driver would say
BYTES = 1 << 20


class Card:
    """The driver's calls that matter here, with two streams."""

    def __init__(self, folder: str) -> None:
        self.driver = ctypes.CDLL(f"{folder}/libcuda.so.1")
        context = ctypes.c_void_p()
        assert self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert self.driver.cuCtxSetCurrent(context) == 0
        self.one, self.other = self.made("cuStreamCreate", 0), self.made("cuStreamCreate", 0)

    def made(self, call: str, *more: object) -> ctypes.c_void_p:
        new = ctypes.c_void_p()
        assert getattr(self.driver, call)(ctypes.byref(new), *more) == 0, call
        return new

    def memory(self) -> ctypes.c_void_p:
        return self.made("cuMemAllocAsync", ctypes.c_size_t(BYTES), self.one)

    def locked(self) -> ctypes.c_void_p:
        return self.made("cuMemHostAlloc", ctypes.c_size_t(BYTES), 0)

    def event(self, stream: ctypes.c_void_p) -> ctypes.c_void_p:
        event = self.made("cuEventCreate", 2)
        assert self.driver.cuEventRecord(event, stream) == 0
        return event

    def order(self, first: ctypes.c_void_p, then: ctypes.c_void_p) -> None:
        assert self.driver.cuStreamWaitEvent(then, self.event(first), 0) == 0

    def set(self, memory: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        return self.driver.cuMemsetD8Async(memory, 7, ctypes.c_size_t(BYTES), stream)

    def send(self, memory: ctypes.c_void_p, source: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        return self.driver.cuMemcpyHtoDAsync_v2(memory, source, ctypes.c_size_t(BYTES), stream)

    def written(self) -> ctypes.c_void_p:
        """Memory of one stream's that the other, in order, has written last."""
        memory = self.memory()
        self.order(self.one, self.other)
        assert self.set(memory, self.other) == 0
        return memory

    def fetch(self, memory: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        return self.driver.cuMemcpyDtoHAsync_v2(ctypes.create_string_buffer(BYTES), memory, ctypes.c_size_t(BYTES), stream)


def fresh_memory(card: Card, ordered: bool) -> int:
    memory = card.memory()
    if ordered:
        card.order(card.one, card.other)
    return card.set(memory, card.other)


def written_then_read(card: Card, ordered: bool) -> int:
    memory = card.written()
    if ordered:
        card.order(card.other, card.one)
    return card.fetch(memory, card.one)


def freed_while_used(card: Card, ordered: bool) -> int:
    memory = card.written()
    if ordered:
        assert card.driver.cuStreamSynchronize(card.other) == 0
    return card.driver.cuMemFreeAsync(memory, card.one)


def an_event_of_before(card: Card, ordered: bool) -> int:
    """What is waited for is what the stream was asked for when the event was recorded, not later work."""
    memory = card.memory()
    card.order(card.one, card.other)
    early = card.event(card.other)
    assert card.set(memory, card.other) == 0
    late = card.event(card.other)
    assert card.driver.cuStreamWaitEvent(card.one, late if ordered else early, 0) == 0
    return card.set(memory, card.one)


def locked_memory_freed(card: Card, ordered: bool) -> int:
    memory, source = card.memory(), card.locked()
    assert card.send(memory, source, card.one) == 0
    if ordered:
        assert card.driver.cuEventSynchronize(card.event(card.one)) == 0
    return card.driver.cuMemFreeHost(source)


def locked_memory_written(card: Card, ordered: bool) -> int:
    memory, source = card.memory(), card.locked()
    assert card.send(memory, source, card.one) == 0
    if ordered:
        assert card.driver.cuStreamSynchronize(card.one) == 0
    ctypes.memset(source, 1, BYTES)
    return 0


def outcome(case, folder: str, ordered: bool) -> int:
    """What a process of its own ends with: a card that was used wrongly is of no more use."""
    process = os.fork()
    if process == 0:
        code = 2
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = {0: 0, OUT_OF_ORDER: 1}.get(case(Card(folder), ordered), 2)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for case in (fresh_memory, written_then_read, freed_while_used, an_event_of_before, locked_memory_freed, locked_memory_written):
        refused = -signal.SIGSEGV if case is locked_memory_written else 1
        for ordered, expected in ((True, 0), (False, refused)):
            got = outcome(case, sys.argv[1], ordered)
            assert got == expected, f"{case.__name__}, {'in' if ordered else 'not in'} order: {got}"
    print("work that is not in order is refused")


main()
