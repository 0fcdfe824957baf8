"""Byte-level BPE tokenizers, kept as a `tokenizer.json` of the `tokenizers` library."""

import json
import os
from collections.abc import Iterable
from hashlib import blake2b

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's pre-tokenization) with `END_OF_TEXT` as id 0: any text survives a round trip.

    The vocabulary is smaller than asked for where the texts run out of pairs to merge. ValueError below the 256
    bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer at `path`, as text is encoded for training: whole documents, no padding, and a special token's
    name inside a document read as plain text. ValueError naming the file if it is none."""
    text = _read(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_document(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id of the token that ends a document: `name`, or the first known one the vocabulary has."""
    for candidate in (name,) if name else _KNOWN_ENDS:
        if (identity := tokenizer.token_to_id(candidate)) is not None:
            return identity
    wanted = repr(name) if name else f"none of {', '.join(_KNOWN_ENDS)}"
    raise ValueError(f"the tokenizer has no token to end a document with: {wanted}; name one of its tokens")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Identifies a `tokenizer.json` by its content, however it is laid out in the file."""
    return text_fingerprint(_read(path), path)


def text_fingerprint(text: str, where: str | os.PathLike[str] = "tokenizer.json") -> str:
    """The same of the file's text. ValueError naming `where` if that is not JSON."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not a tokenizer.json ({error})") from None
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
