"""Layer-major: every micro-batch through one stage before the next stage is touched, so that only one stage's weights are on the device.

Forward, only the input of every stage is kept. Backward, stage after stage in reverse, each is computed again with its graph, and its
gradient is summed over the micro-batches in fp32 and sent home. Sums run in the order of the micro-batches, so that in fp32 on one device
the result equals that of `residence.device` bit for bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs import Config
from hyperlm import model, tree
from hyperlm.env import compute_dtype
from hyperlm.loss import head_nats
from hyperlm.precision import accumulate, compute_copy
from hyperlm.tree import Tree


def make_gradients(cfg: Config, device: torch.device) -> Callable[[Tree, Tensor, Sequence[Tensor], int], tuple[Tensor, Tree]]:
    """Parameters and gradients live on the CPU; computation and the inputs of stages are on `device`."""
    dtype, blocks = compute_dtype(device), model.skeleton(cfg.model).blocks
    run = torch.compile(model.run_block) if cfg.train.compile else model.run_block

    def fetch(stage: Tree) -> Tree:
        """A stage's weights on the device, to be differentiated."""
        return tree.map(lambda p: p.to(device).requires_grad_(), compute_copy(stage, dtype))

    def pulled(outputs: list[Callable[[], Tensor]], into: list[Tensor | None], weights: Tree, pull: list[Tensor | None]) -> tuple[Tree, list[Tensor | None]]:
        """The summed gradient of a stage, and the gradient of each of its inputs."""
        leaves, sums, inputs = tree.leaves(weights), None, []
        for output, x, d in zip(outputs, into, pull, strict=True):
            grads = torch.autograd.grad(output(), leaves if x is None else [*leaves, x], d)
            inputs.append(None if x is None else grads[-1])
            sums = accumulate(sums, grads[: len(leaves)])
        return tree.unflatten([g.cpu() for g in sums], weights), inputs

    def gradients(params: Tree, batch: Tensor, keys: Sequence[Tensor], count: int) -> tuple[Tensor, Tree]:
        tokens, targets = batch[:, :, :-1].clamp(min=0), batch[:, :, 1:]
        contexts = [model.context(dtype, t, cfg.model, cfg.kernels, key=key) for t, key in zip(tokens, keys, strict=True)]

        def block_of(layer: int, weights: Tree, x: Tensor, a: int) -> Tensor:
            return run(blocks[layer], weights, x, None, model.layer_context(contexts[a], layer))[0]

        with torch.no_grad():
            weights = fetch(params["embed"])
            x = [model.embed(weights, t, cfg.model, ctx) for t, ctx in zip(tokens, contexts, strict=True)]
            inputs = []  # of each block, for each micro-batch
            for layer, stage in enumerate(params["blocks"]):
                weights = fetch(stage)
                inputs.append(x)
                x = [block_of(layer, weights, own, a) for a, own in enumerate(x)]

        total = torch.zeros((), device=device)
        weights = fetch(params["head"])
        x = [own.requires_grad_() for own in x]

        def loss_of(a: int) -> Tensor:
            features = model.finish(weights, x[a], cfg.model, contexts[a])
            nats, _ = head_nats(features.flatten(0, 1), weights["weight"], targets[a].flatten())
            total.add_(nats.detach())
            return nats / count

        head, d = pulled([lambda a=a: loss_of(a) for a in range(len(x))], x, weights, [None] * len(x))
        found = []
        for layer in reversed(range(len(blocks))):
            weights = fetch(params["blocks"][layer])
            x = [own.requires_grad_() for own in inputs.pop()]
            grads, d = pulled([lambda a=a: block_of(layer, weights, x[a], a) for a in range(len(x))], x, weights, d)
            found.append(grads)
        weights = fetch(params["embed"])
        outputs = [lambda a=a: model.embed(weights, tokens[a], cfg.model, contexts[a]) for a in range(len(x))]
        embed, _ = pulled(outputs, [None] * len(x), weights, d)
        return total, {"embed": embed, "blocks": found[::-1], "head": head}

    return gradients
