"""Talk to a model in the terminal: a line in, an answer out, as it comes.

Rows that are chats go on from what was said before; a text template makes every line a question of its own, because
that is what the model was trained on.

Ctrl-C stops an answer and keeps what was said so far: the person has read it, and what comes next may refer to it.
Nothing is left out of a conversation that has become too long: a model that has forgotten its first turns without
a word is worse than one that says so.
"""

from collections.abc import Callable, Mapping

from edgetune.contract import Contract, Conversation, Turn
from edgetune.errors import EdgetuneError, TerminatedError
from edgetune.generation import Answer, Sampling
from edgetune.infer import Asker, rows_from_texts
from edgetune.row import Row
from edgetune.stream import OnText

_HELP = """\
/reset   forget the conversation so far
/quit    leave (so does the end of input: Ctrl-D)
/help    show this list
Ctrl-C stops an answer."""


def check(contract: Contract, given: Mapping[str, str]) -> None:
    """Raise EdgetuneError when a line does not make a question together with the columns that are ``given``."""
    contract.question("", given)


class Chat:
    """A conversation with a model; ``write`` gets the answers, ``tell`` everything else, a line at a time."""

    def __init__(
        self, asker: Asker, sampling: Sampling, given: Mapping[str, str], *, write: OnText, tell: OnText
    ) -> None:
        self.asker, self.sampling, self.given = asker, sampling, given
        self.write, self.tell = write, tell
        self.contract = asker.encoder.contract
        self.remembers = isinstance(self.contract, Conversation)
        self.said: list[Turn] = []

    def run(self, read: Callable[[], str]) -> None:
        """Answer lines until ``read`` raises EOFError, /quit is said, or Ctrl-C is pressed twice."""
        self._greet()
        leaving = False
        while True:
            try:
                line = read()
                leaving = False
                if line.strip() == "/quit":
                    return
                self._take(line)
            except EOFError:
                return
            except TerminatedError:
                raise
            except KeyboardInterrupt:
                self.tell("")
                if leaving:
                    return
                leaving = True
                self.tell("(/quit, Ctrl-D or Ctrl-C again to leave)")

    def _greet(self) -> None:
        self.tell("/help lists the commands, /quit leaves")
        if not self.remembers:
            self.tell("every line is a question of its own, as in training: nothing said before is remembered")

    def _take(self, line: str) -> None:
        text = line.strip()
        if text == "/help":
            self.tell(_HELP)
        elif text == "/reset":
            self.said.clear()
            self.tell("forgotten" if self.remembers else "there is nothing to forget: every line stands alone")
        elif line.startswith("/"):
            self.tell(f"there is no command {text.split()[0]}; /help lists them; a text begins with a space instead")
        elif text:
            self._ask(text)

    def _ask(self, text: str) -> None:
        try:
            prompt = self._prompt(text)
        except EdgetuneError as error:
            for problem in error.problems:
                self.tell(f"error: {problem.message}\nhint: {problem.hint}")
            return
        said = self._answered(prompt)
        if said and self.remembers:  # a question without an answer would leave two user turns in a row
            self.said.append((text, said))

    def _prompt(self, text: str) -> list[int]:
        (row,) = rows_from_texts(self.contract, [text], self.given)
        if self.said:
            row = Row(self.contract.question(text, self.given, self.said), row.place)
        return self.asker.prompt(row, hint="/reset forgets the conversation" if self.said else "")

    def _answered(self, prompt: list[int]) -> str:
        """Return what the model says, up to where Ctrl-C stops it."""
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        try:
            ((_, answer),) = self.asker.backend.answers([prompt], self.sampling, on_text)
        except TerminatedError:
            raise
        except KeyboardInterrupt:
            self.write("\n")
            self.tell("(stopped)")
            return "".join(pieces).strip()
        self.write("\n")
        if answer.stop_reason == "length":
            self.tell(self._cut(answer))
        return answer.text

    def _cut(self, answer: Answer) -> str:
        if answer.answer_tokens == self.sampling.max_new_tokens:
            return f"(cut after {answer.answer_tokens} tokens: --max-new-tokens)"
        hint = "; /reset makes room" if self.said else ""
        return f"(cut: the model takes {self.asker.backend.max_length} tokens in all{hint})"
