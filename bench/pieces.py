"""The pieces that case A spends its time in, each by itself, on one GPU: products, the narrow products of adapters, SwiGLU, the bus.

    python bench/pieces.py

Shapes of one micro-batch of 8,188 tokens through a layer of the 8B shape. For products, row strides show what alignment is worth;
the last lines run one product for some seconds, since power limits what a GPU sustains. Prints milliseconds, and TFLOP/s or GB/s.
"""
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import gpu_kernels

TOKENS, WIDTH, INNER, RANK = 8188, 4096, 14336, 16
GROUPS = (("q, k, v", 4096, 3 * RANK, 6144), ("o", 4096, RANK, 4096), ("gate, up", 4096, 2 * RANK, 28672), ("down", 14336, RANK, 4096))


def milliseconds(run, repeats=10):
    """Mean time of run(), after three calls that are not counted."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def draw(*shape):
    return (torch.randn(*shape, device="cuda") * 0.05).to(torch.bfloat16)


def products():
    """Forward and backward products of each group, with rows that begin at 16 and at 128 bytes."""
    for name, width, ranks, out in GROUPS:
        work = 2 * TOKENS * width * out / 1e9
        for step in (8, 64):
            stride = width + -(-ranks // step) * step
            x, weight, grad = draw(TOKENS, stride), draw(out, stride), draw(TOKENS, out)
            y, dx = (torch.empty(TOKENS, columns, device="cuda", dtype=torch.bfloat16) for columns in (out, width))
            forward = milliseconds(lambda: torch.mm(x[:, :width + ranks], weight[:, :width + ranks].T, out=y))
            backward = milliseconds(lambda: torch.mm(grad, weight[:, :width], out=dx))
            print(f"{name:9} rows of {stride:6}   forward {forward:.3f} ms {work / forward:4.0f} TFLOP/s   "
                  f"backward {backward:.3f} ms {work / backward:4.0f} TFLOP/s", flush=True)
        wide, tall = draw(TOKENS, out + 64), draw(out + ranks, width)
        longer = milliseconds(lambda: torch.mm(wide[:, :out + ranks], tall, out=dx))
        low, a = draw(TOKENS, ranks), draw(ranks, width)
        added = milliseconds(lambda: torch.addmm(dx, low, a, out=dx))
        print(f"{name:9} adapters' share of d x: inside the product {longer:.3f} ms in all, added to it {added:.3f} ms", flush=True)


def swiglu_backward():
    """SwiGLU's backward pass with the adapter sums that read its tiles: one kernel, and the steps it stands for."""
    grad, gate_up = draw(TOKENS, INNER + 64)[:, :INNER], draw(TOKENS, 2 * INNER) * 20
    low, d_low = draw(TOKENS, WIDTH + 64)[:, WIDTH:WIDTH + 2 * RANK], draw(TOKENS, RANK)
    out = torch.empty(TOKENS, 2 * INNER + 64, device="cuda", dtype=torch.bfloat16)[:, :2 * INNER]
    total = torch.zeros(INNER, RANK, device="cuda")

    def steps():
        act = gpu_kernels.swiglu_backward(grad, gate_up, out)
        for narrow, columns in ((low[:, :RANK], out[:, :INNER]), (low[:, RANK:], out[:, INNER:]), (d_low, act)):
            torch.addmm(total, columns.T, narrow, out_dtype=torch.float32, out=total)

    moved = TOKENS * INNER * 2 * 5 / 1e6
    in_one = lambda: gpu_kernels.swiglu_backward_sums(grad, gate_up, low, d_low, out)
    for what, run in (("one kernel", in_one), ("step by step", steps)):
        spent = milliseconds(run)
        print(f"swiglu backward, {what:12} {spent:.3f} ms {moved / spent:5.0f} GB/s", flush=True)


def bus_and_power():
    x, weight = draw(8192, WIDTH), draw(2 * INNER, WIDTH)
    y = torch.empty(8192, 2 * INNER, device="cuda", dtype=torch.bfloat16)
    host = torch.empty(8192, WIDTH, dtype=torch.bfloat16, pin_memory=True)
    to_host, to_gpu = lambda: host.copy_(x, non_blocking=True), lambda: x.copy_(host, non_blocking=True)
    for what, run in (("to the host", to_host), ("to the GPU", to_gpu)):
        print(f"{what:12} {x.nbytes / milliseconds(run) / 1e6:.0f} GB/s")
    began = time.time()
    while time.time() - began < 30:
        start = time.time()
        for _ in range(300):
            torch.mm(x, weight.T, out=y)
        torch.cuda.synchronize()
        rate = 300 * 2 * 8192 * 2 * INNER * WIDTH / (time.time() - start)
        print(f"after {time.time() - began:4.1f} s  {rate / 1e12:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    products()
    swiglu_backward()
    bus_and_power()
