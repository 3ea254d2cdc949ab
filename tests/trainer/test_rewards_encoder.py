from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from lwz_trainer.errors import UserError
from lwz_trainer.rewards.encoder import SentenceEncoder
from tests.trainer.tiny import make_tiny_tokenizer

TEXTS = ["The sea was calm.", "大海很平静。", "A letter. " * 40, "", "Once there was a writer."]


def tiny_bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, pad_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    out_dir = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(tiny_bert_config()).save_pretrained(out_dir)
    make_tiny_tokenizer().save_pretrained(out_dir)
    return str(out_dir)


def test_sentence_encoder_is_the_mean_of_the_hidden_states(encoder_dir: str) -> None:
    model = BertModel.from_pretrained(encoder_dir).eval()
    embeddings_ND = SentenceEncoder(encoder_dir)(TEXTS)
    assert embeddings_ND.shape == (5, 32)
    for text, embedding_D in zip(TEXTS, embeddings_ND, strict=True):
        ids = make_tiny_tokenizer()(text, return_tensors="pt")["input_ids"].long()[:, :64]
        if ids.shape[1]:
            with torch.no_grad():
                expected_D = model(ids).last_hidden_state[0].mean(dim=0).numpy()
            np.testing.assert_allclose(embedding_D, expected_D, atol=1e-5)
        else:
            assert np.isfinite(embedding_D).all()


def test_sentence_encoder_does_not_depend_on_the_batch(encoder_dir: str) -> None:
    encoder = SentenceEncoder(encoder_dir)
    texts = [
        f"The sea was calm {'and wide ' * (number % 7)}on day {number}." for number in range(70)
    ]
    together_ND = encoder(texts)
    alone_ND = np.concatenate([encoder([text]) for text in texts])
    np.testing.assert_allclose(together_ND, alone_ND, atol=1e-5)


def test_sentence_encoder_does_not_need_a_pooler(tmp_path: Path) -> None:
    BertForMaskedLM(tiny_bert_config()).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    assert np.isfinite(SentenceEncoder(str(tmp_path))(TEXTS)).all()


def test_sentence_encoder_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards.format.encoder: cannot load"):
        SentenceEncoder(str(tmp_path))
