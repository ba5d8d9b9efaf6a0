"""Files that are copied beside the weights of a model that transformers has no architecture for. Nothing of the package
imports them, and they import nothing of it."""
