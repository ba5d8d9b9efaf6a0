"""The families of decoders, one a file; `checkpoint/architectures.py` has the table of them."""
