"""Fusing and freezing models: chains are recognized by what a forward computes, not by the names of classes."""

from fused_res.fusion.convert import fuse, unfuse
from fused_res.fusion.freeze import freeze

__all__ = ["freeze", "fuse", "unfuse"]
