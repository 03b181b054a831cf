"""What a person at a terminal uses: the commands, and how answers are shown."""
