"""A text cut at its tokens."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; together they are the text.

    A character whose bytes lie in several tokens belongs to the last of them, and the others have "".
    """
    stream = DecodeStream(skip_special_tokens=False)
    found = [stream.step(tokenizer, token) or "" for token in tokens]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    found[-1] += text[sum(map(len, found)) :]  # bytes that no later token completed
    return found
