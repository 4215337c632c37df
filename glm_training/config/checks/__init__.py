"""What is valid key by key and does not go together."""
