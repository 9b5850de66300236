"""Random residual networks as source text, which is executed, so that a tracer reads real code in real spellings.

A network has one to three blocks. Most of a block is a common spelling of convolution -> norm -> ReLU with an addition;
each place has a small probability of an operator, a branch or a side effect that a fused forward must preserve.
"""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")

IMPORTS = """\
import random
import torch
from torch import nn
from torch.nn import functional as F
from torch.ao.nn.quantized import FloatFunctional
from torch.utils.checkpoint import checkpoint
"""

#: Helpers of a network's module, of which the source holds the ones that it uses.
HELPERS = {
    "SCALE": "SCALE = 0.5\n",
    "rectify": "def rectify(x):\n    return F.relu(x)\n",
    "merge": "def merge(a, b):\n    return a + b\n",
    "Lambda": """\
class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
""",
    "Opaque": """\
class Opaque(nn.Module):
    def forward(self, x):
        if x.sum() > 1e9:
            return x * 2
        return x
""",
    "SqueezeExcite": """\
class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 2, 1)
        self.expand = nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
""",
    "ConvNorm": """\
class ConvNorm(nn.Module):
    def __init__(self, conv, norm, act=None):
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)
""",
    "NormedConv": """\
class NormedConv(nn.Conv2d):
    def __init__(self, *args, norm, act=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.act = norm, act

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)
""",
    "Wrapper": """\
class Wrapper(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)
""",
}


@dataclass(frozen=True)
class Network:
    """The source of a module with a class ``Net``; its repr can be pasted into a list of explicit examples.

    Args:
        source: Python source.
        channels: channels of the input.
        extra: whether ``Net.forward`` has an optional second argument of the input's shape.
        supported: norms of one forward in a pattern that `fuse` supports and in code that a tracer can read.
    """

    source: str
    channels: int = 4
    extra: bool = False
    supported: int = 0

    def __repr__(self) -> str:
        fields = f"channels={self.channels}, extra={self.extra}, supported={self.supported}"
        return f'Network({fields}, source="""\\\n{self.source}""")'


