"""Settings that a stage passes to its workers, as JSON on their command line."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    backend: str = ""  # of the kernels that the stage checks or profiles
    batch: int = 256
    only: tuple[str, ...] = ()  # names of the items; default: every item of the kind
    model: str = "resnet50"  # or timm/<name>
    warm: bool = False  # run every item once, to fill the caches of the compilers; nothing is timed
    small: bool = False  # small tensors, for a tool that slows the kernels down
    rehearse: bool = False  # tiny tensors on the CPU, with stand-ins for the GPU

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Settings":
        values = json.loads(text)
        return Settings(**{**values, "only": tuple(values["only"])})
