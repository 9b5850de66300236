"""Modules with a fused forward and backward, for images ``(N, C, H, W)``; each runs its stock layers where those would
differ, so that results, gradients, running statistics and state_dict are the stock layers' at any time."""

from fused_res.nn.batch_norm_act import BatchNormAct2d
from fused_res.nn.block import BasicBlock, Bottleneck, ResidualBlock
from fused_res.nn.configured import Configured
from fused_res.nn.conv_bn_act import ConvBNAct2d
from fused_res.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct2d, convert_sync_batchnorm

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "Configured",
    "ConvBNAct2d",
    "ResidualBlock",
    "SyncBatchNorm",
    "SyncBatchNormAct2d",
    "convert_sync_batchnorm",
]
