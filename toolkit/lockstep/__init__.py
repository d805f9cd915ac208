"""The march: both models advance block by block over all documents.

`streams` hold the residual states between blocks, in memory or mapped from disk. The march yields
steps and keeps nothing but its streams; whoever listens decides the rest of the memory.
"""

from toolkit.lockstep.march import March, Mode, Step
from toolkit.lockstep.streams import Stream

__all__ = ["March", "Mode", "Step", "Stream"]
