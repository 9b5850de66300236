"""The table of all styles."""

from benchmarks.styles import (
    attention,
    cifar,
    classification,
    detection,
    dimensions,
    families,
    libraries,
    networks,
    spellings,
    structure,
    torchvision_like,
)
from benchmarks.styles.style import Style

STYLES: tuple[Style, ...] = tuple(
    style
    for family in (
        torchvision_like,
        cifar,
        libraries,
        detection,
        classification,
        spellings,
        structure,
        attention,
        families,
        networks,
        dimensions,
    )
    for style in family.STYLES
)
BY_NAME = {style.name: style for style in STYLES}
