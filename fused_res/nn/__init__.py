"""Modules with a fused forward and backward, for inputs ``(N, C, H, W)``.

Each module runs its unfused PyTorch layers wherever the fused operators would behave differently, so outputs,
gradients, running statistics and state_dict always match those of PyTorch's layers.
"""

from fused_res.nn.batch_norm_act import BatchNormAct2d
from fused_res.nn.block import BasicBlock, Bottleneck, ResidualBlock
from fused_res.nn.conv_bn_act import ConvBNAct2d
from fused_res.nn.fusable_module import FusableModule
from fused_res.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct2d, convert_sync_batchnorm

#: Former name of :class:`FusableModule`.
Configured = FusableModule

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "Configured",
    "ConvBNAct2d",
    "FusableModule",
    "ResidualBlock",
    "SyncBatchNorm",
    "SyncBatchNormAct2d",
    "convert_sync_batchnorm",
]
