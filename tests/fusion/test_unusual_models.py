"""Untraceable, captured, sharded and otherwise unusual models: they run as in stock PyTorch, with a reason.

``fuse`` and ``freeze`` of a model that runs in stock PyTorch never raise, change no state and run no code with side
effects; outputs, gradients and state then equal stock PyTorch's.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import random
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from fused_res import freeze, fuse, summarize
from tests.support.model_comparison import RELATIVE_TOLERANCE, assert_near, randomize_norms

COUNTER = 0
CALLS: list[str] = []
SCALE = 1.5


class Body(nn.Module):
    """Two convolutions with norms; subclasses write unusual forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def first(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def second(self, y: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(y)) + y)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


class BranchOnData(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if y.mean() > 0.3 else y


class LoopOnData(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        while y.abs().max() > 1:
            y = y / 2
        return self.second(y)


class ReadsItem(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * math.tanh(x.sum().item())


class AssertsOnData(Body):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all()
        return self.second(self.first(x))


class Generator(Body):
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        y = self.first(x)
        yield y
        yield self.second(y)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.steps(x))).sum(0)


class Tries(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        try:
            y = self.shortcut(y)
        except AttributeError:
            y = self.second(y)
        try:
            return torch.cat([x, y[:, :, 1:]], 1)
        except RuntimeError:
            return y


class Prints(Body):
    def forward(self, x: Tensor) -> Tensor:
        print("shape", tuple(x.shape))
        return self.second(self.first(x))


class RandomBranch(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if random.random() < 0.5 else y


class RandomNoise(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + torch.randn_like(y)) * torch.rand(1, dtype=y.dtype)


class NumpyRandom(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * np.random.uniform(0.5, 2))


class Environment(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * float(os.environ.get("FUSED_RES_TEST_SCALE", "1")))


class Clock(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["started"] = time.perf_counter() > 0
        return self.second(self.first(x))


class GlobalCounter(Body):
    def forward(self, x: Tensor) -> Tensor:
        global COUNTER
        COUNTER += 1
        return self.second(self.first(x)) * COUNTER


class GlobalList(Body):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append("forward")
        return self.second(self.first(x)) * len(CALLS)


class GlobalScale(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * SCALE)


class Numpy(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * float(np.tanh(x.detach().numpy().sum()))


class CountsCalls(Body):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x)) * self.calls


class KeepsFeatures(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.first(x)
        return self.second(self.features)


class KeepsList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.outputs.append(self.first(x))
        return self.second(self.outputs[-1])


class WritesBuffer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.second(self.first(x)) * self.seen


class MakesLayer(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if not hasattr(self, "head"):
            self.head = nn.Conv2d(4, 4, 1).to(y)
            nn.init.ones_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        return self.head(self.second(y))


class AnyArguments(Body):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.second(self.first(*args)) * kwargs.get("scale", 2)


class NoGradInside(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return self.second(y)


class Detaches(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach())


class BranchOnMode(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y) if self.training else y * 2
        return y * 3 if torch.is_grad_enabled() else y


class WritesInPlace(Body):
    """Values between the layers are written in place, once through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x).mul_(2))
        y += 1
        y[:, :1].zero_()
        return F.relu(self.bn2(self.conv2(y)) + y)


class WritesItsInput(Body):
    """The caller's tensor is written, as by a normalization in place."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x.sub_(0.5)
        return self.second(self.first(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0]  # not the derivative, on purpose


class CustomFunction(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Square.apply(self.first(x)))


class OverridesCall(Body):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class OverridesGetattr(Body):
    """Attributes that do not exist are those of a wrapped module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.second(self.first(x)))


class DoublesWeight(nn.Conv2d):
    """A convolution whose attribute is not its parameter."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class OverridesGetattribute(Body):
    def __getattribute__(self, name: str) -> Any:
        if name == "conv1":
            name = "conv3"
        return super().__getattribute__(name)

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(3, 4, 3, padding=1)


class OverridesSetattr(Body):
    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "training" or not self.__dict__.get("closed"), f"{name} is set after construction"
        super().__setattr__(name, value)

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["closed"] = True


class Slots(Body):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.factor = 3.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"factor": self.factor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "factor"})
        self.factor = state["factor"]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.factor


class PropertyLayer(Body):
    """A layer that a property constructs on every read."""

    @property
    def act(self) -> nn.Module:
        return nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class Falsy(Body):
    """Its truth value is False, and it equals every other module."""

    __hash__ = nn.Module.__hash__

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return True


class ForwardIsProperty(Body):
    @property
    def forward(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        return lambda x: self.second(self.first(x)) * 2


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        instance.made_by_metaclass = True
        return instance


class WithMetaclass(Body, metaclass=Meta):
    pass


class NotSubclassable(Body):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class has no subclasses")


class UsesClassCell(Body):
    """Compares its own class and name exactly."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.__class__.__name__ == "UsesClassCell"
        return self.second(self.first(x))


class LowPrecisionBuffers(Body):
    def __init__(self) -> None:
        super().__init__()
        for at, dtype in enumerate((torch.float16, torch.bfloat16, torch.int8, torch.bool)):
            self.register_buffer(f"mask{at}", torch.ones(4, 1, 1, dtype=dtype))

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(function, recurse)
        self._buffers.update(kept)  # double() converts no buffer
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for at in range(4):
            y = y * self.get_buffer(f"mask{at}").to(y.dtype)
        return self.second(y)


class ComplexWeights(Body):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv2d(3, 3, 1, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.spectrum(x.to(torch.complex128)).abs()))


class TiedConvolutions(Body):
    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3.weight = self.conv2.weight
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(self.second(self.first(x)))))


class LayersTwice(Body):
    """One convolution and one norm at two places of one forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn2(self.conv2(y)))))) + y


class TwoNames(Body):
    def __init__(self) -> None:
        super().__init__()
        self.alias, self.norms = self.conv2, nn.ModuleList([self.bn1, self.bn2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norms[0](self.conv1(x)))
        return self.relu(self.bn2(self.alias(y)) + self.norms[1](self.conv2(y)))


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    note: str | None = None


class ManyArguments(Body):
    def forward(  # type: ignore[override]
        self, x: Tensor, mode: str = "sum", scales: Any = (1.0,), mask: Tensor | None = None, options: Any = None
    ) -> Output:
        hidden = [y := self.first(x)]
        for scale in scales:
            hidden.append(y := self.second(y * scale))
        if mask is not None:
            y = y * mask
        y = y.sum(1) if mode == "sum" else y.mean(1)
        return Output(y * (options or {}).get("gain", 1), hidden, mode)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class ContainerInput(Body):
    def forward(self, inputs: dict[str, Any]) -> Any:  # type: ignore[override]
        low = self.first(inputs["pair"].low)
        return {"out": Pair(low, self.second(low)), "list": [self.first(inputs["pair"].high), None, "text"]}


class WholeOutputUnused(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.second(y)  # its running statistics are updated nevertheless
        return y


def closure_module() -> nn.Module:
    scales = [2.0]

    class Closure(Body):
        def forward(self, x: Tensor) -> Tensor:
            scales.append(scales[-1] + 1)
            return self.second(self.first(x) * scales[-1])

    return Closure()


def instance_forward() -> nn.Module:
    model = Body()
    model.forward = types.MethodType(lambda self, x: self.second(self.first(x)) * 2, model)  # type: ignore[method-assign]
    return model


class _Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def parametrized() -> nn.Module:
    model = Body()
    parametrize.register_parametrization(model.conv1, "weight", _Softplus())
    parametrize.register_parametrization(model.bn2, "weight", _Softplus())
    return model


def with_hook(path: str, register: str, hook: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(Body(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        getattr(model.get_submodule(path), register)(hook, **options)
        return model

    return make


def changed(make: Callable[[], nn.Module], change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        change(model)
        return model

    return made


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def shared_block() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), block, nn.ReLU(), block)


def doubles_weight() -> nn.Module:
    model = Body()
    conv = model.conv2
    model.conv2 = DoublesWeight(4, 4, 3, padding=1)
    model.conv2._parameters.update(conv._parameters)  # its constructor initializes only copies
    return model


def materialized_lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    model(torch.ones(2, 3, 8, 8))
    return model


HOOKS: dict[str, Callable[[], nn.Module]] = {
    f"{register} on {path or 'the model'}": with_hook(path, register, hook)
    for path in ("", "0", "0.conv1", "0.bn2", "0.relu", "1", "2", "3")
    for register, hook in {
        "register_forward_hook": lambda module, args, output: output * 1.5,
        "register_forward_pre_hook": lambda module, args: (args[0] * 0.5,),
        "register_full_backward_hook": lambda module, into, out: tuple(g if g is None else g * 2 for g in into),
        "register_full_backward_pre_hook": lambda module, out: tuple(g * 2 for g in out),
    }.items()
}

SUBCLASSES = (
    BranchOnData, LoopOnData, ReadsItem, AssertsOnData, Generator, Tries, Prints, RandomBranch, RandomNoise,
    NumpyRandom, Environment, Clock, GlobalCounter, GlobalList, GlobalScale, Numpy, CountsCalls, KeepsFeatures,
    KeepsList, WritesBuffer, MakesLayer, AnyArguments, NoGradInside, Detaches, BranchOnMode, WritesInPlace,
    WritesItsInput, CustomFunction, OverridesCall, OverridesGetattr, OverridesGetattribute, OverridesSetattr, Slots,
    PropertyLayer, Falsy, ForwardIsProperty, WithMetaclass, NotSubclassable, UsesClassCell, LowPrecisionBuffers,
    ComplexWeights, TiedConvolutions, LayersTwice, TwoNames, ManyArguments, WholeOutputUnused,
)  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in SUBCLASSES},
    **{f"{cls.__name__} inside": lambda cls=cls: sequence(cls()) for cls in SUBCLASSES[:24]},
    "closure": closure_module,
    "forward of an instance": instance_forward,
    "DoublesWeight": doubles_weight,
    "parametrized": parametrized,
    "shared block": shared_block,
    "weight tied to a parameter of the model": changed(Body, lambda m: setattr(m, "tied", m.conv2.weight)),
    "frozen convolution": changed(Body, lambda m: m.conv1.requires_grad_(False)),
    "frozen norm": changed(Body, lambda m: m.bn1.requires_grad_(False)),
    "norm in evaluation": changed(Body, lambda m: m.bn1.eval()),
    "frozen first half": changed(Body, lambda m: [child.requires_grad_(False).eval() for child in (m.conv1, m.bn1)]),
    "everything frozen": changed(Body, lambda m: m.requires_grad_(False).eval()),
    "norm without statistics": changed(Body, lambda m: setattr(m, "bn1", nn.BatchNorm2d(4, track_running_stats=False))),
    "norm with cumulative average": changed(Body, lambda m: setattr(m, "bn1", nn.BatchNorm2d(4, momentum=None))),
    "norm without affine": changed(Body, lambda m: setattr(m, "bn1", nn.BatchNorm2d(4, affine=False))),
    "running_mean is None": changed(Body, lambda m: m.bn1._buffers.update(running_mean=None, running_var=None)),
    "identity instead of a norm": changed(Body, lambda m: setattr(m, "bn2", nn.Identity())),
    "fx graph": lambda: torch.fx.symbolic_trace(Body()),
    "fx graph inside": lambda: sequence(torch.fx.symbolic_trace(Body())),
    "scripted": lambda: torch.jit.script(ScriptableBody()),
    "scripted inside": lambda: sequence(torch.jit.script(ScriptableBody())),
    "traced": lambda: torch.jit.trace(Body().double(), torch.ones(2, 3, 8, 8).double(), check_trace=False),
    "traced inside": lambda: sequence(
        torch.jit.trace(Body().double(), torch.ones(2, 3, 8, 8).double(), check_trace=False)
    ),
    "materialized lazy": materialized_lazy,
    "DataParallel": lambda: nn.DataParallel(Body()),
    "DataParallel inside": lambda: sequence(nn.DataParallel(Body())),
    "compiled": lambda: torch.compile(Body(), backend="eager"),
    "compiled inside": lambda: sequence(torch.compile(Body(), backend="eager")),
    "compiled in place": changed(Body, lambda m: m.compile(backend="eager")),
    "child compiled in place": changed(lambda: sequence(Body()), lambda m: m[0].compile(backend="eager")),
    "empty": lambda: nn.Sequential(),
    "identity": nn.Identity,
    "no norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
    **HOOKS,
}  # fmt: skip


class ScriptableBody(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


#: Further arguments of the models' forwards.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AnyArguments": {"scale": 3},
    "ManyArguments": {"mode": "mean", "scales": [0.5, 2], "mask": torch.ones(1), "options": {"gain": 2.0}},
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return randomize_norms(MODELS[name]()).double()


def images(step: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested output in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return list(itertools.chain(*map(tensors_of, children)))


def reset_globals() -> None:
    global COUNTER
    COUNTER = 0
    CALLS.clear()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def global_state() -> list[Any]:
    numpy_state = np.random.get_state()
    return [
        COUNTER, list(CALLS), torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(),
        numpy_state[2:], dict(os.environ), torch.is_grad_enabled(), torch.get_default_dtype(), warnings.filters[:],
        torch.is_inference_mode_enabled(), nn.Module.__call__, nn.Module.__getattr__, F.relu, F.batch_norm, torch.relu,
    ]  # fmt: skip


class Same:
    """Equality by identity; keeps the object alive, so that no other one gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = object.__hash__


def snapshot(value: Any) -> Any:
    """Return a description of an attribute: equal later if and only if nothing was written to it."""
    if isinstance(value, Tensor):
        return Same(value), value._version, value.requires_grad, Same(value.grad), value.data_ptr(), value.dtype
    if isinstance(value, dict):
        return [(key, snapshot(item)) for key, item in value.items() if not str(key).startswith("_fused_res")]
    if isinstance(value, (list, tuple, set)):
        return [snapshot(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else Same(value)


def module_state(model: nn.Module) -> list[Any]:
    return [(path, snapshot(object.__getattribute__(m, "__dict__"))) for path, m in model.named_modules()]


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """Return the numbers, strings and tensors among the attributes of all modules."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in object.__getattribute__(module, "__dict__").items():
            if key.startswith("_"):
                continue
            if isinstance(value, (int, float, str, type(None))):
                found[f"{path}.{key}"] = value
            elif not isinstance(value, nn.Module):
                found |= {f"{path}.{key}.{at}": t.detach() for at, t in enumerate(tensors_of(value))}
    return found


def run_steps(model: nn.Module, **extra: Any) -> dict[str, Any]:
    """Train for two steps, evaluate once, and return everything that can be observed."""
    reset_globals()
    seen: dict[str, Any] = {}
    training = model.training
    for step in range(2):
        x = images(step).requires_grad_()
        outputs = tensors_of(model(x, **extra))
        seen |= {f"output {at} of step {step}": y.detach().clone() for at, y in enumerate(outputs)}
        loss = sum(y.square().mean() for y in outputs if y.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
        seen[f"input gradient of step {step}"] = x.grad
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                seen[f"gradient of {name} in step {step}"] = parameter.grad
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        seen |= {f"{name} after step {step}": t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        evaluated = tensors_of(model.eval()(images(2), **extra))
    seen |= {f"output {at} in evaluation": y for at, y in enumerate(evaluated)}
    model.train(training)
    return seen | plain_attributes(model) | {"globals": global_state()[:6]}


def check_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        found = actual[name]
        if not isinstance(value, Tensor):
            assert found is None if value is None else found == value, name
        elif value.is_complex():
            assert_near(torch.view_as_real(found), torch.view_as_real(value), name)
        elif value.dtype in RELATIVE_TOLERANCE:
            assert_near(found, value, name)
        else:
            assert torch.equal(found, value), name


def count_stock_norms(model: nn.Module, **extra: Any) -> int:
    """Return the number of batch norms that a forward runs with PyTorch's operator."""
    with torch.autograd.profiler.profile() as profile:
        model(images(), **extra)
    return sum(event.name == "aten::batch_norm" for event in profile.function_events)


def check_named(model: nn.Module, stock_norms: int) -> None:
    """Check that ``summarize`` gives a reason for everything that runs stock."""
    summary = summarize(model)
    assert str(summary)
    assert all(row.why for row in summary.rows)
    names = dict(model.named_modules(remove_duplicate=False))
    assert all(row.name in names for row in summary.rows)
    # Every norm has a row, or a module around it has one.
    rows = {row.name for row in summary.rows}
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "" not in rows:
            parts = path.split(".")
            assert rows & {".".join(parts[: end + 1]) for end in range(len(parts))}, path
    # A module that runs fused in pieces is one row, which says what does not.
    assert stock_norms == 0 or summary.left or any("piece" in row.why for row in summary.rows)


class TestStockBehavior:
    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit and torch.fx are deprecated; old hooks warn
            yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", MODELS)
    def test_fuse_changes_no_state(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        model = make(name)
        reset_globals()
        capsys.readouterr()
        before, globals_before = module_state(model), global_state()
        assert fuse(model) is model
        assert module_state(model) == before and global_state() == globals_before
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", MODELS)
    def test_fused_equals_stock(self, name: str) -> None:
        extra = ARGUMENTS.get(name, {})
        stock, ours = make(name), fuse(make(name))
        check_same(run_steps(ours, **extra), run_steps(stock, **extra))
        check_named(ours, count_stock_norms(ours, **extra))

    @pytest.mark.parametrize("name", MODELS)
    def test_frozen_equals_stock(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        extra = ARGUMENTS.get(name, {})
        stock, source = make(name), make(name)
        reset_globals()
        capsys.readouterr()
        before, globals_before = module_state(source), global_state()
        try:
            copy.deepcopy(make(name))
        except Exception:
            reset_globals()
            with pytest.raises((TypeError, ValueError, RuntimeError), match="freeze|cop(y|ied)"):
                freeze(source)
            return
        reset_globals()
        ours = freeze(source)
        assert module_state(source) == before and global_state() == globals_before
        assert capsys.readouterr().out == ""
        stock.eval()
        found = []
        for model in (ours, stock):
            reset_globals()
            with torch.no_grad():
                outputs = [tensors_of(model(images(step), **extra)) for step in range(2)]
            found.append([*itertools.chain(*outputs), COUNTER, len(CALLS)])
        check_same(*(dict(enumerate(values)) for values in found))
        check_named(ours, count_stock_norms(ours, **extra))

    def test_container_inputs_and_outputs(self) -> None:
        stock = randomize_norms(ContainerInput()).double()
        ours = fuse(copy.deepcopy(stock))
        for x in (images(0), images(1)):
            inputs = {"pair": Pair(x, x + 1), "text": "unused"}
            actual, expected = ours(inputs), stock(inputs)
            assert type(actual["out"]) is Pair and actual["list"][1:] == [None, "text"]
            for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
                assert_near(a, b, "output")
            sum(t.sum() for t in tensors_of(actual)).backward()
            sum(t.sum() for t in tensors_of(expected)).backward()
        for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
            assert_near(a.grad, b.grad, name)

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_dataclass_output_keeps_its_type(self, transform: Callable[[nn.Module], Any]) -> None:
        ours = transform(ManyArguments().double())
        for mode in ("sum", "mean"):
            output = ours(images(), mode, scales=())
            assert type(output) is Output and output.note == mode and len(output.hidden) == 1

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_globals_and_environment_read_at_every_call(
        self, transform: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for cls in (GlobalScale, Environment):
            torch.manual_seed(0)
            stock = randomize_norms(cls()).double().eval()
            ours = transform(copy.deepcopy(stock))
            for value in (1.5, 3.0, -2.0):
                monkeypatch.setitem(globals(), "SCALE", value)
                monkeypatch.setenv("FUSED_RES_TEST_SCALE", str(value))
                with torch.no_grad():
                    assert_near(ours(images()), stock(images()), f"{cls.__name__}, {value}")

    @pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_hooks_on_all_modules(self, transform: Callable[[nn.Module], Any], register: str) -> None:
        torch.manual_seed(0)
        stock = randomize_norms(Body()).double().eval()
        ours, found = transform(copy.deepcopy(stock)), []
        calls: list[str] = []

        def hook(module: nn.Module, args: Any, output: Tensor | None = None) -> Any:
            calls.append(type(module).__name__)
            return args[0] * 0.5 if output is None else output * 0.5

        handle = getattr(nn.modules.module, register)(hook)
        try:
            with torch.no_grad():
                for net in (ours, stock):
                    calls.clear()
                    found.append((net(images()), list(calls)))
        finally:
            handle.remove()
        assert found[0][1] == found[1][1]
        assert_near(found[0][0], found[1][0], "output")


class TestDevicesAndShapes:
    def test_lazy_before_materialization(self) -> None:
        stock, ours = (
            nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            for _ in range(2)
        )
        fuse(ours)
        summarize(ours)
        for net in (stock, ours):
            net.double()
            torch.manual_seed(0)
            net(images())
            randomize_norms(net)
        ours.load_state_dict(stock.state_dict())
        check_same(run_steps(ours), run_steps(stock))
        check_same(run_steps(fuse(ours)), run_steps(stock))

    def test_lazy_cannot_be_frozen_before_materialization(self) -> None:
        """PyTorch cannot copy an uninitialized parameter."""
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
        with pytest.raises((TypeError, ValueError, RuntimeError), match="uninitialized"):
            freeze(model)

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_meta_device(self, transform: Callable[[nn.Module], Any]) -> None:
        with torch.device("meta"):
            model = Body()
        ours = transform(model)
        summarize(ours)
        output = ours(torch.empty(2, 3, 8, 8, device="meta"))
        assert output.is_meta and output.shape == (2, 4, 8, 8)
        assert all(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
        torch.manual_seed(0)
        values = randomize_norms(Body()).state_dict()
        ours.to_empty(device="cpu").load_state_dict(values)
        stock = Body()
        stock.load_state_dict(values)
        stock.train(ours.training)
        x = images().float()
        assert_near(ours(x).detach(), stock(x).detach(), "output after materialization")

    def test_fake_tensors(self) -> None:
        with torch._subclasses.FakeTensorMode():
            model = fuse(Body())
            y = model(torch.empty(2, 3, 8, 8))
            y.sum().backward()
        assert y.shape == (2, 4, 8, 8) and model.conv1.weight.grad.shape == (4, 3, 3, 3)

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_quantized(self, transform: Callable[[nn.Module], Any]) -> None:
        quantization = pytest.importorskip("torch.ao.quantization")
        engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
        if not engines:
            pytest.skip("this build of PyTorch has no quantized engine")

        class Quantized(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
                self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
                self.add = nn.quantized.FloatFunctional()

            def forward(self, x: Tensor) -> Tensor:
                y = self.relu(self.bn(self.conv(self.quant(x))))
                return self.dequant(self.add.add(y, y))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = randomize_norms(Quantized()).eval()
            x = images().float()
            for stage in ("float", "fused modules", "observed", "converted"):
                if stage == "fused modules":
                    model = quantization.fuse_modules(model, [["conv", "bn", "relu"]])
                if stage == "observed":
                    model.qconfig = quantization.get_default_qconfig(engines[0])
                    model = quantization.prepare(model)
                    model(x)
                if stage == "converted":
                    model = quantization.convert(model)
                with torch.no_grad():
                    expected = copy.deepcopy(model)(x)
                    ours = transform(copy.deepcopy(model))
                    assert_near(ours(x), expected, stage)
                summarize(ours)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_norms_in_float32_of_a_half_model(self, dtype: torch.dtype, transform: Callable[[nn.Module], Any]) -> None:
        """Mixed-precision recipes keep norms in float32; the results agree to the rounding of the dtype."""
        torch.manual_seed(0)
        stock = randomize_norms(Body()).to(dtype).eval()
        for norm in (stock.bn1, stock.bn2):
            norm.float()
        x = images().to(dtype)
        with torch.no_grad():
            expected, exact = stock(x), copy.deepcopy(stock).double()(x.double())
            actual = transform(copy.deepcopy(stock))(x)
        assert actual.dtype == expected.dtype
        error, allowed = ((y.double() - exact).abs().max() for y in (actual, expected))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max()


class TestFrozenInside:
    """A frozen submodule inside of a model that is fused or frozen again."""

    def test_fuse_around_a_frozen_submodule(self) -> None:
        def models() -> tuple[nn.Module, nn.Module]:
            torch.manual_seed(0)
            first = randomize_norms(sequence(nn.Conv2d(4, 4, 1))).double()
            stem = nn.Conv2d(3, 4, 1).double()
            return nn.Sequential(stem, first), nn.Sequential(copy.deepcopy(stem), copy.deepcopy(first))

        ours, stock = models()
        ours[1] = freeze(ours[1])
        stock[1].eval().requires_grad_(False)
        fuse(ours)
        found = []
        for net in (ours, stock):
            x = images().requires_grad_()
            y = net(x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad, net[0].weight.grad])
        for name, a, b in zip(("output", "input gradient", "gradient"), *found, strict=True):
            assert_near(a, b, name)
        assert not any(p.requires_grad for p in ours[1].parameters()) and not ours[1].training
        twice = freeze(ours)
        with torch.no_grad():
            assert_near(twice(images()), stock.eval()(images()), "frozen again")


@pytest.mark.usefixtures("process_group")
class TestDistributed:
    @pytest.mark.parametrize("order", ["fuse, wrap", "wrap, fuse", "wrap, train, fuse"])
    def test_distributed_data_parallel(self, order: str) -> None:
        stock, ours = make("LayersTwice"), make("LayersTwice")
        ours = DistributedDataParallel(fuse(ours)) if order == "fuse, wrap" else DistributedDataParallel(ours)
        if order == "wrap, train, fuse":
            check_same(run_steps(ours.module), run_steps(stock))
        fuse(ours)
        summarize(ours)
        actual = {name.replace("module.", "", 1): value for name, value in run_steps(ours).items()}
        expected = run_steps(stock)
        for name, value in expected.items():
            if isinstance(value, Tensor):
                key = next(k for k in (name, name.replace("gradient of ", "gradient of module.")) if k in actual)
                assert_near(actual[key], value, name)

    def test_freeze_of_a_wrapped_model(self) -> None:
        stock = make("everything frozen")
        wrapped = DistributedDataParallel(make("LayersTwice"))
        with torch.no_grad():
            expected = copy.deepcopy(wrapped.module).eval()(images())
            assert_near(freeze(wrapped.module)(images()), expected, "module")
            try:
                copy.deepcopy(wrapped)
            except Exception:
                with pytest.raises((TypeError, ValueError, RuntimeError), match="freeze|cop(y|ied)"):
                    freeze(wrapped)
            else:
                assert_near(freeze(wrapped)(images()), expected, "wrapped")
            assert_near(fuse(make("everything frozen"))(images()), stock(images()), "afterwards")

    @pytest.mark.parametrize("order", ["fuse, shard", "shard, fuse"])
    def test_fully_shard(self, order: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        stock, ours = make("Falsy"), make("Falsy")
        try:
            fully_shard(make("Falsy"), mesh=mesh)(images())
        except Exception as error:
            pytest.skip(f"FSDP does not run on this machine in stock PyTorch: {type(error).__name__}: {error}")
        if order == "fuse, shard":
            fuse(ours)
        fully_shard(ours, mesh=mesh)
        fuse(ours)
        summarize(ours)
        for net in (ours, stock):
            net(images()).square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            gradient: Any = a.grad
            assert_near(gradient.full_tensor(), b.grad, name)
        for (name, a), b in zip(ours.named_buffers(), stock.buffers(), strict=True):
            assert_near(a, b, name)


@pytest.mark.parametrize("value", [None, 3, "model", [nn.ReLU()], nn.ReLU, torch.ones(2)])
def test_not_a_module(value: Any) -> None:
    for function in (fuse, freeze, summarize):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
            function(value)
