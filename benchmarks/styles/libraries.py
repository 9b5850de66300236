"""Hugging Face and OpenMMLab: modules of layers, norms by name, closures, output objects."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.style import CLASSES, Style, conv1x1, conv3x3, global_pool

ACT2FN = {"relu": nn.ReLU, "linear": nn.Identity}


class ConvLayer(nn.Module):
    """Hugging Face: convolution, normalization, activation; the activation's class comes from a table."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, act: str = "relu"
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = ACT2FN[act]() if act is not None else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        hidden_state = self.activation(hidden_state)
        return hidden_state


class ShortCut(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.convolution = conv1x1(in_channels, out_channels, stride)
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return hidden_state


class BasicLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        resized = in_channels != out_channels or stride != 1
        self.shortcut = ShortCut(in_channels, out_channels, stride) if resized else nn.Identity()
        self.layer = nn.Sequential(
            ConvLayer(in_channels, out_channels, stride=stride),
            ConvLayer(out_channels, out_channels, act="linear"),
        )
        self.activation = ACT2FN["relu"]()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


@dataclass
class ModelOutput:
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(BasicLayer(i, o, stride), BasicLayer(o, o, 1))
            for i, o, stride in ((width, width, 1), (width, 2 * width, 2))
        )

    def forward(self, hidden_state: Tensor, output_hidden_states: bool = False) -> ModelOutput:
        hidden_states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        for stage_module in self.stages:
            if output_hidden_states and hidden_states is not None:
                hidden_states = (*hidden_states, hidden_state)
            hidden_state = stage_module(hidden_state)
        return ModelOutput(last_hidden_state=hidden_state, hidden_states=hidden_states)


class ForImageClassification(nn.Module):
    def __init__(self, width: int, return_dict: bool = False) -> None:
        super().__init__()
        self.return_dict = return_dict
        self.embedder = ConvLayer(3, width, kernel=7, stride=2)
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.encoder = Encoder(width)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2 * width, CLASSES))

    def forward(self, pixel_values: Tensor) -> Tensor | ModelOutput:
        embedding = self.pooler(self.embedder(pixel_values))
        outputs = self.encoder(embedding, output_hidden_states=self.return_dict)
        logits = self.classifier(F.adaptive_avg_pool2d(outputs.last_hidden_state, (1, 1)))
        if not self.return_dict:
            return logits
        return ModelOutput(outputs.last_hidden_state, outputs.hidden_states, logits)


class ConvModule(nn.Module):
    """OpenMMLab: layers run in the order of a tuple of names; the norm is found by its name."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(out_channels))
        self.with_activation = act
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class MMBasicBlock(nn.Module):
    """The forward is a closure, which `with_cp` would checkpoint; norms are properties over names."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.add_module(self.norm1_name, nn.BatchNorm2d(out_channels))
        self.conv2 = conv3x3(out_channels, out_channels)
        self.add_module(self.norm2_name, nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU(inplace=True)
        resized = stride != 1 or in_channels != out_channels
        self.downsample = ConvModule(in_channels, out_channels, 1, stride, act=False) if resized else None
        self.with_cp = False
        self.drop_path = nn.Identity()

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            out = self.conv2(out)
            out = self.norm2(out)
            if self.downsample is not None:
                identity = self.downsample(x)
            out = self.drop_path(out)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        return self.relu(out)


class MMBottleneck(nn.Module):
    """Three ConvModules and an addition."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        planes = out_channels // 4
        self.conv1 = ConvModule(in_channels, planes, 1)
        self.conv2 = ConvModule(planes, planes, 3, stride)
        self.conv3 = ConvModule(planes, out_channels, 1, act=False)
        resized = stride != 1 or in_channels != out_channels
        self.downsample = ConvModule(in_channels, out_channels, 1, stride, act=False) if resized else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.conv3(self.conv2(self.conv1(x)))
        return self.relu(out + identity)


class MMResNet(nn.Module):
    """Stages are added by name and looked up in the forward; features are returned as a tuple, here of one."""

    def __init__(self, block: Any, width: int, expansion: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm1_name = "bn1"
        self.add_module(self.norm1_name, nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.res_layers: list[str] = []
        first, second = width * expansion, 2 * width * expansion
        for index, (inner, outer, stride) in enumerate(((width, first, 1), (first, second, 2))):
            self.res_layers.append(f"layer{index + 1}")
            self.add_module(self.res_layers[-1], nn.Sequential(block(inner, outer, stride), block(outer, outer, 1)))
        self.out_indices = (1,)
        self.fc = nn.Linear(second, CLASSES)

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.norm1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            res_layer = getattr(self, layer_name)
            x = res_layer(x)
            if i in self.out_indices:
                outs.append(x)
        return self.fc(global_pool(tuple(outs)[-1]))


STYLES = (
    Style(
        "hugging-face",
        ForImageClassification,
        "conv-norm-act modules, hidden_state += residual, an output object between modules",
        twin="torchvision-basic",
    ),
    Style(
        "hugging-face-output",
        lambda width: ForImageClassification(width, return_dict=True),
        "returns an object with the hidden states",
    ),
    Style(
        "mmcv-closure",
        lambda width: MMResNet(MMBasicBlock, width),
        "norms by name, a closure _inner_forward, ConvModule as projection",
        twin="torchvision-basic",
    ),
    Style(
        "mmcv-conv-module",
        lambda width: MMResNet(MMBottleneck, width, expansion=2),
        "ConvModule loops over a tuple of names",
        twin="torchvision-bottleneck",
    ),
)
