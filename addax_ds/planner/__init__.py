"""What a step needs in memory, before anybody pays for a GPU; no weights and no hub are needed."""
