"""What is measured side by side: kinds of models, and peers that are no models of hyperlm."""

from dataclasses import replace
from typing import Literal, get_args

from hyperlm.config import Config, Kind

Peer = Literal["nanogpt", "nanogpt-muon"]
HYBRID_EVERY = 4  # layers of a hybrid: three of phase8, one of phase7

KINDS = (*get_args(Kind), "hybrid")
PEERS = get_args(Peer)


def of_kind(config: Config, label: str) -> Config:
    """The configuration with the model of that kind; "hybrid" is phase8 with every fourth layer of phase7."""
    if label == "hybrid":
        return replace(config, model=replace(config.model, kind="phase8", exact_every=config.model.exact_every or HYBRID_EVERY))
    return replace(config, model=replace(config.model, kind=label))
