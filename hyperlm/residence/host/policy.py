"""How a step of the host residence goes: what `search.plan` decides of a run, once."""

from dataclasses import dataclass
from typing import Literal

import torch

from hyperlm.config import Config

SLOTS = 3  # buffers for stages on the device

# Residuals that are narrower than the stream, but for a block's input: they cost little, and without them more has to be computed again.
NARROW = frozenset(("input", "ffn_up", "ffn_down"))
WIDE = NARROW | {"mixer"}

Timing = Literal["immediate", "speculative", "deferred"]


@dataclass(frozen=True)
class Policy:
    """How a step goes."""

    group: int = 1  # micro-batches at a time
    residuals: frozenset[str] = NARROW  # of a block that are kept, and not computed again
    resident_blocks: int = 0  # from the first, whose residuals stay on the device
    resident_gradients: int = 0  # stages, from the first, whose gradients stay there until their pending update
    in_head: int = 0  # the last of these, whose gradients lie where the head comes to
    head_aliases_slots: bool = False  # whether the head takes the place of all other stages but the last block
    max_logits: int = 0  # of the head at a time; 0 for the default
    # When a stage learns: as soon as its gradient is there, by its own norm; as if nothing will be clipped, to be corrected; or on its next
    # fetch.
    update: Timing = "deferred"
    quantised: bool = False  # whether matrices' gradients go home in 8 bits
    converts: bool = False  # whether matrices are computed with as copies in another dtype
    slots: int = SLOTS
    arena: int = 0  # bytes of device memory that are taken at once, at the start, and cut up

    @property
    def releases_early(self) -> bool:
        """Whether a stage's buffer is free once its copy is made."""
        return self.slots < SLOTS


def fixed(config: Config, dtype: torch.dtype) -> Policy:
    """What the settings alone decide."""
    layerwise = config.optim.clip_scope == "layer"
    # Moments are no finer, and the bus is the slowest.
    quantised = config.optim.state == "int8" and dtype == torch.bfloat16 and not layerwise
    converts = dtype != (torch.bfloat16 if config.optim.state == "int8" else torch.float32)
    early = converts and config.optim.state != "int8" and not layerwise
    update: Timing = "immediate" if layerwise else "speculative" if quantised else "deferred"
    return Policy(update=update, quantised=quantised, converts=converts, slots=SLOTS - early)
