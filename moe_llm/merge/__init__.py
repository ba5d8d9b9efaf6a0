"""Several models into one, on state dicts alone, from a recipe in mergekit's vocabulary.

recipe       what a recipe may say: pydantic models, from YAML
parameters   weight, density, ...: filters by tensor name, values interpolated over depth
models       a checkpoint directory's tensors under the names of transformers 5, in spans of elements
rows         the same with the rows and columns of some tensors rearranged
vocabulary   embeddings of different tokenizers, brought to one
methods/     one method, one file; the registry
plan         from a recipe to one job for each tensor of the output, everything checked
align        which expert of one model is which of the other, layer by layer
activations  layer inputs on a text, where experts are matched by what they do
mixture      dense models to a mixture of experts, and its gates
checkpoints  the last checkpoints of a run as a recipe
write        the output directory: streamed, atomic
run          `moe-llm merge`

No tensor is ever read whole: all methods work on spans of `job.SPAN` elements, so that memory depends neither on
the models' size nor, but for a few MiB each, on their number.
"""
