"""How long a newcomer takes to the first answer, as the documentation leads there."""
