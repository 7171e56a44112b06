"""A plain GPT as nanoGPT has it: learned positions, pre-LayerNorm without biases, GELU, a tied head; trained by AdamW, or by Muon.

It has the width and the heads of the models that it stands beside, and as many layers as come nearest to their number of parameters. It
reads the same batches, clips alike and follows the same schedule; on a GPU it computes in bf16 by autocast with fp32 weights, compiled by
torch.compile.
Axes: B batch, N sequence, D width, H heads, K head dim, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperlm import memory
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.env import compute_dtype
from hyperlm.loss import IGNORE
from hyperlm.optim import Schedule, learning_rate

STD = 0.02  # of weights at first; of what is added to the stream 1/sqrt(2 L) of it, as in GPT-2
LOGITS = 1 << 26  # of an evaluation at a time, in fp32


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int  # tokens that it can read: its positions are learned
    dropout: float

    @property
    def parameters(self) -> int:
        """The head is the embedding; a block has 12 D^2 in matrices and two norms."""
        return (self.vocabulary + self.length) * self.width + self.layers * (12 * self.width**2 + 2 * self.width) + self.width


def shape(config: Config) -> Shape:
    """Of the width of the configuration's model, with as many layers (one or more) as come nearest to the parameters of its Euclidean
    twin."""
    m = config.model
    twin = replace(config, model=replace(m, kind="softmax", exact_every=0))
    none = Shape(m.d_model, 0, m.n_heads, m.vocab_size, config.data.seq_len, m.dropout)
    a_layer = replace(none, layers=1).parameters - none.parameters
    return replace(none, layers=max(1, round((sum(memory.parameters(twin).values()) - none.parameters) / a_layer)))


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        d = s.width
        self.heads, self.dropout = s.heads, s.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.q, self.k, self.v, self.out = (nn.Parameter(torch.empty(d, d)) for _ in range(4))  # apart, since Muon makes each orthogonal
        self.up, self.down = nn.Parameter(torch.empty(4 * d, d)), nn.Parameter(torch.empty(d, 4 * d))

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        qkv = F.linear(self.attention_norm(x), torch.cat([self.q, self.k, self.v]))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, -1))  # (B, H, N, K)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + F.dropout(F.linear(y.transpose(1, 2).flatten(2), self.out), rate)
        y = F.linear(F.gelu(F.linear(self.mlp_norm(x), self.up)), self.down)
        return x + F.dropout(y, rate)


class GPT(nn.Module):
    """Tokens (B, N) int64, N at most `shape.length` -> normalised features (B, N, D); logits are their products with `embedding` (V, D)."""

    def __init__(self, s: Shape, seed: int, device: torch.device) -> None:
        super().__init__()
        self.dropout = s.dropout
        self.embedding = nn.Parameter(torch.empty(s.vocabulary, s.width))
        self.positions = nn.Parameter(torch.empty(s.length, s.width))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():  # norms keep their ones
            if p.dim() > 1:
                added = name.endswith((".out", ".down"))
                nn.init.normal_(p, std=STD / math.sqrt(2 * s.layers) if added else STD, generator=generator)
        self.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding) + self.positions[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 where the models of hyperlm compute in it."""
    dtype = compute_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def optimizers(model: GPT, config: Config, *, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW of matrices, with decay, and vectors; or Muon of the blocks' matrices and AdamW of the rest.

    Both have the rate of the configuration: Muon's updates are scaled to the root mean square that AdamW's have (Liu et al. 2025).
    """
    o = config.optim
    blocks = [p for p in model.blocks.parameters() if p.dim() > 1] if muon else []
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in blocks)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    rules: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=True)]
    if muon:
        rules.append(torch.optim.Muon(blocks, lr=o.lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return rules


Step = Callable[[Batch], tuple[Tensor, bool]]


def make_step(model: GPT, config: Config, schedule: Schedule, device: torch.device, *, muon: bool) -> Step:
    """step(batch) of (A, B, N) tokens and targets -> nats a learnt token, and whether it was skipped, not being finite.

    The gradient is that of total nats / learnt targets over all micro-batches, clipped by its whole norm, as in `hyperlm.step`.
    """
    lr, rules, updates = learning_rate(schedule, config.optim), optimizers(model, config, muon=muon), 0

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(model(tokens), model.embedding)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    torch.compiler.reset()  # after some models that were compiled before in this process it would give up, and say nothing
    loss_of = torch.compile(loss) if device.type == "cuda" else loss

    def step(batch: Batch) -> tuple[Tensor, bool]:
        nonlocal updates
        model.train()
        count, batch, total = max(1, int((batch.targets != IGNORE).sum())), batch.to(device), torch.zeros((), device=device)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            with autocast(device):
                nats = loss_of(tokens, targets)
            (nats / count).backward()
            total += nats.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
        finite = bool(torch.isfinite(norm + total))
        for rule in rules:
            if finite:
                for group in rule.param_groups:
                    group["lr"] = lr(updates)
                rule.step()
            rule.zero_grad(set_to_none=True)
        updates += finite
        return total / count, not finite

    return step


@torch.no_grad()
def token_nats(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats (B, N) fp32 of the targets (B, N) of tokens (B, N), 0 where a target is ignored."""
    model.eval()
    with autocast(tokens.device):
        features = model(tokens).flatten(0, 1)
        parts = [
            F.cross_entropy(F.linear(chunk, model.embedding).float(), wanted, ignore_index=IGNORE, reduction="none")
            for chunk, wanted in zip(*(x.split(max(1, LOGITS // len(model.embedding))) for x in (features, targets.flatten())), strict=True)
        ]
    return torch.cat(parts).view(targets.shape)
