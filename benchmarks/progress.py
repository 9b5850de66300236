"""Progress bars: a persistent one for a list of cases, and on a terminal transient ones below it."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def cases(iterable: Iterable[T], label: str) -> Iterable[T]:
    return tqdm(iterable, desc=label)


def details(iterable: Iterable[T], label: str) -> Iterable[T]:
    return tqdm(iterable, desc=f"  {label}", leave=False, disable=None)
