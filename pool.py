"""Chunks of work over all cores, in order, with few of them in memory at a time.

Workers are forked, so that a tokenizer or a table is theirs without being copied; where a system cannot fork, or for little
work, everything runs here. A worker that dies or hangs is told with the rows it had. Leaves out: anything about what is done.
"""
import collections
import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

HANG_SECONDS = 600  # a chunk takes well under a second


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(items, size):
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


_work = None  # what the workers do, inherited when they are forked


def _call(chunk):
    return _work(chunk)


def _begin():
    """In a worker: Ctrl-C is the parent's to handle, and where the parent is killed the worker goes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def ordered(function, work, workers=0):
    """function(chunk) for each chunk of the iterator `work`, in its order, by `workers` processes (0: one a core).

    At most three chunks a worker are under way. The first two chunks are done here: little work starts no process. Raises what
    `function` raises, and ValueError where a worker dies or takes HANG_SECONDS over a chunk (a list of (name, ...) rows).
    """
    global _work
    work = iter(work)
    for chunk in islice(work, 2):
        yield function(chunk)
    workers = workers or cores()
    if workers < 2 or sys.platform != "linux":
        yield from map(function, work)
        return
    first = next(work, None)
    if first is None:
        return
    _work, under_way = function, collections.deque()
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=_begin)
    try:
        for chunk in (chunk for part in ([first], work) for chunk in part):
            under_way.append((chunk[0][0], chunk[-1][0], executor.submit(_call, chunk)))
            if len(under_way) >= 3 * workers:
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())
    finally:
        _work = None
        for process in list((executor._processes or {}).values()):
            if sys.exc_info()[0] is not None:  # an error here, or nobody wants the rest: a hanging worker would be waited for
                process.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def _result(entry):
    first, last, future = entry
    try:
        return future.result(HANG_SECONDS)
    except TimeoutError:
        raise ValueError(f"a worker took more than {HANG_SECONDS} s over the rows {first} to {last}; look at them, or leave them "
                         "out") from None
    except BrokenProcessPool:
        raise ValueError(f"a worker died over the rows {first} to {last} or those just before: killed from outside, or out of memory; "
                         "look at them, or run with more memory") from None
