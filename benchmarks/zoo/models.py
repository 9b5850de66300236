"""The catalog of the zoo: models that people use, built as their packages ship them, with random weights.

Every constructor imports its package when it is called, and none downloads anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fused_res.testing import stub_torchvision_operators

#: Import names of the packages, in the order of the page.
PACKAGES = ("torchvision", "timm", "transformers", "segmentation_models_pytorch", "pytorchcv", "monai")


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Args:
        package: import name of the package that contains it.
        name: name in that package, unique in the catalog together with the package.
        build: constructor.
        shape: shape of the input whose time is measured.
        compared: shape of the input of the comparison in float64; default: two samples of `shape`.
        fused: smallest share of the norms that run fused, in training and in evaluation; the tests compare with it.
        popular: whether it is one of the models whose norms the project's goal of 95 % counts.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 3, 64, 64)
    compared: tuple[int, ...] | None = None
    fused: float = 1.0
    popular: bool = False

    @property
    def title(self) -> str:
        return f"{self.package}:{self.name}"

    @property
    def compared_shape(self) -> tuple[int, ...]:
        return self.compared or (2, *self.shape[1:])


def missing_packages() -> list[str]:
    """Return the packages of the catalog that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def load(package: str) -> Any:
    """Import a module of one of the packages; its deprecation warnings are not shown."""
    stub_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


