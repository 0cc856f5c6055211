"""The settings of a model and of a run: frozen, validated dataclasses, and the recipes."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from fasttx.errors import ConfigError


def setting(default: Any, help: str, *, group: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that also knows its command-line help, group and choices."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


def _check_types(config: Any) -> None:
    """Raise ConfigError for a wrong type (a bool is no number) or a value that is no choice."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = (*allowed, int) if float in allowed else allowed
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(t.__name__ for t in allowed)
            raise ConfigError(f"{f.name} is {_shown(value)}; expected {names}")
        choices = f.metadata.get("choices", ())
        if choices and value not in choices:
            raise ConfigError(f"{f.name} is {_shown(value)}; expected one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} is {value!r}; expected a finite number")
        if isinstance(value, str) and (not value or "\0" in value):
            raise ConfigError(
                f"{f.name} is {_shown(value)}; expected a text without NUL characters"
            )


def _check_range(config: Any, low: float, high: float, *names: str, below: bool = False) -> None:
    """Raise ConfigError unless low <= value <= high, or where it must be `below`, value < high."""
    for name in names:
        value = getattr(config, name)
        if value is None or (low <= value <= high and not (below and value == high)):
            continue
        wanted = f"at least {low:,}" if value < low else f"at most {high:,}"
        if high <= 1:
            wanted = f"between {low:g} and {high:g}"
        if below:
            wanted = f"at least {low:g} and less than {high:g}"
        raise ConfigError(f"{name} is {_shown(value)}; expected {wanted}")


def _shown(value: Any) -> str:
    """A value in a message: its whole text, unless that would fill the screen."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def known_fields(cls: type, values: Any) -> dict[str, Any]:
    """Return `values`. Raises ConfigError for what is no dictionary, or has names that are no field
    of `cls`."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"the settings of {cls.__name__} are {_shown(values)}; expected names and values"
        )
    unknown = sorted(map(str, set(values) - {f.name for f in dataclasses.fields(cls)}))
    if unknown:
        shown = ", ".join(name[:80] for name in unknown[:5])
        more = ", ..." if len(unknown) > 5 else ""
        raise ConfigError(f"unknown {cls.__name__} settings: {shown}{more}")
    return values


# What a label is, by transformers' names: one class a text; any number of classes; a number.
SINGLE_LABEL, MULTI_LABEL, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip

