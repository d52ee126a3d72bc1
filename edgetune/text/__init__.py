"""Words that people write and read: sizes, suggestions, TOML, signs of life. No idea of models."""
