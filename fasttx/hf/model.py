"""A run of fasttx as a model of transformers: AutoConfig, AutoModelForSequenceClassification and
AutoTokenizer know it once fasttx.hf is imported; save_pretrained, push_to_hub, pipeline and Trainer
work on it.

    model, tokenizer = fasttx.hf.from_run("runs/full")
    fasttx.hf.save_run("runs/full", "folder")            # with a model card
    fasttx.hf.push_run("runs/full", "me/imdb-fasttx")    # the same, to the hub
    pipeline("text-classification", "folder", truncation=True)

B texts, L tokens, T rows of a packed batch.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fasttx.config import ModelConfig
from fasttx.errors import CheckpointError, ConfigError, first_line
from fasttx.files import atomic_folder, write_text_atomic
from fasttx.hf.card import card_of
from fasttx.load import load
from fasttx.models.classifier import TransformerClassifier
from fasttx.text.corpora import hub_unreachable
from fasttx.text.packing import RaggedIds, pack
from fasttx.text.tokenizer import PAD, UNK, Tokenizer
from fasttx.version import __version__


class FasttxConfig(PreTrainedConfig):
    """`model`: the settings of `fasttx.ModelConfig`, but for the number of classes and the backend.

    truncation: what of a text longer than max_len the model was trained on.
    """

    model_type = "fasttx"

    def __init__(
        self, model: Mapping[str, Any] | None = None, truncation: str = "head", **kwargs: Any
    ) -> None:
        self.model = dict(model or {})
        self.truncation = truncation
        settings = ModelConfig(**self.model)
        self.vocab_size, self.hidden_size = settings.vocab_size, settings.d_model
        self.max_position_embeddings = settings.max_len
        kwargs.setdefault("pad_token_id", settings.pad_id)
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)

    def settings(self) -> ModelConfig:
        return ModelConfig(**{**self.model, "num_classes": self.num_labels})


class FasttxForSequenceClassification(PreTrainedModel):
    """`fasttx.TransformerClassifier` behind transformers' interface; `classifier` is the model."""

    config_class = FasttxConfig
    base_model_prefix = "classifier"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is the mean over the texts of a batch

    def __init__(self, config: FasttxConfig) -> None:
        super().__init__(config)
        self.classifier = TransformerClassifier.from_config(config.settings())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of what a checkpoint lacks, such as the last layer for other classes."""
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TransformerClassifier):
            # transformers leaves tables that are no weights without values: moving fills them.
            module.to(module.embedding.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Padded (B, L) with attention_mask; or packed (1, T), as `PackingCollator` makes it, with
        cu_seq_lens_q (B + 1,). labels (B,), or (B, num_labels) of several labels a text."""
        if cu_seq_lens_q is None:
            if input_ids.dim() == 2 and input_ids.shape[1] > self.classifier.config.max_len:
                raise ConfigError(
                    f"input_ids has {input_ids.shape[1]} tokens a text, and the model reads "
                    f"{self.classifier.config.max_len}; expected no more. Pass truncation=True to "
                    "the tokenizer or the pipeline"
                )
            logits = self.classifier(input_ids, attention_mask)
        else:
            logits = self.classifier(
                input_ids.flatten(),
                cu_seqlens=cu_seq_lens_q,
                position_ids=None if position_ids is None else position_ids.flatten(),
                max_seqlen=max_length_q,
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class PackingCollator:
    """Features with `input_ids` and `labels` (or `label`) as one packed batch for `Trainer`.

    Texts are cut to max_len. Labels may be ints, floats or lists of floats. Use it as
    `Trainer(..., data_collator=PackingCollator(model.config))`.
    """

    def __init__(self, config: FasttxConfig) -> None:
        self._longest, self._truncation = config.settings().max_len, config.truncation

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = RaggedIds.from_lists([feature["input_ids"] for feature in features])
        batch = pack(ids.truncate(self._longest, self._truncation))
        found: dict[str, Any] = {}
        name = "labels" if "labels" in features[0] else "label"
        if name in features[0]:
            # First: transformers counts the texts of a batch by the first tensor that it finds.
            found["labels"] = torch.tensor(np.array([feature[name] for feature in features]))
            if found["labels"].is_floating_point():
                found["labels"] = found["labels"].float()
        return found | {
            "input_ids": batch.input_ids[None],
            "position_ids": batch.position_ids[None],
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
        }


def from_run(
    run: str | Path,
) -> tuple[FasttxForSequenceClassification, PreTrainedTokenizerFast]:
    """The best model of a run folder and its tokenizer; the same bits. Raises as `fasttx.load`."""
    found = load(run, device="cpu")
    settings = dataclasses.asdict(found.model.config)
    del settings["num_classes"]
    settings["attn_backend"] = "auto"  # this machine's choice need not be the next one's
    names = list(found.label_names)
    config = FasttxConfig(
        settings, found.truncation, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=found.problem_type,
    )  # fmt: skip
    config.architectures = ["FasttxForSequenceClassification"]
    model = FasttxForSequenceClassification(config).eval()
    model.classifier.load_state_dict(found.model.state_dict())
    return model, _tokenizer(found.tokenizer, found.model.config.max_len, found.truncation)


def _tokenizer(ours: Any, max_len: int, truncation: str) -> PreTrainedTokenizerFast:
    """Reads every text as ours does, "<PAD>" and "[SEP]" that somebody typed too."""
    import json

    import tokenizers

    if truncation == "head+tail":
        # transformers cuts at one end only.
        truncation = "head"
    options: dict[str, Any] = {
        "model_max_length": max_len,
        "truncation_side": "left" if truncation == "tail" else "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,
    }
    if isinstance(ours, Tokenizer):
        options |= {"pad_token": PAD, "unk_token": UNK}
    else:
        options |= {"pad_token": ours.pad_token, "unk_token": ours.unk_token}
    content = tokenizers.Tokenizer.from_str(json.dumps(ours.to_dict()))
    return PreTrainedTokenizerFast(tokenizer_object=content, **options)


def save_run(run: str | Path, folder: str | Path, *, name: str | None = None) -> Path:
    """A run as a folder of Hugging Face's: config.json, model.safetensors, the tokenizer, and a
    model card with what the run measured. name: of the model, in the card (default: the folder's).
    Raises CheckpointError where the folder holds something; then, and where writing fails, the
    folder stays as it was.
    """
    out = Path(folder).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} holds something; expected a new or an empty folder")
    model, tokenizer = from_run(run)
    card = card_of(Path(run).expanduser(), name or out.name)
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text_atomic(temporary / "README.md", card)
    return out


