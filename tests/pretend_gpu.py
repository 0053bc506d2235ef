"""A GPU that is not there, for tests: tensors keep their values on the CPU and are marked as the GPU's.

Inside `with PretendGPU() as gpu:` a tensor that was sent to cuda, or made there, says that its device is
cuda, and so do all that are computed from it, backward too. What fails on a real GPU fails here: an operation
of such a tensor with one of the CPU (numbers, of no dimension, apart), .numpy(), random numbers there from a
generator of the CPU. gpu.waits lists what made the CPU wait for the device. test_gpu.py compares these rules
with those of PyTorch's fake tensors.
"""

import contextlib
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# devices may differ: a copy, and places given to an indexing operation
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_"}
WAIT = {"nonzero", "masked_select", "_local_scalar_dense", "bincount", "_unique2", "unique_consecutive"}
READS = "item tolist __bool__ __float__ __int__ __index__ __format__ __repr__ __str__ cpu".split()


class PretendGenerator(torch.Generator):
    """Of random numbers on the GPU."""


class OnWhichDevice(TorchFunctionMode):
    """What Python asks: devices of tensors, and tensors of devices."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        here = first is not None and gpu.holds(first)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            prop = func.__self__.__name__ if hasattr(func, "__self__") else ""
            if here and prop in ("device", "is_cuda", "is_cpu"):
                return {"device": CUDA, "is_cuda": True, "is_cpu": False}[prop]
            return func(*args, **kwargs)
        if here and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if here and name in READS:
            gpu.waits.append(name)
        device = kwargs.pop("device", None)
        if name in ("to", "cuda", "cpu") and first is not None:
            args, device = list(args), {"cuda": CUDA, "cpu": torch.device("cpu")}.get(name, device)
            for i, value in enumerate(args[1:], start=1):
                if isinstance(value, (str, torch.device)):
                    device, args[i] = value, torch.device("cpu")
                elif isinstance(value, torch.Tensor):
                    device = CUDA if gpu.holds(value) else "cpu"
            target = here if device is None else torch.device(device).type == "cuda"
            if name == "to" and here and not target:
                gpu.waits.append("to cpu")
            result = first.to(*args[1:], **kwargs) if name == "to" else first
            if target != here:
                result = result.clone() if result is first else result
                gpu.mark(result, target)
            return result
        there = here if device is None else torch.device(device).type == "cuda"
        generator = kwargs.get("generator")
        if generator is not None and (device or first is not None):
            if there != isinstance(generator, PretendGenerator):
                raise RuntimeError("Expected a generator of the device of the tensor")
        result = func(*args, **kwargs)
        if device is not None or name == "new_tensor":
            gpu.mark(result, there)
        return result


class PretendGPU(TorchDispatchMode):
    """What is computed: by PyTorch's operations, forward and backward."""

    def __init__(self):
        super().__init__()
        self.storages, self.waits, self.stack = {}, [], None

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages

    def mark(self, tensors, on=True):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # a weak reference, so that no other storage gets this number
                self.storages[storage._cdata] = StorageWeakRef(storage)
                if not on:
                    del self.storages[storage._cdata]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [self.holds(x) for x in tensors]
        if any(here) and name not in MAY_MIX:
            strangers = [x for x, on in zip(tensors, here, strict=True) if not on and x.ndim]
            if strangers:
                shapes = [tuple(x.shape) for x in strangers]
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, but {shapes} are on the cpu"
                )
        masks = name in ("index", "index_put", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in tensors[1:]
        )
        if any(here) and (name in WAIT or masks):
            self.waits.append(f"{name} by a mask" if masks else name)
        result = func(*args, **kwargs)
        if here and (here[0] if name in MAY_MIX else any(here)):
            self.mark(result)
        return result

    def __enter__(self):
        generator, autocast = torch.Generator, torch.autocast

        def make_generator(device="cpu"):
            return PretendGenerator() if torch.device(device).type == "cuda" else generator(device)

        def cast(kind, dtype=None, enabled=True):
            return autocast("cpu" if kind == "cuda" else kind, dtype, enabled=enabled)

        grouped = torch._C._group_tensors_by_device_and_dtype

        def group(tensors, *options):
            groups = grouped(tensors, *options).items()
            return {(CUDA if self.holds(g[0][0][0]) else d, t): g for (d, t), g in groups}

        self.stack = contextlib.ExitStack()
        for change in (
            mock.patch.object(torch, "Generator", make_generator),
            mock.patch.object(torch, "autocast", cast),
            mock.patch("torch.amp.grad_scaler.amp_definitely_not_available", lambda: False, create=True),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group),
            OnWhichDevice(self),
        ):
            self.stack.enter_context(change)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()
