"""What is measured side by side: kinds of models, and peers that are no models of hyperlm."""

from dataclasses import replace
from typing import Literal, get_args

from hyperlm.config import Config, ConfigError, Kind

Peer = Literal["nanogpt", "nanogpt-muon"]
HYBRID_EVERY = 4  # layers of a hybrid: three of phase8, one of phase7

KINDS = (*get_args(Kind), "hybrid")
PEERS = get_args(Peer)


def of_kind(config: Config, label: str) -> Config:
    """The configuration with the model of that kind; "hybrid" is phase8 with every fourth layer of phase7.

    Raises:
        ConfigError: on a hybrid that would have none of phase7.
    """
    if label == "hybrid":
        every, layers = config.model.exact_every or HYBRID_EVERY, config.model.n_layers
        if every > layers:
            has = f"a hybrid has a layer of phase7 in every {every}"
            raise ConfigError(f"--model.n-layers {layers}: {has}; ask for as many, or set --model.exact-every")
        return replace(config, model=replace(config.model, kind="phase8", exact_every=every))
    return replace(config, model=replace(config.model, kind=label))
