from fused_res.fusion.convert import fuse, unfuse
def freeze(*a): raise NotImplementedError
def summarize(*a): raise NotImplementedError
