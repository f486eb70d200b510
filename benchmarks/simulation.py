"""The live bytes of a program's tensors: simulated without values, or as the allocator sees them.

`Simulation` and `Allocator` have the same methods. A program runs within `running()`, marks its
phases with `phase` and what it makes with `make`. Afterwards `peaks` holds the bytes at the peak of
each phase, by kind where they are simulated.
"""

import contextlib
import weakref
from collections import Counter
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from core import packing

aten = torch.ops.aten
BLOCK = 512  # bytes; CUDA's allocator deals in multiples


class Simulation(FakeTensorMode):
    """Tensors with shapes and no values, and the bytes of every storage from creation to end.

    Operations on real tensors stay real, so a packing's plan is computed from real lengths. Never
    use it together with FlopCounterMode, whose hooks keep the graph alive.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.making: str | None = None  # kind of everything that is made; None: autograd decides
        self.in_backward = self.nested = False
        self.storages: dict[int, tuple[str, int]] = {}  # kind and size
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter] = {}
        self.phase_name = "set-up"

    @contextlib.contextmanager
    def running(self):
        def send_to_device(x, device, skip_keys, **more):
            if isinstance(x, Tensor):
                return self.move(x)
            if isinstance(x, tuple):
                return tuple(send_to_device(item, device, skip_keys) for item in x)
            items = x.items()
            return {k: v if k == skip_keys else self.move(v) for k, v in items}

        with contextlib.ExitStack() as stack:
            for owner, name, replacement in (
                (import_utils, "is_fake_tensor", lambda _: False),  # nothing is being compiled
                (nn.Module, "to", lambda module, *_, **__: module),  # would swap fake tensors
                (packing, "send_to_device", send_to_device),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            with self:
                yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, kwargs = tree_leaves((args, kwargs)), kwargs or {}
        if self.nested:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not self.making and not any(isinstance(x, FakeTensor) for x in leaves):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:  # reads a value, and there is none
            return args[0].dtype == torch.bool or 1.0
        self.nested = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.nested = False
        kind = self.making or ("activations" if torch.is_grad_enabled() else "temporaries")
        if not self.making and func is aten._to_copy.default and self.kind(args[0]) == "weights":
            kind = "bf16 copies"
        replaced = 0
        if func is aten.add.Tensor and self.in_backward and kind == "temporaries":
            replaced = args[0].untyped_storage().nbytes()  # without a mode, autograd adds in place
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.count(x, kind, replaced)
        return out

    # --- what is alive ---

    def kind(self, x: Tensor) -> str:
        return self.storages.get(x.untyped_storage()._cdata, ("",))[0]

    def count(self, x: FakeTensor, kind: str, replaced: int = 0) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.storages:
            self.storages[key] = kind, size
            self.live[kind] += size
            weakref.finalize(storage, self.end, key)  # also if only autograd still holds it
            self.see(replaced)

    def end(self, key: int) -> None:
        kind, size = self.storages.pop(key)
        self.live[kind] -= size

    def see(self, replaced: int = 0) -> None:
        """Compare the live bytes with the peak of this phase."""
        if self.live.total() - replaced > self.peaks.get(self.phase_name, Counter()).total():
            self.peaks[self.phase_name] = self.live - Counter(temporaries=replaced)

    def relabel(self, x: FakeTensor, kind: str) -> None:
        key = x.untyped_storage()._cdata
        before, size = self.storages[key]
        self.live[before] -= size
        self.live[kind] += size
        self.storages[key] = kind, size

    # --- what a program says ---

    def move(self, x: Tensor) -> Tensor:
        """A real tensor as one on the simulated device."""
        fake = self.from_tensor(x)
        self.count(fake, "inputs")
        return fake

    @contextlib.contextmanager
    def make(self, kind: str):
        self.making, before = kind, self.making
        yield
        self.making = before

    @contextlib.contextmanager
    def phase(self, name: str):
        before, self.phase_name = self.phase_name, name
        self.in_backward = name == "backward"
        self.see()
        yield
        self.phase_name, self.in_backward = before, False

    def watch(self, policy: nn.Module, accelerator) -> None:
        """Call gradients by their name, and let `reduce` return values, which are read."""
        accelerator.reduce = lambda x, _: torch.ones(x.shape)
        for p in policy.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.relabel(p.grad, "gradients"))


class Allocator:
    """The bytes that the CPU's allocator holds, as a profiler records them.

    Matrix products are allocated and not computed, because in bf16 they would take hours on a CPU.
    """

    def __init__(self):
        self.peaks: dict[str, Counter] = {}
        self.phases: set[str] = set()

    @contextlib.contextmanager
    def running(self):
        def product(*factors: Tensor, **_) -> Tensor:
            a, b = factors[-2:]  # addmm and baddbmm have another argument before
            return a.new_zeros(*a.shape[:-1], b.shape[-1])

        library = torch.library.Library("aten", "IMPL")
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            library.impl(name, product, "CPU")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        live, phase, end = 0, "set-up", 0
        events = profiler.profiler.kineto_results.events()
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() in self.phases:
                phase, end = event.name(), event.start_ns() + event.duration_ns()
            elif event.name() == "[memory]":
                live += event.nbytes()
            inside = phase if event.start_ns() <= end else "set-up"
            if live > self.peaks.get(inside, Counter()).total():
                self.peaks[inside] = Counter(all=live)

    def move(self, x: Tensor) -> Tensor:
        return x

    def make(self, kind: str):
        return contextlib.nullcontext()

    def phase(self, name: str):
        self.phases.add(name)
        return record_function(name)

    def watch(self, policy: nn.Module, accelerator) -> None:
        pass
