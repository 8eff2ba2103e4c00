"""The tokenizer that llama.cpp writes into a GGUF file of UMT5."""

from __future__ import annotations

from gguf import GGUFWriter
from jobs import SPIECE
from sentencepiece import SentencePieceProcessor


def fields(message: bytes) -> list[tuple[int, bytes]]:
    """The length-delimited fields of a protocol buffer; others are skipped."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            found.append((key >> 3, message[at : at + length]))
            at += length
        elif key & 7 == 5:
            at += 4
        else:
            varint()
    return found


def as_llama_cpp_does(writer: GGUFWriter) -> None:
    """What convert_hf_to_gguf writes of a T5 tokenizer; padding entries at the end as it adds them."""
    model = SentencePieceProcessor(model_file=str(SPIECE))
    count = model.vocab_size()
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(count)
    ]
    normalizer = dict(fields(SPIECE.read_bytes()))[3]
    writer.add_tokenizer_model("t5")
    writer.add_token_list([*(model.id_to_piece(i) for i in range(count)), "[PAD374]", "[PAD375]"])
    writer.add_token_scores([*(model.get_score(i) for i in range(count)), -10000.0, -10000.0])
    writer.add_token_types([*types, 5, 5])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(dict(fields(normalizer))[2])
