"""Several causal LMs of transformers answer together; their weights stay apart.

causal_lm    a checkpoint as transformers loads it, and how it is sampled from
recipe       what an ensemble's file may say: pydantic models, from YAML
models       the members' checkpoints, each loaded once, and what a token costs
vocabulary   a member's tokens as those of the main model
rules        from the members' next-token distributions to one: linear, log-linear, cascade
following    a member beside generate(), with a KV cache of its own that follows the beams
ensemble     members and rule together, and the LogitsProcessor of both
scores       the members' distributions on text, without generating
fit          weights and thresholds from text: convex, one pass over the members
evaluate     loss, perplexity and bits per byte of an ensemble beside its members'
requests     methods on whole answers: cascade, stacking, self-refinement
commands     arguments of the command line
run          `moe-llm generate --ensemble`, `evaluate --ensemble` and `ensemble fit`
"""
