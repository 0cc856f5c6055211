"""What lies beside an exported model: its tokenizer, its labels, an example, and a README."""

from __future__ import annotations

import json
from typing import Any

from fasttx.export.check import misread
from fasttx.export.formats import Format
from fasttx.load import TextClassifier
from fasttx.text.pieces import PieceTokenizer
from fasttx.text.tokenizer import PAD
from fasttx.version import __version__


def tokenizer_json(classifier: TextClassifier) -> str:
    """A tokenizer.json that cuts and pads, whose ids are those of the run."""
    import tokenizers

    ours, config = classifier.tokenizer, classifier.model.config
    content = ours.to_dict()
    # Else a "[SEP]" that somebody typed would be one. What stands around a text is in the
    # post_processor, with its ids.
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["special"]]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    pad_token = ours.pad_token if isinstance(ours, PieceTokenizer) else PAD
    theirs.enable_padding(pad_id=config.pad_id, pad_token=pad_token)
    side = "left" if classifier.truncation == "tail" else "right"
    theirs.enable_truncation(config.max_len, direction=side)
    return str(theirs.to_str(pretty=True))


def long_texts(classifier: TextClassifier) -> list[str]:
    """What a tokenizer.json cannot say of long texts, so that the folder reads them otherwise."""
    longest, found = classifier.model.config.max_len, []
    if classifier.truncation == "head+tail":
        found.append(
            f"of a text of more than {longest} tokens the run reads the beginning and the end, and "
            "tokenizer.json keeps the beginning"
        )
    if classifier.long_texts == "windows":
        found.append(
            f"a text of more than {longest} tokens is read in windows by the run, and cut here"
        )
    return found


def notes(classifier: TextClassifier, tokenizer: str) -> list[str]:
    """What the folder of this tokenizer.json reads otherwise than the run."""
    found, ours = long_texts(classifier), classifier.tokenizer
    typed = [f"a {ours.id_to_token(i)} b" for i in ours.special.reserved]
    if misread(tokenizer, classifier, typed):
        found.append(
            f"a token such as {ours.id_to_token(ours.special.reserved[0])} that somebody typed is "
            "read as one by tokenizer.json, and as an unknown word by the run"
        )
    return found


def config_json(classifier: TextClassifier) -> dict[str, Any]:
    """Labels and sizes by the names that Hugging Face's config.json has for them."""
    names, config = classifier.label_names, classifier.model.config
    return {
        "model_type": "fasttx",
        "problem_type": classifier.problem_type,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_len,
        "pad_token_id": config.pad_id,
    }


# --- the example ----------------------------------------------------------------------------------

_EXAMPLE = '''\
"""What the model says of texts: python example.py "a wonderful film" ..."""
import json, pathlib, sys
import numpy as np, tokenizers, {package}
here, texts = pathlib.Path(__file__).resolve().parent, sys.argv[1:] or ["a wonderful film"]
labels = json.loads((here / "config.json").read_text(encoding="utf-8"))["id2label"].values()
encoded = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json")).encode_batch(texts)
for e in encoded:
    e.pad(1)  # a text without a word takes a column too
ids, mask = np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded])
{model}
{logits}
{answer}
for text, row in zip(texts, p):
    print(text, dict(zip(labels, row.astype(float).round(4).tolist())))
'''
_TORCH = "x = model(torch.tensor(ids), torch.tensor(mask)).numpy(force=True)"
_MODELS = {
    "onnx": (
        "onnxruntime",
        'session = onnxruntime.InferenceSession(here / "model.onnx")',
        'x = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]',
    ),
    "torch-export": (
        "torch",
        'model = torch.export.load(here / "model.pt2").module()',
        _TORCH,
    ),
    "aoti": (
        "torch",
        'model = torch._inductor.aoti_load_package(str(here / "model.pt2"))',
        _TORCH,
    ),
}
_ANSWERS = {
    "single_label_classification": (
        "p = np.exp(x - x.max(1, keepdims=True))\np /= p.sum(1, keepdims=True)"
    ),
    "multi_label_classification": "p = 1 / (1 + np.exp(-x))",
    "regression": "p = x",
}


def example_py(form: str, problem: str) -> str:
    """A program of 15 lines that does without fasttx and, for ONNX, without torch."""
    package, model, logits = _MODELS[form]
    answer = _ANSWERS[problem]
    return _EXAMPLE.format(package=package, model=model, logits=logits, answer=answer)


# --- the README -----------------------------------------------------------------------------------

_README = """\
# {name}

A text classifier, exported by fasttx {version}: {about}

    python example.py "a wonderful film" "I want my money back"

| | |
|---|---|
| input `input_ids` | int64 (batch, length), by `tokenizer.json`; at most {longest} tokens a text |
| input `attention_mask` | int64 (batch, length), 1 for a token and 0 for padding, on either side |
| output `logits` | float32 (batch, {classes}): {labels} |
| `config.json` | the names of the labels, as Hugging Face writes them |
| `export.json` | what was measured when this was written |

{measured}
"""


def readme(
    name: str, form: Format, classifier: TextClassifier, measured: list[str], said: list[str]
) -> str:
    """measured: sentences on the check. said: on what this folder does otherwise than the run."""
    names = ", ".join(classifier.label_names[:20])
    more = ", ..." if len(classifier.label_names) > 20 else ""
    lines = [*measured, *(f"Otherwise than the run: {note}." for note in said)]
    return _README.format(
        name=name, version=__version__, about=form.about, measured="\n\n".join(lines),
        longest=classifier.model.config.max_len, classes=len(classifier.label_names),
        labels=names + more,
    )  # fmt: skip
