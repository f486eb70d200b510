"""Two rewards of your own, as an example.

    accelerate launch grpo.py --rewards accuracy format docs/own_rewards.py:brevity

A reward is a function of the completion's text and the row. The row holds `question`, `options`,
`answer`, `task`, `images` and every other column of your data. It returns a number.
"""


def brevity(completion: str, row: dict) -> float:
    """-0.02 per word."""
    return -0.02 * len(completion.split())


def no_repetition(completion: str, row: dict) -> float:
    """Minus the share of three-word sequences that occurred before: from 0 down to almost -1."""
    words = completion.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) - 1 if triples else 0.0
