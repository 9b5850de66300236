"""Reports on a user's own model: which modules run fused and why others do not, and whether results are the same."""

from fused_res.report.check import Comparison, Report, Timing, check
from fused_res.report.summary import Row, Summary, summarize

__all__ = ["Comparison", "Report", "Row", "Summary", "Timing", "check", "summarize"]
