"""Ways in which residual networks are written, as small networks: own versions, from papers and documentation."""

from benchmarks.styles.style import Style
from benchmarks.styles.table import BY_NAME, STYLES

__all__ = ["BY_NAME", "STYLES", "Style"]
