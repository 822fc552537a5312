"""The text of an answer while its token ids come."""

from collections.abc import Callable
from typing import Any

OnText = Callable[[str], None]
"""Gets the pieces of an answer as they come."""


class Stream:
    """Gives the text of an answer as its ids come: in the end, just what :class:`Answer` holds.

    A text that ends in the middle of a character, or with white space, waits for what follows.
    """

    def __init__(self, text_of: Callable[[list[int]], str], on_text: OnText) -> None:
        self._text_of, self._on_text = text_of, on_text
        self._ids: list[int] = []
        self._given = ""

    def put(self, token: int) -> None:
        """Take the next id."""
        self._ids.append(token)
        text = self._text_of(self._ids)
        if not text.endswith("\ufffd"):
            self._give(text)

    def finish(self) -> None:
        """Give what still waits."""
        self._give(self._text_of(self._ids))

    def _give(self, text: str) -> None:
        if text != self._given and text.startswith(self._given):
            piece, self._given = text[len(self._given) :], text
            self._on_text(piece)


class TransformersStreamer:
    """What ``generate`` of transformers calls with the prompt first, then with each new id."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._is_prompt = stream, True

    def put(self, ids: Any) -> None:
        """Pass the newest id on."""
        if not self._is_prompt:
            self._stream.put(int(ids.reshape(-1)[-1]))
        self._is_prompt = False

    def end(self) -> None:
        """There is nothing to do: the backend finishes the stream."""
