"""Adapters as files: read, export, compose and undo them without running a model."""
