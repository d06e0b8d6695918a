"""A stranger's text, fit to be printed: names of tensors, classes and folds, paths in lists.

    print(f"{path}: it has the tensor {printable(name)}")

A terminal obeys what it is sent: an escape sequence clears the screen, a line break forges a second
"error:" line. And a name of 5 MB buries the sentence that it stands in.
"""

NEEDED_BY_SCRIPTS = "\u00a0\u3000\u200c\u200d"  # spaces and joiners: not "printable", but harmless


def printable(text, longest=100):
    """-> `text` in one line of about `longest` characters: its middle left out where it is longer,
    and what is no character to look at written as its code, \\x1b."""
    text = str(text)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}...{text[-half:]}"
    characters = []
    for character in text:
        if not is_plain(character):
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def is_plain(character):
    """Is it printed as itself, without any other effect on what is around it?"""
    return character.isprintable() or character in NEEDED_BY_SCRIPTS


def is_plain_text(text, longest):
    """Can `text` be printed as it is, and is it at most `longest` characters long?"""
    return len(text) <= longest and all(is_plain(character) for character in text)
