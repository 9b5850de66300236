"""Fusing, freezing, checking and summarizing models: chains are recognized by what a forward computes."""

from fused_res.fusion.check import Comparison, Report, Timing, check
from fused_res.fusion.convert import fuse, unfuse
from fused_res.fusion.freeze import freeze
from fused_res.fusion.summary import Row, Summary, summarize

__all__ = ["Comparison", "Report", "Row", "Summary", "Timing", "check", "freeze", "fuse", "summarize", "unfuse"]
