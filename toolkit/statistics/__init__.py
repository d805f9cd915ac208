"""Sums over tokens: update, reduce over processes, and a frozen result that shares no memory.

Every file is one statistic that keeps the contract of `accumulator`; `frame` makes sums whose order
changes no bit.
"""

from toolkit.statistics.accumulator import Accumulator
from toolkit.statistics.frame import Frame, frames_of
from toolkit.statistics.gate_gains import SizeCounts, SizeHistogram
from toolkit.statistics.moments import Moments, MomentSums
from toolkit.statistics.norms import MeanNorms, NormSums
from toolkit.statistics.reservoir import Reservoir
from toolkit.statistics.sketch import SketchedSums

__all__ = [
    "Accumulator",
    "Frame",
    "MeanNorms",
    "MomentSums",
    "Moments",
    "NormSums",
    "Reservoir",
    "SizeCounts",
    "SizeHistogram",
    "SketchedSums",
    "frames_of",
]
