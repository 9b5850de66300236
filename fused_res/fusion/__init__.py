from fused_res.fusion.convert import fuse, unfuse
from fused_res.fusion.freeze import freeze
def summarize(*a): raise NotImplementedError
