"""A GPU step, rehearsed without a GPU: wrong devices, waits of the host, exchanges that ranks would not agree about, slips of
dtype, and memory by part, from tensors that have shapes and no values (torch's FakeTensorMode and fake process group)."""

from moe_llm.distributed.rehearsal.step import Rehearsal, disagreements, rehearse

__all__ = ["Rehearsal", "disagreements", "rehearse"]
