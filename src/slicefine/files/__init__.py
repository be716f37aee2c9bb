"""Adapters as files: read, write, export and compose them without running a model."""
