"""Errors of use: each message names the value, what was expected and the remedy.

The command line prints them as one line and exits with status 2; anything else is a defect and shows its traceback.
"""


class UsageError(ValueError):
    """Base of every error that the caller can mend."""


class ShapeError(UsageError):
    """Sizes that do not fit together: image, patch, channels, width and heads, ranks, limits."""


class SerializationError(UsageError):
    """An order of prediction that cannot be drawn, or that the decoder cannot follow."""


class ModelError(UsageError):
    """An unknown model, tag or option, or options that exclude each other."""


class CheckpointError(UsageError):
    """Weights that cannot be read or that belong to another architecture."""


class ConfigError(UsageError):
    """An unknown recipe key, a value of the wrong type, or an output folder that cannot be used."""


class DataError(UsageError):
    """Images that are missing, unreadable or not laid out as a data set."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, in one line of at most so many characters."""
    return ' '.join(str(error).split())[:most]


def suggest(name: str, known: list[str]) -> str:
    """A sentence naming the entries of `known` nearest to `name`, or all of them where they are few."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f'Did you mean {" or ".join(repr(n) for n in near)}?'
    return f'Known: {", ".join(sorted(known))}.' if len(known) <= 40 else ''
