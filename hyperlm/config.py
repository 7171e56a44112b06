"""Every setting of hyperlm: frozen dataclasses, read by tyro.

Each field is a flag (`model.d_model` is `--model.d-model`), its docstring the flag's help, line by line. `resolve` checks a configuration and
fills in what follows from other settings; `another_run` says which changes make another run. Nothing here imports anything of hyperlm but
the class of its errors.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from hyperlm.errors import HyperlmError

Kind = Literal["phase7", "phase8", "softmax"]
EUCLIDEAN: tuple[Kind, ...] = ("softmax",)  # kinds whose mixers have no radii


class ConfigError(HyperlmError, ValueError):
    """A setting that cannot work; the message says which, why, and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. Ranks and head count follow from `d_model` and `head_dim`."""

    kind: Kind = "phase8"
    """Token mixer: phase7 (exact hyperbolic attention, O(N^2)), phase8 (tangent-space linear attention, O(N)) or softmax (Euclidean twin)."""
    d_model: int = 512
    """Width D of the residual stream."""
    n_layers: int = 12
    """Number of blocks L."""
    head_dim: int = 64
    """Width K of a head."""
    vocab_size: int = 50304
    """Rows V of embedding and head; also the size a BPE tokenizer is trained to. Set by the tokenizer when that is bytes or a file."""
    exact_every: int = 0
    """Put a phase7 mixer in every n-th layer (hybrid); 0 for none."""
    ssm: bool = False
    """Add the tangent-space recurrence as an extra branch before every mixer (experimental)."""
    score: Literal["logcosh", "distance", "cosine", "bias", "gain", "first-order"] = "logcosh"
    """Score of phase7: -beta log cosh d, or -beta d; or, to compare with, what of the first any dot product can do: beta times the cosine of the
    directions, that with the bias -beta log cosh r of keys, that with a gain of tanh r for queries and keys, or with both, its first order."""
    dropout: float = 0.0
    """Dropout rate on the embedding, on what a mixer read and gated, and on each branch's output. Texts of a few MB want 0.2 to 0.3."""

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def embed_rank(self) -> int:
        return self.d_model // 4

    @property
    def ffn_rank(self) -> int:
        return self.d_model // 8

    @property
    def gate_rank(self) -> int:
        return min(128, self.d_model // 4)

    @property
    def ssm_dim(self) -> int:
        return self.d_model // 4

    def layer_kind(self, layer: int) -> Kind:
        """Mixer of layer `layer`, counted from 0."""
        return "phase7" if self.exact_every and (layer + 1) % self.exact_every == 0 else self.kind

    @property
    def hyperbolic_layers(self) -> list[int]:
        """Those whose mixers have radii."""
        return [layer for layer in range(self.n_layers) if self.layer_kind(layer) not in EUCLIDEAN]


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = ("stdlib",)
    """Text to train on: files, folders, hf://datasets/owner/name or `stdlib`, with weights if wanted (`books:0.7`); or recipes (.toml)."""
    val_sources: tuple[str, ...] = ()
    """Validation text of its own. Without it, a share of the documents of `sources` is held out."""
    val_fraction: float = 0.05
    """Share of the text held out for validation: documents chosen by a hash of their content, or the end of one where there are too few."""
    tokenizer: str = "bpe"
    """`bpe` (trained on the corpus), `bytes`, or the path of a tokenizer.json."""
    seq_len: int = 512
    """Tokens N in a training sequence."""
    loss: Literal["all", "assistant"] = "assistant"
    """What is learnt of conversations: all tokens, or what the assistant says and the ends of its turns. Of texts, all are learnt."""
    isolate: bool = False
    """Begin afresh with each document, in padded sequences of its own: attention, convolution and state never see another."""
    max_mib: float = 0.0
    """Use at most this much text of each source: as many documents as fit, in the order of their hashes; 0 for all of it."""
    text_field: str = "text"
    """Where rows (.jsonl .json .csv .tsv .parquet .arrow) have their text: a field or a column."""
    on_bad: Literal["skip", "stop"] = "skip"
    """What to do about a row that cannot be used: leave it out and say how many there were, or stop."""
    dedup: bool = False
    """Leave out documents that are near copies of others: four of five runs of words are the same, by MinHash of rensa (extra `dedup`)."""
    cache: str = ""
    """Folder of tokenised text; by default $XDG_CACHE_HOME/hyperlm or ~/.cache/hyperlm."""


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 8
    """Sequences in a micro-batch."""
    grad_accum: int = 4
    """Micro-batches in a step."""
    steps: int = 0
    """Optimizer steps; 0 to go by epochs."""
    epochs: float = 4.0
    """Passes over the training text, when `steps` is 0. More than about four teach little (Muennighoff et al. 2023)."""
    seed: int = 0
    """Decides initial weights, data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    residence: Literal["auto", "device", "host"] = "auto"
    """Where parameters and optimizer state live: on the device, or in host memory, from where layers visit it; auto takes the device if all fits."""
    device_memory: float = 0.0
    """GiB of GPU memory that the whole process may use; 0 for all that is free."""
    compile: bool = False
    """Compile blocks with torch.compile."""
    recompute: bool = False
    """Keep only each block's input and recompute the rest in the backward pass: less memory, a third more work."""

    def total_steps(self, an_epoch: float) -> int:
        """Of a run whose epochs have so many."""
        return self.steps or math.ceil(self.epochs * an_epoch)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 0.0
    """Peak learning rate of AdamW; 0: follows from the width."""
    warmup_steps: int = 0
    """Steps of linear warm-up; 0 for a tenth of the run, from 50 to 1000 but at most half of it."""
    lr_floor: float = 0.1
    """Where the cosine ends, as a share of `lr`."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """Largest norm of a step's gradient; 0 to leave it alone."""
    clip_scope: Literal["global", "layer"] = "global"
    """Clip by the norm of the whole gradient, or each layer by its own."""
    state: Literal["auto", "fp32", "int8"] = "auto"
    """Weights and moments in fp32, or weights in bf16 with moments of 8 bits: a third of the memory; auto takes fp32 where it fits."""


@dataclass(frozen=True)
class CkptConfig:
    every: int = 200
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Newest checkpoints to keep; the best one by validation loss stays as well."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 200
    """Steps between evaluations; the last step always evaluates."""
    max_tokens: int = 262144
    """Validation tokens per source, in whole documents; 0 for all."""
    sample_tokens: int = 96
    """Length of the text generated after an evaluation; 0 for none."""
    prompt: str = ""
    """How that text begins; by default as a held-out document does, or with the question of a held-out conversation."""
    passkey: int = 0
    """Trials of passkey retrieval at an evaluation: a number hidden in a sequence of validation text, asked for at its end; 0 for none."""


@dataclass(frozen=True)
class LogConfig:
    every: int = 10
    """Steps between log lines."""


@dataclass(frozen=True)
class Config:
    """One run, whole. Stored as config.json in the run's folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend; auto takes the fastest one usable."""
    name: str = ""
    """Name of the run, a folder under runs/; by default preset, kind and time."""


# -- checks and storage ----------------------------------------------------------------------------------------------------------------

LARGEST_FLOAT = 1e30  # below the end of fp32, so that products with a few such numbers are infinite and not an error
LARGEST = {
    "train.batch_size": 1 << 20,
    "train.grad_accum": 1 << 20,
    "model.d_model": 1 << 20,
    "model.n_layers": 10_000,
    "model.vocab_size": 1 << 24,
    "data.seq_len": 1 << 30,
    "eval.passkey": 1 << 10,
}  # far above what anyone trains: a typing error, or damage
PROSPECTIVE = (  # what concerns the future of a run only, and may change when it is resumed
    "optim.lr", "optim.warmup_steps", "optim.lr_floor", "optim.beta1", "optim.beta2", "optim.weight_decay", "optim.clip",
    "optim.clip_scope", "train.steps", "train.epochs", "train.device", "train.device_memory", "train.residence", "train.compile",
    "train.recompute", "kernels", "ckpt.every", "ckpt.keep", "eval.every", "eval.max_tokens", "eval.sample_tokens", "eval.prompt",
    "eval.passkey", "log.every", "data.cache",
)  # fmt: skip
SPLIT = ("train.batch_size", "train.grad_accum")  # may change while their product stays


def resolve(config: Config) -> Config:
    """Check `config` and fill in what follows from other settings.

    Raises:
        ConfigError: naming the flag, the reason and a value that works.
    """
    for name, value in flat(to_dict(config)).items():  # whatever a flag can hold: no number that arithmetic would turn into another
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise ConfigError(f"--{flag_of(name)} {value}: must be a finite number, at most {LARGEST_FLOAT:g}")
        if isinstance(value, int) and not abs(value) <= LARGEST.get(name, 2**63 - 1):
            raise ConfigError(f"--{flag_of(name)} {value}: must be at most {LARGEST.get(name, 2**63 - 1):,}")
    m, d, t, o = config.model, config.data, config.train, config.optim
    if d.tokenizer == "bytes":  # 256 bytes and the special tokens, rounded up for the matrix units
        config = replace(config, model=(m := replace(m, vocab_size=320)))

    def require(ok: bool, flag: str, value: Any, why: str) -> None:
        if not ok:
            raise ConfigError(f"--{flag} {value}: {why}")

    for flag, value, low in [
        ("model.d-model", m.d_model, 32),
        ("model.n-layers", m.n_layers, 1),
        ("model.head-dim", m.head_dim, 4),
        ("model.vocab-size", m.vocab_size, 300),
        ("model.exact-every", m.exact_every, 0),
        ("data.seq-len", d.seq_len, 2),
        ("data.max-mib", d.max_mib, 0),
        ("train.batch-size", t.batch_size, 1),
        ("train.grad-accum", t.grad_accum, 1),
        ("train.steps", t.steps, 0),
        ("train.seed", t.seed, 0),
        ("train.device-memory", t.device_memory, 0),
        ("optim.warmup-steps", o.warmup_steps, 0),
        ("optim.weight-decay", o.weight_decay, 0),
        ("optim.clip", o.clip, 0),
        ("ckpt.every", config.ckpt.every, 1),
        ("ckpt.keep", config.ckpt.keep, 1),
        ("eval.every", config.eval.every, 1),
        ("eval.max-tokens", config.eval.max_tokens, 0),
        ("eval.sample-tokens", config.eval.sample_tokens, 0),
        ("eval.passkey", config.eval.passkey, 0),
        ("log.every", config.log.every, 1),
    ]:
        require(value >= low, flag, value, f"must be at least {low}")
    require(m.head_dim % 2 == 0, "model.head-dim", m.head_dim, "must be even, for the rotary embedding")
    require(m.d_model % m.head_dim == 0, "model.d-model", m.d_model, f"must be a multiple of --model.head-dim {m.head_dim}")
    require(m.d_model % 8 == 0, "model.d-model", m.d_model, "must be a multiple of 8, for the low-rank layers")
    require(0 <= m.dropout < 1, "model.dropout", m.dropout, "must be at least 0 and below 1")
    require(len(d.sources) > 0, "data.sources", "", "needs at least one file, folder, recipe or `stdlib`")
    require(
        d.max_mib == 0 or 0.001 <= d.max_mib < float("inf"), "data.max-mib", d.max_mib, "must be at least 0.001, or 0 for all of the text"
    )
    require(d.text_field != "", "data.text-field", "''", "must be the name of a field, such as text")
    require(0 < d.val_fraction < 1, "data.val-fraction", d.val_fraction, "must be between 0 and 1")
    require(t.steps > 0 or t.epochs > 0, "train.epochs", t.epochs, "must be above 0 where --train.steps is 0")
    require(o.lr >= 0, "optim.lr", o.lr, "must be above 0, or 0 to follow from the width")
    require(0 <= o.lr_floor <= 1, "optim.lr-floor", o.lr_floor, "must be between 0 and 1")
    require(0 <= o.beta1 < 1, "optim.beta1", o.beta1, "must be at least 0 and below 1")
    require(0 <= o.beta2 < 1, "optim.beta2", o.beta2, "must be at least 0 and below 1")
    plain = (
        config.name.isprintable()
        and not set("/ \\") & set(config.name)
        and not config.name.startswith("-")
        and config.name not in (".", "..")
    )
    require(plain, "name", repr(config.name), "must be a plain folder name, without spaces")
    return config if o.lr else replace(config, optim=replace(o, lr=peak_rate(m)))


def peak_rate(cfg: ModelConfig) -> float:
    """The peak learning rate of a run that is given none: 1 / d_model, but no more than 1/128.

    AdamW moves every weight by about the rate, so what a matrix reads from d features moves by d times that: the rate goes as 1 / d (Yang
    et al. 2022, "Tensor Programs V", hidden matrices under Adam; most matrices here are low-rank factors, whose ranks grow with d). The
    constant was chosen by runs of 200 steps of 32 x 512 tokens at d 256, 512, 1024, 2048 and 4096 with 4, 12, 16, 24 and 32 layers, one
    seed. With a warm-up of 40 to 50 steps, training loss with twice this rate is lower by 0.06 to 0.08 up to d 2048, and higher by 0.15 at
    d 4096; four epochs of preset `standard` end 0.05 higher with it. With a warm-up of 20, four times this rate is far worse up to d 2048,
    and twice this rate at d 4096. The cap is a choice, not an optimum: at d 64, 1/64 ends lower than 1/128 (5.02 and 5.19), and gradients
    have norms above 30 with either.
    """
    return 1 / max(128, cfg.d_model)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Any, cls: Any = Config, prefix: str = "") -> Any:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: on a setting that this version does not have, or of a type or value that it cannot have. Those that are absent take
            their defaults.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'it'} is not a group of settings")
    hints = get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ConfigError(f"unknown setting {prefix}{min(map(str, unknown)):.60}: it was written by another version of hyperlm")
    return cls(**{name: checked(values[name], hint, prefix + name) for name, hint in hints.items() if name in values})


def checked(value: Any, hint: Any, name: str) -> Any:
    """`value`, read from JSON, as what the type `hint` of a setting wants."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, f"{name}.")
    if origin is tuple and isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    if value in choices if origin is Literal else type(value) is hint or (hint is float and type(value) is int):
        return float(value) if hint is float else value
    raise ConfigError(f"{name} cannot be {value!r:.60}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"model.d_model": 512, ...}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def flag_of(name: str) -> str:
    """`model.d_model` -> `model.d-model`"""
    return name.replace("_", "-")


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as {"model.d_model": (value in a, value in b)}."""
    left, right = flat(to_dict(a)), flat(to_dict(b))
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def another_run(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Those `differences` by which `b` would be another run than `a`, not the same one going on: all but what concerns the future alone."""
    same_step = a.train.batch_size * a.train.grad_accum == b.train.batch_size * b.train.grad_accum
    allowed = (*PROSPECTIVE, *(SPLIT if same_step else ()))
    return {name: change for name, change in differences(a, b).items() if name not in allowed}