def torchvision(name: str, **fields: Any) -> ZooModel:
    """Describe a model of ``torchvision.models``; names with prefix ``quantized_`` are built in float."""

    def build() -> nn.Module:
        models = load("torchvision.models")
        options: dict[str, Any] = {}
        if name.startswith(("fcn", "deeplab", "lraspp")):
            options["weights_backbone"] = None
        elif "googlenet" in name or "inception" in name:
            options["init_weights"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated
            model: nn.Module = models.get_model(name, weights=None, **options)
        return model

    return ZooModel("torchvision", name, build, **fields)


def fpn_backbone(name: str, **fields: Any) -> ZooModel:
    """Describe the backbone with frozen norms of torchvision's Faster R-CNN, Mask R-CNN and RetinaNet."""

    def build() -> nn.Module:
        utils = load("torchvision.models.detection.backbone_utils")
        model: nn.Module = utils.resnet_fpn_backbone(backbone_name=name, weights=None)
        return model

    return ZooModel("torchvision", f"{name}_fpn backbone", build, **fields)


def timm(name: str, **fields: Any) -> ZooModel:
    def build() -> nn.Module:
        model: nn.Module = load("timm").create_model(name, pretrained=False)
        return model

    return ZooModel("timm", name, build, **fields)


def transformers(name: str, config: str, options: dict[str, Any] | None = None, **fields: Any) -> ZooModel:
    """Describe a model of ``transformers``, built from a configuration.

    Args:
        name: name of the model's class.
        config: name of the configuration's class.
        options: arguments of the configuration.
        fields: fields of the description.
    """

    def build() -> nn.Module:
        package = load("transformers")
        model: nn.Module = getattr(package, name)(getattr(package, config)(**(options or {})))
        return model

    return ZooModel("transformers", name, build, **fields)


def segmentation(architecture: str, encoder: str, **fields: Any) -> ZooModel:
    def build() -> nn.Module:
        package = load("segmentation_models_pytorch")
        model: nn.Module = getattr(package, architecture)(encoder_name=encoder, encoder_weights=None)
        return model

    return ZooModel("segmentation_models_pytorch", f"{architecture} {encoder}", build, **fields)


def pytorchcv(name: str, **fields: Any) -> ZooModel:
    def build() -> nn.Module:
        model: nn.Module = load("pytorchcv.model_provider").get_model(name, pretrained=False)
        return model

    return ZooModel("pytorchcv", name, build, **fields)


def monai(name: str, options: dict[str, Any], **fields: Any) -> ZooModel:
    def build() -> nn.Module:
        model: nn.Module = getattr(load("monai.networks.nets"), name)(**options)
        return model

    return ZooModel("monai", name, build, **fields)


#: Fields of video networks: their convolutions are slow in float64.
VIDEO: dict[str, Any] = {"shape": (2, 3, 8, 56, 56), "compared": (2, 3, 4, 24, 24)}
VOLUME = (2, 1, 32, 32, 32)
#: The classifiers of pytorchcv pool 7 x 7 pixels.
FIXED = (2, 3, 224, 224)

ZOO: tuple[ZooModel, ...] = (
    torchvision("resnet18", popular=True),
    torchvision("resnet50", popular=True),
    torchvision("resnext50_32x4d", popular=True),
    torchvision("wide_resnet50_2", popular=True),
    torchvision("densenet121", popular=True),
    torchvision("googlenet", popular=True),
    torchvision("inception_v3", shape=(2, 3, 299, 299)),
    torchvision("mobilenet_v2", popular=True),
    torchvision("mobilenet_v3_large", popular=True),
    torchvision("mnasnet1_0"),
    torchvision("shufflenet_v2_x1_0", popular=True),
    torchvision("efficientnet_b0", popular=True),
    torchvision("efficientnet_v2_s"),
    torchvision("regnet_x_400mf"),
    torchvision("regnet_y_400mf", popular=True),
    fpn_backbone("resnet50", popular=True),
    torchvision("fcn_resnet50", popular=True),
    torchvision("deeplabv3_resnet50"),
    torchvision("lraspp_mobilenet_v3_large"),
    torchvision("r3d_18", **VIDEO, popular=True),
    torchvision("mc3_18", **VIDEO),
    torchvision("r2plus1d_18", **VIDEO),
    torchvision("quantized_resnet18"),
    torchvision("quantized_mobilenet_v2"),
    timm("resnet50", popular=True),
    timm("resnet50d"),
    timm("resnetrs50"),
    timm("resnest14d"),
    timm("seresnet50", popular=True),
    timm("skresnet18"),
    timm("res2net50_26w_4s", popular=True),
    timm("dla34", popular=True),
    timm("hrnet_w18_small", popular=True),
    timm("resnetv2_50", popular=True),
    timm("regnety_004", popular=True),
    timm("densenet121"),
    timm("efficientnet_b0", popular=True),
    timm("mobilenetv3_large_100"),
    timm("mixnet_s"),
    timm("ghostnet_100"),
    timm("rexnet_100"),
    timm("repvgg_a0"),
    timm("gernet_s"),
    timm("cspresnet50"),
    timm("darknet53"),
    timm("dpn68"),
    timm("ese_vovnet19b_dw"),
    timm("inception_v4", shape=(2, 3, 96, 96)),
    timm("xception41"),
    timm("legacy_xception"),
    timm("selecsls42b"),
    timm("hgnetv2_b0"),
    timm("fastvit_t8"),
    timm("repvit_m1"),
    timm("mobilevit_s"),
    timm("levit_128", shape=(2, 3, 224, 224)),
    timm("convmixer_768_32", shape=(2, 3, 64, 64)),
    transformers("ResNetForImageClassification", "ResNetConfig", popular=True),
    transformers("RegNetForImageClassification", "RegNetConfig"),
    transformers("MobileNetV2ForImageClassification", "MobileNetV2Config"),
    segmentation("Unet", "resnet34"),
    segmentation("FPN", "resnet34"),
    segmentation("DeepLabV3Plus", "efficientnet-b0"),
    pytorchcv("resnet18", shape=FIXED),
    pytorchcv("preresnet18", shape=FIXED),
    pytorchcv("seresnet18", shape=FIXED),
    pytorchcv("densenet121", shape=FIXED),
    pytorchcv("resnet20_cifar10", shape=(4, 3, 32, 32)),
    monai("ResNet", {"block": "basic", "layers": [2, 2, 2, 2], "block_inplanes": [64, 128, 256, 512], "spatial_dims": 3,
                     "n_input_channels": 1}, shape=VOLUME),
    monai("BasicUNet", {"spatial_dims": 3, "norm": "batch"}, shape=VOLUME),
    monai("DenseNet121", {"spatial_dims": 2, "in_channels": 3, "out_channels": 10}),
    monai("UNet", {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (16, 32, 64), "strides": (2, 2),
                   "num_res_units": 2, "norm": "batch"}),
)  # fmt: skip

#: Small relatives of them, one or two for each mechanism, for `make test`: not on the page.
SMALL: tuple[ZooModel, ...] = (
    torchvision("shufflenet_v2_x0_5"),
    fpn_backbone("resnet18", shape=(2, 3, 32, 32)),
    timm("resnet10t"),
    timm("dla46_c"),
    timm("regnety_002", shape=(2, 3, 32, 32)),
    timm("test_efficientnet"),
    transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "layer_type": "basic"},
        shape=(2, 3, 32, 32),
    ),
    pytorchcv("resnet20_cifar10", shape=(2, 3, 32, 32)),
    pytorchcv("preresnet20_cifar10", shape=(2, 3, 32, 32)),
    monai(
        "ResNet",
        {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 8], "spatial_dims": 3,
         "n_input_channels": 1},
        shape=(2, 1, 16, 16, 16),
    ),
    monai(
        "ResNet",
        {"block": "bottleneck", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 8], "spatial_dims": 1,
         "n_input_channels": 2},
        shape=(2, 2, 64),
    ),
)  # fmt: skip
