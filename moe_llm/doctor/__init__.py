"""`moe-llm doctor`: a small copy of a run, in its own layout and in one process, compared step by step.

shrink     the user's configuration in small: sizes go down, features stay
sample     a little of the user's own text, and a tokenizer for it
ranks      the processes
observe    one run with everything written down that comparisons need
oracle     what should have come out, from the literature: shares no code with what it judges
judge      the package beside the oracle
compare    observations -> findings
causes     what a pattern of failures usually means
examine    all of it in order
report     the table
"""
