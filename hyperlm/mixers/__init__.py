"""Token mixers by kind."""

from hyperlm.mixers.frame import Mixer
from hyperlm.mixers.phase7 import Phase7
from hyperlm.mixers.phase8 import Phase8
from hyperlm.mixers.softmax import Softmax

MIXERS: dict[str, type[Mixer]] = {"phase7": Phase7, "phase8": Phase8, "softmax": Softmax}
