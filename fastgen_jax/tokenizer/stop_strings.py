"""Stop strings, found in text that arrives in pieces."""


class StopString:
    """A stop string, prepared for its matchers; never changes.

    Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977.
    INVARIANT: borders[i] is the length of the longest proper prefix of `text` that ends
    text[: i + 1].
    """

    def __init__(self, text: str):
        self.text = text
        self.borders = [0] * len(text)
        for i in range(1, len(text)):
            self.borders[i] = self.extend(self.borders[i - 1], text[i])

    def extend(self, n_matched: int, character: str) -> int:
        """Length of the longest prefix that ends the text, after one more character."""
        while n_matched and self.text[n_matched] != character:
            n_matched = self.borders[n_matched - 1]
        return n_matched + (self.text[n_matched] == character)


class StopMatcher:
    """Finds a stop string in text that arrives in pieces, at constant cost per character.

    INVARIANT: n_matched is the length of the longest proper prefix of `stop` that ends the text.
    """

    __slots__ = ("n_matched", "stop")

    def __init__(self, stop: StopString):
        self.stop = stop
        self.n_matched = 0

    def feed(self, text: str, *, may_stop: bool) -> int | None:
        """How many characters of `text` complete the first match; None: no match that counts."""
        stop, n_matched = self.stop, self.n_matched
        if not n_matched and stop.text[0] not in text:
            return None
        for n_read, character in enumerate(text, 1):
            n_matched = stop.extend(n_matched, character)
            if n_matched == len(stop.text):
                if may_stop:
                    return n_read
                n_matched = stop.borders[-1]
        self.n_matched = n_matched
        return None