# A model with more weights has a wrong number in its settings. (This many take 40 GB.)
MOST_WEIGHTS = 10_000_000_000


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `TransformerClassifier`. The defaults have exactly 5,785,858 parameters."""

    vocab_size: int = setting(10_000, "rows of the token embedding", group="model")
    num_classes: int = 2  # no flag: a run takes it from its dataset
    d_model: int = setting(256, "width of the residual stream", group="model")
    num_heads: int = setting(8, "attention heads", group="model")
    num_layers: int = setting(4, "encoder blocks", group="model")
    d_ff: int = setting(1024, "hidden width of the MLP", group="model")
    max_len: int = setting(256, "longest sequence, in tokens", group="model")
    dropout: float = setting(0.1, "dropout probability at every site", group="model")
    attn_backend: str = setting(
        "auto", "attention backend; `fasttx backends` lists them", group="model"
    )
    activation: str = setting("relu", "MLP activation", group="model", choices=("relu", "gelu"))
    attention_dropout: float | None = setting(
        None, "dropout on the attention weights (default: the same as dropout)", group="model"
    )
    norm_first: bool = setting(
        True,
        "LayerNorm before attention and MLP and after the last block; no: after each, as BERT",
        group="model",
    )
    positions: str = setting(
        "sinusoidal",
        "position table: sinusoidal, which is fixed, or learned",
        group="model",
        choices=("sinusoidal", "learned"),
    )
    embedding_norm: bool = setting(False, "LayerNorm on the embedded words", group="model")
    # No flags: a pretrained encoder brings them. embedding_size: width of the embedding, projected
    # to d_model (None: d_model). pad_id: the word that padded input is padded with.
    embedding_size: int | None = None
    norm_eps: float = 1e-5
    pad_id: int = 0
    pooling: str = setting(
        "mean",
        "what the head reads of a text: the mean of its rows, or its first row (cls)",
        group="model",
        choices=("mean", "cls"),
    )
    head_activation: str = setting(
        "gelu", "activation in the head", group="model", choices=("gelu", "tanh", "relu")
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 1, 1_000_000, "num_classes", "d_ff", "max_len")
        _check_range(self, 2, 100_000_000, "vocab_size")
        _check_range(self, 1, 100_000, "d_model", "num_heads", "embedding_size")
        _check_range(self, 0.0, 1.0, "norm_eps")
        _check_range(self, 0, self.vocab_size - 1, "pad_id")
        _check_range(self, 0, 1000, "num_layers")
        _check_range(self, 0.0, 1.0, "dropout", "attention_dropout")
        if self.d_model % self.num_heads:
            raise ConfigError(
                f"d_model is {self.d_model} and num_heads is {self.num_heads}; "
                "expected a d_model that num_heads divides"
            )
        if self.embedding_width % 2 and self.positions == "sinusoidal":
            name = "d_model" if self.embedding_size is None else "embedding_size"
            raise ConfigError(
                f"{name} is {self.embedding_width}; expected an even number (sine and cosine "
                "positions)"
            )
        block = self.d_model * (4 * self.d_model + 2 * self.d_ff)
        weights = self.d_model * (self.vocab_size + self.num_classes) + self.num_layers * block
        if weights > MOST_WEIGHTS:
            raise ConfigError(
                f"vocab_size {self.vocab_size:,}, d_model {self.d_model:,}, d_ff {self.d_ff:,} and "
                f"num_layers {self.num_layers:,} make {weights:,} weights; expected at most "
                f"{MOST_WEIGHTS:,}. Choose smaller ones"
            )

    @property
    def embedding_width(self) -> int:
        """Columns of the token embedding and of the positions."""
        return self.d_model if self.embedding_size is None else self.embedding_size

    @property
    def dropout_text(self) -> str:
        """For people: 0.2, or 0.2 (attention 0) where the two differ."""
        if self.attention_dropout in (None, self.dropout):
            return f"{self.dropout:g}"
        return f"{self.dropout:g} (attention {self.attention_dropout:g})"


# The weights of one encoder fit another if these are equal.
ENCODER_SHAPE = (
    "vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "activation", "norm_first",
    "positions", "embedding_norm", "embedding_size", "norm_eps", "pad_id",
)  # fmt: skip
# What a head of that encoder reads, and how.
HEAD_SHAPE = ("pooling", "head_activation")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: where the text comes from, how it is optimised, and what it runs on."""

    dataset: str = setting(
        "auto", "auto, imdb, demo, or the path of a folder or file", group="data"
    )
    text_column: str | None = setting(
        None, "name of the text column (default: found)", group="data"
    )
    label_column: str | None = setting(
        None,
        "name of the label column (default: found); of multi-label data also several 0/1 columns, "
        "separated by commas",
        group="data",
    )
    problem_type: str = setting(
        SINGLE_LABEL,
        "what a label is: one class a text, any number of classes, or a number to be fitted",
        group="data",
        choices=PROBLEM_TYPES,
    )
    train_samples: int | None = setting(
        None, "texts to train on (for a classifier, a tenth more for validation)", group="data"
    )
    test_samples: int | None = setting(None, "test reviews to use (default: all)", group="data")
    subset_order: str = setting(
        "shuffled",
        "shuffled: stratified, drawn from the seed; file: the first rows as they lie",
        group="data",
        choices=("shuffled", "file"),
    )
    allow_single_class: bool = setting(
        False, "accept a split in which only one label occurs", group="data"
    )
    truncation: str = setting(
        "head",
        "what to keep of a training text longer than max-len",
        group="data",
        choices=("head", "tail", "head+tail"),
    )
    long_texts: str = setting(
        "cut",
        "how a text longer than max-len is measured and predicted: cut as in training, or all of "
        "it in windows whose logits are averaged",
        group="data",
        choices=("cut", "windows"),
    )

    split_seed: int | None = setting(
        None,
        "seed of subsets and validation split alone: runs that share it can be pooled by "
        "`fasttx ensemble` (default: seed)",
        group="data",
    )
    pseudo_labels: str | None = setting(
        None,
        "folder that `fasttx ensemble --pseudo-labels` wrote: train on the dataset's unlabelled "
        "texts too, with the probabilities found there",
        group="data",
    )

    epochs: int = setting(5, "passes over the training split", group="optimisation")
    batch_size: int = setting(32, "reviews a step, over all processes", group="optimisation")
    grad_accumulation: int = setting(
        1, "batches whose gradients are added up before a step", group="optimisation"
    )
    optimizer: str = setting(
        "adam", "optimiser", group="optimisation", choices=("adam", "adamw", "sgd")
    )
    lr: float = setting(1e-4, "peak learning rate", group="optimisation")
    beta2: float = setting(0.999, "second-moment decay of Adam", group="optimisation")
    weight_decay: float = setting(
        0.0, "weight decay, on matrices only (not with adam: use adamw)", group="optimisation"
    )
    schedule: str = setting(
        "constant",
        "learning rate after the warm-up: constant, or cosine down to zero",
        group="optimisation",
        choices=("constant", "cosine"),
    )
    warmup_steps: int = setting(0, "steps of linear warm-up", group="optimisation")
    grad_clip: float = setting(0.0, "largest gradient norm (0: no clipping)", group="optimisation")
    label_smoothing: float = setting(0.0, "label smoothing", group="optimisation")
    word_dropout: float = setting(
        0.0, "share of training words replaced by <UNK>", group="optimisation"
    )

    init_from: str | None = setting(
        None,
        "whose tokenizer and encoder weights to start from: a run, or a pretrained encoder (a "
        "folder of Hugging Face's, or a name on its hub)",
        group="run",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="run")
    precision: str = setting(
        "fp32",
        "arithmetic: fp32, tf32 (CUDA), or autocast to bf16 or fp16",
        group="run",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "compile the model with torch.compile", group="run")
    seed: int = setting(0, "seed of everything random", group="run")
    log_every: int = setting(50, "steps between two lines of metrics.jsonl", group="run")
    checkpoint_seconds: float = setting(
        30.0, "seconds between two checkpoints inside an epoch", group="run"
    )

    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        _check_types(self)
        # Above the upper limits lie slips of the keyboard, not settings.
        _check_range(self, 1, 1_000_000, "epochs", "batch_size", "grad_accumulation")
        _check_range(self, 1, 1_000_000_000, "log_every", "train_samples", "test_samples")
        _check_range(self, 0, 1_000_000_000, "warmup_steps")
        _check_range(self, 0.0, 1e9, "grad_clip", "checkpoint_seconds")
        _check_range(self, 0.0, 1e3, "lr", "weight_decay")
        _check_range(self, 0.0, 1.0, "label_smoothing", "word_dropout")
        _check_range(self, 0.0, 1.0, "beta2", below=True)  # torch's own limits
        _check_range(self, 0, 2**63 - 1, "seed", "split_seed")
        self._check_problem()
        if self.optimizer == "adam" and self.weight_decay:
            raise ConfigError(
                f"weight_decay is {self.weight_decay} with optimizer adam, where it would be added "
                "to the gradients and swamp them; use adamw, or weight_decay 0"
            )

    def _check_problem(self) -> None:
        """Raise ConfigError for settings that only classes that exclude one another have."""
        if self.problem_type == SINGLE_LABEL:
            return
        for name, off in (("label_smoothing", 0.0), ("pseudo_labels", None)):
            if (value := getattr(self, name)) != off:
                raise ConfigError(
                    f"{name} is {value!r} with problem_type {self.problem_type}; expected "
                    f"{off!r}: it is for {SINGLE_LABEL}"
                )

    @property
    def seed_of_splits(self) -> int:
        return self.seed if self.split_seed is None else self.split_seed

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ConfigError for a setting that it does not know, and for
        values that are none."""
        values = dict(known_fields(cls, values))
        if "model" in values:
            values["model"] = ModelConfig(**known_fields(ModelConfig, values["model"]))
        return cls(**values)


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """One pretraining run (a masked language model); settings that need labels have no effect."""

    unlabelled: bool = setting(
        True, "learn from the texts without labels too, not only from train's", group="data"
    )
    mask_share: float = setting(
        0.15, "share of the words that are hidden and to be named", group="optimisation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, 0.01, 0.9, "mask_share")


# No dropout: two passes are too few to overfit (Geiping, Goldstein, "Cramming", 2023).
PRETRAIN = PretrainConfig(
    epochs=2,
    batch_size=32,
    optimizer="adamw",
    lr=1e-3,
    beta2=0.98,
    weight_decay=0.01,
    schedule="cosine",
    warmup_steps=500,
    grad_clip=1.0,
    mask_share=0.2,
    checkpoint_seconds=60.0,
    model=ModelConfig(dropout=0.0),
)

_FULL = TrainConfig(
    epochs=3,
    batch_size=64,
    optimizer="adamw",
    lr=6e-4,
    beta2=0.98,
    weight_decay=0.1,
    schedule="cosine",
    warmup_steps=200,
    grad_clip=1.0,
    label_smoothing=0.1,
    word_dropout=0.15,
    truncation="head+tail",
    long_texts="windows",
    model=ModelConfig(dropout=0.2, attention_dropout=0.0),
)

RECIPES: dict[str, TrainConfig] = {
    # The system this library began as, on an honest (shuffled, stratified) subset.
    "seed": TrainConfig(train_samples=5000, test_samples=1000),
    # All of IMDB.
    "full": _FULL,
    # The same from an encoder that `fasttx pretrain` has trained (--init-from).
    "finetune": dataclasses.replace(
        _FULL, lr=3e-4, epochs=4, model=dataclasses.replace(_FULL.model, dropout=0.1)
    ),
    # From a pretrained encoder of the BERT family (--init-from).
    "finetune-bert": TrainConfig(
        epochs=3,
        batch_size=32,
        optimizer="adamw",
        lr=3e-5,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=100,
        grad_clip=1.0,
        truncation="head+tail",
        model=ModelConfig(dropout=0.1),
    ),
    # The built-in corpus: minutes on two cores.
    "demo": TrainConfig(
        dataset="demo",
        epochs=6,
        optimizer="adamw",
        lr=6e-4,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=100,
        grad_clip=1.0,
        model=ModelConfig(
            vocab_size=1000,
            d_model=128,
            num_heads=4,
            num_layers=2,
            d_ff=256,
            max_len=64,
            dropout=0.0,
        ),
    ),
}
