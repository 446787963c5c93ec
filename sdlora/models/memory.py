"""How much memory a computation takes at its peak, found without taking it: it runs on the meta device, where tensors have shapes and no
numbers, while a ledger adds up what is alive."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sdlora.lora.layers import Adapter
from sdlora.models.attention import backward_bytes
from sdlora.models.packed import Packed


def process_bytes() -> int:
    """What this process holds of the machine's memory."""
    return int(psutil.Process().memory_info().rss)


def weight_bytes(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for module in modules for t in [*module.parameters(), *module.buffers()])


def on_meta(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy that takes no memory. Weights are in `dtype`, but for packed ones, and what adapters add to them is as it is."""
    exact = {id(t) for part in module.modules() if isinstance(part, Adapter) for t in own_tensors(part)}
    exact |= {id(t) for part in module.modules() if isinstance(part, Packed) for t in part.kept()}
    shells: dict[int, Tensor] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        kept = tensor.dtype if id(tensor) in exact or not tensor.is_floating_point() else dtype
        shell = torch.empty_like(tensor, device="meta", dtype=kept)
        shells[id(tensor)] = nn.Parameter(shell, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shell
    return copy.deepcopy(module, dict(shells))


def own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def peak_bytes(run: Callable[[], object], device_type: str, dtype: torch.dtype) -> int:
    """The most bytes that tensors made by `run` take at once, as if it ran on such a device under autocast to `dtype`. It must
    compute with meta tensors alone; those that were there before are not counted."""
    ledger = Ledger(WORKSPACES.get(device_type, nothing))
    with Autocast(device_type, dtype), ledger:
        run()
    return ledger.peak


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, until they are freed, and what operations take while they run."""

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...]], int]):
        """`workspace`: an operation and its arguments -> bytes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.workspace = workspace
        self.alive = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}  # by the address of a storage, as long as it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in tensors_of(args):
            self._enter(tensor, 0)  # what was there before
        result = outcome(func, args, kwargs or {})
        for tensor in tensors_of(result):
            self._enter(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.alive + self.workspace(func, args))
        return result

    def _enter(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:

            def leave(_: object) -> None:
                del self._seen[key]
                self.alive -= size

            self._seen[key] = weakref.ref(storage, leave)
            self.alive += size


def tensors_of(values: Any) -> list[Tensor]:
    """Of an operation's arguments or result, which nest no deeper than lists in a tuple."""
    found = values if isinstance(values, list | tuple) else [values]
    inner = [each for value in found for each in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in inner if isinstance(value, Tensor)]


def outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of an operation. One that meta tensors went through before gives tensors of the same shapes at once: to derive them takes PyTorch a
    millisecond, and a UNet does the same things over and over."""
    given = tensors_of(args)
    if not given or not all(tensor.is_meta for tensor in given) or func._schema.is_mutable:
        return func(*args, **kwargs)
    key = (func, described(args), *((name, described(value)) for name, value in kwargs.items()))
    if key in SEEN:
        made = [torch.empty_strided(*shape[:2], dtype=shape[2], device="meta") for shape in SEEN[key]]
        return made[0] if len(made) == 1 else tuple(made)
    result = func(*args, **kwargs)
    made = list(result) if isinstance(result, tuple) and len(result) > 1 else [result]
    is_view = {storage_of(tensor) for tensor in tensors_of(made)} & {storage_of(tensor) for tensor in given}
    if not is_view and all(isinstance(tensor, Tensor) for tensor in made):
        SEEN[key] = [described(tensor) for tensor in made]
    return result


def described(value: Any) -> Any:
    """A tensor by its shape, strides and type, and all else by its type and itself, since 1 and 1.0 make different tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(described, value)) if isinstance(value, list | tuple) else (type(value), value)


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


SEEN: dict[Any, list[tuple[Any, ...]]] = {}  # an operation and what it was given -> shapes, strides and types of what it made


# ---------------------------------------------------------------- what devices do that the meta device does not


class Autocast(TorchFunctionMode):
    """Casts as torch.autocast does on a type of device, since it leaves meta tensors alone; and attention as it is computed there, in
    one piece and not with a matrix of T x T."""

    def __init__(self, device_type: str, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.exact = dtype, EXACT.get(device_type, frozenset())

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and func in LOW | self.exact:
            args, kwargs = cast((args, kwargs), torch.float32 if func in self.exact else self.dtype)
        return (attention if func is F.scaled_dot_product_attention else func)(*args, **kwargs)


def cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """The CPU's flash kernel, which alone is there on the meta device; those of CUDA keep the same for the backward pass."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(query, key, value, 0.0, options.get("is_causal", False), attn_mask=attn_mask, scale=options.get("scale"))[0]
    return result


# From "Automatic Mixed Precision package" in PyTorch's documentation, as far as a step meets it.
LOW = frozenset(
    {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}
)
NORMS = frozenset({F.group_norm, F.layer_norm, F.softmax, Tensor.softmax})
EXACT = {"cuda": NORMS, "mps": NORMS}  # in fp32, whatever they are given


def nothing(func: Any, args: tuple[Any, ...]) -> int:
    return 0


def workspace_on_cpu(func: Any, args: tuple[Any, ...]) -> int:
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return backward_bytes(*args[1:3])
    return convolution_on_cpu(func, args)


def convolution_on_cpu(func: Any, args: tuple[Any, ...]) -> int:
    """oneDNN computes on copies, in a layout of its own, of input, weight and result; where it does not know a type of number, as bf16
    without AVX-512, PyTorch unfolds the input to a matrix (C * kh * kw, h * w) for each of the batch."""
    if func is torch.ops.aten.convolution.default:
        x, weight, result = args[0], args[1], None
    elif func is torch.ops.aten.convolution_backward.default:
        result, x, weight = args[:3]
    else:
        return 0
    stride = args[3] if result is None else args[4]
    pixels = math.prod(-(-side // step) for side, step in zip(x.shape[2:], stride, strict=True))
    if in_onednn(x.dtype):
        numbers = x.numel() + weight.numel() + len(x) * len(weight) * pixels
    else:
        numbers = len(x) * weight[0].numel() * pixels if weight[0, 0].numel() > 1 else 0
    return int(numbers * x.element_size())


def in_onednn(dtype: torch.dtype) -> bool:
    """Whether this CPU computes with such numbers at full speed."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


WORKSPACES: dict[str, Callable[[Any, tuple[Any, ...]], int]] = {"cpu": workspace_on_cpu}
