"""Where parameters live during a step. Each module's `make_gradients(cfg, device)` builds the same function

    (params, batch (A, B, N+1), keys (A), count) -> (nats, gradients)

of fp32 parameters, a step's micro-batches and their dropout keys, and the number of targets in all of them: summed nats, and the fp32
gradients of nats / count in the structure of the parameters.
"""
