"""Many training runs as one recipe: a grid of settings, tuned on validation, resumed when interrupted."""
