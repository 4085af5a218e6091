"""Registration with other engines."""
