"""Where parameters live during a step. Each module's `make_advance(cfg, schedule, device)` builds the same function

    (state, batch (A, B, N), keys (A), count) -> (state, nats, norm, finite)

of a step's micro-batches, their dropout keys and the number of targets that are learnt in all of them (at least 1): the state with its
parameters learned (or, if nats or norm are not finite, as they were), summed nats, and the norm of the gradient of nats / count before
clipping.
"""

PIECE = 40 << 20  # bytes of moments and gradients that come at a time, for an update
SLOTS, PIECES, INPUTS = 3, 3, 2  # buffers on the device for stages, for pieces of an update, and for inputs of blocks
STREAMED = 2  # the same for blocks, between steps
