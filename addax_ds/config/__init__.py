"""Arguments, the DeepSpeed JSON, and what is refused."""
