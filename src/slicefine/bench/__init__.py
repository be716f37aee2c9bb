"""What methods cost, side by side: step time, memory, files and moves (`slicefine bench`)."""

__all__: list[str] = []
