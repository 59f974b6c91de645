"""Frozen projections with a low-rank adapter, all adapters in one buffer, and PEFT's format on disk.

Leaves out: adapters on embeddings or head, and what PEFT's format can say beyond LoRA and DoRA on projections: refused by name.
"""
import contextlib
import json
import math
import pathlib

import torch
from torch import nn
from torch.nn import functional as F

import config
import quant
import trust

PEFT_PREFIX = "base_model.model."  # what PEFT puts before a module's name on disk


class FrozenMatmul(torch.autograd.Function):
    """x W^T with a frozen quantised W, plus low B^T where there is an adapter.

    Keeps nothing of W for the backward pass but the quantised weight. The sum is rounded once, to `dtype` (x's, unless a wider one is
    given). Were x W^T rounded to 16 bits before, an update of less than half its last digit would vanish,
    as most do near B = 0, and the gradient would foretell what the loss does not do.
    """

    @staticmethod
    def forward(ctx, x, weight, low=None, B=None, dtype=None):
        ctx.weight, ctx.dtype = weight, x.dtype
        ctx.save_for_backward(low, B)
        if low is None:
            return weight.matmul(x, dtype)
        y = weight.matmul(x, torch.promote_types(x.dtype, torch.float32))
        quant.add_product(y.flatten(0, -2), low.flatten(0, -2), B.T)
        return y.to(dtype or x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        (low, B), grad = ctx.saved_tensors, grad_output.to(ctx.dtype)
        grad_x = grad @ ctx.weight.dequantize(ctx.dtype) if ctx.needs_input_grad[0] else None
        if low is None:
            return grad_x, None, None, None, None
        return grad_x, None, grad @ B, grad.flatten(0, -2).T @ low.flatten(0, -2), None


class AdaptedLinear(nn.Module):
    """y = x W^T + b + scaling * dropout(x) A^T B^T, W and b frozen (Hu et al. 2021, section 4.1). r = 0: no adapter.

    lora_A (r, in) and lora_B (out, r) are trained in `adapter_dtype`; products run in x's dtype. x: (..., in) -> y: (..., out).
    `weight` is a quant.FrozenWeight, set when its tensor has been read. With `dora`, lora_magnitude_vector (out,) is trained too.
    """

    def __init__(self, in_features, out_features, bias=None, r=0, scaling=1.0, dropout=0.0, device=None, adapter_dtype=torch.float32,
                 dora=False):
        super().__init__()
        self.in_features, self.out_features, self.r, self.scaling, self.dropout = in_features, out_features, r, scaling, dropout
        self.weight = None
        self.bias = bias
        if r:
            self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=adapter_dtype))
            self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=adapter_dtype))
        self.dora, self.held = bool(r) and dora, None  # held: see rows_held
        if self.dora:
            self.lora_magnitude_vector = nn.Parameter(torch.zeros(out_features, device=device, dtype=adapter_dtype))

    def forward(self, x):
        if self.r:
            dropped = F.dropout(x, self.dropout, self.training)
            low = self.scaling * (dropped @ self.lora_A.to(x.dtype).T)  # (..., r)
            B = self.lora_B.to(x.dtype)
            y = self.with_magnitude(x, dropped, low, B) if self.dora else FrozenMatmul.apply(x, self.weight, low, B)
        else:
            y = FrozenMatmul.apply(x, self.weight)
        return y if self.bias is None else y + self.bias

    def with_magnitude(self, x, dropped, low, B):
        """m (W + s B A) / |W + s B A| in place of W + s B A (Liu et al. 2024, equation 5), of the dropped x.

        What was dropped goes through W alone. The lengths |W + s B A| of the rows count as constants, as in its section 4.3 and in
        PEFT: the gradients lack what lies along the rows.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        lengths = self.row_lengths(x.dtype) if self.held is None else self.held
        y = self.lora_magnitude_vector / lengths * FrozenMatmul.apply(dropped, self.weight, low, B, wide)
        if self.dropout and self.training:
            y = y + FrozenMatmul.apply(x - dropped, self.weight, None, None, wide)
        return y.to(x.dtype)

    @torch.no_grad()
    def row_lengths(self, dtype):
        """|W + s B A|, the lengths of its rows, (out,) in the adapters' dtype, for W in `dtype`."""
        weight, low = self.weight.dequantize(dtype), self.scaling * self.lora_B
        pieces = quant.pieces(self.out_features, 1024)
        return torch.cat([torch.linalg.vector_norm(weight[rows] + low[rows] @ self.lora_A, dim=1) for rows in pieces])


