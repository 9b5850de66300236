"""Networks that use a residual network in parts: encoders, pyramids, several inputs or outputs."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.styles.cifar import BasicBlock as CifarBlock
from benchmarks.styles.style import CLASSES, Style, conv3x3, conv_norm_relu, global_pool
from benchmarks.styles.torchvision_like import BasicBlock, Bottleneck, ResNet


class DoubleConv(nn.Module):
    """Convolution, norm and ReLU twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            *conv_norm_relu(in_channels, out_channels), *conv_norm_relu(out_channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Features of the encoder are concatenated in the decoder. Ronneberger et al., U-Net, 2015."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), CifarBlock(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), CifarBlock(2 * width, 4 * width))
        self.up1 = DoubleConv(6 * width, 2 * width)
        self.up2 = DoubleConv(3 * width, width)
        self.outc = nn.Conv2d(width, 2, 1)

    def decode(self, x: Tensor, skip: Tensor, up: nn.Module) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
        return up(torch.cat([skip, x], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.decode(x3, x2, self.up1)
        x = self.decode(x, x1, self.up2)
        return self.outc(x)


class ListEncoder(nn.Module):
    """Calls the parts of a stock network from outside and collects features in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = ResNet(BasicBlock, width)
        self.encoder.fc = nn.Identity()  # type: ignore[assignment]

    def forward(self, input_image: Tensor) -> list[Tensor]:
        features = []
        x = (input_image - 0.45) / 0.225
        x = self.encoder.conv1(x)
        x = self.encoder.bn1(x)
        features.append(self.encoder.relu(x))
        features.append(self.encoder.layer1(self.encoder.maxpool(features[-1])))
        features.append(self.encoder.layer2(features[-1]))
        return features


class AttributeEncoder(ListEncoder):
    """The features are an attribute of the module, written in the forward."""

    def forward(self, input_image: Tensor) -> list[Tensor]:
        self.features: list[Tensor] = []
        x = (input_image - 0.45) / 0.225
        x = self.encoder.conv1(x)
        x = self.encoder.bn1(x)
        self.features.append(self.encoder.relu(x))
        self.features.append(self.encoder.layer1(self.encoder.maxpool(self.features[-1])))
        self.features.append(self.encoder.layer2(self.features[-1]))
        return self.features


class LayerGetter(nn.ModuleDict):
    """The children of a network, run in order; some of their outputs are returned by name."""

    def __init__(self, model: nn.Module, return_layers: dict[str, str]) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        remaining = set(return_layers)
        for name, module in model.named_children():
            children[name] = module
            remaining.discard(name)
            if not remaining:
                break
        super().__init__(children)
        self.return_layers = return_layers

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        out: OrderedDict[str, Tensor] = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


class DictOutput(nn.Module):
    """A segmentation network: a backbone that returns a dict, and two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = LayerGetter(ResNet(Bottleneck, width), {"layer1": "aux", "layer2": "out"})
        self.classifier = nn.Sequential(conv_norm_relu(4 * width, width), nn.Dropout(0.1), nn.Conv2d(width, 2, 1))
        self.aux_classifier = nn.Sequential(conv_norm_relu(2 * width, width), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        features = self.backbone(x)
        result = {}
        for key, head in (("out", self.classifier), ("aux", self.aux_classifier)):
            y = head(features[key])
            result[key] = F.interpolate(y, size=input_shape, mode="bilinear", align_corners=False)
        return result


class FeaturePyramid(nn.Module):
    """A pathway from coarse to fine features adds them up. Lin et al., Feature pyramid networks, 2017."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = LayerGetter(ResNet(BasicBlock, width), {"relu": "c1", "layer1": "c2", "layer2": "c3"})
        self.inner = nn.ModuleDict(
            {f"c{i + 1}": nn.Conv2d(c, width, 1) for i, c in enumerate((width, width, 2 * width))}
        )
        self.outer = nn.ModuleDict({name: conv_norm_relu(width, width) for name in self.inner})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        names = list(self.inner)
        top = self.inner[names[-1]](features[names[-1]])
        results = {names[-1]: self.outer[names[-1]](top)}
        for name in reversed(names[:-1]):
            lateral = self.inner[name](features[name])
            top = lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
            results[name] = self.outer[name](top)
        return results


class EarlyExit(nn.Module):
    """A flag of the constructor decides where the forward returns; the later layers exist and do not run."""

    def __init__(self, width: int, exit_after: int | None = 1) -> None:
        super().__init__()
        self.exit_after = exit_after
        self.stem = conv_norm_relu(3, width, stride=2)
        self.blocks = nn.ModuleList([CifarBlock(width, width), CifarBlock(width, width), CifarBlock(width, width)])
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.exit_after:
                return self.linear(global_pool(x))
        return self.linear(global_pool(x))


class Siamese(nn.Module):
    """Two images through one trunk, then their cross-correlation. Bertinetto et al., SiamFC, 2016."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv3x3(3, width, 2),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            CifarBlock(width, 2 * width, 2),
            CifarBlock(2 * width, 2 * width),
        )
        self.adjust = nn.BatchNorm2d(1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z = self.features(z)
        x = self.features(x)
        n, c, h, w = x.shape
        out = F.conv2d(x.reshape(1, n * c, h, w), z, padding=h // 2, groups=n)
        return self.adjust(out.view(n, 1, *out.shape[2:])) * 0.001


STYLES = (
    Style("unet", UNet, "features of the encoder are concatenated with upsampled ones"),
    Style("encoder-list", ListEncoder, "calls a stock network's layers from outside, collects features in a list"),
    # The stem's norm runs in a forward that writes an attribute of its module.
    Style("encoder-attribute", AttributeEncoder, "the list of features is an attribute", share=0.9),
    Style(
        "layer-getter",
        lambda width: LayerGetter(ResNet(BasicBlock, width), {"relu": "0", "layer1": "1", "layer2": "2"}),
        "a loop over a ModuleDict returns an OrderedDict",
    ),
    Style("dict-output", DictOutput, "a backbone that returns a dict, two heads, a dict as output"),
    Style("feature-pyramid", FeaturePyramid, "a top-down pathway adds features of several sizes"),
    Style("early-exit", EarlyExit, "returns after a block that the constructor has set"),
    # The last norm follows a convolution with another image's features, so it is alone.
    Style("siamese", Siamese, "two inputs share a trunk", share=6 / 7, inputs=2),
)
