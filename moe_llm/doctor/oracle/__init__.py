"""A second opinion that shares no code with what it judges: what a run should have done, from the literature.

Each file is one subject and short enough to be checked by reading. They may import torch, transformers and numpy, and
read the values of a configuration; of the package's own code they may use nothing else (a test of the imports says so).

transformer     transformers' own model: losses and gradients of a step
family          which of transformers' models that is: Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE
router_losses   choices and weights of routers, balance, z-loss and losses of their own, from the papers' formulas
optimizer       torch's AdamW or SGD with parameters grouped by their names, and the clipping of gradients
schedule        the learning rate of each step
low_rank        adapters and their gradients
average         the exponential average of the weights
checkpoint      what a checkpoint's files say
chat            what of a conversation is learned
text            blocks of text: targets, document borders, padding, from the raw text and the tokenizer alone
order           the order of the blocks, judged by its properties
"""
