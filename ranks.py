"""Several processes that train as one: which of them this is, its share of a window, and what they tell each other.

    torchrun --standalone --nproc-per-node=2 train.py configs/approach1.json

torchrun starts the processes, names them in the environment, and ends the rest when one has died. torch.distributed carries
everything: NCCL what lies on GPUs, gloo what lies on the hosts. Each function below must be called by every rank at the same place.
Alone, without torchrun, they give back what they are given. A rank that the others wait for in vain ends them with `Lost`.
Leaves out: pipeline and tensor parallelism, and ranks that come and go during a run.
"""
import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

RANK, RANKS, ON_HOST = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
FIRST = RANK == 0  # the one that writes and speaks
PARTING = 2  # seconds that a rank stays for another one's sake, so that torchrun sees that one end first, and reports it
LOADING = 12 * 3600  # seconds that ranks wait while one of them makes the token cache; one that dies is noticed at once


class Lost(RuntimeError):
    """Another rank has died, or did not come in time."""


def start(wait):
    """Join the other ranks, which wait `wait` seconds for one of them at most. Returns the device of this one.

    All but the first are silent from here on, but for errors.
    """
    device = torch.device("cuda", ON_HOST) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if ON_HOST >= torch.cuda.device_count():
            raise ValueError(f"torchrun started rank {ON_HOST} on a host of {torch.cuda.device_count()} GPUs; lower --nproc-per-node")
        torch.cuda.set_device(device)
    if RANKS > 1 and not dist.is_initialized():
        with lost():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=wait))
            patient()
        if not FIRST:
            sys.stdout = open(os.devnull, "w")
    return device


@functools.cache
def patient():
    """The group in which ranks wait for one that loads."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=LOADING))


def finish():
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
        patient.cache_clear()


@contextlib.contextmanager
def lost():
    """Tell an error of torch.distributed inside the block as what it means."""
    try:
        yield
    except RuntimeError as error:
        raise as_lost(error) from error


def as_lost(error):
    """An error of torch.distributed as what it means."""
    reason = str(error).splitlines()[0].rpartition("] ")[2][:100]  # without the place in torch's own code
    return Lost(f"rank {RANK}: another rank has ended, and said why if it could, or did not come within train.rank_wait; "
                f"where there is a checkpoint, the newest is whole: go on from it with --resume ({reason})")


@contextlib.contextmanager
def one_first():
    """The block is run by one rank of each host, then by the others, which find what it made."""
    if RANKS > 1 and ON_HOST:
        with lost():
            dist.barrier(group=patient())
    yield
    if RANKS > 1 and not ON_HOST:
        with lost():
            dist.barrier(group=patient())


def all_here():
    """Wait for every rank, the first above all, which saves and writes: torchrun gives the others 30 seconds once one has ended."""
    if RANKS > 1:
        with lost():
            dist.barrier(group=patient())


def total(tensor):
    """The sum of `tensor` over all ranks, in place and the same bits on each. Returns it."""
    if RANKS > 1:
        with lost():
            dist.all_reduce(tensor)
    return tensor


def most(*numbers):
    """The largest of each number (int or bool) over all ranks, as a list of ints."""
    if RANKS == 1:
        return [int(number) for number in numbers]
    told = torch.tensor(numbers, dtype=torch.int64)
    with lost():
        dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()


def words(text):
    """[the text of each rank that has one], the same on every rank. Costs one exchange of a number while nobody has anything to say."""
    if not any(most(bool(text))):
        return []
    return [said for said in (same(text, rank) for rank in range(RANKS)) if said]


def same(text, source=0):
    """The text of rank `source`, on every rank."""
    if RANKS == 1:
        return text
    content = torch.tensor(list(text.encode()) if RANK == source else [], dtype=torch.uint8)
    size, = most(len(content))
    content = content if RANK == source else torch.zeros(size, dtype=torch.uint8)
    with lost():
        dist.broadcast(content, source)
    return bytes(content.tolist()).decode()


def from_first(tensors):
    """Every rank's `tensors` become those of the first, in place."""
    for tensor in tensors if RANKS > 1 else ():
        with lost():
            dist.broadcast(tensor.detach(), 0)


def gathered(tensor):
    """[the tensor of each rank], all of one shape and on the host, on every rank."""
    if RANKS == 1:
        return [tensor]
    there = [torch.empty_like(tensor) for _ in range(RANKS)]
    with lost():
        dist.all_gather(there, tensor)
    return there


def share(rows, samples):
    """The part of `samples` (row indices) that is this rank's: about as many tokens as every other's.

    Longest first, each to the rank with the fewest tokens so far: a function of the rows alone, so nothing need be agreed on.
    """
    if RANKS == 1:
        return samples
    parts, loads = [[] for _ in range(RANKS)], [0] * RANKS
    length = lambda i: int(rows.offsets[i + 1] - rows.offsets[i])
    for i in sorted(samples, key=lambda i: -length(i)):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += length(i)
    return parts[RANK]


def check_same(digest, what):
    """Raises RuntimeError where `digest` (hexadecimal) is not the same on all ranks."""
    number = int(digest[:15], 16)
    largest, smallest = most(number, -number)
    if largest != -smallest:
        raise RuntimeError(f"the ranks' {what} differ, so they no longer train one model; the last checkpoint is from before that")


def begin_alike(facts):
    """End the run, exit code 2, where one of `facts` {what: value or digest} is not the same on all ranks, as where hosts have other files.

    The first rank raises ValueError with what differs, and where; the others end without a word.
    """
    if RANKS == 1:
        return
    told = [json.loads(same(json.dumps(facts), rank)) for rank in range(RANKS)]
    names = [name for name in facts if any(of_rank.get(name) != told[0].get(name) for of_rank in told)]
    if not names:
        return
    if not FIRST:
        sys.exit(2)
    other = {name: next(rank for rank in range(RANKS) if told[rank].get(name) != told[0].get(name)) for name in names}
    lines = "".join(f"\n  {name}: {json.dumps(told[0].get(name))} on the first rank, {json.dumps(told[rank].get(name))} on rank {rank}"
                    for name, rank in other.items())
    raise ValueError(f"the ranks would not train the same model on the same rows:{lines}\n"
                     "Give every host the same files, settings, packages and kind of device.")


def alone(program):
    """End a program that several ranks cannot share, exit code 2. The first raises ValueError; the others end without a word."""
    if RANKS > 1:
        if not FIRST:
            let_end()
            sys.exit(2)
        raise ValueError(f"{program} works in one process, and torchrun started {RANKS} (WORLD_SIZE); start it with python {program}")


def let_end():
    """Stay while another rank ends, which torchrun then reports and ends this one for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PARTING)


def together(main):
    """`main` as one of several ranks: where another one is lost, this one ends in a moment, with code 1 and one message.

    Warnings are the first rank's to tell; errors are raised, and told outside.
    """
    def run(argv):
        quiet = contextlib.nullcontext() if FIRST else contextlib.redirect_stderr(open(os.devnull, "w"))
        try:
            with quiet:
                code = main(argv)
            finish()
            return code
        except (ValueError, OSError):
            if not FIRST:  # which as a rule finds the same wrong, and tells it
                let_end()
            raise
        except RuntimeError as error:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename  # torch's own exchanges, where weights are gathered
            if RANKS > 1 and f"torch{os.sep}distributed{os.sep}" in raised_in:
                error = as_lost(error)
            if not isinstance(error, Lost):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            let_end()
            os._exit(1)  # torch.distributed would wait for the lost one before it lets this process go
    return run