def push_run(
    run: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None,
    revision: str | None = None, create_pr: bool = False,
) -> str:  # fmt: skip
    """What `save_run` writes, as one commit to a repository of Hugging Face's hub, which is made
    where it is not there; the commit's address. The settings are those of `huggingface_hub`, and
    so is the token, unless one is given (`hf auth login`). Raises CheckpointError where the hub
    refuses or cannot be reached.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as place:
        folder = save_run(run, Path(place) / "model", name=repo_id.rpartition("/")[2])
        try:
            if unreachable := hub_unreachable():
                raise ConnectionError(unreachable)
            hub = huggingface_hub.HfApi(
                huggingface_hub.constants.ENDPOINT, token=token,
                library_name="fasttx", library_version=__version__,
            )  # fmt: skip
            repository = hub.create_repo(repo_id, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, revision=revision,
                create_pr=create_pr, commit_message=f"A model of fasttx {__version__}",
            )  # fmt: skip
        except Exception as error:  # the hub and the network raise many kinds
            raise CheckpointError(
                f"{repo_id} could not be written to Hugging Face's hub: {first_line(error)}. Check "
                "the name (OWNER/NAME) and your token (hf auth login), or keep a folder: "
                "fasttx.hf.save_run"
            ) from error
    return str(commit.pr_url or commit.commit_url)


def register() -> None:
    """A second call changes nothing."""
    AutoConfig.register(FasttxConfig.model_type, FasttxConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        FasttxConfig, FasttxForSequenceClassification, exist_ok=True
    )
