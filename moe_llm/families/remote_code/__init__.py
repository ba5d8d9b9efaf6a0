"""Files that are copied beside the weights of a model that transformers has no architecture for. They import nothing of
the package, and of it only `ensemble.causal_lm` imports them."""