def adapters(network):
    """{PEFT's name: parameter} of every adapter matrix: ...q_proj.lora_A.weight (r, in), ...q_proj.lora_B.weight (out, r), and with
    lora.dora ...q_proj.lora_magnitude_vector (out,).

    In the network's order, but of each block (self_attn, mlp) first every A, then every B: fused.Group counts on neighbours.
    """
    blocks = {}
    for name, module in network.named_modules():
        if isinstance(module, AdaptedLinear) and module.r:
            blocks.setdefault(name.rpartition(".")[0], []).append((f"{PEFT_PREFIX}{name}", module))
    parts = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}
    ordered = ((name, module, part) for modules in blocks.values() for part in parts for name, module in modules if hasattr(module, part))
    return {f"{name}.{part}{parts[part]}": getattr(module, part) for name, module, part in ordered}


@torch.no_grad()
def draw_adapters(network, seed):
    """A uniform in +-1/sqrt(in) as PEFT draws it, B = 0, from a generator of their own: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(network).items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif ".lora_B." in name:
            parameter.zero_()


@torch.no_grad()
def correct(module, weight):
    """Set an AdaptedLinear's A and B so that s B A is the best rank-r approximation of what quantisation took from `weight` (out, in).

    LoftQ (Li et al. 2023, section 3) with one step of its alternation: the quantised weight stays what it is without it, and the
    adapter is one that anything can load over it. Raises ValueError for a rank that the matrix cannot have.
    """
    if module.r > min(weight.shape):
        raise ValueError(f"lora.init: loftq needs a rank of {min(weight.shape)} at most for a projection of shape {tuple(weight.shape)}, "
                         f"lora.r is {module.r}")
    u, s, v = torch.linalg.svd(weight.float() - module.weight.dequantize(torch.float32), full_matrices=False)
    root = (s[:module.r] / module.scaling).sqrt()
    module.lora_A.copy_(root[:, None] * v[:module.r])
    module.lora_B.copy_(u[:, :module.r] * root)


@contextlib.contextmanager
def rows_held(network):
    """Inside the block DoRA's row lengths stay what they are now, whatever the adapters do: what its gradients are the gradients of."""
    modules = [module for module in network.modules() if isinstance(module, AdaptedLinear) and module.dora]
    for module in modules:
        module.held = module.row_lengths(network.get_output_embeddings().weight.dtype)
    try:
        yield
    finally:
        for module in modules:
            module.held = None


@torch.no_grad()
def measure_rows(network):
    """Set DoRA's magnitudes to the lengths that the rows have, so that they change nothing yet."""
    for module in network.modules():
        if isinstance(module, AdaptedLinear) and module.dora:
            module.lora_magnitude_vector.copy_(module.row_lengths(network.get_input_embeddings().weight.dtype))


