"""Documents of packed rows, one by one, so that no mask between them is needed."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe_llm.data.packing import Batch


def documents_of(batch: "Batch") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The isolated documents of packed rows, or the rows where they are not isolated: (ids, labels, real), each
    padded on the right to (B, S), and the row that each came from."""
    pieces, rows = [], []
    for row in range(len(batch.input_ids_BS)):
        real_S = batch.attention_mask_BS[row]
        owners_BS = batch.document_ids_BS
        owner_S = torch.zeros_like(batch.labels_BS[row]) if owners_BS is None else owners_BS[row]
        for document in owner_S[real_S].unique():
            mine_S = real_S & (owner_S == document)
            pieces.append((batch.input_ids_BS[row][mine_S], batch.labels_BS[row][mine_S]))
            rows.append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BS = pad([ids for ids, _ in pieces], batch_first=True)
    labels_BS = pad([labels for _, labels in pieces], batch_first=True, padding_value=-100)
    mask_BS = pad([torch.ones_like(ids, dtype=torch.bool) for ids, _ in pieces], batch_first=True)
    return ids_BS, labels_BS, mask_BS, torch.tensor(rows)
