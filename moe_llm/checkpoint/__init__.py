"""What a training run leaves on disk, and how it comes back.

safetensors_io  tensors to and from disk, one at a time
weights         a directory's tensors under the model's names, checked
pretrained      MoEForCausalLM: from_pretrained, save_pretrained
export          config.json, generation_config.json and the tokenizer beside the weights
folder          the directories of a run's checkpoints: names, order, pruning
manifest        sizes and hashes of a checkpoint's files
ranks           how all ranks learn what happened on one
plan            which rank writes which tensor to which file
background      one piece of work at a time, in a thread beside training
state           save and load training checkpoints, at any layout of ranks
resume          which checkpoint a run goes on from, and whether it is the same run
"""
