"""Sentence embeddings: the mean of an encoder's last hidden states, of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from judges.errors import UserError
from workers.models.resolve import resolve_encoder

_BATCH = 32


class SentenceEncoder:
    """Embeds texts as sentence-transformers does for models that pool by the mean.

    ``model`` is a directory, a known encoder or a hub id. It computes in float32 on the CPU.

    Raises:
        UserError: ``model`` is none of the three, or was not fetched.
    """

    def __init__(self, model: str) -> None:
        location = resolve_encoder(model)
        logging.disable_progress_bar()
        try:
            self._model = AutoModel.from_pretrained(location, dtype=torch.float32).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(location)
        except OSError as error:
            raise UserError(
                f"objective.embedding_model={model}: cannot be loaded "
                f"({str(error).strip().splitlines()[0]}): check the name and the network, or run "
                "`freshpairs fetch minilm-l6-v2` and name that"
            ) from error
        positions = getattr(self._model.config, "max_position_embeddings", None)
        limit = self._tokenizer.model_max_length  # astronomical where the tokenizer has none
        self._max_tokens = min(limit, positions or limit)

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings [N, D] in the order of ``texts``, each cut at the model's maximum length."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return np.empty((0, self._model.config.hidden_size), np.float32)
        tokens = [torch.tensor(ids, dtype=torch.long) for ids in self._token_ids(unique)]
        by_length = sorted(range(len(unique)), key=lambda i: len(tokens[i]))
        embedding: dict[str, npt.NDArray[np.float32]] = {}
        for start in range(0, len(unique), _BATCH):
            batch = by_length[start : start + _BATCH]
            rows = self._embed([tokens[i] for i in batch]).numpy()
            embedding.update(zip((unique[i] for i in batch), rows, strict=True))
        return np.stack([embedding[text] for text in texts])

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    @torch.no_grad()
    def _embed(self, tokens: list[Tensor]) -> Tensor:
        """[B, D], padding on the right: positions are counted from the left."""
        pad = self._tokenizer.pad_token_id or 0
        ids_BT = pad_sequence(tokens, batch_first=True, padding_value=pad)
        lengths_B1 = torch.tensor([[len(ids)] for ids in tokens])
        keep_mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B1).long()
        states_BTD = self._model(input_ids=ids_BT, attention_mask=keep_mask_BT).last_hidden_state
        sums_BD = (states_BTD * keep_mask_BT[..., None]).sum(1)
        return normalize(sums_BD, dim=-1)  # of the same direction as the mean
