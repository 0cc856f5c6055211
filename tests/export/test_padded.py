"""The padded module that is exported: the function of the model, and of transformers' own."""

from __future__ import annotations

import pytest
import torch

from fasttx import TransformerClassifier
from fasttx.export.padded import PaddedClassifier
from fasttx.models.pretrained import read_folder

CONFIGS = {
    "fasttx": {},
    "gelu": {"activation": "gelu", "pooling": "cls"},
    "post-norm": {
        "norm_first": False, "positions": "learned", "embedding_norm": True, "pooling": "cls",
        "head_activation": "tanh", "pad_id": 1, "norm_eps": 1e-3,
    },
    "projected": {
        "norm_first": False, "positions": "learned", "embedding_norm": True, "embedding_size": 10,
        "head_activation": "relu",
    },
    "sinusoidal": {"norm_first": False, "embedding_norm": True, "embedding_size": 10},
}  # fmt: skip
LENGTHS = (9, 1, 0, 4)


def batch(columns: int, shift: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of LENGTHS that begin in the columns `shift`; padding holds any ids."""
    ids = torch.randint(2, 50, (len(LENGTHS), columns))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        first = shift[row] if shift else 0
        mask[row, first : first + length] = 1
    return ids, mask


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_it_is_the_function_of_the_model(config):
    sizes = {"vocab_size": 50, "num_classes": 3, "d_model": 16, "num_heads": 2, "num_layers": 2}
    model = TransformerClassifier(
        **sizes, d_ff=24, max_len=9, attn_backend="reference", **config
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide a mistake
            parameter.add_(0.2 * torch.randn_like(parameter))
    padded = PaddedClassifier(model)
    for columns, shift in ((9, None), (11, [2, 10, 0, 3])):
        ids, mask = batch(columns, shift)
        torch.testing.assert_close(padded(ids, mask), model(ids, mask), atol=2e-6, rtol=1e-5)
    ids, mask = batch(9)
    mask[0, 4] = 0  # padding in the middle, as the model takes it
    torch.testing.assert_close(padded(ids, mask), model(ids, mask), atol=2e-6, rtol=1e-5)


def test_a_text_that_is_too_long_is_refused():
    model = TransformerClassifier(20, 2, 8, 1, 1, 8, 4, attn_backend="reference")
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(IndexError):
        PaddedClassifier(model)(ids, ids)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
@torch.no_grad()
def test_it_is_the_function_of_transformers(tmp_path, kind):
    folders = pytest.importorskip("tests.pretrained_folders")
    theirs = folders.write(tmp_path, kind)
    found = read_folder(tmp_path)
    model = TransformerClassifier.from_config(found.config)
    state = {k: v for k, v in found.state().items() if not k.startswith("masked.")}
    model.load_state_dict(state)
    ids, mask = batch(9)
    ids, mask = ids[[0, 1, 3]], mask[[0, 1, 3]]
    # RoBERTa counts positions by the padding id, not by the mask.
    ids = torch.where(mask == 1, ids, found.config.pad_id)
    wanted = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(PaddedClassifier(model)(ids, mask), wanted, atol=1e-5, rtol=1e-5)