class AdapterMemory:
    """Every adapter matrix in one buffer: `flat`, the parameter that the optimizer sees, with its gradient, and a working copy.

    The matrices and their .grad become views of `flat` and flat.grad, so that clipping, norm and AdamW are one kernel each. The working
    copy holds them in the compute dtype; `refresh` makes it anew, and every forward pass begins with that.
    """

    def __init__(self, network, dtype):
        parameters = list(adapters(network).values())
        self.flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        self.flat.grad = torch.zeros_like(self.flat)
        self.working = self.flat.data if dtype == self.flat.dtype else torch.empty_like(self.flat, dtype=dtype)
        self.kept = None  # fused.Kept, where weights are kept dequantised
        self.places, start = {}, 0
        for parameter in parameters:
            place = self.places[parameter] = slice(start, start := start + parameter.numel())
            parameter.data = self.flat.data[place].view_as(parameter)
            parameter.grad = self.flat.grad[place].view_as(parameter)
        for module in network.modules():
            if isinstance(module, AdaptedLinear) and module.r:
                module.working_B = self.working[self.places[module.lora_B]].view_as(module.lora_B)

    def refresh(self):
        """Bring the working copy up to date with the weights."""
        if self.working.dtype != self.flat.dtype:
            self.working.copy_(self.flat.detach())
        if self.kept:
            self.kept.refresh()

    def together(self, parameters):
        """(working copy, gradient) of neighbouring matrices of equal width as one: (sum of rows, width) each."""
        places = [self.places[parameter] for parameter in parameters]
        assert all(left.stop == right.start for left, right in zip(places, places[1:]))
        whole = slice(places[0].start, places[-1].stop)
        return self.working[whole].view(-1, parameters[0].shape[1]), self.flat.grad[whole].view(-1, parameters[0].shape[1])


@torch.no_grad()
def set_adapters(own, tensors, origin):
    """Copy matrices {name: tensor} into those of `adapters`.

    Raises ValueError naming `origin` for names or shapes that are not the network's.
    """
    different = sorted(set(own) ^ set(tensors))
    if different:
        where = "the file but not in the model" if different[0] in tensors else "the model but not in the file"
        raise ValueError(f"{origin}: {different[0]} is in {where} ({len(different)} such); the adapter belongs to other targets or another "
                         "model")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{origin}: {name} has the shape {tuple(tensors[name].shape)}, this model and lora.r need "
                             f"{tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


def peft_settings(lora, network, base):
    """The adapter_config.json text under which PEFT (and what reads PEFT) loads what `adapters` holds."""
    from peft import LoraConfig
    names = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters(network)})
    alpha = lora.alpha if lora.alpha % 1 else int(lora.alpha)
    settings = LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora,
                          use_dora=lora.dora, target_modules=names, bias="none", base_model_name_or_path=str(base),
                          inference_mode=True).to_dict()
    return json.dumps({name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}, indent=1, default=str)


def read_adapter(folder):
    """(config.Lora, {PEFT's name: tensor}, base model's name) of an adapter folder in PEFT's format.

    Raises ValueError for files that are missing and for what cannot be honoured, by name: modules_to_save, rank patterns, ...
    """
    from peft import LoraConfig
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} there, so it is no adapter in PEFT's format")
    settings = trust.read_json(folder / "adapter_config.json")
    trust.tensor_shapes(folder / "adapter_model.safetensors")
    honoured = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "base_model_name_or_path", "task_type",
                "inference_mode", "revision", "auto_mapping", "peft_version", "init_lora_weights"}
    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    for name, value in settings.items():
        if name not in honoured and value and value != usual.get(name):
            raise ValueError(f"{folder}/adapter_config.json: {name} = {json.dumps(value)} is not supported; LoRA and DoRA "
                             "adapters on projections are")
    if settings.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"{folder}/adapter_config.json: init_lora_weights = {settings['init_lora_weights']!r} changes the base weights; "
                         "convert it to a plain LoRA adapter with PEFT first")
    if type(settings.get("r")) is not int or not all(type(settings.get(name)) in (int, float) for name in ("lora_alpha", "lora_dropout")):
        raise ValueError(f"{folder}/adapter_config.json: r must be a whole number, lora_alpha and lora_dropout must be numbers, as PEFT "
                         "writes them")
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in tensors})
    lora = config.Lora(r=settings["r"], alpha=float(settings["lora_alpha"]), dropout=float(settings["lora_dropout"]),
                       rslora=bool(settings.get("use_rslora")), dora=bool(settings.get("use_dora")), targets=modules)
    return lora, tensors, settings.get("base_model_name_or_path") or ""