@contextlib.contextmanager
def imported(network: Network) -> Iterator[types.ModuleType]:
    """Execute the source as an importable module: pickle finds its classes, and inspect their source."""
    name = "random_network_" + hashlib.sha256(network.source.encode()).hexdigest()[:12]
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    lines = network.source.splitlines(keepends=True)
    linecache.cache[module.__file__] = (len(network.source), None, lines, module.__file__)
    sys.modules[name] = module
    try:
        exec(compile(network.source, module.__file__, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name], linecache.cache[module.__file__]


class Spelling(NamedTuple):
    """Code that computes one operator.

    Args:
        code: an expression or statements; ``{x}`` is the tensor, ``{r}`` a second one, ``{m}`` the child, ``{c}`` the
            number of channels, ``{half}`` and ``{twice}`` are fractions of it.
        child: constructor of an attribute of the module, or "".
        readable: whether a tracer can read the code; if not, the module's own norms need not be fused.
    """

    code: str
    child: str = ""
    readable: bool = True


# An example shrinks to the first entry of a list.

RELUS = (
    *[Spelling("F.relu({x})"), Spelling("{m}({x})", "nn.ReLU()"), Spelling("{m}({x})", "nn.ReLU(inplace=True)")] * 2,
    Spelling("F.relu({x}, inplace=True)"),
    Spelling("F.relu_({x})"),
    Spelling("torch.relu({x})"),
    Spelling("torch.relu_({x})"),
    Spelling("{x}.relu()"),
    Spelling("{x}.relu_()"),
    Spelling("{x}.clamp_min(0)"),
    Spelling("{x}.clamp(min=0)"),
    Spelling("{x}.clamp_(min=0)"),
    Spelling("torch.clamp({x}, min=0.0)"),
    Spelling("nn.ReLU()({x})"),
    Spelling("nn.ReLU(inplace=True)({x})"),
    Spelling("rectify({x})"),
)

OTHER_ACTIVATIONS = (
    Spelling("F.leaky_relu({x}, 0.1)"),
    Spelling("torch.sigmoid({x})"),
    Spelling("F.hardswish({x})"),
    Spelling("{m}({x})", "nn.SiLU()"),
    Spelling("{m}({x})", "nn.LeakyReLU(0.1, inplace=True)"),
    Spelling("{x}.clamp_min(0.1)"),
    Spelling("{x}.clamp(0, 1)"),
    Spelling("{x}.clamp(min=-0.5)"),
    Spelling("F.relu6({x})"),
)

#: Statements that add the tensor {r} to {x}; the result is {x}.
ADDITIONS = (
    *[Spelling("{x} = {x} + {r}"), Spelling("{x} += {r}"), Spelling("{x} = {r} + {x}")] * 2,
    Spelling("{x} = torch.add({x}, {r})"),
    Spelling("{x} = torch.add({r}, {x})"),
    Spelling("{x} = {x}.add({r})"),
    Spelling("{x} = {x}.add_({r})"),
    Spelling("{x}.add_({r})"),
    Spelling("{x} = merge({x}, {r})"),
    Spelling("{x} = torch.add({x}, {r}, alpha=1)"),
    Spelling("{x} = {m}.add({x}, {r})", "FloatFunctional()"),
    Spelling("{x} = {m}.add_relu({x}, {r})", "FloatFunctional()"),
)

OTHER_ADDITIONS = (
    Spelling("{x} = torch.add({x}, {r}, alpha=2)"),
    Spelling("{x} = {x} * 0.5 + {r}"),
    Spelling("{x} = {x} + 2 * {r}"),
    Spelling("{x} = {x} - {r}"),
    Spelling("{x} = sum([{x}, {r}])"),
    Spelling("{x} = torch.stack([{x}, {r}]).sum(0)"),
    Spelling("{r} += {x}\n{x} = {r}"),
    Spelling("{x} = {r}.add_({x})"),
    Spelling("{x} = {x} + {r}.mean((2, 3), keepdim=True)"),
    Spelling("{x} = {x} + {r}[:1]"),
    Spelling("{x} = {x} + {r} + {r}"),
    Spelling("{x} = torch.maximum({x}, {r})"),
)

#: Statements that replace {x} by a tensor of the same shape, or that have a side effect.
FOREIGN = (
    Spelling("{x} = {x}.clone()"),
    Spelling("{x} = {x}.contiguous()"),
    Spelling("{x} = {x}.detach()"),
    Spelling("{x} = F.dropout({x}, 0.3, self.training)"),
    Spelling("{x} = {m}({x})", "nn.Dropout(0.3)"),
    Spelling("{x} = {m}({x})", "nn.Dropout2d(0.3, inplace=True)"),
    Spelling("{x} = {x} * torch.sigmoid({x}.mean((2, 3), keepdim=True))"),
    Spelling("{x} = {m}({x})", "SqueezeExcite({c})"),
    Spelling("{x} = {m}(torch.cat([{x}, {x}], 1))", "nn.Conv2d({twice}, {c}, 1)"),
    Spelling("n, c, h, w = {x}.shape\n{x} = {x}.reshape(n, 2, {half}, h, w).transpose(1, 2).reshape(n, c, h, w)"),
    Spelling("a, b = {x}.split([1, {c} - 1], 1)\n{x} = torch.cat([b, a], 1)"),
    Spelling("a, b = {x}.chunk(2, 1)\n{x} = torch.cat([b, a], 1)"),
    Spelling("{x} = {x} * {m}", "nn.Parameter(torch.full(({c}, 1, 1), 0.5))"),
    Spelling("{x} = {x}.flatten(2).view({x}.shape)"),
    Spelling("{x} = {x}.view({x}.shape[0], -1).view_as({x})"),
    Spelling("{x} = F.max_pool2d({x}, 3, 1, 1)"),
    Spelling("{x} = {m}({x})", "nn.MaxPool2d(3, 1, 1)"),
    Spelling("{x} = F.avg_pool2d({x}, 3, 1, 1)"),
    Spelling("{x} = {m}({x})", "Opaque()"),
    Spelling("{x} = {m}({x})", "nn.Identity()"),
    Spelling("{x} = {m}({x})", "nn.BatchNorm2d({c})"),
    Spelling("{x} = checkpoint(rectify, {x}, use_reentrant=False)"),
    # in-place operations, also on values with other uses
    Spelling("{x}.mul_(0.5)"),
    Spelling("{x} *= 0.5"),
    Spelling("{x}[:, :1] = 0.25"),
    Spelling("{x}.detach().mul_(0.5)"),
    Spelling("{x} = {x}.flatten(2).mul_(0.5).view({x}.shape)"),
    # branches
    Spelling("if self.training:\n    {x} = {x} * 0.5"),
    Spelling("if not self.training:\n    {x} = {x} * 0.5"),
    Spelling("if {m}:\n    {x} = {x} * 0.5", "True"),
    Spelling("if {m} is not None:\n    {x} = {m}({x})", "None"),
    Spelling("if {x}.shape[1] == 4:\n    {x} = {x} * 0.5"),
    Spelling("if {x}.shape[0] == 1 or {x}.size(-1) > 6:\n    {x} = {x} * 0.5"),
    Spelling("if {x}.numel() == 0:\n    {x} = {x} + 1"),
    Spelling("assert {x}.dim() == 4"),
    Spelling("if {x}.is_contiguous():\n    {x} = {x} * 0.5", readable=False),
    Spelling("if {x}.requires_grad:\n    {x} = {x} * 0.5", readable=False),
    Spelling("if {x}.dtype == torch.bfloat16:\n    {x} = {x} * 0.5", readable=False),
    Spelling("if torch.is_grad_enabled():\n    {x} = {x} * 0.5", readable=False),
    Spelling("if torch.is_autocast_enabled('cpu'):\n    {x} = {x} * 0.5", readable=False),
    Spelling("if {x}.sum() > 1e9:\n    {x} = {x} * 2", readable=False),
    Spelling("with torch.no_grad():\n    {x} = {x} * 0.5", readable=False),
    # randomness, side effects, and state that the module does not hold as a parameter, buffer or child
    Spelling("if self.training:\n    {x} = {x} * (torch.rand({x}.shape[0], 1, 1, 1) < 0.8)", readable=False),
    Spelling("if random.random() < 0.5:\n    {x} = {x} * 0.5", readable=False),
    Spelling("{m} = {m} + 1", "0", readable=False),
    Spelling("{m} = {x}.detach()", "None", readable=False),
    Spelling("{m}.append(1)", "[]", readable=False),
    Spelling("{x} = {x} * {m}['gain']", "{'gain': 0.5}", readable=False),
    Spelling("{x} = {x} * self.gain"),
    Spelling("{x} = {x} * SCALE", readable=False),
)

NORMS = (
    *["nn.BatchNorm2d({c})"] * 12,
    "nn.BatchNorm2d({c}, affine=False)",
    "nn.BatchNorm2d({c}, momentum=None)",
    "nn.BatchNorm2d({c}, track_running_stats=False)",
    "nn.BatchNorm2d({c}, eps=1e-3, momentum=0.3)",
    "nn.GroupNorm(1, {c})",
    "nn.Identity()",
)


class Choices:
    """Choices made by random bytes, one byte each; an exhausted source chooses the first option.

    One draw of bytes gives more different examples than many draws: Hypothesis makes half of its examples by repeating
    draws of another example.
    """

    def __init__(self, data: bytes) -> None:
        self.data = iter(data)

    def pick(self, options: Sequence[T]) -> T:
        return options[next(self.data, 0) * len(options) >> 8]


def sequential(*modules: str) -> str:
    return f"nn.Sequential({', '.join(modules)})"


class Writer:
    """Source of one module class with ``forward(self, x)``.

    Args:
        choices: source of all choices.
        name: name of the class.
        oddity: factor of the probability of everything that is not common.
    """

    def __init__(self, choices: Choices, name: str, oddity: int) -> None:
        self.pick, self.name, self.oddity = choices.pick, name, oddity
        self.init: list[str] = []
        self.body: list[str] = []
        self.methods: list[str] = []
        self.arguments = "self, x"
        self.supported = 0
        self.readable = True
        self.shared_relu = self.pick((False, True))

    def rarely(self, one_in: int = 10) -> bool:
        return self.pick(range(one_in)) >= one_in - self.oddity

    def child(self, name: str, constructor: str) -> str:
        """Add ``self.<name><number> = constructor`` to ``__init__``; return the attribute's expression."""
        attribute = f"self.{name}{len(self.init)}"
        self.init.append(f"{attribute} = {constructor}")
        return attribute

    def spell(self, spelling: Spelling, x: str, channels: int, r: str = "") -> str:
        """Return the spelling's code for the tensors named `x` and `r`."""
        sizes = {"c": channels, "half": channels // 2, "twice": 2 * channels}

        def fill(text: str, m: str = "") -> str:
            for name, value in {"x": x, "r": r, "m": m, **sizes}.items():
                text = text.replace("{" + name + "}", str(value))
            return text

        self.readable &= spelling.readable
        return fill(spelling.code, self.child("op", fill(spelling.child)) if spelling.child else "")

    def activate(self, x: str, channels: int) -> str:
        """Return an expression that applies an activation to `x`: a ReLU, or rarely another one."""
        if self.rarely(12):
            return self.spell(self.pick(OTHER_ACTIVATIONS), x, channels)
        spelling = self.pick(RELUS)
        if spelling.child and self.shared_relu:
            if not any(line.startswith("self.relu ") for line in self.init):
                self.init.append(f"self.relu = {spelling.child}")
            return f"self.relu({x})"
        return self.spell(spelling, x, channels)

    def foreign(self, x: str, channels: int, one_in: int = 12) -> None:
        """Rarely append a foreign operator on `x`, a name."""
        even = channels % 2 == 0
        if self.rarely(one_in):
            options = [s for s in FOREIGN if even or not ("{half}" in s.code or "chunk" in s.code)]
            self.body += self.spell(self.pick(options), x, channels).split("\n")

    def conv_arguments(self, inputs: int, outputs: int, stride: int) -> str:
        kernel = self.pick((3, 3, 1))
        dilation = 2 if kernel == 3 and self.rarely() else 1
        groups = self.pick([g for g in (1, 1, 1, 2, 4) if inputs % g == outputs % g == 0])
        padding = dilation * (kernel // 2)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        text = "".join(f", {k}={v}" for k, v in options.items() if v != (0 if k == "padding" else 1))
        if self.rarely(20):
            text += ", padding_mode='circular'"
        return f"{inputs}, {outputs}, {kernel}{text}" + ("" if self.rarely(3) else ", bias=False")

    def unit(self, x: str, out: str, inputs: int, outputs: int, stride: int = 1, act: bool = True) -> str:
        """Append ``out = act(norm(conv(x)))`` in one of its spellings; return `out`."""
        arguments = self.conv_arguments(inputs, outputs, stride)
        conv = f"nn.Conv2d({arguments})"
        norm = self.pick(NORMS).replace("{c}", str(outputs))
        supported = norm.startswith("nn.BatchNorm2d") and "circular" not in arguments
        style = self.pick(
            (
                "lines",
                "lines",
                "nested",
                "sequential",
                "ConvNorm",
                "NormedConv",
                "method",
                "closure",
                "norm first",
                "bare",
            )
        )
        if style in ("NormedConv", "ConvNorm"):
            head = f"NormedConv({arguments}, norm={norm}" if style == "NormedConv" else f"ConvNorm({conv}, {norm}"
            relu = self.pick((", act=nn.ReLU()", ", act=nn.ReLU(inplace=True)")) if act else ""
            self.body.append(f"{out} = {self.child('unit', head + relu + ')')}({x})")
        elif style == "sequential":
            layers = [conv, norm] + ([self.pick(("nn.ReLU()", "nn.ReLU(inplace=True)"))] if act else [])
            self.body.append(f"{out} = {self.child('unit', sequential(*layers))}({x})")
        elif style == "nested":
            conv, norm = self.child("conv", conv), self.child("norm", norm)
            value = f"{norm}({conv}({x}))"
            self.body.append(f"{out} = {self.activate(value, outputs) if act else value}")
        elif style in ("method", "closure"):
            conv, norm = self.child("conv", conv), self.child("norm", norm)
            value = f"{norm}({conv}(y))"
            lines = [f"    y = {value}", f"    return {self.activate('y', outputs) if act else 'y'}"]
            name = f"unit{len(self.init)}_{len(self.methods)}"
            if style == "method":
                self.methods += [f"def {name}(self, y):", *lines, ""]
                self.body.append(f"{out} = self.{name}({x})")
            else:
                self.body += [f"def {name}(y):", *lines, f"{out} = {name}({x})"]
        elif style == "norm first":
            first = self.child("norm", f"nn.BatchNorm2d({inputs})")
            self.body.append(f"{out} = {self.child('conv', conv)}({self.activate(f'{first}({x})', inputs)})")
            supported = True
        elif style == "bare":
            value = f"{self.child('conv', conv)}({x})"
            self.body.append(f"{out} = {self.activate(value, outputs) if act else value}")
            supported = False
        else:
            supported &= self.lines(x, out, inputs, outputs, stride, act, conv, norm)
        self.supported += supported
        return out

    def lines(self, x: str, out: str, inputs: int, outputs: int, stride: int, act: bool, conv: str, norm: str) -> bool:
        """Append a unit, one statement for each operator; return whether nothing intervenes."""
        conv, norm = self.child("conv", conv), self.child("norm", norm)
        start = len(self.body)
        self.body.append(f"{out} = {conv}({x})")
        self.foreign(out, outputs, 25)
        kept = self.pick((out, norm)) if self.rarely() else None
        if kept == out:  # the convolution's output has a second use
            self.body.append(f"kept = {out}")
        self.body.append(f"{out} = {norm}({out})")
        if kept == norm:
            self.body.append(f"kept = {out}")
        self.foreign(out, outputs, 25)
        if act:
            self.body.append(f"{out} = {self.activate(out, outputs)}")
        if kept:
            self.body.append(f"{out} = {out} + 0.5 * kept")
        plain = len(self.body) - start == 2 + act
        if inputs == outputs and stride == 1 and self.rarely():  # the same layers twice
            self.body += [line.replace(f"({x})", f"({out})") for line in self.body[start:]]
            return False
        if self.rarely(30):
            self.body[start:] = ["with torch.no_grad():", *["    " + line for line in self.body[start:]]]
            self.readable = False
        return plain

    def render(self) -> str:
        code = "\n".join([*self.methods, *self.body])
        lines = ["gain = 0.5", ""] if "self.gain" in code else []
        lines += ["def __init__(self):", "    super().__init__()", *["    " + line for line in self.init]]
        lines += ["", *self.methods, f"def forward({self.arguments}):", *["    " + line for line in self.body]]
        return f"class {self.name}(nn.Module):\n" + "".join(f"    {line}\n" if line else "\n" for line in lines)


class Block(NamedTuple):
    """A block's class: its name and source, and how a network calls it."""

    name: str
    source: str
    outputs: int
    stride: int
    tapped: bool
    residual_argument: bool
    supported: int


def write_block(choices: Choices, name: str, inputs: int, oddity: int) -> Block:
    writer = Writer(choices, name, oddity)
    same = writer.pick((True, False))
    outputs = inputs if same else writer.pick((4, 8, 6, 2, 3, 5))
    stride = 1 if same else writer.pick((1, 2))
    same = same or (stride == 1 and outputs == inputs)
    tap = writer.pick(("unit", "addition", "activation")) if writer.rarely(8) else None  # a second output
    residual_argument = same and writer.rarely(8)
    body = writer.body
    writer.foreign("x", inputs, 20)
    if residual_argument:
        writer.arguments += ", residual=None"
        body += ["if residual is None:", "    residual = x"]

    projection = [f"nn.Conv2d({writer.conv_arguments(inputs, outputs, stride)})", f"nn.BatchNorm2d({outputs})"]
    kinds = (
        ["projection", "attributes", "relu", "pooled", "ConvNorm", "convolution"] if writer.pick((False, True)) else []
    )
    if same:
        kinds = ["identity", "identity", "none attribute", "empty", "nn.Identity", "lambda", "early", "missing", *kinds]
    elif outputs >= inputs:
        kinds += ["padded"]
    kind = "argument" if residual_argument else writer.pick(kinds or ["projection"])
    late = writer.pick((False, True))  # the shortcut is called after the branch

    def shortcut() -> None:
        if kind in ("identity", "early"):
            body.append("identity = x")
        elif kind == "argument":
            body.append("identity = residual")
        elif kind == "none attribute":
            writer.init.append(f"self.shortcut = {writer.pick(('None', sequential(*projection)))}")
            body.extend(["identity = x", "if self.shortcut is not None:", "    identity = self.shortcut(x)"])
        elif kind == "attributes":
            body.append(f"identity = {writer.child('norm', projection[1])}({writer.child('conv', projection[0])}(x))")
        elif kind != "missing":
            pool = f"nn.AvgPool2d({stride}, {stride}, ceil_mode=True)"
            unstrided = projection[0].replace(f", stride={stride}", "")
            modules = {
                "empty": "nn.Sequential()",
                "nn.Identity": "nn.Identity()",
                "lambda": "Lambda(lambda x: x[:, :])",
                "padded": f"Lambda(lambda x: F.pad(x[:, :, ::{stride}, ::{stride}], "
                f"(0, 0, 0, 0, {(outputs - inputs) // 2}, {outputs - inputs - (outputs - inputs) // 2})))",
                "projection": sequential(*projection),
                "relu": sequential(*projection, "nn.ReLU(inplace=True)"),
                "pooled": sequential(pool, unstrided, projection[1]),
                "ConvNorm": f"ConvNorm({', '.join(projection)})",
                "convolution": projection[0],
            }
            writer.init.append(f"self.shortcut = {modules[kind]}")
            body.append("identity = self.shortcut(x)")

    if not late:
        shortcut()
    channels, current = inputs, "x"
    units = writer.pick((1, 2, 3))
    last_act = writer.rarely(5)
    for index in range(units):
        width = outputs if index == units - 1 else writer.pick((4, 8, 6, 3))
        act = index < units - 1 or last_act
        current = writer.unit(current, "out", channels, width, stride if index == 0 else 1, act)
        channels = width
        if index == 0 and tap == "unit":
            body.append("tap = out")
        writer.foreign("out", channels)
    if late:
        shortcut()
    if tap == "addition":
        body.append("tap = out")
    if kind != "missing":
        spelling = writer.pick(OTHER_ADDITIONS if writer.rarely(8) else ADDITIONS)
        body += writer.spell(spelling, "out", outputs, "identity").split("\n")
    if tap == "activation":
        body.append("tap = out")
    if not writer.rarely(6):
        body.append(f"out = {writer.activate('out', outputs)}")
    writer.foreign("out", outputs, 15)
    body.append("return out, tap" if tap else "return out")
    # Only a plain projection's norm is certain to run in a supported pattern.
    plain = "circular" not in projection[0]
    supported = writer.supported + (plain and kind in ("projection", "attributes", "relu", "pooled", "ConvNorm"))
    source = writer.render()
    supported = supported if writer.readable and not tap else 0
    return Block(name, source, outputs, stride, tap is not None, residual_argument, supported)


def write_network(choices: Choices) -> Network:
    """Return a network of one to three blocks for images of about 6 x 6 pixels."""
    oddity = choices.pick((0, 1, 2, 3))
    net = Writer(choices, "Net", oddity)
    channels = start = net.pick((4, 3, 2))
    size = 6
    extra = net.rarely(4)
    sources = []
    if extra:
        net.arguments += ", extra=None"
        net.body += ["if extra is not None:", "    x = x + extra"]
    if net.pick((False, True)):  # a stem
        width = net.pick((4, 8, 6))
        net.unit("x", "x", channels, width)
        channels = width
        if net.rarely(3):
            net.body.append(f"x = {net.child('pool', 'nn.MaxPool2d(3, 2, 1)')}(x)")
            size = 3
    supported = 0
    results: list[str] = []  # further outputs
    pending: list[str] = []  # constructors of consecutive blocks in one container

    def flush() -> None:
        if not pending:
            return
        stage, style = sequential(*pending), net.pick(("Sequential", "ModuleList", "named", "Wrapper"))
        pending.clear()
        if style == "ModuleList":
            net.body += [f"for layer in {net.child('layers', f'nn.ModuleList({stage})')}:", "    x = layer(x)"]
        elif style == "named":
            layers = net.child("stage", stage)
            net.body += [f"for name in {layers}._modules:", f"    x = getattr({layers}, name)(x)"]
        else:
            net.body.append(f"x = {net.child('stage', f'Wrapper({stage})' if style == 'Wrapper' else stage)}(x)")
        if net.rarely(5):
            results.append(f"feature{len(net.body)}")
            net.body.append(f"{results[-1]} = x")

    for index in range(net.pick((1, 2, 3))):
        block = write_block(choices, f"Block{index}", channels, oddity)
        size = -(-size // block.stride)
        sources.append(block.source)
        constructor = f"{block.name}()"
        if net.rarely(15):
            sources.append(
                f"class Derived{index}({block.name}):\n    def forward(self, x):\n        return super().forward(x)\n"
            )
            constructor = f"Derived{index}()"
        channels = block.outputs
        derived = constructor.startswith("Derived")
        if block.tapped or (block.residual_argument and not derived) or net.pick((True, False)):
            flush()
            attribute = net.child("block", constructor)
            argument = (
                ", residual=x * 0.5" if block.residual_argument and not derived and net.pick((False, True)) else ""
            )
            if block.tapped:
                net.body.append(f"x, tap{index} = {attribute}(x{argument})")
                results.append(f"tap{index}")
            else:
                net.body.append(f"x = {attribute}(x{argument})")
                if net.rarely(8):
                    results.append(f"feature{len(net.body)}")
                    net.body.append(f"{results[-1]} = x")
            net.foreign("x", channels, 20)
        else:
            pending.append(constructor)
        supported += block.supported
    flush()
    if net.rarely(4):
        net.body.append(f"x = {net.child('head', f'nn.Linear({channels}, 3)')}(x.mean((2, 3)))")
    if results:
        form = net.pick(("tuple", "list", "dict"))
        texts = {
            "tuple": f"x, {', '.join(results)}",
            "list": f"[x, {', '.join(results)}]",
            "dict": "{'x': x, " + ", ".join(f"'{name}': {name}" for name in results) + "}",
        }
        net.body.append(f"return {texts[form]}")
    else:
        net.body.append("return x")
    sources.append(net.render())
    text = "\n\n".join(sources)
    helpers = [source for name, source in HELPERS.items() if name in text]
    supported += net.supported if net.readable else 0
    return Network("\n\n".join([IMPORTS, *helpers, *sources]), start, extra, supported)
