"""A second opinion that shares no code with what it judges: what a run should have done, from the literature.

Each file is one subject and short enough to be checked by reading. They may import torch, transformers and numpy, and
read the values of a configuration; of the package's own code they may use nothing else (a test of the imports says so).

transformer     transformers' own model: losses and gradients of a step
family          which of transformers' models that is, and its tensors by our names
documents       documents of packed rows, one by one
choices         which experts a token has, and with which weights, from the papers' formulas
blocks          sparse layers that no model of transformers has: slots, merged weights, parts of tokens
router_losses   balance, z-loss and the routers' own losses
token_losses    losses of routers that learn from the tokens' losses: REINFORCE and EM
buffers         what routers move without a gradient after a step
optimizer       torch's AdamW or SGD with parameters grouped by their names, and the clipping of gradients
schedule        the learning rate of each step
low_rank        adapters and their gradients
average         the exponential average of the weights
checkpoint      what a checkpoint's files say
chat            what of a conversation is learned
text            blocks of text: targets, document borders, padding, from the raw text and the tokenizer alone
order           the order of the blocks, judged by its properties
"""
