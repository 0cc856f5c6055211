"""The model card of a run: README.md with the metadata that Hugging Face's hub reads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from fasttx.tasks import read_config
from fasttx.training.checkpoint import read_json
from fasttx.training.folder import RunFolder
from fasttx.version import __version__

_TEXT = """\
# {name}

An encoder-only Transformer that tells {labels} apart, trained with fasttx {version}.

```python
import fasttx.hf
from transformers import pipeline

classify = pipeline("text-classification", {name!r}, truncation=True)
classify("I expected nothing and loved it.")
```

It needs fasttx (`pip install 'fasttx[hf]'`), which registers the architecture with transformers.

## Measured

{measured}

## Trained

| setting | value |
|---|---|
{settings}
"""


def card_of(run: Path, name: str) -> str:
    """Raises CheckpointError for a folder that is no run."""
    folder = RunFolder(run)
    config = read_config(folder.config, "classification")
    results = read_json(folder.results) if folder.results.exists() else {}
    labels, train = config.label_names, config.train
    dataset = str(config.dataset.get("name", "a dataset"))
    measured, metrics = "The run was not finished, so nothing was measured.", []
    if "test_accuracy" in results:
        texts = config.dataset["test_samples"]
        measured = (
            f"Accuracy on {texts:,} test texts of {dataset}: {results['test_accuracy']:.2%}; macro "
            f"F1 {results['test']['macro_f1']:.2%}. The epoch was chosen on a validation split "
            f"({results['val_accuracy']:.2%}). One run, seed {train.seed}."
        )
        metrics = [
            EvalResult(
                task_type="text-classification", dataset_type=dataset, dataset_name=dataset,
                dataset_split="test", metric_type=kind, metric_value=round(float(value), 4),
            )
            for kind, value in (
                ("accuracy", results["test_accuracy"]), ("f1", results["test"]["macro_f1"])
            )
        ]  # fmt: skip
    values = {
        "parameters": f"{results['parameters']:,}" if results else "",
        "texts": f"{config.dataset['train_samples']:,} of {dataset}",
        "epochs": train.epochs, "batch": train.batch_size, "optimiser": train.optimizer,
        "learning rate": f"{train.lr:g} ({train.schedule})", "precision": train.precision,
        "longest text": f"{train.model.max_len} tokens ({train.truncation})",
    }  # fmt: skip
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-classification", tags=["fasttx"],
        model_name=name, eval_results=metrics or None,
    )  # fmt: skip
    body = _TEXT.format(
        name=name, labels=", ".join(labels), version=__version__, measured=measured,
        settings="\n".join(f"| {k} | {v} |" for k, v in values.items() if v != ""),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
