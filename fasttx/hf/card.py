"""The model card of a run: README.md with the metadata that Hugging Face's hub reads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from fasttx.tasks import read_config
from fasttx.training.checkpoint import read_json
from fasttx.training.folder import RunFolder
from fasttx.training.problems import PROBLEMS
from fasttx.version import __version__

_TEXT = """\
# {name}

An encoder-only Transformer that {does}, trained with fasttx {version}.

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
    problem = PROBLEMS[train.problem_type]
    measure, named = problem.measure, problem.card_metrics
    if f"test_{measure.chosen}" in results:
        texts, test = config.dataset["test_samples"], results["test"]
        shown = {title: test[key] for title, key, _ in named if test[key] is not None}
        said = ", ".join(f"{title} {measure.shown(x)}" for title, x in shown.items())
        measured = (
            f"On {texts:,} test texts of {dataset}: {said}. The epoch was chosen on a validation "
            f"split ({measure.chosen_title} {measure.shown(results[f'val_{measure.chosen}'])}). "
            f"One run, seed {train.seed}."
        )
        metrics = [
            EvalResult(
                task_type="text-classification", dataset_type=dataset, dataset_name=dataset,
                dataset_split="test", metric_type=kind, metric_name=title,
                metric_value=round(float(test[key]), 4),
            )
            for title, key, kind in named if test[key] is not None
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
        name=name, does=problem.purpose.format(labels=", ".join(labels)), version=__version__,
        measured=measured,
        settings="\n".join(f"| {k} | {v} |" for k, v in values.items() if v != ""),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
