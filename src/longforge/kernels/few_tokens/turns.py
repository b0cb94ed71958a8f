"""How threads share the phases of a step: work in units, taken one at a time, nobody waits for a start.

A step is a row of phases, each a number of units that may run in any order; a phase begins when all units of
the one before are done. Threads take units by counting up atomically, first those of their own share (so that
a share's weights stay in their core's cache), then what is left of the others'. One thread alone gets through
all phases, so a thread that comes late, or never, only makes the step slower.

me: int64 [4], a thread's own notes: its number, its phase, the share it takes from, units done in the phase.
turns: int64 [phases, threads + 1, 8], cleared before the step: units taken of each share, and units done; a
cache line each.
"""

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic

from longforge.kernels.numba_host import compiled

__all__ = ["clear", "take"]

intrinsic: Any = numba_intrinsic
PATIENCE = 100
"""Looks at a counter before the core is offered to another thread."""


def _element(context, builder, signature, args):
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _count_up(typingctx, counters, i, by):
    """Adds to counters[i] for all threads to see; what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _element(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def _look(typingctx, counters, i):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(_element(context, builder, signature, args), "acquire", 8)

    return types.int64(counters, types.int64), codegen


@intrinsic
def _offer_core(typingctx):
    """Lets another thread run, where the system has a word for it."""

    def codegen(context, builder, signature, args):
        if sys.platform != "win32":
            kind = ir.FunctionType(ir.IntType(32), [])
            found = builder.module.globals.get("sched_yield") or ir.Function(
                builder.module, kind, "sched_yield"
            )
            builder.call(found, [])
        return context.get_dummy_value()

    return types.void(), codegen


@compiled()
def clear(turns):
    """Before a step, by one thread. Apart, because numba makes a parallel region of an assignment."""
    flat = turns.reshape(-1)
    for i in range(len(flat)):
        flat[i] = 0


@compiled()
def take(turns, me, units):
    """The next unit of the phase; -1 when all of them are done, and the thread is in the next phase."""
    threads = turns.shape[1] - 1
    flat, base = turns.reshape(-1), me[1] * (threads + 1) * 8
    while me[2] < threads:
        share = (me[0] + me[2]) % threads
        first, end = units * share // threads, units * (share + 1) // threads
        if first < end:
            unit = first + _count_up(flat, base + share * 8, 1)
            if unit < end:
                me[3] += 1
                return unit
        me[2] += 1
    if me[3]:
        _count_up(flat, base + threads * 8, me[3])
    looks = 0
    while _look(flat, base + threads * 8) < units:
        looks += 1
        if looks > PATIENCE:
            _offer_core()
    me[1] += 1
    me[2] = me[3] = 0
    return -1
