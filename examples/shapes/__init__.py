"""A small captioned video world with two trained diffusion transformers."""
