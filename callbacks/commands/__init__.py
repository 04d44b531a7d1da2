"""Commands that measure or draw reports; one module each."""
