"""Discovery of a model's components by autograd."""

from devinterp.engine.discovery.masks import Mask
from devinterp.engine.discovery.structure import Layer, Mixer, Structure, structure

__all__ = ["Layer", "Mask", "Mixer", "Structure", "structure"]
