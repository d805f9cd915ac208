"""The kinds of adapter by name."""

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.gated_heads import GatedHeads
from toolkit.adapters.head_affine import HeadAffine
from toolkit.adapters.head_vector import HeadVector
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.nonlinear import NonLinear
from toolkit.adapters.vector import FixedVector

KINDS: dict[str, type[Adapter]] = {
    cls.kind: cls
    for cls in (FixedVector, Linear, LoReFT, NonLinear, HeadVector, HeadAffine, GatedHeads)
}
