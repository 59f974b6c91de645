"""Forward and backward of a micro-batch as CUDA graphs, for models whose kernels are shorter than their launches.

A graph replays fixed shapes, so a micro-batch is padded up to a bucket: its tokens by documents that nothing supervises, its
supervised positions by ones without a target. What is padded adds exactly nothing to loss and gradients. The first micro-batch of
a bucket runs eagerly, and its graph is recorded behind it. Leaves out: the optimizer step (a few kernels, launched while the
GPU is busy), recomputed layers, sharded weights, and LLM.int8() where it waits for the GPU.
"""
import contextlib
import functools
import gc

import torch

import quant

LARGEST = 16384  # tokens of a micro-batch: beyond, kernels are long enough for their launches


def serves(network, checkpoint_layers):
    """'' if this network's micro-batches can and should be replayed, else why not, in words."""
    if network.device.type != "cuda":
        return "no GPU"
    if not network.use_varlen:
        return "attention by documents needs their lengths on the host"
    if network.sharded:
        return "weights are sharded"
    if checkpoint_layers:
        return "some layers are recomputed"
    if any(isinstance(module, quant.LLMInt8Weight) and module.waits(LARGEST) for module in network.modules()):
        return "LLM.int8() waits for the GPU"
    if any(getattr(module, "dora", False) for module in network.modules()):
        return "DoRA measures its rows anew in each pass"
    if network.config.hidden_size > 2048:
        return "its kernels are longer than their launches"
    return ""


def bucket(n, finest):
    """The next size that graphs are made for: multiples of an eighth of the power of two below n, at least `finest`."""
    step = max(finest, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def sizes_of(batch):
    """(tokens, supervised positions, documents, longest document) that a data.MicroBatch is padded to.

    Each new combination costs an eager pass and a recording, half a second of a small model, so what costs next to nothing when it is
    padded (positions for the head, empty documents) comes in coarse steps.
    """
    longest, tokens = max(256, 1 << (batch.max_seqlen - 1).bit_length()), bucket(len(batch.input_ids), 64)
    return tokens, bucket(len(batch.rows), 128), bucket(len(batch.cu_seqlens) - 1 + -(-tokens // longest), 16), longest


def padded(batch, tokens, supervised, documents, longest):
    """The fields of a data.MicroBatch (on the host) padded to the given sizes, as {name: tensor}."""
    extra = tokens - len(batch.input_ids)
    tail = torch.arange(extra) % longest
    ends = [len(batch.input_ids) + min(extra, (i + 1) * longest) for i in range(documents + 1 - len(batch.cu_seqlens))]
    assert extra == 0 or ends and ends[-1] == tokens
    missing = supervised - len(batch.rows)
    return {"input_ids": torch.cat((batch.input_ids, torch.zeros(extra, dtype=torch.int64))),
            "position_ids": torch.cat((batch.position_ids, tail)),
            "cu_seqlens": torch.cat((batch.cu_seqlens, torch.tensor(ends, dtype=torch.int32))),
            "rows": torch.cat((batch.rows, torch.zeros(missing, dtype=torch.int64))),
            "targets": torch.cat((batch.targets, torch.full((missing,), -100)))}


class NotRecordable(ValueError):
    """Something in a model's passes cannot be part of a CUDA graph; the message names the way out."""


@contextlib.contextmanager
def recording(graph, **options):
    """torch.cuda.graph(graph, **options), whose failure is told as what it is.

    Raises NotRecordable where what is recorded cannot be, and torch.OutOfMemoryError where that was the reason: ending a recording that
    has failed raises an error of its own, which would hide it. Other errors stay what they are.
    """
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except RuntimeError as error:
        reason = error
        while reason is not None and not isinstance(reason, torch.OutOfMemoryError):
            reason = reason.__context__
        if reason is not None:
            raise reason
        if "captur" not in str(error).lower():
            raise
        first_line = str(error).partition("\n")[0]
        raise NotRecordable(f"memory.graphs: this model's passes cannot be recorded as a CUDA graph ({first_line}); "
                         "give --memory.graphs=no") from error


class Replayed:
    """Calls like `eager(batch, weight)`: adds weight x d loss / d adapters to the gradients and returns the loss, on the GPU."""

    def __init__(self, network, eager):
        self.network, self.eager, self.graphs, self.pool = network, eager, {}, None
        self.stream = torch.cuda.Stream()
        self.weight = torch.zeros((), device=network.device)

    def __call__(self, batch, weight):
        """batch: a data.MicroBatch on the host; weight: a scalar tensor."""
        if len(batch.input_ids) > LARGEST:
            return self.eager(batch, weight)
        sizes = sizes_of(batch)
        fields = {name: tensor.pin_memory() for name, tensor in padded(batch, *sizes).items()}
        self.weight.copy_(weight)
        if sizes not in self.graphs:
            return self.record(sizes, fields)
        graph, static, loss = self.graphs[sizes]
        for name, tensor in fields.items():
            getattr(static, name).copy_(tensor, non_blocking=True)
        graph.replay()
        return loss

    def record(self, sizes, fields):
        """Run one micro-batch of a new bucket eagerly, then record the graph for the next ones."""
        device = self.network.device
        static = Static(max_seqlen=sizes[-1], **{name: tensor.to(device) for name, tensor in fields.items()})
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # as recording does, so that everything is compiled and allocated once before
            done = self.eager(static, self.weight)
        torch.cuda.current_stream().wait_stream(self.stream)
        gc.collect()  # a graph of autograd's that is still about would tie the recording to another stream
        graph = torch.cuda.CUDAGraph()
        with recording(graph, pool=self.pool, stream=self.stream):
            loss = self.eager(static, self.weight)
        self.pool = self.pool or graph.pool()
        self.graphs[sizes] = graph, static, loss
        return done


@functools.cache
def side_stream(device):
    """The stream to record and replay on: one for all calls, as cuBLAS keeps a workspace for every stream it has met."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(device):
    """Inside the block a GPU works on a stream of its own, which is given; None and nothing else elsewhere."""
    if device.type != "cuda":
        yield None
        return
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield stream
    finally:
        torch.cuda.current_stream().wait_stream(stream)


class Recorded:
    """`compute()`, which returns a tensor on the GPU, as a CUDA graph: each call computes anew, into the same tensor, from what is
    where it was."""

    def __init__(self, compute, device):
        with beside(device) as stream:
            compute()  # as in Replayed.record
            gc.collect()
            self.graph = torch.cuda.CUDAGraph()
            with recording(self.graph, stream=stream):
                self.result = compute()

    def __call__(self):
        self.graph.replay()
        return self.result


def forget(forward_backward):
    """Let go of what is recorded, and of its memory, where `forward_backward` is a Replayed."""
    if isinstance(forward_backward, Replayed):
        forward_backward.graphs.clear()
        forward_backward.pool = None


class Static:
    """The fields of a micro-batch at fixed addresses."""

    def __init__(self, **fields):
        vars(self).update(fields)

    def to(self, device):
        return self
