"""The decoders that checkpoints can be of: configuration keys and tensor names of each, both ways.

family         what a family of decoders is
architectures  the table of the families, and which of them a model is
hf             in memory <-> Mixtral's published names, and config.json
card           the model card that a checkpoint of any family has
layout         families whose experts are one tensor on disk
mxfp4          matrices in four bits, as GPT-OSS is published
mixtral, ...   one family a file
remote_code    modelling code for the checkpoints that are of no family
"""
